"""Certificates of PyTorch models: they hold whatever training does, except where nothing was promised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import accaware as aa
from accaware.formats import Spec
from accaware.layers import QuantIdentity


def small(transposed=True):
    layers = [nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)]
    if transposed:
        layers += [nn.ConvTranspose2d(4, 3, 3, stride=2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


def trained(spec, seed, steps, lr, scale=1.0):
    torch.manual_seed(seed)
    model, x = small(), torch.randn(8, 2, 5, 5)
    model(x)
    aa.prepare_(model, spec, sample=x[:2])
    aa.calibrate(model, [x])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    for _ in range(steps):
        loss = F.cross_entropy(scale * model(torch.randn(8, 2, 5, 5)), torch.randint(3, (8,))) + aa.penalty(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    return model


@st.composite
def requests(draw):
    method = draw(st.sampled_from(["projected", "a2q", "a2q+"]))
    return Spec(
        weight_bits=draw(st.integers(2, 8)),
        act_bits=draw(st.integers(2, 4)),
        acc_bits=draw(st.integers(6, 10)),
        method=method,
        preload=draw(st.sampled_from(["none", "free"])) if method == "projected" else "none",
        tile=draw(st.sampled_from([None, None, 3, 8])),
        order=draw(st.sampled_from(["chw", "hwc"])),
        overflow=draw(st.sampled_from(["wrap", "saturate"])),
        per_channel=draw(st.booleans()),
    )


@example(Spec(2, 2, 9, method="a2q", per_channel=False), 2, 2, 10.0)  # the scale of an activation falls below 0
@given(requests(), st.integers(0, 2**31), st.integers(0, 3), st.sampled_from([1e-3, 0.1, 10.0]))
@settings(max_examples=25, deadline=None)
def test_the_certificate_holds_after_any_training(spec, seed, steps, lr):
    model = trained(spec, seed, steps, lr)
    certificate = aa.certify(model)
    assert certificate.holds, certificate.table()
    assert certificate.bits_needed <= spec.acc_bits
    assert all(op.verdict == "proven" for op in certificate.inside)
    assert len(certificate.inside) == 5
    # Not one input of the data overflows either.
    x = torch.randn(4, 2, 5, 5)
    if spec.tile is None:
        with torch.no_grad():
            plain = model(x)
            with aa.wrapping(model):
                torch.testing.assert_close(model(x), plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_baseline_is_refuted_by_an_input_that_overflows(seed):
    model = trained(Spec(acc_bits=6, method="baseline"), seed, 2, 0.01)
    certificate = aa.certify(model)
    assert not certificate.holds
    refuted = [op for op in certificate.operations if op.verdict == "refuted"]
    assert refuted
    integers = {layer.name: layer for layer in aa.integer_layers(model)}
    for op in refuted:
        layer, found = integers[op.name], op.witness
        inputs = np.array(found.inputs)
        assert inputs.min() >= layer.codes.lo
        assert inputs.max() <= layer.codes.hi
        total = int(layer.rows[found.row] @ inputs)
        assert total == found.value
        assert not -32 <= total <= 31


def test_the_baseline_is_proven_where_the_register_is_wide():
    assert aa.certify(trained(Spec(acc_bits=32, method="baseline"), 0, 1, 0.01)).holds


def test_the_certificate_follows_the_weights():
    """A step of a fused optimizer or a write through `.data` changes what is certified."""
    model = trained(Spec(acc_bits=9, method="baseline"), 0, 0, 0.1)
    first = aa.certify(model)
    with torch.no_grad():
        model(torch.randn(4, 2, 5, 5))
    assert aa.certify(model).sha256 == first.sha256
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)
    torch.optim.SGD([model[0].weight], lr=0.5, fused=True).step()
    second = aa.certify(model)
    model[0].weight.data.mul_(-1)
    third = aa.certify(model)
    assert len({c.sha256 for c in (first, second, third)}) == 3


def test_the_function_survives_the_package_of_its_name():
    model = trained(Spec(acc_bits=9), 0, 0, 0.1)
    assert aa.Certificate is not None
    assert aa.certify(model).holds
    assert aa.certify(model).holds


class Everything(nn.Module):
    """One of each thing that accumulates, most of it outside any request."""

    def __init__(self):
        super().__init__()
        self.conv, self.kept, self.plain = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.stream = QuantIdentity()
        self.pool = nn.AvgPool2d(2)
        self.norm = nn.BatchNorm2d(4)
        self.rnn = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stream(self.norm(self.conv(x)).relu())
        x = self.pool(self.plain(self.kept(x)) + x)
        a = F.adaptive_avg_pool2d(self.stream(x.relu()), 1).flatten(1)
        b = x.flatten(2)
        b = torch.einsum("bct,bdt->bcd", b, b) @ b.mean(-1, keepdim=True)
        c, _ = self.rnn(x.flatten(2).transpose(1, 2))
        return self.head(a + b.flatten(1) + c.sum(1))


def everything(keep=None):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = Everything()
    aa.prepare_(model, Spec(acc_bits=10), sample=x[:1], keep=keep or {"kept": 8, "plain": "float"})
    aa.calibrate(model, [x])
    return model


def test_every_accumulating_operation_is_listed_once():
    certificate = aa.certify(everything())
    found = {op.name: op for op in certificate.operations}
    assert certificate.holds
    assert len(found) == len(certificate.operations), [op.name for op in certificate.operations]
    assert {name for name, op in found.items() if op.verdict != "outside"} == {"conv", "head"}
    assert found["kept"].verdict == "outside"
    assert found["kept"].bits_needed > 10
    assert found["plain"].bits_needed is None
    assert found["plain"].note == "float layer"
    kinds = {op.kind for op in certificate.operations if op.verdict == "outside"}
    assert kinds >= {"Conv2d", "avg_pool2d", "adaptive_avg_pool2d", "einsum", "matmul", "mean", "lstm", "sum", "add"}


def test_a_sum_of_codes_tells_its_width():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.stream, self.head = nn.Conv2d(3, 4, 3), QuantIdentity(), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(F.adaptive_avg_pool2d(self.stream(self.conv(x).relu()), 1).flatten(1))

    x = torch.randn(4, 3, 10, 10)
    model = Pooled()
    aa.prepare_(model, Spec(acc_bits=10), sample=x)
    aa.calibrate(model, [x])
    (pool,) = (op for op in aa.certify(model).operations if op.kind == "adaptive_avg_pool2d")
    assert pool.bits_needed == 11  # 64 codes of at most 15: 960 needs 11 bits
    assert pool.note == "sum of 64 codes"


class Derived(nn.Linear):
    """More than a linear layer, for all that anybody knows."""


def listed(model):
    return {op.name: op.kind for op in aa.certify(model).operations if op.verdict == "outside"}


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize(
    ("layer", "kind", "function"),
    [
        (lambda: Derived(8, 8), "Derived", "linear"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "ParametrizedLinear", "linear"),
        (lambda: nn.LSTM(8, 8), "LSTM", "lstm"),
        (lambda: nn.GRUCell(8, 8), "GRUCell", "gru_cell"),
    ],
)
def test_layers_that_are_not_converted_are_listed_once(sampled, layer, kind, function):
    x = torch.randn(16, 8)
    model = nn.Sequential(nn.Linear(8, 8), layer())
    aa.prepare_(model, Spec(), sample=x if sampled else None)
    aa.calibrate(model, [x])
    found = {name: kind for name, kind in listed(model).items() if name.startswith("1")}
    assert found == ({f"1.{function}": function} if sampled else {"1": kind})


@pytest.mark.parametrize("sampled", [True, False])
def test_attention_in_floats_is_listed_once(sampled):
    x = torch.randn(4, 5, 8)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    aa.prepare_(model, Spec(), sample=x if sampled else None)
    aa.calibrate(model, [x])
    found = [name for name in listed(model) if "self_attn" in name]
    assert found == ["self_attn.multi_head_attention_forward" if sampled else "self_attn"]


def test_a_module_put_in_after_prepare_is_listed():
    x = torch.randn(16, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    aa.prepare_(model, Spec(), sample=x)
    aa.calibrate(model, [x])
    model[1] = nn.LSTM(8, 8)
    assert listed(model) == {"1": "LSTM"}


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        y = self.a(x)
        return (y @ y.T).mean(1, keepdim=True)


def test_a_wrapped_model_has_the_certificate_of_the_model():
    x = torch.randn(16, 8)
    model = aa.prepare_(Product(), Spec(), sample=x)
    aa.calibrate(model, [x])
    assert aa.certify(nn.DataParallel(model)) == aa.certify(model)
    assert set(listed(model)) == {"matmul", "mean"}


def test_parts_that_were_prepared_have_their_place_in_the_names():
    x = torch.randn(16, 8)
    model = nn.ModuleDict({"one": Product(), "two": nn.Sequential(Product()), "head": nn.Linear(1, 2)})
    aa.prepare_(model["one"], Spec(), sample=x)
    aa.prepare_(model["two"], Spec(acc_bits=12), sample=x)
    for part in ("one", "two"):
        aa.calibrate(model[part], [x])
    certificate = aa.certify(model)
    names = ["one.a", "two.0.a", "head", "one.matmul", "one.mean", "two.0.matmul", "two.0.mean"]
    assert [op.name for op in certificate.operations] == names
    assert [op.name for op in aa.certify(model["two"]).operations] == ["0.a", "0.matmul", "0.mean"]


def test_a_stream_of_a_part_tells_the_width_of_its_sums():
    x = torch.rand(16, 8)
    part = nn.Sequential(nn.Linear(8, 8), QuantIdentity(), nn.AdaptiveAvgPool1d(3), nn.Linear(3, 2))
    model = nn.ModuleDict({"part": part, "more": nn.ReLU()})
    aa.prepare_(part, Spec(), sample=x)
    aa.calibrate(part, [x])
    (pool,) = (op for op in aa.certify(model).operations if "pool" in op.kind)
    assert pool.name == "part.2.adaptive_avg_pool1d"
    assert pool.note == "sum of 4 codes"  # of 8 in 3 windows: 3, 4 and 3


def test_fingerprints_tell_everything_that_is_proven_apart():
    def fingerprint(**changes):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4))
        x = torch.rand(16, 8)
        aa.prepare_(model, Spec(**{"acc_bits": 9, **changes}))
        aa.calibrate(model, [x])
        return aa.certify(model).sha256

    assert fingerprint() == fingerprint()
    others = [{"acc_bits": 10}, {"act_bits": 3}, {"weight_bits": 3}, {"overflow": "saturate"}, {"tile": 4}]
    found = [fingerprint(), *(fingerprint(**other) for other in others)]
    assert len(set(found)) == len(found)


def test_unprepared_and_uncalibrated_models_get_a_clear_error():
    with pytest.raises(ValueError, match="no quantized layer; call prepare_ first"):
        aa.certify(nn.Sequential(nn.Linear(2, 2)))
    model = nn.Sequential(nn.Linear(2, 2))
    aa.prepare_(model, Spec())
    with pytest.raises(ValueError, match=r"^0: not calibrated; call calibrate\(model, batches\)"):
        aa.certify(model)
