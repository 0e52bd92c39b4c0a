"""MobileNetV1, the ResNets of ImageNet and the super-resolution networks: shapes, names, and what stays outside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import accaware as aa
from accaware.experiments.models import BUILT_IN, build
from accaware.layers import QuantIdentity
from accaware.prepare import quant_layers

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet18-cifar": (2, 2, 2, 2)}
#: He et al., and torchvision's table.
MILLIONS = {"resnet18": 11.69, "resnet34": 21.80, "resnet50": 25.56, "resnet18-cifar": 11.17}


def test_mobilenet_is_that_of_the_paper() -> None:
    """Table 1 of Howard et al., for 10 classes: 28 layers; 3.2 M parameters (4.2 M with a classifier of 1000)."""
    model = build("mobilenetv1", 10)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 28
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 3.2
    depthwise = [m for m in layers if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [m.in_channels for m in depthwise] == [32, 64, 128, 128, 256, 256, *[512] * 6, 1024]
    assert all(m.groups == m.in_channels == m.out_channels for m in depthwise)
    shapes: list[tuple[int, ...]] = []
    model.linear.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    model.blocks[-1].register_forward_hook(lambda _, args, out: shapes.append(tuple(out.shape)))
    model(torch.zeros(2, 3, 32, 32))
    assert shapes == [(2, 1024, 2, 2), (2, 1024)]


def test_the_width_multiplies_all_channels() -> None:
    model = build("mobilenetv1", 10, width=0.25)
    assert [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)][:3] == [8, 8, 16]
    assert model.linear.in_features == 256
    with pytest.raises(ValueError, match=r"width 0\.5 is for mobilenetv1, not for resnet20"):
        build("resnet20", 10, width=0.5)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet18-cifar"])
def test_state_dicts_are_torchvisions(name: str) -> None:
    model = build(name, 1000 if "cifar" not in name else 10)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == MILLIONS[name]
    assert set(model.state_dict()) == set(torchvision_keys(name))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_outputs_are_those_of_the_reference(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, 5).eval()
    state = {key: torch.randn_like(v) * 0.05 if v.is_floating_point() else v for key, v in model.state_dict().items()}
    state = {key: 1 + v.abs() if key.endswith(("running_var", "bn1.weight")) else v for key, v in state.items()}
    model.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = reference(name, state, x)
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def torchvision_keys(name: str) -> list[str]:
    """The names in a state dict of torchvision's network."""
    bottleneck = name == "resnet50"
    keys = ["conv1.weight", *norm("bn1"), "fc.weight", "fc.bias"]
    for stage, blocks in enumerate(BLOCKS[name], 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}."
            for index in range(1, 4 if bottleneck else 3):
                keys += [f"{at}conv{index}.weight", *norm(f"{at}bn{index}")]
            if block == 0 and (stage > 1 or bottleneck):
                keys += [f"{at}downsample.0.weight", *norm(f"{at}downsample.1")]
    return keys


def norm(name: str) -> list[str]:
    return [f"{name}.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def reference(name: str, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """He et al.'s network for ImageNet, straight from a state dict; the 3x3 convolution of a bottleneck strides."""

    def conv_bn(x: Tensor, conv: str, bn: str, stride: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        statistics = (state[f"{bn}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *statistics)

    x = F.max_pool2d(F.relu(conv_bn(x, "conv1", "bn1", 2)), 3, 2, 1)
    for stage, blocks in enumerate(BLOCKS[name], 1):
        for block in range(blocks):
            at, stride = f"layer{stage}.{block}.", 2 if stage > 1 and block == 0 else 1
            strides = (1, stride, 1) if name == "resnet50" else (stride, 1)
            y = x
            for index, s in enumerate(strides, 1):
                y = conv_bn(F.relu(y) if index > 1 else y, f"{at}conv{index}", f"{at}bn{index}", s)
            if f"{at}downsample.0.weight" in state:
                x = conv_bn(x, f"{at}downsample.0", f"{at}downsample.1", stride)
            x = F.relu(x + y)
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("name", ["espcn", "unet"])
def test_super_resolution_enlarges_by_three(name: str) -> None:
    model = build(name, None)
    assert model(torch.zeros(2, 3, 11, 14)).shape == (2, 3, 33, 42)
    with pytest.raises(ValueError, match=f"model '{name}' is for super-resolution data"):
        build(name, 10)
    with pytest.raises(ValueError, match="model 'resnet20' is for classification data"):
        build("resnet20", None)


@pytest.mark.parametrize("name", BUILT_IN)
def test_first_and_last_layer_and_streams_have_their_bits(name: str) -> None:
    """Those of the paper; what feeds a residual connection or a skip is quantized."""
    torch.manual_seed(0)
    enlarges, imagenet = name in ("espcn", "unet"), name in ("resnet18", "resnet34", "resnet50")
    model = build(name, None if enlarges else 3, *([0.25] if name == "mobilenetv1" else []))
    side = 32 if not enlarges else 8
    aa.prepare_(model, aa.Spec(4, 4, 12), torch.zeros(1, 3, side, side), keep=model.keep)
    layers = list(quant_layers(model).values())
    outside = [layer for layer in layers if not layer.inside]
    order: list[str] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, _: order.append(m.name))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, side, side))
    assert [layer.name for layer in outside] == [order[0], order[-1]]
    assert all((layer.spec.weight_bits, layer.spec.act_bits, layer.spec.acc_bits) == (8, 8, 32) for layer in outside)
    streams = [m.input_quant for m in model.modules() if isinstance(m, QuantIdentity)]
    assert {quant.bits for quant in streams if quant is not None} == ({8} if imagenet else {4} if streams else set())
    assert None not in streams


def test_the_quantizer_of_a_stream_is_that_of_its_readers() -> None:
    model = build("resnet18-cifar", 10)
    aa.prepare_(model, aa.Spec(4, 4, 12), torch.zeros(1, 3, 32, 32), keep=model.keep)
    layers = quant_layers(model)
    stream = model.layer1[1].out_quant.input_quant
    assert layers["layer2.0.conv1"].input_quant is layers["layer2.0.downsample.0"].input_quant is stream


@pytest.mark.parametrize("depthwise", [None, "a2q+", "projected"])
def test_depthwise_layers_have_a_method_of_their_own(depthwise: str | None) -> None:
    model = build("mobilenetv1", 3, width=0.25)
    spec = aa.Spec(4, 4, 16, method="a2q+", depthwise_method=depthwise)  # type: ignore[arg-type]
    aa.prepare_(model, spec, torch.zeros(1, 3, 32, 32), keep=model.keep)
    aa.calibrate(model, [torch.rand(2, 3, 32, 32)])
    methods = {layer.name.split(".")[-1]: layer.method for layer in aa.integer_layers(model) if layer.inside}
    assert methods == {"depthwise": depthwise or "a2q", "pointwise": "a2q+"}
