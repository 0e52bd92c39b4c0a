"""One run over a sample: which layers read the same tensor, and what else in the network accumulates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from accaware.inputs import call
from accaware.layers import QuantIdentity, QuantLayer

__all__ = ["Other", "Trace", "batchnorm_after", "evaluating", "trace"]

_PRODUCTS = {"linear", "conv1d", "conv2d", "conv3d", "matmul", "__matmul__", "bmm", "mm", "einsum", "addmm", "baddbmm"}
_PRODUCTS |= {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention", "bilinear"}
_PRODUCTS |= {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
_PRODUCTS |= {
    "multi_head_attention_forward",
    "_native_multi_head_attention",
    "mv",
    "dot",
    "inner",
    "tensordot",
    "addmv",
    "addbmm",
}
_POOLS = {"avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"}
#: Not those that derive from them: they may do more.
_BATCHNORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}
_SUMS = {"mean", "sum", "cumsum"}
_NORMS = {"layer_norm", "group_norm", "instance_norm", "rms_norm", "softmax"}
_ADDS = {"add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__"}


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
        kind = getattr(func, "__name__", "")
        if not self.inside:
            self.inside += 1  # what reading the sizes of tensors calls is not the model's
            terms = self._terms(kind, args, out)
            source = next((self.streams[id(a)] for a in args if id(a) in self.streams), None)
            kind = kind.strip("_")
            if products := list(_of_activations(kind, args)):
                for kind, count, signed in products:
                    self.result.others.append(Other(self._name(kind), kind, count, source, signed))
            elif terms is not False:
                self.result.others.append(Other(self._name(kind), kind, terms, source))
            self.inside -= 1
        return out

    def _name(self, kind: str) -> str:
        """The module that runs the operation and its kind, numbered from the second on: pool.mean, add, add_2."""
        name = ".".join(filter(None, [self.path[-1] if self.path else "", kind]))
        self.names[name] = self.names.get(name, 0) + 1
        return name if self.names[name] == 1 else f"{name}_{self.names[name]}"

    def _terms(self, kind: str, args: tuple[Any, ...], out: Any) -> int | bool | None:
        if kind in _PRODUCTS or kind in _NORMS:
            return None
        if not (isinstance(out, Tensor) and args and isinstance(args[0], Tensor)):
            return False
        if kind in _POOLS or kind in _SUMS:
            return args[0].numel() // max(1, out.numel()) if "adaptive" in kind or kind in _SUMS else None
        if kind in _ADDS and len(args) > 1 and isinstance(args[1], Tensor) and out.is_floating_point():
            return 2 if out.dim() > 1 else False
        return False

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.path.append(name)
        if name in self.targets:
            self.inside += 1
            x = args[0]
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


def _of_activations(kind: str, args: tuple[Any, ...]) -> Iterator[tuple[str, int, tuple[bool, bool]]]:
    """The products of two activations in one operation: kind, how many one output sums, whether each has a sign."""
    if kind not in ("scaled_dot_product_attention", "matmul", "bmm", "mm"):
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
