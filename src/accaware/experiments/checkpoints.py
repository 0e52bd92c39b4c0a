"""Float weights from a file: safetensors, or a PyTorch state dict that is read without running any code."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from accaware.experiments.images import first_line


def fingerprint(path: str | Path | None) -> str | None:
    """The SHA-256 of a file, None for none. Raises `ValueError` where it is missing."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name. A state dict may lie under "state_dict", and its names may start with "module.".

    Raises `ValueError` where the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint {path} is damaged or no state dict: {first_line(error)}") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {first_line(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"checkpoint {path} holds no state dict of tensors")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load `path` into `model`; every tensor of either must have its place in the other.

    Raises `ValueError` that names the first tensor that is missing, left over, of another shape, or not finite.
    """
    state, own = read_state(path), model.state_dict()
    learned = dict(model.named_parameters())
    for name, tensor in own.items():
        if name not in state and not name.endswith("num_batches_tracked"):
            raise ValueError(f"checkpoint {path} lacks {name}")
        if name in state and state[name].shape != tensor.shape:
            shapes = f"{tuple(state[name].shape)}, the model needs {tuple(tensor.shape)}"
            raise ValueError(f"checkpoint {path}: {name} has shape {shapes}")
        # A buffer may well be infinite: a mask of attention is.
        if name in state and not (state[name].isfinite() if name in learned else ~state[name].isnan()).all():
            raise ValueError(f"checkpoint {path}: {name} holds numbers that are not finite")
    if extra := sorted(set(state) - set(own)):
        raise ValueError(f"checkpoint {path} holds {extra[0]}, which the model does not have")
    model.load_state_dict(state, strict=False)  # batch counters may be missing, nothing else can be
