"""Proofs about ONNX files and run folders, what happens where there is none, and files that have one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accaware.cli import app

if TYPE_CHECKING:
    from accaware.certify.certificate import Certificate
    from accaware.certify.targets import Target
    from accaware.integer.layer import IntegerLayer

_Argument, _Option = typer.Argument, typer.Option

File = Annotated[str, _Argument(help="An ONNX file, or the folder of a run.", show_default=False)]
TargetName = Annotated[
    str | None, _Option("--target", help="A named register (see `accaware targets`), or a JSON file with one.")
]
AccBits = Annotated[
    list[str] | None, _Option(help="Bits of the accumulator, 2-64; PATTERN=BITS for some operations. [default: 32]")
]
Tile = Annotated[int | None, _Option(help="Products per inner sum before it spills; none: all of them.")]
OuterBits = Annotated[int | None, _Option(help="Bits of the accumulator that tiles spill to. [default: 32]")]
Overflow = Annotated[str | None, _Option(help="What the register does: wrap or saturate. [default: wrap]")]
Input = Annotated[
    list[str] | None,
    _Option("--input", help="NAME=uint8[:scale[:zero]]: codes of a graph input that the file does not give."),
]


@app.command()
def certify(
    file: File,
    target: TargetName = None,
    acc_bits: AccBits = None,
    tile: Tile = None,
    outer_bits: OuterBits = None,
    overflow: Overflow = None,
    inputs: Input = None,
    json: Annotated[str | None, _Option(help="Write the certificate.")] = None,
    html: Annotated[str | None, _Option(help="Write a page that reads well in a browser.")] = None,
    witnesses: Annotated[
        str | None, _Option(help="Write, as .npz, an input for every row that can overflow its register.")
    ] = None,
) -> int:
    """Prove that no input can overflow the accumulator, or show one that does. Exit code 0: proven; 1: not."""
    if Path(file).is_dir():
        if any((target, acc_bits, tile, outer_bits, overflow, inputs)):
            raise ValueError(f"{file} is a run folder, whose layers have their own targets; give none")
        certificate, layers = _of_run(file)
    else:
        register, patterns = _register(target, acc_bits or [], tile, outer_bits, overflow)
        certificate, layers = _of_file(file, register, inputs or [], patterns)
    print(certificate.table(), end="")
    if json is not None:
        certificate.save(json)
    if html is not None:
        from accaware.certify.report import html as page
        from accaware.files import write_whole

        write_whole(Path(html), page(certificate))
    if witnesses is not None:
        from accaware.certify.witnesses import save_witnesses

        save_witnesses(Path(witnesses), layers())
    return 0 if certificate.holds else 1


@app.command()
def check(
    certificate: Annotated[str, _Argument(help="A certificate that `certify --json` wrote.", show_default=False)],
    file: File,
) -> int:
    """Derive a certificate again, by simpler means, and compare. Exit code 0: it agrees; 1: it does not."""
    from accaware.certify.certificate import Certificate
    from accaware.certify.second import disagreements, own_word

    claimed = Certificate.load(certificate)
    found = disagreements(claimed, file)
    for line in found:
        print(line)
    if (word := own_word(claimed)) is not None:
        print(f"note: {word}")
    print(f"{certificate}: {'agrees with' if not found else 'DISAGREES with'} {file}")
    return 1 if found else 0


@app.command()
def emulate(
    file: File,
    target: TargetName = None,
    acc_bits: AccBits = None,
    tile: Tile = None,
    outer_bits: OuterBits = None,
    overflow: Overflow = None,
    inputs: Input = None,
    data: Annotated[str | None, _Option(help="An .npz with `images` and maybe `labels`. [default: random]")] = None,
    limit: Annotated[int | None, _Option(help="Only the first rows. [default: all; 16 random ones]", min=1)] = None,
    batch_size: Annotated[int, _Option(help="Rows that run together.", min=1)] = 32,
    json: Annotated[str | None, _Option(help="Write the counts.")] = None,
    outputs: Annotated[str | None, _Option(help="Write the outputs, as .npz.")] = None,
) -> int:
    """Run the network with that accumulator, wrapping around or saturating, and count the overflows."""
    from accaware.certify.emulation import Emulator
    from accaware.certify.measure import load_data, measure, outputs_file, random_feeds
    from accaware.files import write_whole

    register, patterns = _register(target, acc_bits or [], tile, outer_bits, overflow)
    with _as_file(file) as path:
        emulator, exact = (Emulator(path, t, inputs or [], p) for t, p in ((register, patterns), (None, {})))
    feeds, labels = (random_feeds(emulator, limit or 16), None) if data is None else load_data(data, emulator, limit)
    with _progress(2 * max((len(array) for array in feeds.values() if array.ndim), default=1)) as advance:
        found = measure(emulator, exact, feeds, labels, target=register.name, batch_size=batch_size, progress=advance)
    print(found.table(), end="")
    if data is None:
        print("inputs were drawn at random (seed 0); give --data for real ones")
    if json is not None:
        write_whole(Path(json), found.to_json())
    if outputs is not None:
        write_whole(Path(outputs), outputs_file(found.emulated.outputs))
    return 0


@contextmanager
def _as_file(file: str) -> Iterator[Path]:
    """The file, or a run folder's network as a file, for as long as the block lasts."""
    if not Path(file).is_dir():
        yield Path(file)
        return
    from tempfile import TemporaryDirectory

    from accaware.experiments.job import load_run, sample_input
    from accaware.exporter.write import export

    with TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        export(load_run(Path(file)), path, "qdq", sample_input(Path(file)))
        yield path


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    """A bar on stderr while that is a terminal; gives what moves it on."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("rows", total=total)
        yield lambda rows: bar.advance(task, rows)


@app.command()
def repair(
    file: Annotated[str, _Argument(help="An ONNX file.", show_default=False)],
    out: Annotated[str, _Option("--out", "-o", help="The ONNX file to write.", show_default=False)],
    target: TargetName = None,
    acc_bits: AccBits = None,
    tile: Tile = None,
    outer_bits: OuterBits = None,
    overflow: Overflow = None,
    inputs: Input = None,
    data: Annotated[
        str | None,
        _Option(
            help="An .npz with `images`, or with a batch for every graph input: errors count as much as they matter."
        ),
    ] = None,
    keep_scales: Annotated[bool, _Option("--keep-scales", help="Change fewer weights, by more.")] = False,
    json: Annotated[str | None, _Option(help="Write the certificate of the repaired file.")] = None,
) -> int:
    """Write the closest weights that cannot overflow, and prove it. Exit code 0: done; 1: it is impossible."""
    from accaware.certify.repair import ImpossibleError, repair_file

    register, patterns = _register(target, acc_bits or [], tile, outer_bits, overflow)
    power = None
    if data is not None:
        from accaware.onnx.moments import mean_squares

        power = mean_squares(file, data)
    try:
        done = repair_file(file, out, register, inputs or [], patterns, power, rescale=not keep_scales)
    except ImpossibleError as error:
        print(f"repair is impossible: {' '.join(str(error).split())}")
        return 1
    print(done.table(), end="")
    print(f"{out}: every operation is proven for {register.name}")
    if json is not None:
        done.certificate.save(json)
    return 0


@app.command()
def targets() -> None:
    """List the named registers, and what each of them assumes."""
    from accaware.certify.targets import TARGETS

    for name, target in TARGETS.items():
        register = target.accumulator
        tile = f", {register.outer_bits} after {register.tile} products" if register.tile else ""
        print(f"{name}\n    {register.bits} bits{tile}, {register.overflow}; bias {target.bias}")
        print(f"    {target.assumes}\n    Source: {target.source or 'by definition'}")


Layers = Callable[[], "Iterable[IntegerLayer]"]


def _of_run(folder: str) -> tuple[Certificate, Layers]:
    from accaware.certify.model import certify
    from accaware.experiments.job import load_run
    from accaware.integer.convert import integer_layers

    model = load_run(Path(folder))
    return certify(model), lambda: (layer for layer in integer_layers(model) if layer.inside)


def _of_file(file: str, target: Target, inputs: list[str], acc_bits: dict[str, int]) -> tuple[Certificate, Layers]:
    from accaware.certify.files import certify_file, file_layers

    return certify_file(file, target, inputs, acc_bits), lambda: file_layers(file, target, inputs, acc_bits)


def _register(
    name: str | None, acc_bits: list[str], tile: int | None, outer_bits: int | None, overflow: str | None
) -> tuple[Target, dict[str, int]]:
    """The target of all operations, and other widths by pattern. Raises `ValueError`."""
    from dataclasses import replace

    from accaware.certify.targets import TARGETS, target
    from accaware.experiments.settings import acc_widths

    plain, patterns = acc_widths(acc_bits)
    if name is not None:
        if plain is not None or any(option is not None for option in (tile, outer_bits, overflow)):
            raise ValueError("--target takes the place of --acc-bits BITS, --tile, --outer-bits and --overflow")
        return target(name), patterns
    if plain is None and all(option is None for option in (tile, outer_bits, overflow)):
        return TARGETS["file"], patterns
    if tile is None and outer_bits is not None:
        raise ValueError("--outer-bits is the register that tiles spill to: it needs --tile")
    given: dict[str, Any] = {"bits": plain, "tile": tile, "outer_bits": outer_bits, "overflow": overflow}
    base = TARGETS["int32"]
    register = replace(base.accumulator, **{k: v for k, v in given.items() if v is not None})
    name = f"int{register.bits}{f'-tile{tile}' if tile else ''}{'-saturate' if overflow == 'saturate' else ''}"
    return replace(base, name=name, accumulator=register), patterns
