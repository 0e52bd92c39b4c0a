"""What a network is trained for and judged by: classification, super-resolution; text is only judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from accaware.experiments.metrics import PSNR, TOP1, Metric


@dataclass(frozen=True)
class Task(Metric):
    """The functions that tell one task from another. `output` is a network's, [B, ...] float; B counts images.

    augment: (pixels, labels, share of the padding,
    side of a crop, generator) -> a training batch. target: labels -> what `loss` and `score` compare an output with.
    check: raises `ValueError` where an output has another shape than the target needs. loss: (output, target) ->
    scalar. distance: (output, the teacher's) -> scalar. score: (output, target) -> [B], whose mean over all images is
    the metric.
    """

    augment: Callable[[Tensor, Tensor, float, int, torch.Generator], tuple[Tensor, Tensor]]
    target: Callable[[Tensor], Tensor]
    check: Callable[[Tensor, Tensor], None]
    loss: Callable[[Tensor, Tensor], Tensor]
    distance: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]


def augment(pixels: Tensor, share: float, random: torch.Generator) -> Tensor:
    """A random crop of each image padded by `share` of its side with black, and a flip with probability 1/2."""
    count, _, height, width = pixels.shape
    pad = int(height * share)
    top, left = torch.randint(2 * pad + 1, (2, count), generator=random).to(pixels.device)
    flip = (torch.rand(count, generator=random) < 0.5).to(pixels.device)
    windows = F.pad(pixels, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # [B, 3, 2p+1, 2p+1, H, W]
    cropped = windows[torch.arange(count, device=pixels.device), :, top, left]
    cropped[flip] = cropped[flip].flip(-1)
    return cropped


def a_place_for_every_label(output: Tensor, labels: Tensor) -> None:
    """Raise `ValueError` unless the output is [B, classes] with more classes than the largest label."""
    if output.dim() != 2 or output.shape[0] != len(labels) or output.shape[1] <= int(labels.max()):
        needed = [len(labels), int(labels.max()) + 1]
        raise ValueError(f"the model's output has shape {list(output.shape)}; {needed} or wider is needed")


def top1(output: Tensor, labels: Tensor) -> Tensor:
    """100 where the largest of the logits [B, classes] is that of the label, else 0."""
    return 100.0 * (output.argmax(1) == labels).double()


def kl_divergence(output: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the teacher's distribution from this one, per image (Hinton et al. 2015, T = 1)."""
    return F.kl_div(output.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


CLASSIFICATION = Task(
    **asdict(TOP1),
    augment=lambda pixels, labels, share, side, random: (augment(pixels, share, random), labels),
    target=lambda labels: labels,
    check=a_place_for_every_label,
    loss=F.cross_entropy,
    distance=kl_divergence,
    score=top1,
)


def paired_crops(low: Tensor, high: Tensor, side: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same random square of both images, `side` pixels wide in the low-resolution one, flipped at random.

    low: uint8 [B, 3, h, w]; high: uint8 [B, 3, s h, s w]. Flips are horizontal and vertical. Raises `ValueError` where
    an image is smaller than the crop.
    """
    count, _, height, width = low.shape
    scale = high.shape[-1] // width
    if side > min(height, width):
        raise ValueError(f"image_size must lie in [1, {min(height, width)}] (the low-resolution images), not {side}")
    tops = torch.randint(height - side + 1, (count,), generator=random).tolist()
    lefts = torch.randint(width - side + 1, (count,), generator=random).tolist()
    flips = (torch.rand(count, 2, generator=random) < 0.5).tolist()
    crops: list[list[Tensor]] = [[], []]
    for i, (top, left, flip) in enumerate(zip(tops, lefts, flips, strict=True)):
        dims = [dim for dim, wanted in zip((1, 2), flip, strict=True) if wanted]
        for images, factor, found in zip((low, high), (1, scale), crops, strict=True):
            rows, columns = (slice(factor * start, factor * (start + side)) for start in (top, left))
            found.append(images[i, :, rows, columns].flip(dims))
    return torch.stack(crops[0]), torch.stack(crops[1])


def the_same_shape(output: Tensor, target: Tensor) -> None:
    """Raise `ValueError` unless both have it."""
    if output.shape != target.shape:
        raise ValueError(f"the model's output has shape {list(output.shape)}; {list(target.shape)} is needed")


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: RGB, values in [0, 1], a border of 3 pixels left out.

    output (clamped to [0, 1]), target: [B, 3, H, W].
    """
    error = (output.clamp(0, 1) - target)[..., 3:-3, 3:-3].double().square().mean((1, 2, 3))
    return -10 * torch.log10(error.clamp(min=1e-10))


SUPER_RESOLUTION = Task(
    **asdict(PSNR),
    augment=lambda low, high, share, side, random: paired_crops(low, high, side, random),
    target=lambda pixels: pixels.float() / 255,
    check=the_same_shape,
    loss=F.mse_loss,
    distance=F.mse_loss,
    score=psnr,
)
