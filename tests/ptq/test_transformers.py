"""Transformers: every nn.Linear fits its accumulator, padding is no data, attention is listed with what it needs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import accaware as aa
from accaware.prepare import quant_layers
from transformer_helpers import padded, tiny

BATCHES = [padded([5, 9, 9, 3], seed) for seed in range(4)]
SAMPLE = {name: value[:, :3] for name, value in padded([4], 9).items()}
#: Output of the last layer in the wide sense, [B, L, d].
KINDS = {"bert": "last_hidden_state", "llama": "logits"}


class Counted(list):
    """How often it is iterated over."""

    times = 0

    def __iter__(self):
        self.times += 1
        return super().__iter__()


def prepared(kind, keep, **options):
    reference = tiny(kind)
    model = copy.deepcopy(reference)
    spec = aa.Spec(**{"weight_bits": 4, "act_bits": 8, "acc_bits": 14, "tile": 8, **options})
    aa.prepare_(model, spec, SAMPLE, keep=keep)
    aa.calibrate(model, BATCHES)
    return model, reference


def distance(model, reference, output):
    with torch.no_grad():
        differences = (model(**b)[output] - reference(**b)[output] for b in BATCHES)
        return sum(
            float((d * b["attention_mask"].unsqueeze(-1)).square().sum())
            for d, b in zip(differences, BATCHES, strict=True)
        )


@pytest.mark.parametrize(("kind", "keep"), [("bert", {"pooler.dense": "float"}), ("llama", {"lm_head": 8})])
def test_the_integers_fit_and_bring_the_outputs_nearer(kind, keep):
    model, reference = prepared(kind, keep)
    before = distance(model, reference, KINDS[kind])
    batches = Counted(BATCHES)
    aa.reconstruct(model, reference, batches)
    assert batches.times == 5  # once to see the order; Q, K and V, and Llama's gate and up, read one tensor
    assert distance(model, reference, KINDS[kind]) < 0.25 * before
    certificate = aa.certify(model)
    assert certificate.holds
    assert certificate.bits_needed <= 14
    inside = {op.name for op in certificate.inside}
    assert inside == {n for n, m in reference.named_modules() if type(m) is nn.Linear} - set(keep)


def test_layers_that_read_one_tensor_share_its_codes():
    model, _ = prepared("bert", {"pooler.dense": "float"})
    heads = model.encoder.layer[0].attention.self
    assert heads.query.input_quant is heads.key.input_quant is heads.value.input_quant
    assert heads.query.input_quant.codes == aa.Spec(act_bits=8).act_format(signed=True)


def test_padding_is_no_data():
    """The same tokens in batches without padding give the same integers."""
    rows = [
        {n: v[i : i + 1, : int(b["attention_mask"][i].sum())] for n, v in b.items()} for b in BATCHES for i in range(4)
    ]
    found = []
    for batches in (BATCHES, rows):
        reference = tiny("bert")
        model = copy.deepcopy(reference)
        aa.prepare_(model, aa.Spec(acc_bits=12), SAMPLE, keep={"pooler.dense": "float", "*attention.*": "float"})
        aa.calibrate(model, batches)
        aa.reconstruct(model, reference, batches)
        found.append([layer.deployed()[1] for layer in quant_layers(model).values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=0)


def test_a_head_that_shares_its_weights_leaves_the_embedding_alone():
    model, reference = prepared("llama", {})
    assert reference.lm_head.weight is reference.model.embed_tokens.weight
    aa.reconstruct(model, reference, BATCHES)
    assert torch.equal(model.model.embed_tokens.weight, reference.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, reference.lm_head.weight)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_products_of_attention_are_listed_with_what_they_would_need(kind):
    model = tiny("bert")
    model.set_attn_implementation(kind)
    aa.prepare_(model, aa.Spec(act_bits=8), padded([20]), keep={"pooler.dense": "float"})
    aa.calibrate(model, BATCHES)
    found = {op.name: op for op in aa.certify(model).operations}
    names = ("query_key", "attention_value") if kind == "sdpa" else ("matmul", "matmul_2")
    query_key, attention_value = (found[f"encoder.layer.0.attention.self.{name}"] for name in names)
    assert query_key.verdict == attention_value.verdict == "outside"
    assert query_key.bits_needed == 19  # 8 * 128 * 128 = 2^17, which signed codes of 18 bits just miss
    assert attention_value.bits_needed == 21  # 20 * 255 * 128 = 652,800
    assert attention_value.note == "float; in 8-bit codes, a sum of 20 products of activations"
    assert found["encoder.layer.0.attention.output.LayerNorm.layer_norm"].bits_needed is None


def test_norms_are_not_looked_for_where_there_are_none():
    """The bias of a transformer's layer is corrected though nothing can trace the model, and without a warning."""
    model, reference = prepared("llama", {"lm_head": "float"}, tile=None)
    with pytest.warns(UserWarning, match="neither a bias nor a batch-norm"):
        aa.bias_correct(model, reference, BATCHES)
