"""Text for networks of the Hugging Face hub: sentence pairs with human scores, and running text."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accaware.experiments.batches import CALIBRATE, generator
from accaware.experiments.images import first_line, require_folder
from accaware.experiments.metrics import PERPLEXITY, SPEARMAN, Metric

BATCH_TOKENS = 4096
MAX_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class TokenBatches:
    """Sequences of token numbers in batches of one length each: without padding. Yields keyword arguments."""

    sequences: Sequence[Sequence[int]]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (inputs for _, inputs in self.numbered())

    def numbered(self) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """With the numbers of the sequences in each batch; `input_ids` and `attention_mask` are int64 [B, L]."""
        order = sorted(range(len(self.sequences)), key=lambda i: len(self.sequences[i]))
        for length, group in groupby(order, lambda i: len(self.sequences[i])):
            rows, size = list(group), max(1, BATCH_TOKENS // length)
            for first in range(0, len(rows), size):
                chosen = rows[first : first + size]
                ids = torch.tensor([list(self.sequences[i]) for i in chosen])
                yield chosen, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs as tokens: those with a human score, and the sentences of those without, for calibration.

    sentences: the first of every pair, then the second of every pair.
    """

    sentences: Sequence[Sequence[int]]
    human: Tensor
    unlabelled: Sequence[Sequence[int]]
    split: str = "test"
    classes: None = None
    task: Metric = SPEARMAN

    def score(self, model: nn.Module, device: torch.device) -> float:
        """100 times Spearman's correlation of the human scores with the cosines of both sentences' mean outputs."""
        found: list[Tensor] = [torch.empty(0)] * len(self.sentences)
        for numbers, inputs in TokenBatches(self.sentences).numbered():
            with torch.no_grad():
                out = model(**{name: value.to(device) for name, value in inputs.items()})
            for number, mean in zip(numbers, out.last_hidden_state.mean(1).cpu(), strict=True):
                found[number] = mean
        first, second = torch.stack(found).chunk(2)
        return 100 * spearman(F.cosine_similarity(first.double(), second.double()), self.human)


@dataclass(frozen=True)
class Running:
    """Text as pieces of tokens of equal length: those that are judged, and those for calibration."""

    pieces: Sequence[Sequence[int]]
    unlabelled: Sequence[Sequence[int]]
    split: str = "test"
    classes: None = None
    task: Metric = PERPLEXITY

    def score(self, model: nn.Module, device: torch.device) -> float:
        """exp of the mean cross-entropy of every token but the first of each piece, given those before it there."""
        total = 0.0
        for inputs in TokenBatches(self.pieces):
            with torch.no_grad():
                logits = model(**{name: value.to(device) for name, value in inputs.items()}).logits
            total += float(
                F.cross_entropy(logits[:, :-1].mT.float(), inputs["input_ids"][:, 1:].to(device), reduction="sum")
            )
        mean = total / sum(len(piece) - 1 for piece in self.pieces)
        return math.exp(mean) if mean < MAX_EXPONENT else math.inf


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two [n]; values that are equal share the mean of their ranks."""
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def load(name: str, folder: Path | None, tokenizer: Any, length: int) -> Pairs | Running:
    """The data called `name`, in tokens; at most `length` of them a sentence or piece.

    "sts": `pairs_from_folder`, without a folder the STS Benchmark from the hub (`sentence-transformers/stsb`). "text":
    a folder with train.txt (for calibration) and test.txt, in UTF-8, such as WikiText's. Raises `ValueError`.
    """
    if name == "sts":
        rows = pairs_from_hub() if folder is None else pairs_from_folder(folder)
        judged = [row for row in rows if row[0] is not None]
        plain = [sentence for score, *pair in rows if score is None for sentence in pair]
        if len(judged) < 2 or not plain:
            raise ValueError(f"data {folder or name} needs pairs with a score, and pairs without one for calibration")
        if len({row[0] for row in judged}) < 2:
            raise ValueError(f"data {folder or name}: all scores are equal, and nothing correlates with that")
        sentences = [row[1] for row in judged] + [row[2] for row in judged]
        tokens = tokenizer(sentences + plain, truncation=True, max_length=length)["input_ids"]
        human = torch.tensor([row[0] for row in judged], dtype=torch.float64)
        return Pairs(tokens[: len(sentences)], human, tokens[len(sentences) :])
    if folder is None:
        raise ValueError("data 'text' needs a folder with train.txt and test.txt: --data-dir")
    require_folder(folder)
    return Running(_pieces(folder / "test.txt", tokenizer, length), _pieces(folder / "train.txt", tokenizer, length))


Row = tuple[float | None, str, str]


def pairs_from_folder(folder: Path) -> list[Row]:
    """(score or None, sentence, sentence) of all *.tsv and *.csv of a folder; columns are separated by tabs.

    Files have three columns (score, which may be empty, and two sentences) or at least seven, as those of the STS
    Benchmark (sts-test.csv, sts-train.csv: score and sentences are columns 5 to 7). The scores of files with "train" or
    "dev" in their name do not count, since these are for calibration.
    """
    require_folder(folder)
    rows: list[Row] = []
    for file in sorted([*folder.glob("*.tsv"), *folder.glob("*.csv")]):
        known = not any(word in file.stem for word in ("train", "dev"))
        for number, line in enumerate(_read(file).splitlines(), 1):
            cells = line.split("\t")
            score, *pair = cells[4:7] if len(cells) >= 7 else cells
            try:
                first, second = pair
                rows.append((float(score) if score and known else None, first, second))
            except ValueError:
                raise ValueError(f"data file {file}, line {number}: no score and two sentences between tabs") from None
    if not rows:
        raise ValueError(f"data folder {folder} holds no *.tsv or *.csv with sentence pairs")
    return rows


def pairs_from_hub() -> list[Row]:
    """The pairs of the STS Benchmark; those of its training set without their scores."""
    import datasets

    try:
        parts = datasets.load_dataset("sentence-transformers/stsb")
    except Exception as error:  # the hub's client raises dozens of types
        raise ValueError(f"stsb cannot be had from the hub ({first_line(error)}); give --data-dir") from error
    judged: list[Row] = [(row["score"], row["sentence1"], row["sentence2"]) for row in parts["test"]]
    return judged + [(None, row["sentence1"], row["sentence2"]) for row in parts["train"]]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data file {file} cannot be read: {first_line(error)}") from error


def _pieces(file: Path, tokenizer: Any, length: int) -> list[list[int]]:
    tokens = tokenizer(_read(file))["input_ids"]
    pieces = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    if length < 2 or not pieces:
        raise ValueError(f"data file {file} has {len(tokens)} tokens; pieces have max_length={length}, at least 2")
    return pieces


def drawn(sequences: Sequence[Sequence[int]], count: int, seed: int) -> TokenBatches:
    """`count` of the sequences without replacement, or all of them where there are fewer."""
    order = torch.randperm(len(sequences), generator=generator(seed, CALIBRATE))[:count]
    return TokenBatches([sequences[i] for i in order.tolist()])
