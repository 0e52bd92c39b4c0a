"""What overflow does to a network that nobody certified, and does not do to one that somebody did."""

from __future__ import annotations

import copy

import pytest
import torch

import accaware as aa
from accaware.certify.emulation import Emulator
from accaware.certify.measure import measure
from accaware.certify.targets import TARGETS
from exporter.helpers import prepared

pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def trained():
    """A float network of 128 channels, so of up to 1,152 products, and the handwritten digits."""
    from accaware.experiments import demo

    digits = demo.load_digits(0)
    torch.manual_seed(0)
    network = demo.DigitNet(128)
    demo.train(network, digits.train, demo.FLOAT_RATE, epochs=4, seed=0)
    return network, digits


@pytest.mark.parametrize(("method", "start"), [("projected", "none"), ("projected", "free"), ("baseline", "none")])
def test_an_uncertified_network_loses_at_12_bits_what_a_certified_one_keeps(trained, method, start, tmp_path) -> None:
    network, digits = trained
    model, calibration = copy.deepcopy(network), [digits.train.images[:500]]
    x, labels = digits.test.images[:200], digits.test.labels[:200]
    aa.prepare_(model, aa.Spec(acc_bits=12, method=method, preload=start), sample=x[:2])
    aa.calibrate(model, calibration)
    aa.reestimate_batchnorm(model, calibration)
    certificate = aa.export(model.eval(), tmp_path / "net.onnx", sample=x[:2])
    emulator, exact = (Emulator(tmp_path / "net.onnx", target) for target in (TARGETS["file"], None))
    found = measure(emulator, exact, {"input": x.numpy()}, labels.numpy(), target="file", batch_size=100)
    assert certificate.holds == (method == "projected")
    assert found.exact_top1 > 95
    if certificate.holds:
        assert found.emulated.overflows == 0
        assert found.equal == 200
    else:
        assert found.emulated.overflows > 1000
        assert found.top1 < found.exact_top1 - 10
        with aa.wrapping(model), torch.no_grad():  # the model itself, on the same register
            here = model(x).argmax(1).numpy()
        # An overflow magnifies what a tie in float32 changes.
        assert (here == found.emulated.outputs["output"].argmax(1)).mean() > 0.95


def test_sums_from_start_values_run_where_several_layers_read_four_bits(tmp_path) -> None:
    model, x = prepared("residual", acc_bits=9, preload="free")
    aa.export(model, tmp_path / "net.onnx", sample=x[:2])
    emulator, exact = (Emulator(tmp_path / "net.onnx", target) for target in (TARGETS["file"], None))
    found = measure(emulator, exact, {"input": x.numpy()}, None, target="file", batch_size=8)
    assert found.emulated.overflows == 0
    assert found.equal == len(x)


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
