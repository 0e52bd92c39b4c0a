"""Text: batches by length, sentence pairs from files, correlation, perplexity, and whole runs of `accaware ptq`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from scipy.stats import spearmanr

import accaware as aa
from accaware.cli import run
from accaware.experiments.job import load_run
from accaware.experiments.results import read_runs
from accaware.experiments.text import Pairs, Running, TokenBatches, drawn, load, pairs_from_folder, spearman
from cli_helpers import fails
from transformer_helpers import folder

SENTENCES = ["the cat climbs a tree", "a dog sees the cat", "small house", "the big dog sees a small tree near a house"]
PTQ = ["--act-bits", "8", "--acc-bits", "14", "--tile", "8", "--algorithm", "projection", "--device", "cpu"]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def pairs(path: Path) -> Path:
    rows = [(f"{i + j / 2}", a, b) for i, a in enumerate(SENTENCES) for j, b in enumerate(SENTENCES)]
    write(path / "judged.tsv", "".join("\t".join(row) + "\n" for row in rows))
    write(path / "plain.tsv", "".join(f"\t{a}\t{b}\n" for _, a, b in rows))
    return path


def test_batches_hold_sequences_of_one_length() -> None:
    sequences = [[1, 2, 3], [4, 5], [6], [7, 8, 9], [10, 11]]
    found = list(TokenBatches(sequences).numbered())
    assert [(n, inputs["input_ids"].tolist()) for n, inputs in found] == [
        ([2], [[6]]),
        ([1, 4], [[4, 5], [10, 11]]),
        ([0, 3], [[1, 2, 3], [7, 8, 9]]),
    ]
    assert all(inputs["attention_mask"].all() for _, inputs in found)
    large = list(TokenBatches([[0] * 1000] * 9))
    assert [len(inputs["input_ids"]) for inputs in large] == [4, 4, 1]


def test_calibration_draws_without_replacement() -> None:
    sequences = [[i] for i in range(20)]
    chosen = drawn(sequences, 8, seed=0).sequences
    assert len({s[0] for s in chosen}) == 8
    assert chosen == drawn(sequences, 8, seed=0).sequences != drawn(sequences, 8, seed=1).sequences
    assert len(drawn(sequences, 99, seed=0).sequences) == 20


def test_spearman_is_scipys_with_ties() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randint(6, (50,), generator=random).double(), torch.randn(50, generator=random).double()
    for x, y in ((a, b), (a, a - b.round()), (b, -b)):
        assert spearman(x, y) == pytest.approx(spearmanr(x, y)[0], abs=1e-12)


def test_pairs_come_from_three_columns_or_those_of_the_benchmark(tmp_path: Path) -> None:
    write(tmp_path / "a.tsv", "a cat's\t\"quoted\tb\n".replace("a cat's", "4.5") + "\tplain\tpair\n")
    seven = "genre\tfile\t2012\t1\t{}\tx\ty\tsource\n"
    write(tmp_path / "sts-test.csv", seven.format(3.25))
    write(tmp_path / "sts-train.csv", seven.format(1.0))
    write(tmp_path / "notes.txt", "no data")
    assert pairs_from_folder(tmp_path) == [
        (4.5, '"quoted', "b"),
        (None, "plain", "pair"),
        (3.25, "x", "y"),
        (None, "x", "y"),
    ]


@pytest.mark.parametrize(("text", "line"), [("1\ta\tb\n2\ta\n", 2), ("high\ta\tb\n", 1), ("1\ta\tb\tc\n", 1)])
def test_damaged_lines_are_named(tmp_path: Path, text: str, line: int) -> None:
    write(tmp_path / "a.tsv", text)
    with pytest.raises(ValueError, match=rf"a\.tsv, line {line}: no score and two sentences"):
        pairs_from_folder(tmp_path)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        pairs_from_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no"):
        pairs_from_folder(tmp_path)
    write(tmp_path / "a.tsv", "1\ta\tb\n2\ta\tb\n")
    with pytest.raises(ValueError, match="pairs without one for calibration"):
        load("sts", tmp_path, None, 8)
    with pytest.raises(ValueError, match="data 'text' needs a folder"):
        load("text", None, None, 8)
    write(tmp_path / "test.txt", "one two three")
    with pytest.raises(ValueError, match=r"test\.txt has 3 tokens; pieces have max_length=8"):
        load("text", tmp_path, lambda text: {"input_ids": text.split()}, 8)


def test_equal_scores_are_refused(tmp_path: Path) -> None:
    """Nothing correlates with a constant: the result would be no number."""
    write(tmp_path / "pairs.tsv", "3\ta cat\ta dog\n3.0\tthe house\ta tree\n\ta\tb\n")
    with pytest.raises(ValueError, match="all scores are equal, and nothing correlates with that"):
        load("sts", tmp_path, lambda texts, **_: {"input_ids": [[1]] * len(texts)}, 8)


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    def model(input_ids, attention_mask):
        return SimpleNamespace(logits=torch.tensor([0.0, 1e4]).expand(*input_ids.shape, 2))

    assert Running([[0, 0, 0]], []).score(model, torch.device("cpu")) == math.inf  # type: ignore[arg-type]


def test_the_score_correlates_cosines_of_mean_tokens() -> None:
    vectors = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))

    def model(input_ids, attention_mask):
        return SimpleNamespace(last_hidden_state=vectors[input_ids])

    sentences = [[0, 1], [2], [3, 4, 5], [6], [7, 8], [1]]
    means = torch.stack([vectors[s].mean(0) for s in sentences])
    human = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    wanted = 100 * spearmanr(F.cosine_similarity(means[:3], means[3:]), human)[0]
    assert Pairs(sentences, human, []).score(model, torch.device("cpu")) == pytest.approx(wanted)  # type: ignore[arg-type]


def test_a_sentence_encoder_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder("bert", tmp_path / "encoder")
    words = ["--data", "sts", "--data-dir", str(pairs(tmp_path / "sts")), "--model", "hf:encoder", "--max-length", "16"]
    assert run(["ptq", *words, *PTQ, "--out", "a"]) == 0
    result = json.loads(Path("a/result.json").read_text())
    assert (result["metric"], result["holds"], result["split"], result["model"]) == (
        "spearman",
        True,
        "test",
        "hf:encoder",
    )
    assert -100 <= result["spearman"] <= 100
    assert result["spearman"] != result["float_spearman"]
    assert "transformers" in result["versions"]
    assert yaml.safe_load(Path("a/config.yaml").read_text())["max_length"] == 16
    certificate = aa.Certificate.load("a/certificate.json")
    assert len(certificate.inside) == 6
    found = {op.name: op for op in certificate.operations}
    assert found["pooler.dense"].note == "float layer"
    assert found["encoder.layer.0.attention.self.attention_value"].note.endswith("a sum of 16 products of activations")
    assert aa.certify(load_run(Path("a"))).sha256 == certificate.sha256
    (kept,) = read_runs([Path("a")])
    assert kept.shown.startswith(f"Spearman {result['spearman']:.2f} %, proven to fit 14 bits")


def test_a_language_model_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = folder("gpt2", tmp_path / "gpt2")
    for name in ("train", "test"):
        write(tmp_path / "books" / f"{name}.txt", " ".join(SENTENCES * 4) + "\n")
    words = ["--data", "text", "--data-dir", "books", "--model", "hf:gpt2", "--max-length", "8"]
    assert run(["ptq", *words, *PTQ, "--out", "a"]) == 0
    result = json.loads(Path("a/result.json").read_text())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(path)(" ".join(SENTENCES * 4), return_tensors="pt")["input_ids"][0]
    pieces = tokens[: len(tokens) // 8 * 8].reshape(-1, 8)
    loss = AutoModelForCausalLM.from_pretrained(path)(input_ids=pieces, labels=pieces).loss
    assert result["float_perplexity"] == pytest.approx(math.exp(loss.item()), rel=1e-4)
    assert result["perplexity"] != result["float_perplexity"]
    certificate = aa.Certificate.load("a/certificate.json")
    inside = [op.name.removeprefix("transformer.h.0.") for op in certificate.inside]
    assert inside == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]  # Conv1D, and no head
    assert certificate.holds
    assert run(["ptq", *words, *PTQ, "--rotate", "--act-scale", "token", "--out", "b"]) == 0
    turned = aa.Certificate.load("b/certificate.json")
    assert turned.holds
    assert {op.note for op in turned.inside} == {"a scale for each token, inputs are rotated"}
    again = load_run(Path("b"))
    assert aa.certify(again).sha256 == turned.sha256 != certificate.sha256
    with torch.no_grad():
        loss = again(input_ids=pieces, labels=pieces).loss
    found = json.loads(Path("b/result.json").read_text())["perplexity"]
    assert found == pytest.approx(math.exp(loss.item()), rel=1e-3)


def test_impossible_requests_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(pairs(tmp_path / "sts"))
    sts = ["--data", "sts", "--data-dir", data, "--out", str(tmp_path / "no")]
    assert "need each other, not 'sts', 'resnet20'" in fails(["ptq", *sts], capsys)
    assert "need each other" in fails(["ptq", "--model", "hf:x", "--out", "no"], capsys)
    assert "data 'sts' is for ptq" in fails(["train", *sts, "--model", "hf:x"], capsys)
    assert "without val_size" in fails(["ptq", *sts, "--model", "hf:x", "--val-size", "3"], capsys)
    assert "model 'hf:" in fails(["ptq", *sts, "--model", f"hf:{tmp_path}"], capsys)
    longer = ["--model", f"hf:{folder('bert', tmp_path / 'encoder')}", "--max-length", "33"]
    assert "max_length must be at most 32, the positions of hf:" in fails(["ptq", *sts, *longer], capsys)
    assert "max_length must be at least 2" in fails(["ptq", *sts, "--model", "hf:x", "--max-length", "1"], capsys)
