"""Collect finished run folders into one JSON file, and print their table in Markdown.

    python results/collect.py runs/* -o results/cifar10-resnet20-w4a4.json

Every row keeps the configuration that made it beside its result, which names seed, epochs, hardware, versions and
commit. Paths of data and checkpoints are cut to their file names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

METHODS = ("projected", "a2q+", "a2q", "baseline")
LOCAL = ("data_dir", "checkpoint", "out")


def row(folder: Path) -> dict[str, Any]:
    """Configuration and result of one finished run."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config = {name: Path(value).name if name in LOCAL and value else value for name, value in config.items()}
    return {"config": config, "result": json.loads((folder / "result.json").read_text())}


def table(rows: list[dict[str, Any]]) -> str:
    """Top-1 by method and accumulator width; a star marks runs whose certificate does not hold."""
    results = [r["result"] for r in rows]
    widths = sorted({r["acc_bits"] for r in results}, reverse=True)
    lines = ["| method | " + " | ".join(f"P = {p}" for p in widths) + " |", "|---" * (len(widths) + 1) + "|"]
    for method in METHODS:
        cells = []
        for width in widths:
            found = [r for r in results if r["method"] == method and r["acc_bits"] == width]
            cells.append(" / ".join(f"{r['top1']:.2f}{'' if r['holds'] else '*'}" for r in found))
        if any(cells):
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write the file, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [row(folder) for folder in sorted(arguments.folders) if (folder / "result.json").exists()]
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
