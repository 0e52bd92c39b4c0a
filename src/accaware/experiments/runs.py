"""The run folder: `config.yaml`, `log.csv`, `checkpoints/`, `model.safetensors`, `certificate.json`, `result.json`."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

import accaware
from accaware.experiments.settings import Settings
from accaware.files import write_whole


@dataclass(frozen=True)
class RunFolder:
    """The files of one run. `result.json` is written last: where it exists, the run is complete."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where training checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        """One row for every few training steps."""
        return self.path / "log.csv"

    @property
    def complete(self) -> bool:
        """Whether the run has its result."""
        return (self.path / "result.json").exists()

    def require_new(self) -> None:
        """Raise `ValueError` where something is in the way of a new run, now and not when its work is done."""
        if self.path.is_file():
            raise ValueError(f"run folder {self.path} is a file")
        if self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"run folder {self.path} exists{self._way_on()}")
        near = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not (near.is_dir() and os.access(near, os.W_OK | os.X_OK)):
            raise ValueError(f"run folder {self.path} cannot be made: {near} is no folder that can be written to")

    def _way_on(self) -> str:
        try:
            train = self.settings().command == "train"
        except ValueError:
            train = False
        return "; train --resume continues it" if train else " and is not empty; --out takes another one"

    def create(self, settings: Settings) -> None:
        """Make the folder and write its configuration, first of all: what has none is no run."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = f"# repeat with:\n#   {settings.command_line()}\n" + yaml.safe_dump(settings.to_dict(), sort_keys=False)
        write_whole(self.path / "config.yaml", text)
        self.checkpoints.mkdir(exist_ok=True)

    def settings(self) -> Settings:
        """What `create` wrote. Raises `ValueError` where there is no run, or its configuration is damaged."""
        file = self.path / "config.yaml"
        if not file.is_file():
            raise ValueError(f"run folder {self.path} holds no run (no config.yaml)")
        try:
            return Settings.from_dict(yaml.safe_load(file.read_text()))
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error

    def last_checkpoint(self) -> Path | None:
        """The training checkpoint with the most steps."""
        return max(self.checkpoints.glob("step-*.ckpt"), default=None)

    def write_model(self, model: nn.Module, about: dict[str, str]) -> None:
        """`model.safetensors`: the state dict, every name with its own copy of a tensor that several share."""
        state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
        write_whole(self.path / "model.safetensors", save(state, about))

    def model_state(self) -> dict[str, Tensor]:
        """What `write_model` wrote. Raises `ValueError` where it is damaged."""
        file = self.path / "model.safetensors"
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error

    def write_result(self, result: dict[str, Any]) -> None:
        """`result.json`."""
        write_whole(self.path / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")

    def result(self) -> dict[str, Any]:
        """What `write_result` wrote. Raises `ValueError` where it is damaged."""
        file = self.path / "result.json"
        try:
            found = json.loads(file.read_text())
            if missing := sorted({"metric", "classes"} - dict(found).keys()):
                raise ValueError(f"it lacks {missing[0]!r}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        return dict(found)


def hardware(device: torch.device) -> dict[str, Any]:
    """The processor, its cores that this process may use, the threads of torch, and the GPU if the run uses one."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": _processor(), "cores": cores(), "threads": torch.get_num_threads(), "gpu": gpu}


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(*others: str) -> dict[str, str]:
    """Versions of what decides the numbers; `others` are the packages that not every run has."""
    found = {"accaware": accaware.__version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in ("torch", "lightning", "numpy", *others)}


def commit() -> str | None:
    """The commit of this library's code, with "-dirty" where files differ from it; None outside a git checkout."""
    folder = Path(accaware.__file__).parent
    try:
        # an installed copy may lie inside somebody else's repository: only tracked code has a commit
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        return _git(folder, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def no_space(error: OSError) -> bool:
    """Whether the disk (or a quota) is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
