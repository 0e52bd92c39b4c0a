"""Preparing any model: names, patterns, shared tensors, calibration, state dicts."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from torch.nn.utils import prune

import accaware as aa
from accaware.bounds import bits_needed
from accaware.formats import IntFormat, Spec
from accaware.layers import LAYERS, QuantConv2d, QuantIdentity, QuantLinear
from accaware.prepare import quant_layers


class Net(nn.Module):
    """Nested blocks, a residual stream, a fan-out, a module used twice and one shared under two names."""

    def __init__(self, marked=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stream = QuantIdentity() if marked else nn.Identity()
        self.block = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1), "b": nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())})
        self.twice = nn.Conv2d(4, 4, 1)
        self.alias = self.twice
        self.after = QuantIdentity() if marked else nn.Identity()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stream(F.relu(self.stem(x)))
        y = self.block["a"](x) + self.block["b"](x)
        y = self.after(F.relu(self.alias(F.relu(self.twice(F.relu(y)))) + x))
        y = F.adaptive_avg_pool2d(y, 1).flatten(1)
        return self.head(self.q(y) - self.k(y))


IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
NAMES = ["stem", "block.a", "block.b.0", "twice", "q", "k", "head"]


def net(marked=True, seed=0):
    torch.manual_seed(seed)
    return Net(marked)


def prepared(spec=None, calibrated=True, sample=True, **options):
    model = net()
    aa.prepare_(model, spec or Spec(acc_bits=10), sample=IMAGES[:2] if sample else None, **options)
    if calibrated:
        aa.calibrate(model, IMAGES.split(4))
    return model


def test_every_layer_is_converted_in_place_and_once():
    model = net()
    stem, twice = model.stem, model.twice
    assert aa.prepare_(model, Spec()) is model
    assert model.stem is stem
    assert isinstance(stem, QuantConv2d)
    assert model.alias is model.twice is twice
    assert list(quant_layers(model)) == NAMES
    assert [layer.name for layer in quant_layers(model).values()] == NAMES
    assert not any(type(m) in LAYERS for m in model.modules())


def test_preparing_and_calibrating_do_not_change_modes_or_leave_hooks():
    model = net().train()
    model.block.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    aa.prepare_(model, Spec(), sample=IMAGES[:2])
    aa.calibrate(model, [IMAGES])
    assert {name: m.training for name, m in model.named_modules() if name in modes} == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: (nn.Linear(6, 3), (4, 6)),
        lambda: (nn.Conv2d(3, 4, 3), (2, 3, 5, 5)),
        lambda: (nn.ConvTranspose1d(3, 4, 3, 2), (2, 3, 5)),
    ],
)
def test_a_model_that_is_itself_a_layer(make):
    model, shape = make()
    x = torch.randn(shape)
    aa.prepare_(model, Spec(acc_bits=9), sample=x)
    aa.calibrate(model, [x])
    assert model(x).isfinite().all()
    (integer,) = aa.integer_layers(model)
    assert integer.kind == type(model).__name__.removeprefix("Quant")
    fresh, _ = make()
    aa.prepare_(fresh, Spec(acc_bits=9))
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


# Which tensors share a quantizer ---------------------------------------------------------------------------------


def test_layers_that_read_one_tensor_share_its_quantizer():
    model = prepared()
    assert model.block["a"].input_quant is model.block["b"][0].input_quant
    assert model.stream.input_quant is model.block["a"].input_quant
    assert model.q.input_quant is model.k.input_quant
    others = [model.stem, model.stream, model.twice, model.after, model.q, model.head]
    assert len({id(m.input_quant) for m in others}) == len(others)
    # Quantizing the stream again inside of its readers changes nothing.
    seen = []
    model.block["a"].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(IMAGES)
    assert torch.equal(model.block["a"].input_quant(seen[0]), seen[0])


def test_a_plain_fan_out_is_found_from_the_sample():
    model = net(marked=False)
    aa.prepare_(model, Spec(), sample=IMAGES[:2])
    assert model.block["a"].input_quant is model.block["b"][0].input_quant
    assert model.q.input_quant is model.k.input_quant
    model = net(marked=False)
    aa.prepare_(model, Spec())
    assert model.q.input_quant is not model.k.input_quant, "without a sample nothing is known to be shared"


def test_readers_with_other_bits_do_not_share():
    model = prepared(keep={"q": 8})
    assert model.q.input_quant is not model.k.input_quant
    assert (model.q.input_quant.bits, model.k.input_quant.bits) == (8, 4)


def test_a_marker_is_the_identity_until_prepared():
    x = torch.randn(3)
    assert QuantIdentity()(x) is x


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    model = Two()
    aa.prepare_(model, Spec(), sample=(torch.rand(2, 3), torch.rand(2, 4)))
    assert model.a.input_quant is not model.b.input_quant


# Patterns --------------------------------------------------------------------------------------------------------


def test_kept_layers_stay_out_of_the_request():
    model = prepared(keep={"stem": 8, "head": "float", "block.*": 6})
    assert type(model.head) is nn.Linear
    assert (model.stem.spec.weight_bits, model.stem.spec.act_bits, model.stem.spec.acc_bits) == (8, 8, 32)
    assert model.stem.input_quant.codes == IntFormat.signed(8)
    assert [layer.inside for layer in quant_layers(model).values()] == [False, False, False, True, True, True]
    assert model.block["b"][0].spec.weight_bits == 6
    assert model.block["b"][0].spec.method == "baseline"


@pytest.mark.parametrize("bits", [1, 9, 4.0, True, "int8", None])
def test_other_values_of_keep_are_refused(bits):
    with pytest.raises(ValueError, match="keep 'stem' must be 2-8 bits or 'float', not"):
        prepared(keep={"stem": bits})


@pytest.mark.parametrize("option", ["keep", "acc_bits", "signed"])
def test_a_pattern_without_a_match_is_an_error(option):
    with pytest.raises(ValueError, match=rf"^{option}: no layer matches 'conv1'; the layers are stem, block.a, "):
        prepared(**{option: {"conv1": 8}})


def test_the_more_specific_width_wins_and_then_the_later_one():
    widths = {"block.b.0": 11, "*": 16, "block.*": 12, "?": 13, "st*": 14, "*em": 15}
    for order in itertools.permutations(widths):
        model = prepared(acc_bits={name: widths[name] for name in order}, calibrated=False, sample=False)
        found = {name: layer.spec.acc_bits for name, layer in quant_layers(model).items()}
        stem = found.pop("stem")  # "*em" and "st*" are equally specific
        assert stem == (15 if order.index("*em") > order.index("st*") else 14)
        # "?" matches only q and k, yet names nothing more of them than "*" does.
        later = 13 if order.index("?") > order.index("*") else 16
        assert found == {"block.a": 12, "block.b.0": 11, "twice": 16, "head": 16, "q": later, "k": later}
        if order[0] == "*em":
            break


def test_widths_reach_the_certificate():
    model = prepared(acc_bits={"block.*": 7, "block.a": 9})
    widths = {layer.name: layer.accumulator.bits for layer in aa.integer_layers(model)}
    assert widths == {"stem": 10, "block.a": 9, "block.b.0": 7, "twice": 10, "q": 10, "k": 10, "head": 10}


def test_signs_come_from_calibration():
    model = prepared()
    codes = {name: layer.input_quant.codes for name, layer in quant_layers(model).items()}
    signed, unsigned = IntFormat.signed(4), IntFormat.unsigned(4)
    assert codes == {
        "stem": signed, "block.a": unsigned, "block.b.0": unsigned, "twice": unsigned,
        "q": unsigned, "k": unsigned, "head": signed,
    }  # fmt: skip


def test_signs_may_be_given():
    model = prepared(signed={"twice": True, "head": False})
    assert model.twice.input_quant.codes == IntFormat.signed(4)
    assert model.head.input_quant.codes == IntFormat.unsigned(4)


class Fork(nn.Module):
    """Two layers that read one tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("reader", ["a", "b"])
def test_a_sign_given_for_one_reader_is_that_of_all(reader):
    x = torch.rand(16, 8)
    model = aa.prepare_(Fork(), Spec(), sample=x, signed={reader: True})
    aa.calibrate(model, [x])
    assert model.a.input_quant.codes == model.b.input_quant.codes == IntFormat.signed(4)


def test_signs_that_contradict_each_other_are_refused():
    x = torch.rand(16, 8)
    with pytest.raises(ValueError, match="same for layers that read one tensor, not a: False, b: True"):
        aa.prepare_(Fork(), Spec(), sample=x, signed={"a": False, "b": True})
    aa.prepare_(Fork(), Spec(), sample=x, signed={"a": False, "b": True}, keep={"b": 8})


@pytest.mark.parametrize("value", ["unsigned", 1, None])
def test_other_values_of_signed_are_refused(value):
    with pytest.raises(ValueError, match="signed 'q' must be True or False, not"):
        prepared(signed={"q": value})


def test_models_without_layers_and_prepared_models_are_refused():
    with pytest.raises(ValueError, match="ReLU has no layer to quantize; known are Linear, Conv1d"):
        aa.prepare_(nn.ReLU(), Spec())
    with pytest.raises(ValueError, match="prepared already"):
        aa.prepare_(prepared(), Spec())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"acc_bits": {"q": 64}}, ValueError, r"^acc_bits 'q': acc_bits must lie in \[2, 32\], not 64"),
        ({"acc_bits": {"q": 12.0}}, TypeError, "^acc_bits 'q': acc_bits must be an integer"),
        ({"acc_bits": {"st*": 12}, "keep": {"stem": 8}}, ValueError, r"^acc_bits 'st\*' must be 32, .* \(stem\)"),
        ({"acc_bits": {"stem": 12}, "keep": {"stem": "float"}}, ValueError, "^acc_bits 'stem' must be 32"),
        ({"spec": {"acc_bits": 12}}, TypeError, "^spec must be a Spec, not dict"),
    ],
)
def test_a_request_that_is_refused_leaves_the_model_as_it_was(change, error, message):
    model = net()
    with pytest.raises(error, match=message):
        aa.prepare_(model, **{"spec": Spec(), **change})
    assert not quant_layers(model)
    aa.prepare_(model, Spec(), keep={"stem": 8}, acc_bits={"stem": 32, "*": 12})
    assert {layer.spec.acc_bits for layer in quant_layers(model).values()} == {12, 32}


def computed(kind):
    model = net()
    with pytest.warns(FutureWarning) if kind == "weight_norm" else contextlib.nullcontext():
        {
            "pruned": lambda: prune.l1_unstructured(model.head, "weight", amount=0.5),
            "bias": lambda: prune.l1_unstructured(model.head, "bias", amount=1),
            "weight_norm": lambda: nn.utils.weight_norm(model.head),
        }[kind]()
    return model


@pytest.mark.parametrize("kind", ["pruned", "bias", "weight_norm"])
def test_a_weight_that_is_computed_is_refused(kind):
    model = computed(kind)
    part = "bias" if kind == "bias" else "weight"
    message = rf"^head: its {part} must be a parameter, not computed for each run .* prune\.remove, remove_weight_norm"
    for rotate in (False, True):
        with pytest.raises(ValueError, match=message):
            aa.prepare_(model, Spec(rotate=rotate))
    assert not quant_layers(model)
    aa.prepare_(model, Spec(), keep={"head": "float"})
    assert type(model.head) is nn.Linear


def test_a_layer_pruned_after_preparing_is_not_calibrated_until_it_is_plain():
    model = prepared(Spec(acc_bits=10, method="a2q"), calibrated=False)
    prune.l1_unstructured(model.head, "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"^head: its weight must be a parameter"):
        aa.calibrate(model, [IMAGES])
    prune.remove(model.head, "weight")
    aa.calibrate(model, [IMAGES])
    assert aa.certify(model).holds


@pytest.mark.parametrize("features", [(8, 0), (0, 4)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_weights_are_refused(features):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(*features))
    with pytest.raises(ValueError, match=r"^1: a weight of shape \[\d, \d\] has no values to quantize"):
        aa.prepare_(model, Spec())


def test_a_float_layer_keeps_the_weight_that_it_shared():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    before, x = model[0].weight.detach().clone(), torch.rand(16, 8)
    aa.prepare_(model, Spec(acc_bits=6, method="a2q+"), keep={"2": "float"})
    aa.calibrate(model, [x])
    assert torch.equal(model[2].weight, before)
    assert not torch.equal(model[0].weight, before)


# Calibration -----------------------------------------------------------------------------------------------------


def test_calibration_accepts_tensors_and_pairs():
    a, b = prepared(calibrated=False), prepared(calibrated=False)
    aa.calibrate(a, IMAGES.split(3))
    aa.calibrate(b, [(x, torch.zeros(len(x))) for x in IMAGES.split(3)])
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_calibration_sees_the_float_network():
    model = prepared(Spec(2, 2, 32), calibrated=False)
    aa.calibrate(model, [IMAGES])
    first = {n: q.clone() for n, q in model.state_dict().items() if n.endswith("input_quant.scale")}
    aa.calibrate(model, [IMAGES])
    for name, scale in first.items():
        assert torch.equal(model.state_dict()[name], scale), name


@pytest.mark.parametrize(("method", "bits", "least"), [("projected", 4, 5), ("a2q", 5, 6), ("a2q+", 4, 5)])
def test_an_accumulator_too_small_names_the_layer(method, bits, least):
    model = prepared(Spec(acc_bits=bits, method=method), calibrated=False, keep={"stem": 8})
    message = rf"^block\.a: acc_bits={bits} is too small .*\(act_bits=4\).* at least {least}"
    with pytest.raises(ValueError, match=message):
        aa.calibrate(model, [IMAGES])


def test_errors_of_calibration():
    model = prepared(calibrated=False)
    with pytest.raises(ValueError, match="at least one batch"):
        aa.calibrate(model, [])
    with pytest.raises(ValueError, match="init must be search, ep or none, not 'best'"):
        aa.calibrate(model, [IMAGES], init="best")
    with pytest.raises(ValueError, match="call prepare_ first"):
        aa.calibrate(net(), [IMAGES])
    model.unused = nn.Linear(3, 3)
    other = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    other.forward = lambda x: other["used"](x)
    aa.prepare_(other, Spec())
    with pytest.raises(ValueError, match=r"^unused: no calibration data reached this layer"):
        aa.calibrate(other, [torch.rand(2, 3)])


def test_what_failed_is_forgotten():
    """Data of a calibration that failed does not count in the next one."""
    layers = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    layers.forward = lambda x: layers["a"](x)
    aa.prepare_(layers, Spec())
    with pytest.raises(ValueError, match=r"^b: no calibration data"):
        aa.calibrate(layers, [torch.full((2, 3), -1000.0)])
    layers.forward = lambda x: layers["b"](layers["a"](x).relu())
    x = torch.rand(16, 3)
    aa.calibrate(layers, [x])
    assert layers["a"].input_quant.codes == IntFormat.unsigned(4)
    assert layers["a"].input_quant.scale.item() < 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_are_not_finite_name_the_layer(value):
    model = prepared(calibrated=False)
    with torch.no_grad():
        model.block["a"].bias[0] = value
    with pytest.raises(ValueError, match=r"^twice: the calibration data that reach it must be finite"):
        aa.calibrate(model, [IMAGES])
    with pytest.raises(TypeError, match=r"batches must be several, .* not one Tensor"):
        aa.calibrate(model, IMAGES)


def test_the_certificate_judges_the_outer_register():
    """Tiles bound their own registers alone: whether their sum fits is decided for the weights that there are."""
    x = torch.rand(32, 256)
    model = aa.prepare_(nn.Sequential(nn.Linear(256, 4)), Spec(acc_bits=8, tile=16, outer_bits=11))
    aa.calibrate(model, [x])
    with torch.no_grad():
        model[0].weight.fill_(-1)
        model[0].weight[:, 16:] = 0
        model[0].weight_quant.scale.fill_(1)
    assert aa.certify(model).holds
    with torch.no_grad():
        model[0].weight.fill_(-1)
    (operation,) = aa.certify(model).operations
    assert operation.verdict == "refuted"
    assert operation.witness.register == "outer"
    assert bits_needed(min(operation.outer_lo), max(operation.outer_hi)) == 12


@pytest.mark.parametrize("grouped", [False, True])
def test_importance_is_the_power_of_each_tap(grouped):
    """An input channel that is nearly silent does not pull the scale."""
    torch.manual_seed(0)
    x = torch.rand(64, 4, 6)
    x[:, 1] *= 1e-3
    layer = nn.Conv1d(4, 2, 3, groups=2 if grouped else 1)
    with torch.no_grad():
        layer.weight.uniform_(-1, 1)
        layer.weight[:, 1] *= 30  # reads the silent channel (of the first group, where grouped)
    chosen = {}
    for name, inputs in (("silent", x), ("equal", torch.rand(64, 4, 6))):
        model = nn.Sequential(copy.deepcopy(layer))
        aa.prepare_(model, Spec(acc_bits=32))
        aa.calibrate(model, [inputs])
        chosen[name] = model[0].weight_quant.step().detach().flatten()
    assert chosen["silent"][0] < 0.5 * chosen["equal"][0]
    assert (chosen["silent"][1] < 0.5 * chosen["equal"][1]) == (not grouped)


def test_importance_of_transposed_convolutions_follows_the_input_channels():
    torch.manual_seed(0)
    layer = nn.ConvTranspose1d(4, 4, 3, groups=2)
    x = torch.rand(64, 4, 6)
    x[:, 0] *= 1e-3
    with torch.no_grad():
        layer.weight.uniform_(-1, 1)
        layer.weight[0] *= 10  # the first input channel, read by the first group of outputs
    model = nn.Sequential(layer)
    aa.prepare_(model, Spec(acc_bits=32))
    aa.calibrate(model, [x])
    step = model[0].weight_quant.step().detach().flatten()
    largest = layer.weight.detach().abs().amax((0, 2))
    assert bool((step[:2] < 0.5 * largest / 7).all())


def test_weights_in_channels_last_are_initialised():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4)).to(memory_format=torch.channels_last)
    before = model[0].weight.detach().clone()
    aa.prepare_(model, Spec(acc_bits=12))
    aa.calibrate(model, [IMAGES])
    assert torch.equal(model[0].weight, before)


def test_init_choices():
    weights = {}
    for init in ("search", "ep", "none"):
        model = prepared(Spec(acc_bits=6, method="a2q"), calibrated=False)
        before = model.twice.weight.detach().clone()
        aa.calibrate(model, [IMAGES], init=init)
        weights[init] = model.twice.weight.detach().clone()
        assert torch.equal(before, weights[init]) == (init == "none")
    assert not torch.equal(weights["search"], weights["ep"])


# Batch-norm and penalty --------------------------------------------------------------------------------------------


def test_batchnorm_is_reestimated_with_the_deployed_integers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.9), nn.ReLU(), nn.Flatten())
    aa.prepare_(model, Spec(3, 3, 9))
    aa.calibrate(model, [IMAGES])
    model.train()
    with torch.no_grad():
        model[1].running_mean.fill_(7.0)
    aa.reestimate_batchnorm(model, IMAGES.split(4))
    with torch.no_grad():
        outputs = [model[0](x) for x in IMAGES.split(4)]
    means = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variances = torch.stack([y.var((0, 2, 3), unbiased=True) for y in outputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var, variances, rtol=1e-5, atol=1e-6)
    assert model[1].momentum == 0.3
    assert all(m.training for m in model.modules())


def test_reestimating_needs_data_and_batchnorm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    aa.prepare_(model, Spec())
    aa.calibrate(model, [IMAGES])
    aa.reestimate_batchnorm(model, [IMAGES])
    before = {name: value.clone() for name, value in model[1].state_dict().items()}
    with pytest.raises(ValueError, match="at least one batch"):
        aa.reestimate_batchnorm(model, [])
    with pytest.raises(RuntimeError):
        aa.reestimate_batchnorm(model, [IMAGES + 1, IMAGES[:, :1]])
    assert model[1].momentum == 0.1
    assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())
    aa.reestimate_batchnorm(prepared(), [])  # nothing to do


def test_penalty():
    for method in ("projected", "baseline"):
        assert aa.penalty(prepared(Spec(acc_bits=10, method=method))).item() == 0
    model = prepared(Spec(acc_bits=10, method="a2q+"), keep={"head": 8})
    with torch.no_grad():
        for layer in quant_layers(model).values():
            if layer.inside:
                layer.weight_quant.t += 10
    terms = [layer.weight_quant.penalty() for layer in quant_layers(model).values() if layer.inside]
    value = aa.penalty(model)
    torch.testing.assert_close(value, 1e-3 * sum(terms))
    assert value.item() > 0
    torch.testing.assert_close(aa.penalty(model, strength=1.0), sum(terms))
    value.backward()
    assert all(layer.weight_quant.t.grad is not None for layer in quant_layers(model).values() if layer.inside)


@pytest.mark.parametrize("method", ["a2q", "a2q+"])
def test_a_penalty_needs_calibration_or_a_state_dict_of_it(method):
    model, spec = prepared(calibrated=False), Spec(acc_bits=10, method=method)
    assert aa.penalty(model).item() == 0
    model, old = prepared(spec, calibrated=False), prepared(spec)
    with pytest.raises(ValueError, match=r"^stem: not calibrated; call calibrate"):
        aa.penalty(model)
    with torch.no_grad():
        for layer in quant_layers(old).values():
            layer.weight_quant.t += 10
    model.load_state_dict(old.state_dict())
    assert aa.penalty(model).item() == aa.penalty(old).item() > 0


# State dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["projected", "baseline", "a2q", "a2q+"])
@pytest.mark.parametrize("sample", [True, False])
def test_state_dicts_round_trip_through_safetensors(method, sample):
    options = {"spec": Spec(acc_bits=10, method=method), "keep": {"stem": 8}, "sample": sample}
    old, new = prepared(**options), prepared(**options, calibrated=False)
    with torch.no_grad():
        for p in old.parameters():
            p += 0.01 * torch.randn_like(p).abs()
    # safetensors refuses tensors that share memory: each shared quantizer is written under its first name.
    state, seen = {}, set()
    for name, value in old.state_dict().items():
        if value.data_ptr() not in seen:
            state[name] = value.contiguous()
        seen.add(value.data_ptr())
    missing, unexpected = new.load_state_dict(load(save(state)), strict=False)
    assert not unexpected
    assert all("input_quant" in name or name.startswith("alias") for name in missing)
    with torch.no_grad():
        assert torch.equal(new(IMAGES), old(IMAGES))
    for a, b in zip(aa.integer_layers(old), aa.integer_layers(new), strict=True):
        assert (a.rows == b.rows).all()
        assert a.codes == b.codes
    new.load_state_dict(old.state_dict())  # and strictly


def test_loading_into_a_calibrated_model_replaces_codes_and_integers():
    old, new = prepared(), prepared()
    with torch.no_grad():
        new(IMAGES)
        old.stem.weight.mul_(-1)
        old.twice.input_quant.set_codes(IntFormat.signed(4))
    new.load_state_dict(old.state_dict())
    with torch.no_grad():
        assert torch.equal(new(IMAGES), old(IMAGES))
    assert new.twice.input_quant.codes == IntFormat.signed(4)
    assert aa.integer_layers(new)[3].codes == IntFormat.signed(4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec(acc_bits=12), r"^stem: the checkpoint was made for acc_bits 10, not 12$"),
        (Spec(acc_bits=10, weight_bits=3), r"^stem: the checkpoint was made for weight_bits 4, not 3$"),
        (Spec(acc_bits=10, tile=4), r"^stem: the checkpoint was made for tile -1, not 4$"),
        (Spec(acc_bits=10, preload="free"), r"^stem: the checkpoint was made for preload 0, not 1$"),
        (Spec(acc_bits=10, act_bits=3), r"act_bits"),
        (Spec(acc_bits=10, method="baseline"), r"^stem: the checkpoint was made for method projected, not baseline$"),
    ],
)
def test_a_checkpoint_of_another_request_is_an_error(spec, message):
    state = prepared().state_dict()
    with pytest.raises(ValueError, match=message):
        prepared(spec, calibrated=False).load_state_dict(state)


def test_the_first_layer_that_differs_is_named():
    state = prepared(acc_bits={"twice": 12}).state_dict()
    with pytest.raises(ValueError, match=r"^twice: the checkpoint was made for acc_bits 12, not 10$"):
        prepared().load_state_dict(state)


def test_a_checkpoint_of_another_order_of_tiles_is_an_error():
    old = prepared(Spec(acc_bits=10, tile=4)).state_dict()
    with pytest.raises(ValueError, match=r"^stem: the checkpoint was made for order chw, not hwc$"):
        prepared(Spec(acc_bits=10, tile=4, order="hwc"), calibrated=False).load_state_dict(old)
    # Without tiles the order decides nothing, and between kernels of one tap there is none.
    prepared(Spec(acc_bits=10, order="hwc"), calibrated=False).load_state_dict(prepared().state_dict())
    keep = {"stem": 8}
    old = prepared(Spec(acc_bits=10, tile=2), keep=keep).state_dict()
    prepared(Spec(acc_bits=10, tile=2, order="hwc"), keep=keep, calibrated=False).load_state_dict(old)


@pytest.mark.parametrize("known", [6, 8])
def test_earlier_checkpoints_load_and_later_ones_are_refused(known):
    old, new = prepared(Spec(acc_bits=10, method="a2q+")), prepared(Spec(acc_bits=10, method="a2q+"), calibrated=False)
    shorter = {k: v[:known] if k.endswith("request") else v for k, v in old.state_dict().items()}
    new.load_state_dict(shorter)
    assert all(torch.equal(v, new.state_dict()[k]) for k, v in old.state_dict().items())
    longer = {k: F.pad(v, (0, 1)) if k.endswith("request") else v for k, v in old.state_dict().items()}
    with pytest.raises(ValueError, match=r"^stem: the checkpoint is of a later version: its request has 11 entries"):
        new.load_state_dict(longer)


def test_a_checkpoint_from_before_calibration_undoes_it():
    model, fresh = prepared(), prepared(calibrated=False)
    model(IMAGES)
    model.load_state_dict(fresh.state_dict())
    assert torch.equal(model(IMAGES), fresh(IMAGES))
    with pytest.raises(ValueError, match=r"^stem: not calibrated"):
        aa.certify(model)
    aa.calibrate(model, [IMAGES])
    aa.calibrate(fresh, [IMAGES])
    with torch.no_grad():
        assert torch.equal(model(IMAGES), fresh(IMAGES))


def test_a_float_checkpoint_loads_before_preparing():
    state = net().state_dict()
    model = net(seed=1)
    model.load_state_dict(state)
    aa.prepare_(model, Spec())
    assert torch.equal(model.stem.weight, state["stem.weight"])
    assert isinstance(model.head, QuantLinear)


def test_transformer_layers_do_not_take_the_fused_path_around_the_quantizers():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    aa.prepare_(model, Spec(2, 2, 8), sample=x)
    aa.calibrate(model, [x])
    with_gradients = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), with_gradients)
