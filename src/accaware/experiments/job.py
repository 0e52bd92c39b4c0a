"""The main job: from a float network and data to an integer network, its certificate and its accuracy."""

from __future__ import annotations

import copy
import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import accaware as aa
from accaware.certify.certificate import Certificate
from accaware.certify.model import certify
from accaware.experiments import models, runs, text
from accaware.experiments.batches import EvalBatches, calibration_images
from accaware.experiments.checkpoints import fingerprint, load_weights
from accaware.experiments.data import CIFAR10_SIZE, Dataset, load
from accaware.experiments.images import NORMALIZATIONS, Images, first_line
from accaware.experiments.metrics import Metric
from accaware.experiments.models import huggingface
from accaware.experiments.settings import CHECKPOINT_SHA256, TEXT, Settings, check_same
from accaware.experiments.training import Network, Plan, evaluate, fit, train_batches
from accaware.inputs import call

EVAL_PIXELS = 500 * 32 * 32  # in the outputs or inputs of one batch
CALIB_BATCH = 250
BATCHNORM_IMAGES = 4000


@dataclass(frozen=True)
class Job:
    """A calibrated model, and what is needed to train and judge it.

    `reference`: the float model, None where it has no trained weights. `calibration`: training images without
    augmentation, or text. `started`: in seconds of the monotonic clock.
    """

    settings: Settings
    device: torch.device
    data: Dataset | text.Pairs | text.Running
    calibration: EvalBatches | text.TokenBatches
    model: nn.Module
    reference: nn.Module | None
    started: float

    def score(self, model: nn.Module) -> float:
        """The task's metric on the test (or validation) images, or on text. Raises `ValueError` unless it is finite."""
        model = model.to(self.device)
        if isinstance(self.data, Dataset):
            images, normalization = self.data.evaluation, NORMALIZATIONS[self.settings.normalize]
            value = evaluate(model, EvalBatches(images, _fitting(images), normalization, self.data.task), self.device)
        else:
            value = self.data.score(model, self.device)
        if not math.isfinite(value):
            network = "float" if model is self.reference else "quantized" if self.settings.quantize else "trained"
            raise ValueError(f"{self.data.task.name} of the {network} network is {value}: its outputs tell nothing")
        return value


def train(settings: Settings, console: Console) -> dict[str, Any]:
    """`accaware train`: a new run. Returns what `result.json` holds.

    Raises `ValueError` for whatever the user can put right, before anything is written.
    """
    run = runs.RunFolder(Path(settings.out))
    if first_process():
        run.require_new()
    return _train(run, _with_fingerprint(settings), console, resume=False)


def resume(folder: Path, given: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """`accaware train --resume`: go on with the run in `folder`; `given` are the options that were stated again.

    A run that is complete is left alone. Raises `ValueError` where `given` contradicts the run, or it is one of `ptq`.
    """
    run = runs.RunFolder(folder)
    settings = run.settings()
    if settings.command != "train":
        raise ValueError(f"run folder {folder} is a run of {settings.command}, which never stops halfway: repeat it")
    if CHECKPOINT_SHA256 not in given and ("checkpoint" in given or not run.complete):
        checkpoint = given.get("checkpoint", settings.checkpoint)
        given = {**given, "checkpoint": checkpoint, CHECKPOINT_SHA256: fingerprint(checkpoint)}
    check_same(settings, given, folder)
    if run.complete:
        console.print(f"{folder} is complete", highlight=False, markup=False)
        return run.result()
    moved = {name: value for name, value in given.items() if getattr(settings, name) != value}
    return _train(run, replace(settings, **moved), console, resume=True)


def _train(run: runs.RunFolder, settings: Settings, console: Console, resume: bool) -> dict[str, Any]:
    if settings.init == "ptq":
        _require_trained(settings, "init 'ptq'")
    if settings.distill:
        _require_trained(settings, "distill")
    job = _prepare(settings)
    assert isinstance(job.data, Dataset)  # settings refuse text
    float_score = _float_score(job, console)
    last = run.last_checkpoint() if resume else None
    if last is None and settings.init == "ptq":
        _reconstruct(job)
    if last is None:  # start from statistics that fit the integers
        aa.reestimate_batchnorm(job.model, _as_in_training(job.data, settings))
    if first_process() and not resume:
        run.create(settings)
    teacher = job.reference if settings.distill else None
    network = Network(
        job.model,
        job.data.train,
        NORMALIZATIONS[settings.normalize],
        settings,
        job.started,
        teacher,
        job.data.task,
    )
    trainer = fit(network, run, settings, console, last)
    if not trainer.is_global_zero:
        return {}
    return _finish(job, run, float_score, network.elapsed(), console, Plan.of(settings, len(job.data.train)))


def ptq(settings: Settings, console: Console) -> dict[str, Any]:
    """`accaware ptq`: the calibrated network as it is, without training."""
    run = runs.RunFolder(Path(settings.out))
    run.require_new()
    _require_trained(settings, "ptq")
    settings = _with_fingerprint(settings)
    job = _prepare(settings)
    float_score = _float_score(job, console)
    if settings.algorithm != "projection":
        _reconstruct(job, settings.algorithm, settings.fixed_scale)
    return _finish(job, run, float_score, time.monotonic() - job.started, console)


def _with_fingerprint(settings: Settings) -> Settings:
    return replace(settings, checkpoint_sha256=fingerprint(settings.checkpoint))


def _require_trained(settings: Settings, what: str) -> None:
    if settings.checkpoint is None and settings.model in models.BUILT_IN:
        raise ValueError(f"{what} needs the weights of a trained model: --checkpoint")


def _reconstruct(job: Job, algorithm: str = "budgeted", fixed_scale: bool = False) -> None:
    assert job.reference is not None
    aa.reconstruct(job.model, job.reference, job.calibration, algorithm, fixed_scale=fixed_scale)


def load_run(folder: Path) -> nn.Module:
    """The prepared (or float) model of a complete run, in evaluation mode on the CPU, from its folder alone.

    Raises `ValueError` where a file of it is missing or damaged, or the code of its network is another one now.
    """
    run = runs.RunFolder(folder)
    settings, state = run.settings(), run.model_state()
    model = _build(settings, run.result()["classes"])
    if settings.quantize:
        _quantize(model, settings, sample_input(folder))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{folder / 'model.safetensors'} is of another network: {first_line(error)}") from error
    return model.eval()


def sample_input(folder: Path) -> Any:
    """An input of the run's model: two rows of zeros, or two texts of the greatest length."""
    settings = runs.RunFolder(folder).settings()
    if settings.data in TEXT:
        return _sample_text(settings, torch.device("cpu"))
    size = CIFAR10_SIZE if settings.data == "cifar10" else settings.image_size
    return torch.zeros(2, 3, size, size)


def _sample_text(settings: Settings, device: torch.device) -> dict[str, torch.Tensor]:
    """Of the greatest length, which decides how wide the sums of attention over positions are."""
    ids = torch.ones(2, settings.max_length, dtype=torch.int64, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _prepare(settings: Settings) -> Job:
    started = time.monotonic()
    device = find_device(settings.device)
    folder = None if settings.data_dir is None else Path(settings.data_dir)
    data: Dataset | text.Pairs | text.Running
    if settings.data in TEXT:
        data = text.load(settings.data, folder, huggingface.tokenizer(settings.model), settings.max_length)
    else:
        data = load(
            settings.data,
            folder,
            val_size=settings.val_size,
            image_size=settings.image_size,
            resize=settings.resize,
            limit_train=settings.limit_train,
        )
    if isinstance(data, Dataset) and settings.command == "train" and settings.batch_size > len(data.train):
        raise ValueError(f"batch_size must lie in [1, {len(data.train)}] (the training set), not {settings.batch_size}")
    torch.manual_seed(settings.seed)
    model = _build(settings, data.classes)
    if settings.checkpoint is not None:
        load_weights(model, Path(settings.checkpoint))
    trained = settings.checkpoint is not None or settings.model not in models.BUILT_IN
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.equalize:
        aa.equalize(model)
    reference = copy.deepcopy(model).eval()
    calibration: EvalBatches | text.TokenBatches
    if isinstance(data, Dataset):
        images = calibration_images(data.train, settings.calib, settings.seed)
        size = min(CALIB_BATCH, _fitting(images))
        calibration = EvalBatches(images, size, NORMALIZATIONS[settings.normalize], data.task)
        sample: Any = next(iter(calibration))[0][:2].to(device)
    else:
        calibration = text.drawn(data.unlabelled, settings.calib, settings.seed)
        sample = _sample_text(settings, device)
    _require_fit(reference, sample, settings)
    if settings.quantize:
        _quantize(model, settings, sample)
        aa.calibrate(model, calibration, init="search" if settings.init == "ptq" else settings.init)
        if settings.bias_correct:
            aa.bias_correct(model, reference, calibration)
    return Job(settings, device, data, calibration, model, reference if trained else None, started)


@torch.no_grad()
def _require_fit(model: nn.Module, sample: Any, settings: Settings) -> None:
    """Raise `ValueError` where the model cannot take inputs of that shape."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if settings.data in TEXT and positions is not None and settings.max_length > positions:
        raise ValueError(f"max_length must be at most {positions}, the positions of {settings.model}")
    try:
        call(model, sample)
    except (RuntimeError, IndexError) as error:
        shape = list((sample["input_ids"] if settings.data in TEXT else sample).shape)
        raise ValueError(f"model {settings.model!r} cannot take inputs {shape}: {first_line(error)}") from error


def _build(settings: Settings, classes: int | None) -> nn.Module:
    if settings.data in TEXT:
        return huggingface.pretrained(settings.model, causal=settings.data == "text")
    return models.build(settings.model, classes, settings.width)


def _fitting(images: Images) -> int:
    """How many of these images a batch without gradients takes."""
    sizes = [t.shape[-1] * t.shape[-2] for t in (images.pixels, images.labels) if t.dim() == 4]
    return max(1, EVAL_PIXELS // max(sizes))


def _as_in_training(data: Dataset | text.Pairs | text.Running, settings: Settings) -> Iterable[Any]:
    """Augmented images: batch-norm averaged over such, and the statistics of plain ones differ."""
    if not isinstance(data, Dataset):
        return text.TokenBatches(data.unlabelled)
    size = min(CALIB_BATCH, len(data.train))
    normalization = NORMALIZATIONS[settings.normalize]
    batches = train_batches(data.train, replace(settings, batch_size=size), normalization, data.task)
    return batches.stream(0, min(BATCHNORM_IMAGES, len(data.train)) // size)


def _quantize(model: nn.Module, settings: Settings, sample: Any) -> None:
    keep = settings.keep_patterns
    if not keep and (settings.model in models.BUILT_IN or settings.data in TEXT):
        keep = dict(model.keep)  # type: ignore[arg-type]
    aa.prepare_(model, settings.spec, sample, keep=keep, acc_bits=settings.acc_patterns)


def _float_score(job: Job, console: Console) -> float | None:
    if job.reference is None or not first_process():
        return None
    value = job.score(job.reference)
    console.print(f"float {job.data.task.shown(value)} ({job.data.split})", highlight=False)
    return value


def _finish(
    job: Job, run: runs.RunFolder, float_score: float | None, seconds: float, console: Console, plan: Plan | None = None
) -> dict[str, Any]:
    """Judge the model and write it, its certificate (a float network has none) and, last, its result."""
    settings, before = job.settings, time.monotonic()
    model = job.model.to(job.device).eval()
    # The running averages of training lag behind the weights, and remember the last few batches only.
    aa.reestimate_batchnorm(model, _as_in_training(job.data, settings))
    score, metric = job.score(model), job.data.task.metric
    certificate = certify(model) if settings.quantize else None
    request = {name: getattr(settings.spec, name) for name in ("method", "weight_bits", "act_bits", "acc_bits")}
    result = {
        "metric": metric,
        metric: round(score, 4),
        f"float_{metric}": None if float_score is None else round(float_score, 4),
        "split": job.data.split,
        **(dict.fromkeys(request) | {"method": "float"} if certificate is None else request),
        **_proof(certificate),
        "epochs": 0 if plan is None else settings.epochs,
        "steps": 0 if plan is None else plan.steps,
        "seed": settings.seed,
        "seconds": round(seconds + time.monotonic() - before, 1),
        "model": settings.model,
        "classes": job.data.classes,
        "data": settings.data,
        "hardware": runs.hardware(job.device),
        "versions": runs.versions(*(["transformers"] if settings.data in TEXT else [])),
        "commit": runs.commit(),
    }
    if settings.command == "ptq":  # which leaves nothing behind where it is stopped; training has begun its folder
        run.create(settings)
    run.write_model(model, {"accaware": aa.__version__, "command": settings.command_line()})
    if certificate is not None:
        certificate.save(run.path / "certificate.json")
    run.write_result(result)
    _report(result, run, job.data.task, console)
    return result


def _proof(certificate: Certificate | None) -> dict[str, Any]:
    if certificate is None:
        return {"holds": False, "bits_needed": None, "sparsity": None, "zero_channels": None}
    return {
        "holds": bool(certificate.holds),
        "bits_needed": certificate.bits_needed,
        "sparsity": _sparsity(certificate),
        "zero_channels": sum(op.zero_channels for op in certificate.inside),
    }


def _sparsity(certificate: Certificate) -> float | None:
    """Share of integer weights that are 0, over all layers of the request."""
    weights = [op.fan_in * len(op.lo) for op in certificate.inside]
    if not sum(weights):
        return None
    zeros = sum(op.sparsity * count for op, count in zip(certificate.inside, weights, strict=True))
    return round(zeros / sum(weights), 6)


def _report(result: dict[str, Any], run: runs.RunFolder, task: Metric, console: Console) -> None:
    proof = f"{'proven' if result['holds'] else 'NOT proven'} to fit {result['acc_bits']} bits "
    proof += f"(worst layer needs {result['bits_needed']})"
    console.print(
        f"{task.shown(result[task.metric])} ({result['split']}), "
        f"{'float' if result['method'] == 'float' else proof}, {result['seconds']:.0f} s: {run.path}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def find_device(name: str) -> torch.device:
    """The device called `name`: "auto" takes a GPU where there is one, and each process of a host has one of its own.

    Raises `ValueError` where it does not exist, or is of a kind that this library does not train on.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"device {name!r} cannot be used: it must be auto, cpu, mps, cuda or cuda:NUMBER")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used: {first_line(error)}") from error
    return device


def first_process() -> bool:
    """Whether this is the process that writes: the only one, or the first of a distributed run."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
