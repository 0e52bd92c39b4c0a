"""The activation quantizer: signs and scales from data, codes, state dicts."""

from __future__ import annotations

import pytest
import torch

from accaware.formats import IntFormat
from accaware.quantizers import ActivationQuantizer


def calibrated(bits, *batches, signed=None):
    quantizer = ActivationQuantizer(bits, signed)
    quantizer.observe()
    for batch in batches:
        assert quantizer(batch) is batch, "observing passes through"
    quantizer.observing = False
    quantizer.calibrate()
    return quantizer


def test_it_is_the_identity_before_calibration():
    x = torch.randn(5)
    assert ActivationQuantizer(4)(x) is x


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_sign_of_the_data_decides_the_codes(bits):
    x = torch.rand(2, 100)
    assert calibrated(bits, x).codes == IntFormat.unsigned(bits)
    assert calibrated(bits, x - 0.5).codes == IntFormat.signed(bits)
    assert calibrated(bits, x, x - 0.5).codes == IntFormat.signed(bits)
    assert calibrated(bits, x, signed=True).codes == IntFormat.signed(bits)
    assert calibrated(bits, x - 0.5, signed=False).codes == IntFormat.unsigned(bits)


def test_one_negative_value_among_many_is_seen():
    for position in (0, 1, 31, 12345, 2**20 - 1):
        x = torch.rand(2**20)
        x[position] = -0.25
        assert calibrated(4, x).codes == IntFormat.signed(4), position


def test_the_sample_is_taken_from_every_column():
    # 64 x 64 images of which only the last column carries the signal: a stride of 32 would never meet it.
    x = torch.zeros(512, 1, 64, 64)
    x[..., -1] = 1.0
    quantizer = calibrated(4, x)
    assert quantizer.scale.item() == pytest.approx(1 / 15, rel=0.1)


@pytest.mark.parametrize(("bits", "signed"), [(4, False), (4, True), (8, False), (2, True), (1, False), (1, True)])
def test_data_on_a_grid_is_reproduced_exactly(bits, signed):
    form = IntFormat.signed(bits) if signed else IntFormat.unsigned(bits)
    x = 0.25 * torch.arange(form.lo, form.hi + 1).float().repeat(3)
    quantizer = calibrated(bits, x)
    assert quantizer.codes == form
    assert torch.equal(quantizer(x), x)
    assert torch.equal(quantizer.to_codes(x), (4 * x).double())


@pytest.mark.parametrize("signed", [False, True])
def test_the_scale_has_the_smallest_squared_error(signed):
    torch.manual_seed(0)
    x = torch.randn(4096) if signed else torch.rand(4096) ** 3 * 7
    quantizer = calibrated(3, x)
    form = quantizer.codes

    def error(scale):
        return float(((x / scale).round().clamp(form.lo, form.hi) * scale - x).square().mean())

    found = error(quantizer.scale.item())
    others = [error(scale) for scale in torch.linspace(0.01, float(x.abs().max()), 2000).tolist()]
    assert found <= 1.03 * min(others)


def test_calibrating_again_forgets_the_data_before():
    quantizer = calibrated(4, torch.rand(100))
    quantizer.observe()
    quantizer(torch.arange(16.0))
    quantizer.observing = False
    quantizer.calibrate()
    assert quantizer.scale.item() == pytest.approx(1.0)


def test_data_that_is_all_zero_is_accepted():
    x = torch.zeros(10)
    quantizer = calibrated(4, x)
    assert quantizer.scale.item() > 0
    assert torch.equal(quantizer(x), x)


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="no data reached"):
        ActivationQuantizer(4).calibrate()


def test_state_dict_restores_the_codes():
    old = calibrated(4, torch.randn(100))
    new = ActivationQuantizer(4)
    new.load_state_dict(old.state_dict())
    assert new.codes == old.codes == IntFormat.signed(4)
    x = torch.randn(50)
    assert torch.equal(new(x), old(x))


def test_an_uncalibrated_state_dict_leaves_it_uncalibrated():
    new = ActivationQuantizer(4)
    new.load_state_dict(ActivationQuantizer(4).state_dict())
    assert new.codes is None
    new = calibrated(4, torch.randn(100))
    new.load_state_dict(ActivationQuantizer(4).state_dict())
    assert new.codes is None
    assert new.code_range.tolist() == [0, 0]


def test_codes_of_other_bits_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 15\], not of act_bits=8"):
        ActivationQuantizer(8).load_state_dict(calibrated(4, torch.rand(10)).state_dict())


@pytest.mark.parametrize("signed", [False, True])
def test_gradient_of_the_scale_is_that_of_lsq(signed):
    torch.manual_seed(0)
    form = IntFormat.signed(4) if signed else IntFormat.unsigned(4)
    quantizer = ActivationQuantizer(4).double()
    quantizer.set_codes(form)
    with torch.no_grad():
        quantizer.scale.fill_(0.5)
    x = torch.randint(-700, 700, (3, 4, 5)).double() / 64
    grad = torch.randint(-9, 9, x.shape).double()
    quantizer(x).backward(grad)
    u = x / 0.5
    inside = (u >= form.lo) & (u <= form.hi)
    slope = (grad * torch.where(inside, u.round() - u, u.round().clamp(form.lo, form.hi))).sum()
    magnitude = 8 if signed else 15
    assert quantizer.scale.grad.item() == pytest.approx(float(slope) / (20 * magnitude) ** 0.5, rel=1e-12)


def test_calibrating_again_finds_the_sign_anew():
    quantizer = calibrated(4, torch.rand(100))
    for x, signed in ((torch.randn(100), True), (torch.rand(100), False)):
        quantizer.observe()
        quantizer(x)
        quantizer.calibrate()
        assert quantizer.codes.is_signed == signed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_data_that_are_not_finite_are_refused_and_then_forgotten(value):
    quantizer = ActivationQuantizer(4)
    quantizer.observe()
    x = torch.rand(2**18)
    x[12345] = value  # no value of the sample that is kept
    quantizer(x)
    with pytest.raises(ValueError, match=r"^block\.a: the calibration data that reach it must be finite"):
        quantizer.calibrate("block.a")
    quantizer.observe()
    quantizer(torch.rand(100))
    quantizer.calibrate()
    assert quantizer.codes == IntFormat.unsigned(4)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("per_token", [False, True])
def test_an_empty_batch_passes(shape, per_token):
    quantizer = ActivationQuantizer(4, per_token=per_token)
    quantizer.set_codes(IntFormat.signed(4))
    x = torch.zeros(shape, requires_grad=True)
    y = quantizer(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
