"""Finished runs as records: read from run folders, from folders of these, and from collected files. No torch here."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accaware.bounds import data_type_bits
from accaware.certify.certificate import Certificate
from accaware.experiments.metrics import METRICS, PERPLEXITY
from accaware.experiments.settings import Settings, acc_widths
from accaware.files import write_whole
from accaware.formats import IntFormat

INDEX = "index.parquet"
LOCAL = ("data_dir", "checkpoint", "out")  # paths, of which only the last part is anybody's business
LOWER_IS_BETTER = {PERPLEXITY.metric}


@dataclass(frozen=True)
class Run:
    """A finished run: `config` as in config.yaml, `result` as in result.json, and of each layer of the request its
    name, fan_in, codes (lo and hi) and utilisation, as the certificate has them (no layers: it is not at hand).
    """

    config: dict[str, Any]
    result: dict[str, Any]
    layers: list[dict[str, Any]]

    @property
    def metric(self) -> str:
        """One of `METRICS`."""
        return str(self.result["metric"])

    @property
    def value(self) -> float:
        """In its unit."""
        return float(self.result[self.metric])

    @property
    def reference(self) -> float | None:
        """The value of the float network, where there is one."""
        found = self.result.get(f"float_{self.metric}")
        return None if found is None else float(found)

    @property
    def shown(self) -> str:
        """For people: the value, and whether it is proven."""
        proof = "proven" if self.result["holds"] else "NOT proven"
        value = METRICS[self.metric].shown(self.value)
        return f"{value}, {proof} to fit {self.result['acc_bits']} bits (needs {self.result['bits_needed']})"

    @cached_property
    def type_bits(self) -> int | None:
        """The accumulator that the types of the worst layer prove safe; None where the layers are unknown."""
        weights = IntFormat.narrow(self.result["weight_bits"])
        return max((data_type_bits(x["fan_in"], weights, IntFormat(*x["codes"])) for x in self.layers), default=None)

    @property
    def settings(self) -> dict[str, Any]:
        """What may tell runs apart beside the width: the configuration, where patterns stand for widths of layers.

        What a configuration does not name, since it was written before there was such a setting, has its default.
        """
        return {
            **asdict(Settings()),
            **self.config,
            "acc_bits": sorted(acc_widths(self.config.get("acc_bits", ()))[1].items()),
        }


def axis(metric: str) -> str:
    """A metric and its unit, as axes and headings name it.

    >>> axis("top1"), axis("psnr")
    ('top-1 (%)', 'PSNR (dB)')
    """
    known = METRICS[metric]
    return f"{known.name} ({known.unit})" if known.unit else known.name


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """All complete runs of run folders, folders that hold such, and collected JSON files, in the order of their names.

    Float networks, which have no accumulator, are left out. Raises `ValueError` where a path holds no other runs, or a
    file is damaged.
    """
    found: list[Run] = []
    for path in paths:
        runs = _of_folders(path) if path.is_dir() else _of_file(path)
        if not runs:
            raise ValueError(f"{path} holds no complete run of a quantized network")
        found += runs
    return found


def _of_folders(path: Path) -> list[Run]:
    results = [path / "result.json"] if (path / "config.yaml").exists() else path.glob("*/result.json")
    found = (_of_folder(file.parent) for file in sorted(results) if file.exists())
    return [run for run in found if run is not None]


def _of_folder(folder: Path) -> Run | None:
    """None for a float network."""
    import yaml

    try:
        result = json.loads((folder / "result.json").read_text())
        if result["method"] == "float":
            return None
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config = {name: Path(value).name if name in LOCAL and value else value for name, value in config.items()}
        certificate = Certificate.load(folder / "certificate.json")
        layers = [
            {"name": op.name, "fan_in": op.fan_in, "codes": [op.codes.lo, op.codes.hi], "utilisation": op.utilisation}
            for op in certificate.inside
            if op.target and op.codes
        ]
        return _checked(Run(config, result, layers))
    except (yaml.YAMLError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"run folder {folder} is damaged: {error}") from error


def _of_file(file: Path) -> list[Run]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return [_checked(Run(row["config"], row["result"], row.get("layers", []))) for row in rows]
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file} holds no collected runs: {type(error).__name__}: {error}") from error


def _checked(run: Run) -> Run:
    """The run, whose numbers are there."""
    r = run.result
    if not (math.isfinite(run.value) and math.isfinite(run.reference or 0)):
        raise ValueError(f"{run.metric} is not finite")
    _ = run.type_bits, run.settings, run.shown, r["method"], r["act_bits"], r["seed"]
    return run


def collected(runs: Iterable[Run]) -> str:
    """The runs as JSON, one on each line, which `read_runs` reads."""
    records = ({"config": run.config, "result": run.result, "layers": run.layers} for run in runs)
    rows = (json.dumps(record, allow_nan=False) for record in records)
    return "[\n" + ",\n".join(rows) + "\n]\n"


def _flat(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Rows of the same columns: the result, and whatever of the configuration it does not repeat, as plain values."""
    rows = []
    for run in runs:
        row = {"run": run.config.get("out"), **run.result, "type_bits": run.type_bits}
        row |= {name: value for name, value in run.config.items() if name not in row and name != "out"}
        rows.append({name: json.dumps(v) if isinstance(v, dict | list) else v for name, v in row.items()})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in columns} for row in rows]


def as_csv(runs: Iterable[Run]) -> str:
    """One line for each run (at least one); columns are the union of what the runs state."""
    rows = _flat(runs)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_index(folder: Path) -> None:
    """`index.parquet`: one row for each complete run of a sweep, for queries; made from the run folders alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(_flat(_of_folders(folder))), buffer)
    write_whole(folder / INDEX, buffer.getvalue())
