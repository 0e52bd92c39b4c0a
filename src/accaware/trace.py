"""One run over a sample: which layers read the same tensor, and what else in the network accumulates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from accaware.inputs import call, operand
from accaware.layers import QuantIdentity, QuantLayer

__all__ = ["ADDS", "PRODUCTS", "Other", "Trace", "batchnorm_after", "evaluating", "trace"]

#: Torch functions that accumulate, by name without underscores at its ends (`add_`, `__radd__`). Sums of products:
PRODUCTS = {"linear", "bilinear", "conv1d", "conv2d", "conv3d", "convolution", "conv_tbc", "einsum", "tensordot"}
PRODUCTS |= {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention"}
PRODUCTS |= {"matmul", "rmatmul", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "dot", "vdot", "inner"}
PRODUCTS |= {"linalg_matmul", "linalg_multi_dot", "linalg_vecdot", "linalg_matrix_power", "linalg_cross", "sparse_mm"}
PRODUCTS |= {"chain_matmul", "matrix_power", "cross", "cov", "corrcoef", "cosine_similarity", "cdist", "pdist"}
PRODUCTS |= {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
PRODUCTS |= {"multi_head_attention_forward", "native_multi_head_attention"}
#: Sums of values, in numbers that are not told.
_UNTOLD = {"layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm", "normalize"}
_UNTOLD |= {"norm", "linalg_norm", "linalg_vector_norm", "linalg_matrix_norm", "dist", "pairwise_distance"}
_UNTOLD |= {"softmax", "log_softmax", "softmin", "gumbel_softmax", "logsumexp", "logcumsumexp", "var", "std"}
_UNTOLD |= {"var_mean", "std_mean", "trace", "trapezoid", "trapz", "fold", "grid_sample", "embedding_bag"}
_UNTOLD |= {"index_add", "index_reduce", "scatter_add", "scatter_reduce", "segment_reduce"}
_UNTOLD |= {f"{kind}_pool{dims}d" for kind in ("avg", "lp") for dims in (1, 2, 3)} | {"stft", "istft"}
_UNTOLD |= {f"fft_{kind}{dims}" for kind in ("fft", "ifft", "rfft", "irfft") for dims in ("", 2, "n")}
_ADAPTIVE = {"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"}
_SUMS = {"mean", "sum", "nanmean", "nansum"}
#: Sums of two values.
ADDS = {"add", "iadd", "radd", "sub", "isub", "rsub", "addcmul", "addcdiv", "addr", "lerp"}
#: Not those that derive from them: they may do more.
_BATCHNORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}


@dataclass(frozen=True)
class Other:
    """An accumulating operation that is not a quantized layer. `terms`: how many values one output sums, if known.

    `source`: the layer or stream whose quantized tensor it reads, if it reads one. `signed`: of a product of two
    activations, whether each of them took negative values.
    """

    name: str
    kind: str
    terms: int | None
    source: str | None
    signed: tuple[bool, bool] | None = None


@dataclass
class Trace:
    """`sources`: layer -> a name for the tensor it reads, the same for layers that read the same one."""

    sources: dict[str, str] = field(default_factory=dict)
    others: list[Other] = field(default_factory=list)


class _Watch(TorchFunctionMode):
    """Sees every torch function; those of a target module are its own business, not an `Other`."""

    def __init__(self, targets: Mapping[str, nn.Module], result: Trace) -> None:
        super().__init__()
        self.targets, self.result = targets, result
        self.path: list[str] = []
        self.inside = 0
        self.origin: dict[int, str] = {}  # id of a tensor -> name
        self.streams: dict[int, str] = {}  # id of the output of a QuantIdentity -> its name
        self.alive: list[Tensor] = []  # ids must not be used again
        self.calls: dict[str, int] = {}
        self.names: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.inside:
            self.inside += 1  # what reading the sizes of tensors calls is not the model's
            kind = getattr(func, "__name__", "").strip("_")
            named = {key: value for key, value in (kwargs or {}).items() if key != "out"}
            inputs = [leaf for leaf in tree_leaves((args, named)) if isinstance(leaf, Tensor)]
            source = next((self.streams[id(x)] for x in inputs if id(x) in self.streams), None)
            if products := list(_of_activations(kind, args)):
                for kind, count, signed in products:
                    self.result.others.append(Other(self._name(kind), kind, count, source, signed))
            elif (terms := _terms(kind, inputs, (*args[1:], *named.values()), out)) is not False:
                self.result.others.append(Other(self._name(kind), kind, terms, source))
            self.inside -= 1
        return out

    def _name(self, kind: str) -> str:
        """The module that runs the operation and its kind, numbered from the second on: pool.mean, add, add_2."""
        name = ".".join(filter(None, [self.path[-1] if self.path else "", kind]))
        self.names[name] = self.names.get(name, 0) + 1
        return name if self.names[name] == 1 else f"{name}_{self.names[name]}"

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.path.append(name)
        if name in self.targets:
            x = operand(name, args)
            self.inside += 1
            self.alive.append(x)
            self.calls[name] = self.calls.get(name, 0) + 1
            source = self.streams.get(id(x)) or self.origin.setdefault(id(x), name)
            # A layer that runs twice reads several tensors: its quantizer is its own.
            self.result.sources[name] = source if self.calls[name] == 1 else name

    def leave(self, name: str, module: nn.Module, out: Any) -> None:
        self.path.pop()
        if name in self.targets:
            self.inside -= 1
            if isinstance(module, QuantIdentity):
                self.alive.append(out)
                self.streams[id(out)] = self.result.sources[name]


def _terms(kind: str, inputs: list[Tensor], options: tuple[Any, ...], out: Any) -> int | bool | None:
    """The most values that one output adds up; None where that is not known, False where the function adds nothing."""
    if kind in PRODUCTS or kind in _UNTOLD:
        return None
    if kind == "interpolate":  # its only string is the mode, "nearest" where there is none
        return None if any(isinstance(o, str) and not o.startswith("nearest") for o in options) else False
    if not (isinstance(out, Tensor) and inputs):
        return False
    x = inputs[0]
    if kind in ADDS:
        return 2 if len(inputs) > 1 and out.is_floating_point() and out.dim() > 1 else False
    if kind in _ADAPTIVE:
        sizes = list(zip(x.shape, out.shape, strict=True))[-int(kind[-2]) :]
        return prod(map(_widest, *zip(*sizes, strict=True)))
    if kind == "cumsum":
        return next((x.shape[dim] for dim in options if isinstance(dim, int)), None) if x.dim() else 1
    return x.numel() // max(1, out.numel()) if kind in _SUMS else False


def _widest(size: int, bins: int) -> int:
    """The most of `size` values that adaptive pooling averages for one of `bins` outputs."""
    return max((-(-(i + 1) * size // bins) - i * size // bins for i in range(bins)), default=0)


def _of_activations(kind: str, args: tuple[Any, ...]) -> Iterator[tuple[str, int, tuple[bool, bool]]]:
    """The products of two activations in one operation: kind, how many one output sums, whether each has a sign."""
    if kind not in ("scaled_dot_product_attention", "matmul", "linalg_matmul", "bmm", "mm"):
        return
    signs = [bool((a < 0).any()) for a in args[:3] if isinstance(a, Tensor) and not a.is_complex()]
    if kind == "scaled_dot_product_attention" and len(signs) == 3:
        query, key, _ = args[:3]
        yield "query_key", query.shape[-1], (signs[0], signs[1])
        yield "attention_value", key.shape[-2], (False, signs[2])
    elif len(signs) == 2 and not any(isinstance(a, nn.Parameter) for a in args):
        yield kind, args[0].shape[-1], (signs[0], signs[1])


def trace(model: nn.Module, targets: Mapping[str, nn.Module], sample: Any) -> Trace:
    """Run `model` once over `sample` without gradients, in evaluation mode, and report what reads what."""
    result = Trace()
    watch = _Watch(targets, result)
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, args, n=name: watch.enter(n, m, args)))
        hooks.append(module.register_forward_hook(lambda m, args, out, n=name: watch.leave(n, m, out)))
    try:
        with evaluating(model), torch.no_grad(), watch:
            call(model, sample)
    finally:
        for hook in hooks:
            hook.remove()
    return result


@dataclass
class _Output:
    """What one run of a layer gave: how many functions read it, and the batch-norm that does."""

    layer: str
    readers: int = 0
    norm: str = ""


class _Readers(TorchFunctionMode):
    """Counts the functions that read the values of a tensor: all but those that say its type or its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: MutableMapping[Tensor, _Output] = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, (int, torch.Size, torch.dtype, torch.device)):
            self.read((args, kwargs))
        return out

    def read(self, values: Any) -> None:
        """Count the tensors in nested lists, tuples and dictionaries, each once."""
        for value in {id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}.values():
            if (output := self.outputs.get(value)) is not None:
                output.readers += 1


def batchnorm_after(model: nn.Module, layers: Mapping[str, QuantLayer], sample: Any) -> dict[str, str]:
    """layer -> the batch-norm of its channels that alone reads its output and reads nothing else, in one run.

    What is computed past torch's own functions (`torch.autograd.Function`, compiled code) is not seen.
    """
    norms = {n: m for n, m in model.named_modules() if type(m) in _BATCHNORMS and m.running_mean is not None}
    if not norms or not layers:
        return {}
    readers = _Readers()
    found: list[_Output] = []
    runs: Counter[str] = Counter()

    def leave(name: str, out: Tensor) -> None:
        runs[name] += 1
        found.append(_Output(name))
        readers.outputs[out] = found[-1]

    def enter(name: str, args: tuple[Any, ...]) -> None:
        runs[name] += 1
        output = readers.outputs.get(args[0]) if args else None
        # Channels are the second dimension for batch-norm, the last one for a linear layer.
        if output is not None and args[0].dim() == layers[output.layer].weight.dim():
            output.norm = name

    hooks = [m.register_forward_hook(lambda m, args, out, n=name: leave(n, out)) for name, m in layers.items()]
    hooks += [m.register_forward_pre_hook(lambda m, args, n=name: enter(n, args)) for name, m in norms.items()]
    try:
        with evaluating(model), torch.no_grad(), readers:
            readers.read(call(model, sample))
    finally:
        for hook in hooks:
            hook.remove()
    pairs = Counter((output.layer, output.norm) for output in found if output.norm and output.readers == 1)
    return {layer: norm for (layer, norm), count in pairs.items() if runs[layer] == runs[norm] == count}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
