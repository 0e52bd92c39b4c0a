"""Compare sentences by an exported encoder: python encode_onnxruntime.py net.onnx MODEL_FOLDER/tokenizer.json pairs.tsv

Needs onnxruntime, numpy and tokenizers, no PyTorch. Each line of pairs.tsv is a human score (or nothing) and two
sentences, with tabs between them; prints the cosine of each pair and, where there are scores, Spearman's correlation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer


def ranks(values: list[float]) -> np.ndarray:
    """Equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def main(path: str, tokenizer_json: str, pairs: str) -> None:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)

    def embedding(sentence: str) -> np.ndarray:
        ids = np.array([tokenizer.encode(sentence).ids])
        (tokens,) = session.run(["output"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        mean = tokens[0].mean(0)
        return mean / np.linalg.norm(mean)

    scores, cosines = [], []
    for line in Path(pairs).read_text(encoding="utf-8").strip("\n").split("\n"):
        score, first, second = line.split("\t")
        cosine = float(embedding(first) @ embedding(second))
        print(f"{cosine:.4f}\t{first}\t{second}")
        if score:
            scores.append(float(score))
            cosines.append(cosine)
    if scores:
        spearman = np.corrcoef(ranks(scores), ranks(cosines))[0, 1]
        print(f"Spearman {100 * spearman:.2f} % of {len(scores)} pairs")


if __name__ == "__main__":
    main(*sys.argv[1:])
