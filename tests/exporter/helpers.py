"""Networks to export, and what a file computes before every product."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import torch
from torch import nn

import accaware as aa
from accaware.integer.network import IntegerOp


class Residual(nn.Module):
    """A stream that two layers and an addition read; one batch-norm alone behind its layer, one not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.stream = aa.QuantIdentity()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stream(torch.relu(self.bn1(self.conv1(x))))
        y = self.conv2(x)
        y = torch.relu(self.bn2(y) + 0.1 * y + self.conv3(x) + x)
        return self.linear(y.mean((2, 3)))


class Moved(nn.Module):
    """Largest values, slices and reshapes between the quantizers, and behind those of streams."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.stream = aa.QuantIdentity()
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.conv3 = nn.Conv2d(4, 4, 1)
        self.stream3 = aa.QuantIdentity()
        self.conv4 = nn.Conv2d(4, 4, 1)
        self.stream4 = aa.QuantIdentity()
        self.linear = nn.Linear(4, 5)

    def forward(self, x):
        largest = functools.partial(nn.functional.max_pool2d, kernel_size=2, stride=1)
        x = self.stream(self.conv1(largest(x)))
        x = torch.relu(largest(x[:, :, 1:]) + largest(self.conv2(x)[:, :, 1:]))
        x = self.stream3(self.conv3(largest(x).transpose(2, 3)))
        x = self.stream4(self.conv4(x) + x.flatten(2).unflatten(2, x.shape[2:]))
        return self.linear(x.amax((2, 3)))


def _convolutions(dims):
    conv, norm = (getattr(nn, f"{name}{dims}d") for name in ("Conv", "BatchNorm"))
    return nn.Sequential(conv(3, 4, 3, padding=1), norm(4), nn.ReLU(), conv(4, 2, 2, stride=2, dilation=2))


#: A network and the shape of its input, without the rows.
NETWORKS = {
    "residual": (Residual, (3, 8, 8)),
    "moved": (Moved, (3, 8, 8)),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False)), (5, 6)),
    "conv1d": (lambda: _convolutions(1), (3, 12)),
    "conv3d": (lambda: _convolutions(3), (3, 6, 5, 6)),
    "mobile": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU6(),
            nn.Conv2d(6, 8, 1, groups=2),
        ),
        (3, 8, 8),
    ),
    "edges": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, (2, 3), padding="same"), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        ),
        (3, 6, 6),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 2, (2, 3), stride=(1, 2)),
        ),
        (4, 5, 5),
    ),
}


def prepared(name, rows=8, keep=None, **request):
    """A calibrated model whose batch-norms have seen data, and an input."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model, x = make(), torch.randn(rows, *shape)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 0, 1)  # of either sign
            nn.init.normal_(module.bias, 0, 0.3)
    model.train()
    model(x)
    aa.prepare_(model, aa.Spec(**request), sample=x[:2], keep=keep)
    aa.calibrate(model, [x])
    return model.eval(), x


def operands(network, x):
    """The output of an integer network, and the input codes of every layer by its name."""
    seen = {}

    def note(op, args):
        padded = torch.nn.functional.pad(args[0], op.edges, mode=op.edge_mode) if op.edges else args[0]
        seen[op.layer.name] = op.codes(padded).numpy()

    hooks = [m.register_forward_pre_hook(note) for m in network.modules() if isinstance(m, IntegerOp)]
    with torch.no_grad():
        out = network(x)
    for hook in hooks:
        hook.remove()
    return out.numpy(), seen


def file_operands(path, names, x, run):
    """The same of a file, as `run(model, feeds, wanted)` computes it; names: of the products."""
    model = onnx.load(path)
    reads = {node.name: node.input[0] for node in model.graph.node if node.name in names}
    values = run(model, {"input": x.numpy()}, [*{*reads.values()}, "output"])
    return values["output"], {name: values[tensor].astype(np.float32) for name, tensor in reads.items()}
