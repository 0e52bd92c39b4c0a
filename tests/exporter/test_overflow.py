"""What overflow does to a network that nobody certified, and does not do to one that somebody did."""

from __future__ import annotations

import copy

import pytest
import torch

import accaware as aa
from accaware.certify.emulation import Emulator
from accaware.certify.measure import measure
from accaware.certify.targets import TARGETS

pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def images():
    """Of the handwritten digits: those to calibrate with, and those to judge by, with their labels."""
    from accaware.experiments import demo

    digits = demo.load_digits(0)
    return demo.float_network(digits, epochs=5, seed=0), digits


@pytest.mark.parametrize(("method", "start"), [("projected", "none"), ("projected", "free"), ("baseline", "none")])
def test_an_uncertified_network_loses_what_a_certified_one_keeps(images, method, start, tmp_path) -> None:
    model, digits = images
    model = copy.deepcopy(model)
    x, labels = digits.test.images[:200], digits.test.labels[:200]
    bits = 8
    aa.prepare_(model, aa.Spec(acc_bits=bits, method=method, preload=start), sample=x[:2])
    aa.calibrate(model, [digits.train.images[:500]])
    aa.reestimate_batchnorm(model, [digits.train.images[:500]])
    aa.export(model.eval(), tmp_path / "net.onnx", sample=x[:2])
    certificate = aa.certify_file(tmp_path / "net.onnx")
    emulator = Emulator(tmp_path / "net.onnx", TARGETS["file"])
    exact = Emulator(tmp_path / "net.onnx", None)
    found = measure(emulator, exact, {"input": x.numpy()}, labels.numpy(), target="file", batch_size=100)
    assert certificate.holds == (method != "baseline")
    with aa.wrapping(model), torch.no_grad():
        here = model(x).argmax(1).numpy()
    there = found.emulated.outputs["output"].argmax(1)
    assert (here == there).mean() > 0.98  # a tie that float32 breaks differently may turn a digit
    if certificate.holds:
        assert found.emulated.overflows == 0
        assert found.equal == 200
        assert found.top1 == found.exact_top1 > 30  # nothing was trained after quantizing
    else:
        assert found.emulated.overflows > 1000
        assert found.top1 < found.exact_top1 - 10


def test_resnet20_at_10_bits(shared, tmp_path) -> None:
    from accaware.experiments.batches import EvalBatches
    from accaware.experiments.checkpoints import load_weights
    from accaware.experiments.data import load
    from accaware.experiments.images import NORMALIZATIONS
    from accaware.experiments.models import build

    shared("data/cifar10")
    data = load("cifar10", shared("data/cifar10"), limit_train=500)
    train = EvalBatches(data.train, 250, NORMALIZATIONS["imagenet"])
    x, labels = next(iter(EvalBatches(data.evaluation, 100, NORMALIZATIONS["imagenet"])))
    top1 = {}
    for method in ("baseline", "projected"):
        model = build("resnet20", 10)
        load_weights(model, shared("checkpoints/resnet20_cifar10.safetensors"))
        aa.prepare_(model, aa.Spec(acc_bits=10, method=method), sample=x[:2], keep=dict(model.keep))
        aa.calibrate(model, train)
        aa.reestimate_batchnorm(model, train)
        aa.export(model.eval(), tmp_path / "net.onnx", sample=x[:2])
        emulator, exact = (Emulator(tmp_path / "net.onnx", target) for target in (TARGETS["file"], None))
        found = measure(emulator, exact, {"input": x.numpy()}, labels.numpy(), target="file", batch_size=100)
        top1[method] = found.top1, found.exact_top1
        assert (found.emulated.overflows == 0, found.equal == 100) == (method == "projected",) * 2
    assert top1["projected"][0] == top1["projected"][1]
    assert top1["baseline"][0] < top1["baseline"][1] - 50
