"""What metadata can make of a proof: nothing that the integers of the file do not bear out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from accaware.certify.carried import KEY
from accaware.certify.certificate import Operation
from accaware.certify.files import certify_file
from accaware.certify.second import disagreements
from accaware.formats import Accumulator, IntFormat
from onnx_helpers import model, node, save

BYTE = TensorProto.UINT8


def file(folder, bias=0, preload=(), **register):
    """A convolution of four weights of 3, codes of 8 bits, and what the metadata say of its register."""
    weights = {"w": np.full((1, 1, 2, 2), 3, np.int8), "zw": np.int8(0), "b": np.array([bias], np.int32)}
    made = model(
        [node("QLinearConv", "x s z w s zw s z b", "y", "conv")],
        {"x": (BYTE, [1, 1, 4, 4])},
        {"y": (BYTE, None)},
        {"s": np.float32(0.1), "z": np.uint8(0), **weights},
    )
    operations = {"conv": {"register": register, "preload": list(preload), "inside": True}}
    helper.set_model_props(made, {KEY: json.dumps({"schema": 1, "operations": operations})})
    return save(made, folder)


def test_the_summary_counts_what_the_file_leaves_out(tmp_path) -> None:
    path = file(tmp_path, bits=8)
    assert "outside it" not in certify_file(path).table()
    made = onnx.load(path)
    made.metadata_props[0].value = made.metadata_props[0].value.replace("true", "false")
    table = certify_file(save(made, tmp_path)).table()
    assert (
        "0 of 0 operations of the request are proven; outside it, by the own word of the file: 1 with weights" in table
    )


def test_a_bias_is_in_the_register(tmp_path) -> None:
    path = file(tmp_path, bias=2**20, bits=16)
    certificate = certify_file(path)
    (op,) = certificate.operations
    assert (op.verdict, op.lo, op.hi) == ("refuted", (2**20,), (2**20 + 3060,))
    assert disagreements(certificate, path) == []
    forged = Operation("conv", "QLinearConv", "proven", 13, Accumulator(16), IntFormat(0, 255), 4, lo=(0,), hi=(3060,))
    assert disagreements(replace(certificate, operations=(forged,), bias="outside"), path)
    forged = replace(forged, preload=(2**20,))
    assert disagreements(replace(certificate, operations=(forged,)), path)


def test_start_values_do_not_hide_a_bias(tmp_path) -> None:
    path = file(tmp_path, bias=2**20, preload=[5], bits=16)
    certificate = certify_file(path)
    assert "both its bias and the start values" in certificate.operations[0].reason
    assert disagreements(certificate, path) == []
    forged = Operation(
        *("conv", "QLinearConv", "proven", 13, Accumulator(16), IntFormat(0, 255), 4),
        preload=(5,),
        lo=(5,),
        hi=(3065,),
    )
    assert disagreements(replace(certificate, operations=(forged,)), path)


def test_start_values_of_tiles_of_any_taps_all_count(tmp_path) -> None:
    path = file(tmp_path, preload=[0, 40000], bits=16, tile=2, order="any")
    certificate = certify_file(path)
    assert certificate.operations[0].verdict == "unproven"
    assert disagreements(certificate, path) == []
    forged = Operation(
        *("conv", "QLinearConv", "proven", 12, Accumulator(16, tile=2, order="any"), IntFormat(0, 255), 4),
        preload=(0, 40000),
        lo=(0,),
        hi=(1530,),
        outer_lo=(0,),
        outer_hi=(3060,),
    )
    assert disagreements(replace(certificate, operations=(forged,)), path)


@pytest.mark.parametrize("name", ["file", "file with other=9"])
def test_what_the_register_assumes_is_checked(tmp_path, name) -> None:
    path = file(tmp_path, bits=16)
    certificate = replace(certify_file(path), target=name)
    assert disagreements(certificate, path) == []
    (op,) = certificate.operations
    lies = [
        ({"assumes": "Nothing."}, "assumes of target file is 'Codes less their zero points; one running sum"),
        ({"bias": "outside"}, "bias of target file is 'inside', not 'outside'"),
        ({"operations": (replace(op, target=Accumulator(17)),)}, "conv: the file carries another register"),
        ({"operations": (replace(op, raw=True),)}, "conv: the file carries another register"),
    ]
    for lie, line in lies:
        (found,) = disagreements(replace(certificate, **lie), path)
        assert found.startswith(line)


@pytest.mark.parametrize("inside", [False, True])
def test_a_product_of_floats_is_outside_where_the_file_says_so(tmp_path, inside) -> None:
    made = model(
        [node("MatMul", "x f", "y", "float")], {"x": [1, 2]}, {"y": [1, 2]}, {"f": np.ones((2, 2), np.float32)}
    )
    operations = {"float": {"register": {"bits": 32}, "preload": [], "inside": inside}}
    helper.set_model_props(made, {KEY: json.dumps({"schema": 1, "operations": operations})})
    path = save(made, tmp_path)
    certificate = certify_file(path)
    (op,) = certificate.operations
    assert (op.verdict, op.note or op.reason) == ("unproven" if inside else "outside", "its weights 'f' are floats")
    assert ("outside it, by the own word of the file: 1 with weights" in certificate.table()) != inside
    assert disagreements(certificate, path) == []
    forged = Operation("float", "MatMul", "outside", note="its weights 'f' are floats")
    forged = replace(certificate, operations=(forged,))
    assert bool(disagreements(forged, path)) == inside


def test_start_values_of_zero_are_none(tmp_path) -> None:
    path = file(tmp_path, preload=[0], bits=16)
    certificate = certify_file(path)
    assert certificate.holds
    assert disagreements(certificate, path) == []


def test_a_register_of_the_files_own_has_no_other_width(tmp_path) -> None:
    with pytest.raises(ValueError, match="the file itself says what register 'conv' has"):
        certify_file(file(tmp_path, bits=10), acc_bits={"co*": 16})
