"""The integer network: exact sums on every path, and the prepared model's outputs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import accaware as aa
from accaware.integer import network as module
from accaware.integer.network import IntegerIdentity, IntegerOp, integer_network
from exporter.helpers import NETWORKS, prepared

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def ops(network):
    """Its integer layers by name."""
    return {m.layer.name: m for m in network.modules() if isinstance(m, IntegerOp)}


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_model(name, sampled) -> None:
    model, x = prepared(name, acc_bits=12, preload="free")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    network = integer_network(model, x if sampled else None)
    with torch.no_grad():
        ours, theirs = network(x), model(x)
    step = float(theirs.abs().max()) / 15  # a tie that float32 breaks differently moves an output by one code
    assert (ours - theirs).abs().max() < 2 * step
    assert ((ours - theirs).abs() > 1e-4 * step).float().mean() < 0.1
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert not network.training


@pytest.mark.parametrize("name", NETWORKS)
def test_sums_are_exact_in_every_precision(name) -> None:
    model, x = prepared(name, weight_bits=8, act_bits=8, acc_bits=20)
    network = integer_network(model, x)
    wide = integer_network(model, x)
    for op in ops(wide).values():
        op._narrow = False
    seen = []
    for op in ops(network).values():
        op.register_forward_pre_hook(lambda op, args: seen.append((op.layer.name, op.codes(args[0]))))
    with torch.no_grad():
        network(x)
        for layer, codes in seen:
            ours, theirs = ops(network)[layer].sums(codes), ops(wide)[layer].sums(codes)
            assert ours.dtype == torch.int32
            assert torch.equal(ours, theirs)


def test_a_machine_that_is_not_exact_gets_float64(monkeypatch) -> None:
    model, x = prepared("mobile")
    network = integer_network(model, x)
    wanted = network(x)
    honest = IntegerOp._operate

    def sloppy(self, codes, dtype):
        return honest(self, codes, dtype) * (1 + 1e-3 * (dtype == torch.float32))

    monkeypatch.setattr(IntegerOp, "_operate", sloppy)
    again = integer_network(model, x)
    assert torch.equal(again(x), wanted)
    assert set(next(iter(ops(again).values()))._exact.values()) == {False}


def test_sums_beyond_float32_are_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3000, 2))
    x = torch.rand(4, 3000) + 1
    aa.prepare_(model, aa.Spec(weight_bits=8, act_bits=8, acc_bits=32), signed={"0": False})
    with torch.no_grad():
        model[0].weight.abs_().add_(1)
    aa.calibrate(model, [x])
    op = integer_network(model)[0]
    codes = op.codes(x)
    exact = codes.numpy().astype(np.int64) @ op.q.numpy().astype(np.int64).T
    assert not op._narrow
    assert exact.max() > 2**24
    assert np.array_equal(op.sums(codes).numpy(), exact)


def test_sums_beyond_32_bits_are_refused(monkeypatch) -> None:
    model, x = prepared("linear")
    huge = np.full((8, 6), 2**30)
    monkeypatch.setattr(module, "integer_layer", lambda layer: _with_rows(aa.integer_layers(model)[0], huge))
    with pytest.raises(ValueError, match=r"^0: sums reach .*; the integer network adds in 32 bits$"):
        integer_network(model, x)


def _with_rows(layer, rows):
    from dataclasses import replace

    return replace(layer, rows=rows)


def test_a_batchnorm_is_folded_where_nothing_else_reads_the_layer() -> None:
    model, x = prepared("residual")
    network = integer_network(model, x)
    assert isinstance(network.bn1, nn.Identity)
    assert isinstance(network.bn2, nn.BatchNorm2d)  # conv2's output is added as well
    assert isinstance(network.stream, IntegerIdentity)
    assert isinstance(integer_network(model).bn1, nn.BatchNorm2d)


def test_it_is_a_program_of_torch_export() -> None:
    model, x = prepared("residual")
    network = integer_network(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        program = torch.export.export(network, (x,)).module()
    assert torch.equal(program(x), network(x))


def test_autocast_changes_nothing() -> None:
    model, x = prepared("mobile", weight_bits=8, act_bits=8, acc_bits=20)
    network = integer_network(model, x)
    wanted = network(x)  # and float32 was seen to be exact
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(x), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_computes_the_same_sums() -> None:
    model, x = prepared("mobile", weight_bits=8, act_bits=8, acc_bits=20)
    network = integer_network(model, x)
    op = ops(network)["0"]
    codes = op.codes(x)
    here = op.sums(codes)
    assert torch.equal(op.cuda().sums(codes.cuda()).cpu(), here)


def test_a_model_that_is_not_prepared_is_refused() -> None:
    with pytest.raises(ValueError, match="no quantized layer"):
        integer_network(nn.Linear(2, 2))


def hooked(index, **options):
    """A network whose batch-norm would be folded, with a hook that changes what module `index` gives."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(32, 6)
    model(x)
    aa.prepare_(model, aa.Spec(8, 8, 20), sample=x)
    model[index].register_forward_hook(lambda module, args, out: out + 1)
    aa.calibrate(model, [x])
    return model.eval(), x


@pytest.mark.parametrize("index", range(4))
def test_forward_hooks_are_taken_along(index) -> None:
    model, x = hooked(index)
    network = integer_network(model, x)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-3, atol=2e-2)
    assert isinstance(network[1], nn.BatchNorm1d if index < 2 else nn.Identity)


def test_hooks_before_a_layer_and_of_a_stream_are_taken_along() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), aa.QuantIdentity(), nn.Linear(6, 4)), torch.randn(32, 6)
    aa.prepare_(model, aa.Spec(8, 8, 20), sample=x)
    model[0].register_forward_pre_hook(lambda module, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True)
    model[1].register_forward_hook(lambda module, args, kwargs, out: -out, with_kwargs=True)
    aa.calibrate(model, [x])
    network = integer_network(model, x)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("act_scale", ["tensor", "token"])
def test_nan_stays_nan(act_scale) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(8, 6)
    aa.prepare_(model, aa.Spec(act_scale=act_scale), sample=x)
    aa.calibrate(model, [x])
    network = integer_network(model, x)
    x[1, 0], x[2, 0], x[3, 0] = float("nan"), float("inf"), -float("inf")
    with torch.no_grad():
        ours, theirs = network(x), model(x)
    assert theirs[1].isnan().all()
    torch.testing.assert_close(ours, theirs, equal_nan=True)


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return nn.functional.linear(self.b(self.a(x)), self.a.weight)


def test_weights_that_the_model_reads_by_itself_are_named() -> None:
    x = torch.randn(8, 6)
    model = aa.prepare_(ReadTwice(), aa.Spec(), sample=x)
    aa.calibrate(model, [x])
    with pytest.raises(ValueError, match=r"^a: its float weight is read outside of the layer"):
        integer_network(model, x)(x)
