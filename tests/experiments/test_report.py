"""The page and the pictures of many runs: every number is that of a result.json, in a browser too."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from xml.etree.ElementTree import Element

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from accaware.cli import run
from accaware.experiments.curves import groups
from accaware.experiments.figures import LIGHT, MARKERS, _line, _title, draw
from accaware.experiments.results import Run, collected
from accaware.formats import IntFormat
from cli_helpers import fails
from experiments.helpers import made_up
from pages import Page, browse, text

LAYERS = [("layer1.conv", 576, IntFormat.unsigned(4)), ("<b>", 64, IntFormat.unsigned(4))]


def runs(metric: str = "top1", top: float = 90) -> list[Run]:
    """Two methods at three widths with three seeds and two pairs (M, N), and a baseline."""
    random = iter(range(100))
    found = [
        made_up(
            top + width - 3 * (method == "a2q+") - next(random) / 7, width, LAYERS, method=method, seed=seed, **more
        )
        for method in ("projected", "a2q+")
        for width in (10, 11, 12)
        for seed in range(3)
        for more in ({"metric": metric, "weight_bits": bits} for bits in (3, 4))
    ]
    return [*found, made_up(top, 32, LAYERS, method="baseline", bits_needed=15, metric=metric)]


def numbers(page: Page, caption: str) -> dict[str, dict[str, str]]:
    """Cells of the table under a heading, by row and column."""
    (region,) = (e for e in page.find("div[@role='region']") if e.get("aria-label") == caption and e.find("table"))
    return cells(region)


def cells(region: Element) -> dict[str, dict[str, str]]:
    head, *rows = region.findall(".//tr")
    names = [text(cell) for cell in head]
    return {text(row[0]): dict(zip(names[1:], map(text, row[1:]), strict=True)) for row in rows}


def check(page: Page, results: list[dict[str, Any]]) -> None:
    """What the page shows of these results: values, spreads, sparsity, utilisation, and each run."""
    metric = results[0]["metric"]
    shown = numbers(page, {"top1": "top-1 (%) by P", "psnr": "PSNR (dB) by P"}[metric])
    for method in ("projected", "a2q+"):
        for width in (10, 11, 12):
            seeds = {
                bits: [
                    r[metric]
                    for r in results
                    if (r["method"], r["acc_bits"], r["weight_bits"]) == (method, width, bits)
                ]
                for bits in (3, 4)
            }
            best = max(seeds, key=lambda bits: fmean(seeds[bits]))
            expected = f"{fmean(seeds[best]):.2f}± {stdev(seeds[best]):.2f}, 3 seedsM, N = {best}, 4, best of 2"
            assert shown[str(width)][method] == expected
    assert set(shown) == {"10", "11", "12", "15", "17"}
    for width in ("15", "17"):
        (value,) = filter(None, shown[width].values())
        assert value == f"{results[-1][metric]:.2f}M, N = 4, 4"
    assert numbers(page, "Weights that are 0 (%) by P")["10"]["projected"] == "50.0"
    used = numbers(page, "Used of the register, by layer (%)")
    assert set(used) == {"layer1.conv", "<b>"}
    assert set(used["<b>"].values()) == {"75"}
    listed = page.find("details")[-1].findall(".//tbody/tr")
    assert [[text(cell) for cell in row[1:7]] for row in listed] == [
        [str(r[name]) for name in ("method", "acc_bits", "weight_bits", "act_bits", "seed", metric)] for r in results
    ]


@pytest.mark.parametrize(("metric", "top"), [("top1", 70.0), ("psnr", 25.0)])
def test_a_browser_shows_the_numbers_of_the_results(
    metric: str, top: float, browser: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs.json").write_text(collected(runs(metric, top)))
    assert run(["report", str(tmp_path / "runs.json"), "-o", str(tmp_path / "report.html")]) == 0
    page = Page(browse(browser, tmp_path, tmp_path / "report.html", "--dump-dom"))
    check(page, [row["result"] for row in json.loads((tmp_path / "runs.json").read_text())])
    assert "projected | 12" in re.sub(" +", " ", capsys.readouterr().out)


def test_the_committed_results_are_drawn(browser: str, tmp_path: Path) -> None:
    """In light and in dark, without anything wider than a phone."""
    files = sorted((Path(__file__).parents[2] / "results").glob("*.json"))
    file, shot = tmp_path / "report.html", tmp_path / "shot.png"
    assert run(["report", *map(str, files), "-o", str(file)]) == 0
    shown = " ".join(text(row) for row in Page(browse(browser, tmp_path, file, "--dump-dom")).find("details//tr"))
    for path in files:
        for row in json.loads(path.read_text()):
            assert str(row["result"][row["result"]["metric"]]) in shown
    for scheme, colour in ((1, "#ffffff"), (0, "#171c23")):
        options = [f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}", "--window-size=1400,900"]
        browse(browser, tmp_path, file, *options)
        with Image.open(shot) as picture:  # the middle of the first figure, between its lines
            pixels = picture.convert("RGB").crop((60, 300, 1340, 700)).getcolors(2**20) or []
        assert max(pixels)[1] == tuple(bytes.fromhex(colour[1:]))
    frame = f"<iframe src='{file.name}' style='width:400px;height:800px;border:0'></iframe>"
    script = (
        "onload=()=>{const f=document.querySelector('iframe');f.title=f.contentDocument.documentElement.scrollWidth}"
    )
    (tmp_path / "frame.html").write_text(f"{frame}<script>{script}</script>")
    (found,) = Page(browse(browser, tmp_path, tmp_path / "frame.html", "--dump-dom")).find("iframe")
    assert found.get("title") == "400"


def test_bits_saved_and_the_papers_are_on_the_page(tmp_path: Path) -> None:
    ours = [made_up(value, bits) for bits, value in ((9, 80), (10, 86))]
    (tmp_path / "runs.json").write_text(collected([*ours, made_up(83, 12, method="a2q+")]))
    assert run(["report", str(tmp_path / "runs.json"), "-o", str(tmp_path / "report.html")]) == 0
    page = Page((tmp_path / "report.html").read_text())
    saved = {"P of the best A2Q+": "12", "its value": "83.00", "bits saved": "2.50"}
    assert numbers(page, "Bits saved") == {"projected": saved}
    beside = [e for e in page.find("div[@role='region']") if "A2Q+ paper" in e.get("aria-label", "")]
    assert cells(beside[0])["epochs"] == {"here": "1", "there": "100", "": "not the same"}
    assert cells(beside[1])["12"] == {
        "projected, here": "",
        "a2q+, here": "83.00",
        "A2Q, there": "89.1",
        "A2Q+, there": "92.8",
        "baseline by data type, there": "",
    }


def test_what_is_not_proven_is_starred(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.json").write_text(collected([made_up(80, 10, holds=False), made_up(81, 11)]))
    assert run(["report", str(tmp_path / "runs.json"), "-o", str(tmp_path / "report.html")]) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert text(page.find("header")[0]).count("NOT proven: 1 run, starred below.") == 1
    assert numbers(page, "top-1 (%) by P")["10"]["projected"] == "80.00*"
    assert "80.00* " in capsys.readouterr().out


def test_pictures_are_written_for_light_and_dark_pages(tmp_path: Path) -> None:
    (tmp_path / "runs.json").write_text(collected(runs()))
    for name, more, colour in (("light", [], (255, 255, 255)), ("dark", ["--dark"], (0x17, 0x1C, 0x23))):
        words = ["report", str(tmp_path / "runs.json"), *more]
        for suffix in ("png", "svg", "csv"):
            words += ["-o", str(tmp_path / f"{name}.{suffix}")]
        assert run(words) == 0
        with Image.open(io.BytesIO((tmp_path / f"{name}.png").read_bytes())) as picture:
            assert picture.convert("RGB").getpixel((2, 2)) == colour
        assert (tmp_path / f"{name}.csv").read_text().count("\n") == 1 + len(runs())
    first = (tmp_path / "light.svg").read_bytes()
    assert run(["report", str(tmp_path / "runs.json"), "-o", str(tmp_path / "again.svg")]) == 0
    assert (tmp_path / "again.svg").read_bytes() == first
    assert len(groups(runs())) == 1


def many(count: int) -> list[Run]:
    """Curves of one point each, which differ in a setting."""
    return [made_up(70 + number, 10, preload=f"p{number}") for number in range(count)]


def test_a_long_legend_stands_below_and_leaves_the_curves_room(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    draw(groups([*many(11), made_up(1, 10, epochs=3.0)]), "png")
    canvas = FigureCanvasAgg(drawn[0])
    canvas.draw()
    renderer = canvas.get_renderer()
    above, below = drawn[0].subfigs
    (legend,) = above.legends
    box = legend.get_window_extent(renderer)
    assert all(axes.get_legend() is None for axes in above.axes)
    assert not any(box.overlaps(axes.get_tightbbox(renderer)) for axes in above.axes)
    assert box.x0 >= 0
    assert box.x1 <= above.bbox.x1
    assert box.y0 >= above.bbox.y0 - 1
    assert below.legends == []
    assert below.axes[0].get_legend() is not None


def test_every_curve_of_a_method_has_a_marker_of_its_own() -> None:
    (group,) = groups(many(len(MARKERS)))
    assert len({_line(group, number, LIGHT)["marker"] for number in range(len(group.curves))}) == len(MARKERS) > 9


def test_a_figure_says_which_pairs_of_bits_its_points_have() -> None:
    (one,) = groups([made_up(80, 10)])
    (two,) = groups([made_up(80, 10), made_up(85, 16, act_bits=8)])
    assert _title(one) == one.title
    assert _title(two) == f"{two.title}\neach point is the best that was run there of W4A4, W4A8"


def test_the_committed_figure_is_that_of_the_committed_results(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "results"
    files = [str(folder / f"cifar10-resnet20-{name}.json") for name in ("w4a4", "w4a4-more")]
    assert run(["report", *files, "-o", str(tmp_path / "front.svg")]) == 0
    shown = [re.findall(r"<!-- (.+) -->", (f / "front.svg").read_text()) for f in (folder, tmp_path)]
    assert shown[0] == shown[1], "other words; whether lines lie elsewhere depends on the version of matplotlib"


def test_nothing_is_written_where_nothing_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(["report", str(tmp_path), "-o", str(tmp_path / "report.html")], capsys)
    assert list(tmp_path.iterdir()) == []
