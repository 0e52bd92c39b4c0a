"""`accaware train` and `accaware ptq`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from accaware.cli import app
from accaware.experiments.settings import Settings, read_recipe, refuse_unread

_Option = typer.Option
DATA, QUANT, TRAIN, RUN = "Data and model", "Quantization", "Training", "Run"

Data = Annotated[
    str,
    _Option(
        help="cifar10, imagenet, bsds300 or folder (train/CLASS/*, test/CLASS/*); with ptq sts or text.",
        rich_help_panel=DATA,
    ),
]
DataDir = Annotated[
    str | None, _Option(help="Folder of the data; without it, they are downloaded.", rich_help_panel=DATA)
]
ImageSize = Annotated[
    int,
    _Option(
        help="Side that images of a folder (in training, small images of bsds300) are cropped to.", rich_help_panel=DATA
    ),
]
Resize = Annotated[
    int | None, _Option(help="Shorter side of a folder's images before that; none: the same.", rich_help_panel=DATA)
]
Normalize = Annotated[
    str, _Option(help="Mean and deviation of the pixels: imagenet, cifar10 or none.", rich_help_panel=DATA)
]
ValSize = Annotated[
    int, _Option(help="Training rows split off and evaluated instead of the test set.", rich_help_panel=DATA)
]
MaxLength = Annotated[int, _Option(help="Tokens of a sentence or piece of text, at most.", rich_help_panel=DATA)]
LimitTrain = Annotated[int | None, _Option(help="Use only the first rows of the training set.", rich_help_panel=DATA)]
Model = Annotated[
    str,
    _Option(
        help="resnet20, 32, 44, 56, resnet18-cifar, mobilenetv1; resnet18, 34, 50; espcn, unet; or module:factory; "
        "for text hf:NAME_OR_FOLDER.",
        rich_help_panel=DATA,
    ),
]
Width = Annotated[float, _Option(help="Multiplies the channels of mobilenetv1.", rich_help_panel=DATA)]
Checkpoint = Annotated[
    str | None, _Option(help="Float weights: safetensors, or a PyTorch state dict.", rich_help_panel=DATA)
]
Method = Annotated[str, _Option(help="projected, a2q+, a2q or baseline.", rich_help_panel=QUANT)]
DepthwiseMethod = Annotated[
    str | None,
    _Option(
        help="Of depthwise layers (default: a2q where the method is a2q+, as in the paper).", rich_help_panel=QUANT
    ),
]
WeightBits = Annotated[int, _Option(help="Bits of the integer weights, 2-8.", rich_help_panel=QUANT)]
ActBits = Annotated[int, _Option(help="Bits of the activation codes, 1-8.", rich_help_panel=QUANT)]
ActScale = Annotated[
    str,
    _Option(
        help="tensor: one activation scale; token: in linear layers one for each token, found at run time.",
        rich_help_panel=QUANT,
    ),
]
Rotate = Annotated[
    bool,
    _Option(help="Rotate the inputs of linear layers (Hadamard), which spreads outliers.", rich_help_panel=QUANT),
]
AccBits = Annotated[
    list[str], _Option(help="Bits of the accumulator, 2-32; PATTERN=BITS for some layers.", rich_help_panel=QUANT)
]
Preload = Annotated[str, _Option(help="Start value of the accumulator: none or free.", rich_help_panel=QUANT)]
Tile = Annotated[
    int | None, _Option(help="Products per inner sum before it spills; none: all of them.", rich_help_panel=QUANT)
]
OuterBits = Annotated[int, _Option(help="Bits of the accumulator that tiles spill to.", rich_help_panel=QUANT)]
Overflow = Annotated[str, _Option(help="What the register does: wrap or saturate.", rich_help_panel=QUANT)]
Keep = Annotated[
    list[str] | None,
    _Option(
        help="PATTERN=8 or PATTERN=float: layers outside the request (default: first and last of a built-in model).",
        rich_help_panel=QUANT,
    ),
]
Equalize = Annotated[
    bool, _Option("--equalize", help="First equalize the channels of consecutive layers.", rich_help_panel=QUANT)
]
BiasCorrect = Annotated[
    bool, _Option("--bias-correct", help="Last correct biases by the mean error.", rich_help_panel=QUANT)
]
Init = Annotated[str, _Option(help="First weights: search, ep, none; for train also ptq.", rich_help_panel=QUANT)]
Calib = Annotated[int, _Option(help="Training images for calibration.", rich_help_panel=QUANT)]
Algorithm = Annotated[
    str,
    _Option(
        help="budgeted (integers chosen by the outputs they give), projection (by the weights), or others' methods: "
        "axe-gptq, axe-gpfq; without a budget gptq, gpfq.",
        rich_help_panel=QUANT,
    ),
]
FixedScale = Annotated[
    bool,
    _Option(
        "--fixed-scale",
        help="Others' methods keep the scale of --init (none: of the largest weight), as published, instead of the "
        "best of about a hundred by the outputs.",
        rich_help_panel=QUANT,
    ),
]
Epochs = Annotated[float, _Option(help="Passes over the training set; fractions are fine.", rich_help_panel=TRAIN)]
Lr = Annotated[float, _Option(help="Peak learning rate.", rich_help_panel=TRAIN)]
Schedule = Annotated[
    str,
    _Option(
        help="After the warm-up: cosine, constant, x0.1/30 (every 30 epochs) or x0.1@30@50 (after 30 and 50).",
        rich_help_panel=TRAIN,
    ),
]
Optimizer = Annotated[str, _Option(help="sgd or adam.", rich_help_panel=TRAIN)]
Momentum = Annotated[float, _Option(help="Of sgd.", rich_help_panel=TRAIN)]
CropPad = Annotated[
    float, _Option(help="Padding of random crops, as a share of the image's side.", rich_help_panel=TRAIN)
]
Quantize = Annotated[bool, _Option(help="--no-quantize trains the float network.", rich_help_panel=TRAIN)]
BatchSize = Annotated[int, _Option(help="Images per step, over all devices together.", rich_help_panel=TRAIN)]
WeightDecay = Annotated[float, _Option(help="Of weights only.", rich_help_panel=TRAIN)]
Penalty = Annotated[
    float, _Option(help="Weight of A2Q's and A2Q+'s penalty in the loss, their lambda.", rich_help_panel=TRAIN)
]
Warmup = Annotated[float, _Option(help="Share of the steps that warm up.", rich_help_panel=TRAIN)]
ScaleLr = Annotated[float, _Option(help="Learning rate of quantizers relative to --lr.", rich_help_panel=TRAIN)]
Distill = Annotated[float, _Option(help="Weight of the distance to the float network's output.", rich_help_panel=TRAIN)]
Precision = Annotated[str, _Option(help="32-true, bf16-mixed or 16-mixed.", rich_help_panel=TRAIN)]
Seed = Annotated[int, _Option(help="Of everything random.", rich_help_panel=RUN)]
Device = Annotated[str, _Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=RUN)]
Devices = Annotated[int, _Option(help="Processes per node (DDP).", rich_help_panel=RUN)]
NumNodes = Annotated[int, _Option(help="Nodes (DDP).", rich_help_panel=RUN)]
CheckpointEvery = Annotated[int, _Option(help="Steps between checkpoints.", rich_help_panel=RUN)]
Resume = Annotated[bool, _Option("--resume", help="Go on with the run in --out.", rich_help_panel=RUN)]
Recipe = Annotated[Path | None, _Option(help="YAML file of settings; options given here win.", rich_help_panel=RUN)]
Out = Annotated[str, _Option(help="Run folder.", rich_help_panel=RUN)]

_D = Settings()


@app.callback()
def _root() -> None:
    """Integer neural networks whose dot products provably fit a narrow accumulator."""


@app.command()
def train(
    context: typer.Context,
    out: Out,
    recipe: Recipe = None,
    data: Data = _D.data,
    data_dir: DataDir = _D.data_dir,
    image_size: ImageSize = _D.image_size,
    resize: Resize = _D.resize,
    normalize: Normalize = _D.normalize,
    val_size: ValSize = _D.val_size,
    limit_train: LimitTrain = _D.limit_train,
    model: Model = _D.model,
    width: Width = _D.width,
    checkpoint: Checkpoint = _D.checkpoint,
    method: Method = _D.method,
    depthwise_method: DepthwiseMethod = _D.depthwise_method,
    weight_bits: WeightBits = _D.weight_bits,
    act_bits: ActBits = _D.act_bits,
    act_scale: ActScale = _D.act_scale,
    rotate: Rotate = _D.rotate,
    acc_bits: AccBits = list(_D.acc_bits),  # noqa: B006 -- typer copies it
    preload: Preload = _D.preload,
    tile: Tile = _D.tile,
    outer_bits: OuterBits = _D.outer_bits,
    overflow: Overflow = _D.overflow,
    keep: Keep = None,
    equalize: Equalize = _D.equalize,
    init: Init = _D.init,
    bias_correct: BiasCorrect = _D.bias_correct,
    calib: Calib = _D.calib,
    epochs: Epochs = _D.epochs,
    lr: Lr = _D.lr,
    schedule: Schedule = _D.schedule,
    optimizer: Optimizer = _D.optimizer,
    momentum: Momentum = _D.momentum,
    batch_size: BatchSize = _D.batch_size,
    weight_decay: WeightDecay = _D.weight_decay,
    penalty: Penalty = _D.penalty,
    warmup: Warmup = _D.warmup,
    scale_lr: ScaleLr = _D.scale_lr,
    distill: Distill = _D.distill,
    crop_pad: CropPad = _D.crop_pad,
    quantize: Quantize = _D.quantize,
    precision: Precision = _D.precision,
    seed: Seed = _D.seed,
    device: Device = _D.device,
    devices: Devices = _D.devices,
    num_nodes: NumNodes = _D.num_nodes,
    checkpoint_every: CheckpointEvery = _D.checkpoint_every,
    resume: Resume = False,
) -> None:
    """Train an integer network that fits the accumulator, and prove it."""
    values = _values(context)
    settings = None if resume else _settings(context, values)  # resumed, they are those of the run
    from rich.console import Console

    from accaware.experiments import job

    if settings is None:
        job.resume(Path(out), values, Console())
    else:
        job.train(settings, Console())


@app.command()
def ptq(
    context: typer.Context,
    out: Out,
    recipe: Recipe = None,
    data: Data = _D.data,
    data_dir: DataDir = _D.data_dir,
    image_size: ImageSize = _D.image_size,
    resize: Resize = _D.resize,
    normalize: Normalize = _D.normalize,
    val_size: ValSize = _D.val_size,
    limit_train: LimitTrain = _D.limit_train,
    max_length: MaxLength = _D.max_length,
    model: Model = _D.model,
    width: Width = _D.width,
    checkpoint: Checkpoint = _D.checkpoint,
    method: Method = _D.method,
    depthwise_method: DepthwiseMethod = _D.depthwise_method,
    weight_bits: WeightBits = _D.weight_bits,
    act_bits: ActBits = _D.act_bits,
    act_scale: ActScale = _D.act_scale,
    rotate: Rotate = _D.rotate,
    acc_bits: AccBits = list(_D.acc_bits),  # noqa: B006 -- typer copies it
    preload: Preload = _D.preload,
    tile: Tile = _D.tile,
    outer_bits: OuterBits = _D.outer_bits,
    overflow: Overflow = _D.overflow,
    keep: Keep = None,
    equalize: Equalize = _D.equalize,
    init: Init = _D.init,
    bias_correct: BiasCorrect = _D.bias_correct,
    calib: Calib = _D.calib,
    algorithm: Algorithm = _D.algorithm,
    fixed_scale: FixedScale = _D.fixed_scale,
    seed: Seed = _D.seed,
    device: Device = _D.device,
) -> None:
    """Quantize a trained network without training, and prove that it fits the accumulator."""
    settings = _settings(context, _values(context, "ptq"))
    from rich.console import Console

    from accaware.experiments import job

    job.ptq(settings, Console())


def _values(context: typer.Context, command: str = "train") -> dict[str, Any]:
    """The options that were given, as `Settings` names them, over those of the recipe."""
    recipe = context.params["recipe"]
    values = {} if recipe is None else read_recipe(recipe, command)
    given = {name: context.params[name] for name in _stated(context)}
    return {**values, **{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}}


def _settings(context: typer.Context, values: dict[str, Any]) -> Settings:
    """Of a new run. Raises `ValueError` for impossible values, and for an option that would do nothing."""
    settings = Settings(**{**values, "command": context.command.name})
    refuse_unread(_stated(context), [settings])
    return settings


def _stated(context: typer.Context) -> list[str]:
    """The settings that the command line names."""
    sources = {name: context.get_parameter_source(name) for name in context.params if name not in ("resume", "recipe")}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
