"""What one training step costs, by quantizer, in turn in one process; for ResNet20 Brevitas' A2Q+ beside ours.

    python benchmarks/training_step.py [--rounds 15] [--batch-size 128] [--device cpu]
    python benchmarks/training_step.py --model resnet50 --image-size 224 --classes 1000 --batch-size 16 --rounds 3

A step is forward, cross-entropy (and penalty), backward and SGD, on random images; 4-bit weights and activations, first
and last layer at 8 bits. `baseline` is the same step without a budget. The model of Brevitas has the same layers, each
quantizing its own input; it has no quantizer on the residual stream itself. Memory is what a step has at most beyond
what was there before it: activations, gradients, temporaries.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from timing import alternate, memory_of, report
from torch import Tensor, nn

import accaware as aa
from accaware.experiments.models import BUILT_IN, ENLARGE, build

SPECS = {
    "baseline": aa.Spec(4, 4, 32, method="baseline"),
    "projected, P = 12": aa.Spec(4, 4, 12),
    "projected, P = 10": aa.Spec(4, 4, 10),
    "projected, free preload, P = 10": aa.Spec(4, 4, 10, preload="free"),
    "a2q+, P = 12": aa.Spec(4, 4, 12, method="a2q+"),
    "a2q, P = 12": aa.Spec(4, 4, 12, method="a2q"),
}


def step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    penalty: Callable[[nn.Module], Tensor] | None,
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Callable[[], float]:
    """A function that makes one step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)
    model.train()

    def run() -> float:
        optimizer.zero_grad()
        loss = loss_of(model(images), labels)
        if penalty is not None:
            loss = loss + penalty(model)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return run


def ours(network: nn.Module, spec: aa.Spec, images: Tensor) -> nn.Module:
    """Prepared and calibrated in place."""
    aa.prepare_(network, spec, sample=images[:2], keep=dict(network.keep))
    aa.calibrate(network, [images])
    return network


def brevitas(network: nn.Module, images: Tensor) -> nn.Module:
    """The same network with Brevitas' layers, A2Q+ at P = 12."""
    from brevitas import nn as qnn
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import (
        Int8AccumulatorAwareZeroCenterWeightQuant,
        Int8ActPerTensorFloat,
        Int8WeightPerTensorFloat,
        Uint8ActPerTensorFloat,
    )

    for name, layer in list(network.named_modules()):
        kept = name in network.keep
        common = {"bias": layer.bias is not None} if isinstance(layer, nn.Conv2d | nn.Linear) else {}
        if kept:
            common |= {"weight_quant": Int8WeightPerTensorFloat, "input_quant": Int8ActPerTensorFloat}
        else:
            common |= {"weight_quant": Int8AccumulatorAwareZeroCenterWeightQuant, "weight_bit_width": 4}
            common |= {"weight_accumulator_bit_width": 12, "input_quant": Uint8ActPerTensorFloat, "input_bit_width": 4}
            common |= {"input_scaling_impl_type": ScalingImplType.PARAMETER_FROM_STATS}
        if isinstance(layer, nn.Conv2d):
            new = qnn.QuantConv2d(
                layer.in_channels, layer.out_channels, 3, stride=layer.stride, padding=layer.padding, **common
            )
        elif isinstance(layer, nn.Linear):
            new = qnn.QuantLinear(layer.in_features, layer.out_features, **common)
        else:
            continue
        with torch.no_grad():
            new.weight.copy_(layer.weight)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, new)
    return network


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted({*BUILT_IN} - ENLARGE), default="resnet20")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=options.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(options.classes, (options.batch_size,), device=options.device)

    def network() -> nn.Module:
        torch.manual_seed(0)
        return build(options.model, options.classes).to(options.device, memory_format=torch.channels_last)

    steps = {"float": step(network(), images, labels, None)}
    for name, spec in SPECS.items():
        steps[name] = step(ours(network(), spec, images), images, labels, aa.penalty)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if options.model == "resnet20":
                steps["Brevitas a2q+, P = 12"] = step(brevitas(network(), images), images, labels, None)
        except ModuleNotFoundError as error:
            print(f"without Brevitas: {error.name} is not installed")
        seconds = alternate(steps, options.rounds)
    size = f"{options.image_size} x {options.image_size}"
    report(f"One training step of {options.model}, batch {options.batch_size}, {size}", seconds, ["float", "baseline"])
    for name, run in steps.items():
        Console().print(f"{name}: {memory_of(run, options.device) / 2**20:.0f} MB", highlight=False)


if __name__ == "__main__":
    main()
