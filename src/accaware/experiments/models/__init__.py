"""The built-in models by name, and any other model by `package.module:factory`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from torch import nn

from accaware.experiments.models.resnet_cifar import resnet20, resnet32, resnet44, resnet56

BUILT_IN: dict[str, Callable[[int], nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
}

#: Layers of the built-in models that stay outside the request: 8 bits, accumulated at 32.
KEEP_FIRST_AND_LAST: dict[str, int | str] = {"conv1": 8, "linear": 8}


def build(name: str, classes: int) -> nn.Module:
    """The model called `name`: a built-in one with `classes` outputs, or whatever `package.module:factory` returns.

    A factory is called without arguments; its module may lie in the current folder. Raises `ValueError` where the
    name is unknown or the factory cannot be found, fails, or returns no `nn.Module`.
    """
    if name in BUILT_IN:
        return BUILT_IN[name](classes)
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
