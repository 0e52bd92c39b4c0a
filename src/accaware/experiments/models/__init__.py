"""The built-in models by name, and any other model by `package.module:factory`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from torch import nn

from accaware.experiments.models.mobilenet import MobileNetV1
from accaware.experiments.models.resnet import resnet18, resnet18_cifar, resnet34, resnet50
from accaware.experiments.models.resnet_cifar import resnet20, resnet32, resnet44, resnet56
from accaware.experiments.models.superresolution import ESPCN, UNet

#: By name; called with the number of classes, but for those in `ENLARGE`. Each class names in `keep` what stays outside
#: the request unless the user says otherwise: first and last layer at 8 bits, accumulated at 32.
BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet18-cifar": resnet18_cifar,
    "mobilenetv1": MobileNetV1,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "espcn": ESPCN,
    "unet": UNet,
}
ENLARGE = {"espcn", "unet"}
#: Those that `width` makes narrower or wider.
SCALABLE = {"mobilenetv1"}


def build(name: str, classes: int | None, width: float = 1.0) -> nn.Module:
    """The model called `name`: a built-in one with `classes` outputs, or whatever `package.module:factory` returns.

    classes: None where the data have none. width: the width multiplier of MobileNetV1. A factory is called without
    arguments; its module may lie in the current folder. Raises `ValueError` where the name is unknown, the model does
    not do what the data need, or the factory cannot be found, fails, or returns no `nn.Module`.
    """
    if width != 1 and name not in SCALABLE:
        raise ValueError(f"width {width} is for {', '.join(SCALABLE)}, not for {name}")
    if name in BUILT_IN:
        enlarges = name in ENLARGE
        if enlarges != (classes is None):
            raise ValueError(f"model {name!r} is for {'super-resolution' if enlarges else 'classification'} data")
        options = {"width": width} if name in SCALABLE else {}
        return BUILT_IN[name](**options) if classes is None else BUILT_IN[name](classes, **options)
    if ":" not in name:
        raise ValueError(f"unknown model {name!r}; built in are {', '.join(BUILT_IN)}, or give package.module:factory")
    return _from_factory(name)


def _from_factory(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        model = factory()
    except Exception as error:  # a user's module may raise anything; the line must still name the model
        raise ValueError(f"model {name!r} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} returned {type(model).__name__}, not a torch.nn.Module")
    return model
