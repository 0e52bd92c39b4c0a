"""Certificates of ONNX files: lo and hi by brute force, verdicts, witnesses, the second checker, the commands."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accaware.certify.certificate import Certificate
from accaware.certify.files import certify_file, file_layers
from accaware.certify.second import disagreements, own_word
from accaware.certify.targets import TARGETS, Target, target
from accaware.cli import run
from accaware.formats import Accumulator
from accaware.integer.emulate import emulate
from onnx_helpers import model, node, save, tensor

U8, S8, I32 = np.uint8, np.int8, np.int32


def conv(folder, weights, zero=0, weight_zero=0, bias=None, name="net.onnx"):
    """A QLinearConv of u8 codes, weights [O, C, k]."""
    weights = np.asarray(weights)
    constants = {
        "sx": np.float32(0.5),
        "zx": U8(zero),
        "w": weights,
        "sw": np.float32(0.25),
        "zw": weights.dtype.type(weight_zero),
        "sy": np.float32(1),
        "zy": U8(0),
    }
    inputs = "x sx zx w sw zw sy zy"
    if bias is not None:
        constants["b"], inputs = np.asarray(bias, I32), inputs + " b"
    nodes = [node("QLinearConv", inputs, "y", "conv", kernel_shape=[weights.shape[2]])]
    shape = [1, weights.shape[1], 4]
    made = model(nodes, {"x": (tensor("x", U8(0)).data_type, shape)}, {"y": (2, None)}, constants)
    return save(made, folder, name)


def dynamic(folder, weights):
    """DynamicQuantizeLinear and MatMulInteger, weights [K, O]."""
    nodes = [
        node("DynamicQuantizeLinear", "x", "q s z"),
        node("MatMulInteger", "q w z zw", "y", "product"),
    ]
    constants = {"w": np.asarray(weights, S8), "zw": S8(0)}
    return save(model(nodes, {"x": [1, len(weights)]}, {"y": (6, None)}, constants), folder)


def mixed(folder):
    """Something proven, something refuted, something unproven, something outside."""
    constants = {
        "s": np.float32(0.5),
        "z": U8(0),
        "zw": S8(0),
        "small": S8([[1, -2], [3, 1]]),
        "f": np.ones((2, 2), np.float32),
        "large": S8([[100, 1], [100, -1]]),
    }
    nodes = [
        node("QLinearMatMul", "x s z small s zw s z", "a", "safe"),
        node("QLinearMatMul", "a s z large s zw s z", "b", "unsafe"),
        node("DequantizeLinear", "b s z", "c"),
        node("MatMul", "c f", "d", "float"),
        node("Add", "d c", "e", "add"),
    ]
    return save(model(nodes, {"x": (2, [1, 2])}, {"e": [1, 2]}, constants), folder)


def plain(bits, **options):
    return Target("test", Accumulator(bits, **options))


def operation(certificate, name="conv"):
    return next(op for op in certificate.operations if op.name == name)


def brute(rows, ends, tile, order, start):
    """The extreme sums of any tile of one row, by trying every input made of ends, in every tile."""
    taps = range(len(rows))
    size = tile or len(rows)
    tiles = itertools.combinations(taps, min(size, len(rows)))
    if order != "any":
        tiles = [tuple(taps[i : i + size]) for i in range(0, len(rows), size)]
    sums = [
        start + sum(rows[t] * x for t, x in zip(chosen, inputs, strict=True))
        for chosen in tiles
        for inputs in itertools.product(ends, repeat=len(chosen))
    ]
    return min(sums), max(sums)


@st.composite
def cases(draw):
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    unsigned = draw(st.booleans())
    low, high = (0, 255) if unsigned else (-128, 127)
    values = draw(st.lists(st.integers(low, high), min_size=math.prod(shape), max_size=math.prod(shape)))
    weights = np.array(values, U8 if unsigned else S8).reshape(shape)
    zero, weight_zero = draw(st.integers(0, 255)), draw(st.integers(low, high))
    bias = draw(st.none() | st.lists(st.integers(-9999, 9999), min_size=shape[0], max_size=shape[0]))
    register = Accumulator(
        draw(st.integers(10, 20)),
        draw(st.sampled_from(["wrap", "saturate"])),
        tile=draw(st.none() | st.integers(1, 4)),
        order=draw(st.sampled_from(["chw", "hwc", "any"])),
    )
    raw = draw(st.booleans())
    side = "outside" if raw and register.tile is None else draw(st.sampled_from(["inside", "outside"]))
    return weights, zero, weight_zero, bias, Target("drawn", register, raw, side)


@given(cases())
@settings(deadline=None, max_examples=150)
def test_lo_and_hi_are_those_of_brute_force(tmp_path_factory, case):
    weights, zero, weight_zero, bias, where = case
    path = conv(tmp_path_factory.mktemp("net"), weights, zero, weight_zero, bias)
    certificate = certify_file(path, where)
    op, register = operation(certificate), where.accumulator
    for row, taps in enumerate(weights.astype(int)):
        taps = (taps.T if register.order == "hwc" else taps).reshape(-1)
        centred = (taps - weight_zero).tolist()
        start = bias[row] if bias and where.bias == "inside" else 0
        ends = (0, 255, zero) if where.raw else (-zero, 255 - zero, 0)
        inner = brute(
            taps.tolist() if where.raw else centred, ends, register.tile, register.order, 0 if register.tile else start
        )
        assert inner == (op.lo[row], op.hi[row])
        if register.tile:
            assert brute(centred, (-zero, 255 - zero, 0), None, "chw", start) == (op.outer_lo[row], op.outer_hi[row])
    assert disagreements(certificate, path) == []
    (layer,) = file_layers(path, where)
    assert (op.verdict == "refuted") == (op.witness is not None)
    if op.witness is not None and register.order != "any":
        assert emulate(layer, [op.witness.inputs], op.witness.zero_point).overflows[0, op.witness.row] > 0


@given(st.lists(st.lists(st.integers(-128, 127), min_size=2, max_size=2), min_size=1, max_size=4), st.integers(9, 18))
@settings(deadline=None, max_examples=60)
def test_dynamic_quantization_shares_one_zero_point(tmp_path_factory, weights, bits):
    path = dynamic(tmp_path_factory.mktemp("net"), weights)
    certificate = certify_file(path, plain(bits))
    op = operation(certificate, "product")
    for row, taps in enumerate(np.array(weights).T.tolist()):
        sums = [
            sum(q * (x - z) for q, x in zip(taps, codes, strict=True))
            for z in (0, 100, 255)
            for codes in itertools.product((0, 255), repeat=len(taps))
        ]
        partial = [*sums, *(q * e for q in taps for e in (-255, 255)), 0]
        assert (op.lo[row], op.hi[row]) == (min(partial), max(partial)) if len(taps) < 3 else True
        assert op.lo[row] <= min(sums)
        assert max(sums) <= op.hi[row]
        assert {op.lo[row], op.hi[row]} <= {min(sums), max(sums), *partial}
    assert disagreements(certificate, path) == []
    if op.witness:
        (layer,) = file_layers(path, plain(bits))
        assert emulate(layer, [op.witness.inputs], op.witness.zero_point).overflows[0, op.witness.row]


def test_every_verdict(tmp_path):
    certificate = certify_file(mixed(tmp_path), plain(14))
    verdicts = {op.name: op.verdict for op in certificate.operations}
    assert verdicts == {"safe": "proven", "unsafe": "refuted", "float": "unproven", "add": "outside"}
    assert not certificate.holds
    assert operation(certificate, "float").reason == "its weights 'f' are floats"
    assert operation(certificate, "unsafe").witness.value == 255 * 200
    assert operation(certificate, "safe").bits_needed == 11  # 255 * 4
    assert certificate == Certificate.from_json(certificate.to_json())


def test_widths_by_pattern(tmp_path):
    path = mixed(tmp_path)
    certificate = certify_file(path, plain(14), acc_bits={"un*": 17})
    assert [operation(certificate, n).target.bits for n in ("safe", "unsafe")] == [14, 17]
    assert operation(certificate, "unsafe").verdict == "proven"
    with pytest.raises(ValueError, match=r"^acc_bits: no operation matches 'nope'; they are safe, unsafe$"):
        certify_file(path, plain(14), acc_bits={"nope": 17})


# The second checker -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"lo": (-1,)}, r"conv: row 0 is in \[-510, 765\], not \[-1, 765\]"),
        (
            {"verdict": "proven", "witness": None, "target": Accumulator(10)},
            "conv: said to be proven, but it does not fit",
        ),
        ({"name": "other"}, "conv: not in the certificate"),
        (
            {"codes": None, "target": None, "verdict": "outside", "witness": None, "lo": (), "hi": ()},
            "said to be outside",
        ),
    ],
)
def test_what_is_wrong_is_found(change, line, tmp_path, monkeypatch):
    path = conv(tmp_path, S8([[[3], [-2]]]))
    certificate = certify_file(path, plain(10))
    monkeypatch.setattr("accaware.certify.proof.Operation.__post_init__", lambda self: None)  # lies of any kind
    (op,) = certificate.operations
    found = disagreements(replace(certificate, operations=(replace(op, **change),)), path)
    assert any(line.replace("\\", "") in text for text in found), found


def test_a_witness_that_does_not_overflow_is_found(tmp_path):
    path = conv(tmp_path, S8([[[3], [-2]]]))
    certificate = certify_file(path, plain(10))
    (op,) = certificate.operations
    assert (op.witness.inputs, op.witness.value) == ((255, 0), 765)
    lies = [{"inputs": (255, 1)}, {"zero_point": 1}, {"value": 764}]
    # Sums that are right, of codes that are none and with a zero point that is another.
    lies += [{"inputs": (257, 3)}, {"zero_point": 1, "value": 764}]
    for change in lies:
        lie = replace(op, witness=replace(op.witness, **change))
        assert disagreements(replace(certificate, operations=(lie,)), path) == ["conv: its witness does not overflow"]


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        (
            "int16",
            {"assumes": "Nothing."},
            "assumes of target int16 is 'Codes less their zero points; .* not 'Nothing.'",
        ),
        ("int16", {"bias": "outside"}, "bias of target int16 is 'inside', not 'outside'"),
        ("int16", {"target": "avx2-u8s8"}, "assumes of target avx2-u8s8 is 'Stored u8 codes"),
        ("int16", {"bits": 17}, "conv: its register is not that of target int16"),
        ("int16", {"overflow": "saturate"}, "conv: its register is not that of target int16"),
        ("int16", {"tile": 64}, "conv: its register is not that of target int16"),
        ("avx2-u8s8", {"outer_bits": 33}, "conv: its register is not that of target avx2-u8s8"),
        ("avx2-u8s8", {"order": "any"}, "conv: its register is not that of target avx2-u8s8"),
        ("avx2-u8s8", {"raw": False}, "conv: its register is not that of target avx2-u8s8"),
        ("onnxruntime-avx2", {"bits": 17}, "conv: its register is not that of target onnxruntime-avx2"),
        ("onnxruntime-avx2", {"raw": False}, "conv: its kernel adds stored codes in pairs"),
    ],
)
def test_a_named_target_is_what_the_table_says(name, change, line, tmp_path, monkeypatch):
    path = conv(tmp_path, S8([[[3], [-2]]]), bias=[7])
    certificate = certify_file(path, TARGETS[name])
    assert disagreements(certificate, path) == []
    monkeypatch.setattr("accaware.certify.proof.Operation.__post_init__", lambda self: None)  # lies of any kind
    ((key, value),) = change.items()
    (op,) = certificate.operations
    if key in ("bits", "overflow", "tile", "outer_bits", "order"):
        op = replace(op, target=replace(op.target, **change))
    elif key == "raw":
        op = replace(op, raw=value)
    else:
        certificate = replace(certificate, **change)
    (found,) = disagreements(replace(certificate, operations=(op,)), path)
    assert re.match(line, found), found


def test_other_widths_belong_to_the_name(tmp_path):
    path = mixed(tmp_path)
    certificate = certify_file(path, TARGETS["int16"], acc_bits={"un*": 17, "safe": 11})
    assert certificate.target == "int16 with un*=17, safe=11"
    assert disagreements(certificate, path) == []
    assert disagreements(replace(certificate, target="int16"), path) == [
        f"{name}: its register is not that of target int16" for name in ("safe", "unsafe")
    ]


@pytest.mark.parametrize(
    "target", ["int32 with nothing=60", "int32 with nothing=60, unsafe=40", "int32 with un*=60, u*=16"]
)
def test_other_widths_are_those_of_the_patterns(target, tmp_path):
    path = mixed(tmp_path)
    certificate = certify_file(path, TARGETS["int32"])
    ops = [replace(op, target=Accumulator(60)) if op.name == "unsafe" else op for op in certificate.operations]
    lie = replace(certificate, operations=tuple(ops), target=target)
    assert disagreements(lie, path) == [f"unsafe: its register is not that of target {target}"]


def test_an_operation_stands_there_once(tmp_path):
    path = conv(tmp_path, S8([[[3], [-2]]]))
    certificate = certify_file(path, TARGETS["int32"])
    (op,) = certificate.operations
    lie = replace(op, lo=(0,), hi=(100,), bits_needed=8)
    found = disagreements(replace(certificate, operations=(lie, op)), path)
    assert found == ["conv: it is in the certificate twice"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("safe", {"kind": "Bogus"}),
        ("safe", {"method": "certified"}),
        ("safe", {"note": "certified"}),
        ("safe", {"sparsity": 0.9}),
        ("safe", {"zero_channels": 1}),
        ("safe", {"repaired": 1}),
        ("safe", {"preload": (1, 1)}),
        ("safe", {"outer_lo": (1, 1)}),
        ("float", {"kind": "Bogus"}),
        ("float", {"reason": "no reason"}),
        ("add", {"kind": "Bogus"}),
        ("add", {"note": "adds nothing"}),
        ("add", {"bits_needed": 1}),
    ],
)
def test_all_that_can_be_derived_is_compared(name, change, tmp_path):
    path = mixed(tmp_path)
    certificate = certify_file(path, TARGETS["int32"])
    assert disagreements(certificate, path) == []
    ops = [replace(op, **change) if op.name == name else op for op in certificate.operations]
    ((key, said),) = change.items()
    (found,) = disagreements(replace(certificate, operations=tuple(ops)), path)
    assert re.fullmatch(rf"{name}: {key} is .*, not {re.escape(repr(said))}", found), found


@pytest.mark.parametrize("kernel", [[2, 2], [3, 5]])
@pytest.mark.parametrize("type_", [2, 3])
def test_widths_of_sums_are_derived_anew(kernel, type_, tmp_path):
    nodes = [
        node("DequantizeLinear", "x s", "a", "codes"),
        node("AveragePool", "a", "b", "pool", kernel_shape=kernel),
        node("Add", "a a", "c", "add"),
    ]
    path = save(model(nodes, {"x": (type_, [1, 1, 8, 8])}, {"b": None, "c": None}, {"s": np.float32(0.5)}), tmp_path)
    certificate = certify_file(path, TARGETS["int32"])
    assert all(op.bits_needed for op in certificate.operations)
    assert disagreements(certificate, path) == []


def test_what_only_the_certificate_says_of_its_register_is_named(tmp_path, capsys):
    path, saved = conv(tmp_path, S8([[[3]]])), tmp_path / "c.json"
    mine = Target("mine", Accumulator(60), bias="outside")
    note = "note: target 'mine' is in no table: its registers, with biases outside, are the certificate's own word\n"
    certify_file(path, mine).save(saved)
    assert run(["check", str(saved), str(path)]) == 0
    assert capsys.readouterr().out == f"{note}{saved}: agrees with {path}\n"
    for words in (["--acc-bits", "14"], ["--acc-bits", "14", "--acc-bits", "conv=20"], ["--target", "int16"], []):
        assert run(["certify", str(path), *words, "--json", str(saved)]) == 0
        assert own_word(Certificate.load(saved)) is None
    certificate = certify_file(path, replace(TARGETS["int32"], name="int14", accumulator=Accumulator(14)))
    (op,) = certificate.operations
    lies = [{"assumes": "Nothing."}, {"bias": "outside"}, {"target": "int14x"}, {"target": "int15"}]
    lies.append({"operations": (replace(op, target=Accumulator(60)),), "target": "int14 with nothing=60"})
    assert own_word(certificate) is None
    assert all(own_word(replace(certificate, **lie)) for lie in lies)


def test_another_file_is_found(tmp_path):
    certificate = certify_file(conv(tmp_path, S8([[[3]]])), plain(16))
    other = conv(tmp_path, S8([[[2]]]), name="other.onnx")
    assert "the certificate is about another file" in disagreements(certificate, other)[0]


# Targets -----------------------------------------------------------------------------------------------------------


def test_pairs_of_the_avx2_kernels(tmp_path):
    """Rows at the edge of what two products in a saturating int16 hold, and one past it."""
    for pair, verdict in (
        *(((64, 64), "proven"), ((127, 1), "proven"), ((127, -128), "proven"), ((65, 64), "refuted")),
        *(((127, 2), "refuted"), ((-128, -1), "refuted"), ((-128, 0), "proven")),
    ):
        weights = S8(pair).reshape(1, 2, 1)
        assert operation(certify_file(conv(tmp_path, weights), TARGETS["avx2-u8s8"])).verdict == verdict


def test_neighbours_differ_by_the_order_of_taps(tmp_path):
    weights = S8([[[100, 1], [1, 100]]])  # chw: 100 1 | 1 100; hwc: 100 1 | 1 100 transposed
    weights[0] = [[100, 100], [1, 1]]
    path = conv(tmp_path, weights)
    verdicts = [
        operation(certify_file(path, Target("t", Accumulator(16, "saturate", tile=2, order=order), raw=True))).verdict
        for order in ("chw", "hwc", "any")
    ]
    assert verdicts == ["refuted", "proven", "refuted"]


def test_a_bias_counts_where_the_target_says(tmp_path):
    path = conv(tmp_path, S8([[[1]]]), bias=[-500])
    register = Accumulator(10)
    found = [operation(certify_file(path, Target("t", register, bias=side))) for side in ("inside", "outside")]
    assert [(op.lo, op.hi, op.preload) for op in found] == [((-500,), (-245,), (-500,)), ((0,), (255,), ())]
    tiled = operation(certify_file(path, Target("t", replace(register, tile=1))))
    assert (tiled.lo, tiled.outer_lo, tiled.outer_hi) == ((0,), (-500,), (-245,))


def test_every_named_target_says_what_it_assumes():
    for name, found in TARGETS.items():
        assert found.name == name
        assert found.assumes
        assert target(name) is found
        assert Target.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "a target is an object with a name and an accumulator"),
        ({"name": "x"}, "a target is an object"),
        ({"accumulator": {"bits": 16}}, "a target needs name"),
        ({"name": "x", "accumulator": {}}, "a target needs bits"),
        ({"name": "x", "accumulator": {"bits": 1}}, r"acc_bits must lie in \[2, 64\], not 1"),
        ({"name": "x", "accumulator": {"bits": 16, "tiles": 2}}, "a target has no 'tiles'"),
        ({"name": "x", "accumulator": {"bits": 16}, "bias": "no"}, "bias must be inside or outside"),
        ({"name": "x", "accumulator": {"bits": 16}, "raw": 1}, "raw must be true or false"),
        ({"name": "x", "accumulator": {"bits": 16}, "raw": True}, "holds no bias"),
        ({"name": 3, "accumulator": {"bits": 16}}, "name of a target must be text"),
        ({"name": "x", "accumulator": {"bits": 16, "preload": "free"}}, "preload must be none"),
    ],
)
def test_bad_targets_are_refused_with_the_file(values, message, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        target(str(path))


# The commands --------------------------------------------------------------------------------------------------------


def test_certify_and_check(tmp_path, capsys, monkeypatch):
    path = mixed(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = [
        "certify",
        str(path),
        "--acc-bits",
        "14",
        "--acc-bits",
        "safe=11",
        "--json",
        "c.json",
        "--witnesses",
        "w.npz",
    ]
    assert run(words) == 1
    shown = capsys.readouterr().out
    assert "does not hold: 1 of 3 operations of the request are proven" in shown
    assert Certificate.load("c.json").target == "int14 with safe=11"
    with np.load("w.npz") as arrays:
        assert sorted(arrays) == [f"unsafe/{n}" for n in ("inputs", "rows", "values", "zero_points")]
        assert arrays["unsafe/inputs"].tolist() == [[255, 255]]
    assert run(["check", "c.json", str(path)]) == 0
    assert capsys.readouterr().out == f"c.json: agrees with {path}\n"
    damaged = json.loads((tmp_path / "c.json").read_text())
    damaged["operations"][0]["hi"][0] -= 1
    (tmp_path / "c.json").write_text(json.dumps(damaged))
    assert run(["check", "c.json", str(path)]) == 1
    assert "safe: row 0 is in [0, 1020], not [0, 1019]" in capsys.readouterr().out
    safe = conv(tmp_path, S8([[[3]]]), name="safe.onnx")
    assert run(["certify", str(safe)]) == 0
    assert run(["certify", str(safe), "--target", "avx2-u8s8", "--html", "page.html"]) == 0
    assert "conv" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["certify", "nope.onnx"], "nope.onnx: No such file or directory"),
        (["certify", "net.onnx", "--target", "avx3"], "unknown target 'avx3'; known are file, int16, int32, avx2-u8s8"),
        (
            ["certify", "net.onnx", "--target", "int16", "--acc-bits", "3"],
            "--target takes the place of --acc-bits BITS",
        ),
        (["certify", "net.onnx", "--acc-bits", "99"], "acc_bits must lie in [2, 64], not 99"),
        (["certify", "net.onnx", "--acc-bits", "nope=9"], "acc_bits: no operation matches 'nope'"),
        (["certify", "net.onnx", "--outer-bits", "24"], "--outer-bits is the register that tiles spill to"),
        (["certify", "net.onnx", "--target", "mine.json"], "mine.json: 'int16' is the name of another target"),
        (["certify", "net.onnx", "--overflow", "never"], "overflow must be one of wrap, saturate, not 'never'"),
        (["certify", "net.onnx", "--input", "x"], "an input is written NAME=uint8[:scale[:zero]], not 'x'"),
        (["certify", "net.onnx", "--input", "q=uint8"], "'q' is no graph input; those are x"),
        (["certify", "text.onnx"], "text.onnx: not an ONNX model"),
        (["certify", "."], ". holds no run"),
        (["check", "text.onnx", "net.onnx"], "text.onnx: not a certificate"),
        (["check", "nope.json", "net.onnx"], "nope.json: No such file or directory"),
    ],
)
def test_mistakes_get_one_line(words, message, tmp_path, capsys, monkeypatch):
    conv(tmp_path, S8([[[3]]]))
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "mine.json").write_text(json.dumps({"name": "int16", "accumulator": {"bits": 20}}))
    monkeypatch.chdir(tmp_path)
    assert run([*words, *(["--json", "out.json"] if words[0] == "certify" else [])]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("accaware: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
