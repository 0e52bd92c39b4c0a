"""What a float network may gain before training, beside calibration: equalized channels and corrected biases.

In the order of A2Q+ (arXiv 2401.10432, section 5): `equalize` the float model, `prepare_` it, `calibrate` with
`init="ep"`, then `bias_correct`. Each also stands alone.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from accaware.inputs import call, feeds
from accaware.layers import LAYERS, QuantIdentity, QuantLayer
from accaware.prepare import quant_layers
from accaware.trace import batchnorm_after, evaluating

__all__ = ["bias_correct", "equalize"]

_SWEEPS = 20
#: f(s x) = s f(x) for s > 0, value by value.
_ELEMENTWISE: set[Any] = {nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, QuantIdentity}
_ELEMENTWISE |= {F.relu, torch.relu, F.leaky_relu, F.dropout, "relu", "relu_", "contiguous"}
_MODULES = ("MaxPool{}d", "AvgPool{}d", "AdaptiveAvgPool{}d", "Dropout{}d")
_FUNCTIONS = ("max_pool{}d", "avg_pool{}d", "adaptive_avg_pool{}d")
#: The same, channel by channel, of what a convolution of so many dimensions gives: others would pool over channels too.
_POOLS: dict[int, set[Any]] = {
    dims: {nn.Upsample, F.interpolate}
    | {getattr(nn, name.format(dims)) for name in _MODULES}
    | {getattr(F, name.format(dims)) for name in _FUNCTIONS}
    for dims in (1, 2, 3)
}

Layer = nn.Linear | _ConvNd


@dataclass(frozen=True)
class _Pair:
    """Two layers of which the second alone reads the first one's output, through `norm` and homogeneous functions."""

    first: Layer
    norm: _BatchNorm | None
    second: Layer


@torch.no_grad()
def equalize(model: nn.Module) -> int:
    """Cross-layer equalization (Nagel et al. 2019, arXiv 1906.04721, section 4.1), in place; the function stays.

    Where a layer's output reaches only one other layer, through batch-norm, ReLU, pooling and the like, channel i of
    the first is divided by s_i and the inputs of the second that read it are multiplied by s_i, so that the largest
    weights of both agree: s_i = sqrt(r1_i / r2_i) for ranges r1, r2 (of the weights with batch-norm folded in).
    Where there is a batch-norm its weight and bias are divided, not the layer. Depthwise layers take part too. A
    batch-norm after a linear layer is taken to be over its features, which needs two-dimensional outputs. Left alone is
    what has forward hooks, computed weights (weight_norm, pruning), or parameters that anything else reads or holds.

    model: float, or prepared and not yet calibrated. Returns the number of pairs. Raises `ValueError` where the model
    cannot be traced (`torch.fx`) or is calibrated already.
    """
    if any(layer.input_quant.codes is not None for layer in quant_layers(model).values()):
        raise ValueError("this model is calibrated already; equalize comes first")
    if any(layer.rotation is not None for layer in quant_layers(model).values()):
        raise ValueError("this model is rotated already; equalize comes before prepare_")
    pairs = list(_pairs(model))
    for _ in range(_SWEEPS if pairs else 0):
        largest = max(_equalize(pair) for pair in pairs)
        if largest < 1e-3:
            break
    return len(pairs)


def _equalize(pair: _Pair) -> float:
    """Returns the largest |log s|."""
    first, second = _grouped(pair.first), _grouped(pair.second)
    r1 = first.abs().amax((2, 3)).flatten()
    if pair.norm is not None:
        r1 = r1 * _gain(pair.norm).abs()
    r2 = second.abs().amax((1, 3)).flatten()
    s = torch.where((r1 > 0) & (r2 > 0), (r1 / r2).sqrt(), 1.0)
    if pair.norm is None:
        first.div_(s.view(*first.shape[:2], 1, 1))
        scaled = [pair.first.bias]
    else:
        scaled = [pair.norm.weight, pair.norm.bias]
    for parameter in scaled:
        if parameter is not None:
            parameter.div_(s)
    second.mul_(s.view(second.shape[0], 1, second.shape[2], 1))
    return float(s.log().abs().max())


def _grouped(layer: Layer) -> Tensor:
    """A view of the weight, [groups, outputs of a group, inputs of a group, taps]."""
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    view = weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return view.transpose(1, 2) if getattr(layer, "transposed", False) else view


def _gain(norm: _BatchNorm) -> Tensor:
    """What batch-norm multiplies each channel by in evaluation mode."""
    assert norm.running_var is not None
    gain = (norm.running_var + norm.eps).rsqrt()
    return gain if norm.weight is None else gain * norm.weight


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QuantLayer | QuantIdentity) or super().is_leaf_module(m, module_qualified_name)


def _graph(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(model)
    except Exception as error:  # a model's own code may raise anything on proxies
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{type(model).__name__} cannot be traced by torch.fx ({reason})") from error


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    return type(modules[str(node.target)]) if node.op == "call_module" else node.target


def _pairs(model: nn.Module) -> Iterator[_Pair]:
    modules, graph = dict(model.named_modules(remove_duplicate=False)), _graph(model)
    held = _held(model, graph)
    called = [id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module"]
    for start in graph.nodes:
        first = modules.get(str(start.target)) if start.op == "call_module" else None
        if not isinstance(first, Layer) or called.count(id(first)) > 1 or not _alone(first, held):
            continue
        allowed = _ELEMENTWISE if isinstance(first, nn.Linear) else _ELEMENTWISE | _POOLS[first.weight.dim() - 2]
        norm, node, moved = None, start, False
        while len(node.users) == 1:
            node = next(iter(node.users))
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            if module is not None and called.count(id(module)) > 1 and not _stateless(module):
                break
            if module is not None and not _alone(module, held):
                break
            if isinstance(module, _BatchNorm) and norm is None and not moved and _adjustable(module, first):
                norm = module
            elif isinstance(module, Layer):
                if isinstance(module, nn.Linear) == isinstance(first, nn.Linear):
                    yield _Pair(first, norm, module)
                break
            elif _kind(node, modules) in allowed:
                moved = True
            else:
                break


def _held(model: nn.Module, graph: fx.Graph) -> Counter[int]:
    """How many modules hold, and how many nodes read by itself, the parameter of an id."""
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    held.update(id(attrgetter(str(node.target))(model)) for node in graph.nodes if node.op == "get_attr")
    return held


def _alone(module: nn.Module, held: Counter[int]) -> bool:
    """Whether the module alone holds and reads its parameters, none is computed, and no hook sees what it computes."""
    parameters = module._parameters
    computed = any(name not in parameters and hasattr(module, name) for name in ("weight", "bias"))
    shared = any(p is not None and held[id(p)] > 1 for p in parameters.values())
    return not (computed or shared or module._forward_hooks or module._forward_pre_hooks)


def _stateless(module: nn.Module) -> bool:
    return not any(True for _ in module.parameters())


def _adjustable(norm: _BatchNorm, layer: Layer) -> bool:
    return norm.affine and norm.running_var is not None and norm.num_features == _outputs(layer)


def _outputs(layer: nn.Module) -> int | None:
    return getattr(layer, "out_features", getattr(layer, "out_channels", None))


@torch.no_grad()
def bias_correct(model: nn.Module, reference: nn.Module, batches: Iterable[Any]) -> None:
    """Take the mean error of every output channel out of each layer (Nagel et al. 2019, section 4.2), in place.

    The error is that of the layer alone: its output for the inputs that it has in the float network, less the float
    output, averaged over all images and positions. It goes into the layer's bias, or into the running mean of the
    batch-norm that follows (over the layer's channels: after [batch, tokens, features] it is over tokens); a layer with
    neither is left alone, with a warning. In training mode batch-norm itself does what the latter does.

    model: prepared and calibrated. reference: the float network that it was made from, with the same names of layers.
    batches: as for `calibrate`. Raises `ValueError` for a model that is not calibrated, layers that the reference
    lacks, and without data.
    """
    layers = quant_layers(model)
    floats = dict(reference.named_modules())
    if not layers or any(layer.input_quant.codes is None for layer in layers.values()):
        raise ValueError("bias correction needs a prepared and calibrated model")
    if missing := [name for name in layers if type(floats.get(name)) not in LAYERS]:
        raise ValueError(f"{missing[0]}: the reference has no such float layer")
    errors = {name: _MeanError(layer) for name, layer in layers.items()}
    hooks = [floats[name].register_forward_hook(error, with_kwargs=True) for name, error in errors.items()]
    device = next(model.parameters()).device
    first: Any = None
    try:
        with evaluating(model), evaluating(reference):
            for inputs in feeds(batches, device):
                first = inputs if first is None else first
                call(reference, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not any(error.count for error in errors.values()):
        raise ValueError("bias correction needs at least one batch")
    following = batchnorm_after(model, {name: layer for name, layer in layers.items() if layer.bias is None}, first)
    for name, layer in layers.items():
        mean = errors[name].mean().to(layer.weight.dtype)
        if layer.bias is not None:
            layer.bias.sub_(mean)
        elif name in following:
            cast(Tensor, model.get_submodule(following[name]).running_mean).add_(mean)
        else:
            warnings.warn(f"{name} has neither a bias nor a batch-norm: its mean error stays", stacklevel=2)


class _MeanError:
    """A forward hook of a float layer: how far its quantized form is from it, on average, per output channel."""

    def __init__(self, layer: QuantLayer) -> None:
        self.layer, self.total, self.count = layer, torch.zeros((), dtype=torch.float64), 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        error = (self.layer(*args, **kwargs) - out).double()
        # Channels come last for linear layers; without a batch axis they come first for convolutions.
        channel = -1 if isinstance(module, nn.Linear) else -self.layer.weight.dim() + 1
        error = error.movedim(channel, -1).reshape(-1, out.shape[channel])
        self.total = self.total.to(error.device) + error.sum(0)
        self.count += len(error)

    def mean(self) -> Tensor:
        return self.total / max(1, self.count)
