"""Training with Lightning, as one stream of steps that can stop after any of them and go on where it stopped.

Lightning sees a single long epoch. The batch of a step, its augmentation and whatever else is random in it are pure
functions of the seed and the step, so a resumed run repeats the uninterrupted one bit for bit on a CPU.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import pickle
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

import accaware as aa
from accaware.experiments.batches import STEP, EvalBatches, TrainBatches, seed_of
from accaware.experiments.images import Images, Normalization
from accaware.experiments.runs import RunFolder
from accaware.experiments.settings import Schedule, Settings
from accaware.experiments.tasks import CLASSIFICATION, Task
from accaware.files import write_whole
from accaware.quantizers import ActivationQuantizer, WeightQuantizer

LOG_EVERY = 10
RESIDENT = 8 << 30  # bytes of images that may lie in the memory of a GPU


@dataclass(frozen=True)
class Plan:
    """How many optimizer steps a run takes and how many of them warm up; the schedule, and the steps of its epochs."""

    steps: int
    warmup: int
    schedule: Schedule | None = None
    per_epoch: int = 1

    @classmethod
    def of(cls, settings: Settings, images: int) -> Plan:
        """From epochs, of which the last rows that fill no batch are no part."""
        per_epoch = images // settings.batch_size
        steps = max(1, round(settings.epochs * per_epoch))
        warmup = min(steps - 1, round(settings.warmup * steps))
        return cls(steps, warmup, Schedule.parse(settings.schedule), per_epoch)

    def rate(self, step: int) -> float:
        """The learning rate of `step` relative to its peak: linear warm-up, then the schedule (None: a cosine to 0)."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.schedule is not None:
            return self.schedule.rate(step / self.per_epoch)
        return 0.5 + 0.5 * math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup))


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Weights decay; biases and batch-norm do not; parameters of quantizers do not and have `scale_lr` times the rate.

    Raises `ValueError` where the model has nothing to train.
    """
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer | WeightQuantizer)]
    theirs = {id(p) for module in quantizers for p in module.parameters()}
    own = [p for p in model.parameters() if p.requires_grad and id(p) not in theirs]
    scales = [p for p in model.parameters() if p.requires_grad and id(p) in theirs]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in own if p.dim() > 1], "weight_decay": settings.weight_decay, "lr": settings.lr},
        {"params": [p for p in own if p.dim() <= 1], "weight_decay": 0.0, "lr": settings.lr},
        {"params": scales, "weight_decay": 0.0, "lr": settings.lr * settings.scale_lr},
    ]
    if not own:
        raise ValueError("the model has no parameters to train")
    return [group for group in groups if group["params"]]


class Network(LightningModule):
    """The task's loss, the quantizers' penalty, and optionally the distance to the float network (`teacher`).

    `started`: when the job started, by the monotonic clock.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        normalization: Normalization,
        settings: Settings,
        started: float,
        teacher: nn.Module | None = None,
        task: Task = CLASSIFICATION,
    ) -> None:
        super().__init__()
        self.model = model
        self.images, self.normalization, self.settings, self.task = images, normalization, settings, task
        self.plan = Plan.of(settings, len(images))
        self._teacher = [teacher]  # in a list: no part of the checkpoint
        self._started, self._before = started, 0.0

    def train_dataloader(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Called once per session, when the checkpoint has told how many steps are done."""
        trainer, device = self.trainer, self.trainer.strategy.root_device
        images = self.images.to(device) if self.images.pixels.nbytes <= RESIDENT else self.images
        batches = train_batches(
            images, self.settings, self.normalization, self.task, trainer.global_rank, trainer.world_size, device
        )
        if self._teacher[0] is not None:
            self._teacher[0].eval().to(device)
        return batches.stream(trainer.global_step, self.plan.steps)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Whatever is random inside a model (dropout) depends on the seed and the step only."""
        torch.manual_seed(seed_of(self.settings.seed, STEP, self.trainer.global_step, self.trainer.global_rank))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """The loss of one batch, and what the log shows of it."""
        x, target = batch
        output = self.model(x).float()
        score = self.task.score(output.detach(), target).mean()
        penalty = aa.penalty(self.model, self.settings.penalty)
        loss = self.task.loss(output, target) + penalty
        if self._teacher[0] is not None:
            with torch.no_grad():
                wanted = self._teacher[0](x).float()
            loss = loss + self.settings.distill * self.task.distance(output, wanted)
        return {"loss": loss, self.task.metric: score, "penalty": penalty.detach()}

    def configure_optimizers(self) -> Any:
        """SGD with momentum, or Adam; the rate follows `Plan.rate` step by step."""
        groups = parameter_groups(self.model, self.settings)
        optimizer: torch.optim.Optimizer
        if self.settings.optimizer == "adam":
            optimizer = torch.optim.Adam(groups)
        else:
            optimizer = torch.optim.SGD(groups, momentum=self.settings.momentum)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.plan.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def elapsed(self) -> float:
        """Seconds of this job so far, over all its sessions up to their last checkpoint."""
        return self._before + time.monotonic() - self._started

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's checkpoint also keeps the time spent."""
        checkpoint["accaware_seconds"] = self.elapsed()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The inverse."""
        self._before = float(checkpoint["accaware_seconds"])


class WholeFiles(TorchCheckpointIO):
    """Checkpoints written beside and renamed: a kill in the middle of writing leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """To a local path."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(Path(path), buffer.getvalue())

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Raises `ValueError` where the file is damaged, or is no checkpoint of a run."""
        try:
            found: Any = super().load_checkpoint(path, *args, **options)
            if not {"state_dict", "optimizer_states", "accaware_seconds"} <= found.keys():
                raise ValueError("it is no checkpoint of a run")
        except (RuntimeError, EOFError, AttributeError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"checkpoint {path} is damaged; without it, the run starts again") from error
        return dict(found)


class KeepLast(Callback):
    """A checkpoint every `every` steps and after the last one; the ones before are removed."""

    def __init__(self, folder: Path, every: int, last: int) -> None:
        self.folder, self.every, self.last = folder, every, last

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Lightning's hook."""
        step = trainer.global_step
        if step % self.every and step != self.last:
            return
        path = self.folder / f"step-{step:08d}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for other in self.folder.glob("step-*.ckpt"):
                if other != path:
                    other.unlink(missing_ok=True)


class Log(Callback):
    """`log.csv`, TensorBoard if it is there, and the progress bar."""

    def __init__(self, file: Path, console: Console, plan: Plan, metric: str) -> None:
        self.file, self.console, self.plan, self.metric = file, console, plan, metric
        self.fields = ("step", "epoch", "loss", "penalty", metric, "lr", "seconds")
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  " + metric + " {task.fields[score]:.1f}"),
            console=console,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the rows up to the checkpoint that the run goes on from."""
        if not trainer.is_global_zero:
            return
        write_whole(self.file, "".join(self._rows_until(trainer.global_step)))
        if self.console.is_terminal:
            done = trainer.global_step
            self.bar = self.progress.add_task("", total=self.plan.steps, completed=done, loss=math.nan, score=math.nan)
            self.progress.start()

    def _rows_until(self, step: int) -> Iterator[str]:
        yield ",".join(self.fields) + "\n"
        if self.file.exists():
            with self.file.open(newline="") as file:
                for row in csv.reader(file):
                    if row and row[0].isdigit() and int(row[0]) <= step:
                        yield ",".join(row) + "\n"

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """One row every `LOG_EVERY` steps. Raises `ValueError` where the loss is no number any more."""
        step = trainer.global_step
        if step % LOG_EVERY and step != self.plan.steps:
            return
        values = {name: float(outputs[name]) for name in ("loss", "penalty", self.metric)}
        if not math.isfinite(values["loss"]):  # every process sees it
            raise ValueError(f"training diverged: at step {step} the loss is {values['loss']}; try a smaller --lr")
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Network)
        values["lr"] = pl_module.settings.lr * self.plan.rate(step - 1)
        row = (step, step / self.plan.per_epoch, *values.values(), pl_module.elapsed())
        with self.file.open("a") as file:
            file.write(",".join(f"{v:.6g}" for v in row) + "\n")
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
        self._show(step, values)

    def _show(self, step: int, values: dict[str, float]) -> None:
        if self.progress.live.is_started:
            self.progress.update(self.bar, completed=step, loss=values["loss"], score=values[self.metric])
        elif step % max(LOG_EVERY, self.plan.steps // 10 // LOG_EVERY * LOG_EVERY) == 0 or step == self.plan.steps:
            text = f"step {step}/{self.plan.steps}  loss {values['loss']:.3f}  {self.metric} {values[self.metric]:.1f}"
            self.console.print(text, highlight=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Also after an error."""
        if self.progress.live.is_started:
            self.progress.stop()


def fit(network: Network, run: RunFolder, settings: Settings, console: Console, resume: Path | None = None) -> Trainer:
    """Train `network` to the end of its plan, from the checkpoint `resume` if there is one.

    Raises `KeyboardInterrupt` where the user stops it.
    """
    plan = network.plan
    with _quiet():
        trainer = Trainer(
            **accelerator(settings),
            num_nodes=settings.num_nodes,
            precision=settings.precision,  # type: ignore[arg-type]
            max_steps=plan.steps,
            max_epochs=-1,
            logger=_tensorboard(run),
            callbacks=[
                Log(run.log, console, plan, network.task.metric),  # first: it stops before a diverged run is kept
                KeepLast(run.checkpoints, settings.checkpoint_every, plan.steps),
            ],
            plugins=[WholeFiles()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        try:
            trainer.fit(network, ckpt_path=resume, weights_only=True)
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from stop
            raise
    return trainer


def accelerator(settings: Settings) -> dict[str, Any]:
    """Lightning's words for `--device` and `--devices`."""
    kind, _, index = settings.device.partition(":")
    name = {"cuda": "gpu"}.get(kind, kind)
    devices: Any = [int(index)] if index else settings.devices
    distributed = settings.devices * settings.num_nodes > 1
    return {"accelerator": name, "devices": devices, "strategy": "ddp" if distributed else "auto"}


def _tensorboard(run: RunFolder) -> Logger | bool:
    try:
        return TensorBoardLogger(run.path, name="tensorboard", version="")
    except ModuleNotFoundError:
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning without advice: what the user should know, this library says itself."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def train_batches(
    images: Images,
    settings: Settings,
    normalization: Normalization,
    task: Task,
    part: int = 0,
    parts: int = 1,
    device: torch.device | None = None,
) -> TrainBatches:
    """The training batches that `settings` ask for."""
    s = settings
    return TrainBatches(
        images, s.batch_size, s.seed, normalization, part, parts, task, s.crop_pad, s.image_size, device
    )


@torch.no_grad()
def evaluate(model: nn.Module, batches: EvalBatches, device: torch.device) -> float:
    """The task's metric over all images; in evaluation mode, which is restored.

    Raises `ValueError` where the model's output has another shape than the task needs.
    """
    training, total = model.training, 0.0
    model.eval()
    for x, target in batches:
        output, target = model(x.to(device)).float(), target.to(device)
        batches.task.check(output, target)
        total += float(batches.task.score(output, target).sum())
    model.train(training)
    return total / len(batches.images)
