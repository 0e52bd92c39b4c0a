"""Rows: which taps one accumulator adds, checked against what torch's own convolutions really sum."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from accaware.rows import convolution_rows, transposed_rows

TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def numbered(shape):
    """A weight whose entries are their own positions, counted from 1 so that padding (0) shows."""
    return torch.arange(1, 1 + int(np.prod(shape))).reshape(shape)


def sets_of(rows, shape):
    """Channel -> the sets of weight positions that its parts hold."""
    return [{frozenset(part[part > 0].tolist()) for part in channel} for channel in rows.split(numbered(shape))]


def summed_positions(operate, shape, x):
    """Channel -> the sets of weight positions that outputs of this channel really sum, from one-hot weights."""
    touched = []
    for k in range(int(np.prod(shape))):
        weight = torch.zeros(int(np.prod(shape)))
        weight[k] = 1
        touched.append(operate(x, weight.reshape(shape))[0].flatten(1))
    touched = torch.stack(touched, dim=-1)  # [out, positions, weights]
    assert touched.max() <= 1, "every output reads a weight at most once"
    return [{frozenset((1 + position.nonzero()[:, 0]).tolist()) for position in channel} for channel in touched]


@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3), (2, 3, 2, 3), (2, 2, 1, 3, 2)])
@pytest.mark.parametrize("order", ["chw", "hwc"])
@pytest.mark.parametrize("tile", [None, 1, 2, 4, 1000])
def test_convolution_rows_round_trip(shape, order, tile):
    rows = convolution_rows(shape, order, tile)
    weight = numbered(shape)
    split = rows.split(weight)
    assert split.shape == (rows.channels, rows.parts, split.shape[-1])
    assert torch.equal(rows.merge(split), weight)
    assert rows.parts * split.shape[-1] >= rows.fan_in > (rows.parts - 1) * split.shape[-1]
    # The taps of a channel in order, whatever the tiles.
    taps = rows.join(split)[:, 0]
    expected = weight if order == "chw" else weight.movedim(1, -1)
    assert torch.equal(taps, expected.reshape(shape[0], -1))
    valid = rows.valid(torch.device("cpu"))
    assert torch.equal(split > 0, torch.ones_like(split, dtype=torch.bool) if valid is None else valid)


def test_hwc_numbers_channels_innermost():
    weight = torch.tensor([[[[1, 2]], [[3, 4]]]])  # [1 output, 2 channels, 1, 2]
    assert convolution_rows(weight.shape, "chw").split(weight).flatten().tolist() == [1, 2, 3, 4]
    assert convolution_rows(weight.shape, "hwc").split(weight).flatten().tolist() == [1, 3, 2, 4]


def test_the_last_tile_is_padded_with_zeros():
    rows = convolution_rows((1, 5), tile=2)
    assert rows.split(torch.tensor([[1, 2, 3, 4, 5]])).tolist() == [[[1, 2], [3, 4], [5, 0]]]
    assert rows.valid(torch.device("cpu")).tolist() == [[[True, True], [True, True], [True, False]]]
    assert (rows.tiles, rows.parts, rows.fan_in) == (3, 3, 5)


CONVOLUTIONS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]


@pytest.mark.parametrize(("spatial", "groups"), CONVOLUTIONS)
@pytest.mark.parametrize(("stride", "dilation", "padding"), [(1, 1, 0), (2, 1, 1), (1, 2, 1)])
def test_a_convolution_sums_its_row_inside_and_a_part_of_it_at_the_border(spatial, groups, stride, dilation, padding):
    shape = (2 * groups, 2, *(2, 3, 1)[:spatial])
    x = torch.ones(1, 2 * groups, *(7, 6, 3)[:spatial])

    def operate(x, weight):
        return FORWARD[spatial](x, weight, stride=stride, dilation=dilation, padding=padding, groups=groups)

    expected = sets_of(convolution_rows(shape), shape)
    for seen, (row,) in zip(summed_positions(operate, shape, x), expected, strict=True):
        assert row in seen
        assert all(taps <= row for taps in seen)


CASES = [
    # spatial, groups, kernel, stride, dilation, padding, output_padding
    (1, 1, (3,), (1,), (1,), (0,), (0,)),
    (1, 1, (4,), (2,), (1,), (1,), (0,)),
    (1, 2, (5,), (3,), (1,), (2,), (1,)),
    (1, 1, (3,), (2,), (2,), (1,), (1,)),
    (1, 1, (4,), (3,), (2,), (0,), (1,)),
    (1, 1, (2,), (3,), (1,), (0,), (2,)),  # some outputs sum nothing
    (1, 2, (3,), (4,), (2,), (1,), (3,)),
    (2, 1, (3, 2), (2, 1), (1, 1), (1, 0), (1, 0)),
    (2, 2, (3, 4), (2, 3), (1, 2), (1, 0), (0, 2)),
    (2, 1, (2, 3), (1, 2), (2, 3), (0, 1), (1, 1)),
    (3, 1, (1, 2, 3), (1, 2, 2), (1, 1, 1), (0, 0, 1), (0, 1, 0)),
    (3, 2, (2, 1, 2), (2, 1, 1), (1, 1, 2), (1, 0, 0), (0, 0, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("order", ["chw", "hwc"])
def test_the_phases_of_a_transposed_convolution_are_what_its_outputs_sum(case, order):
    spatial, groups, kernel, stride, dilation, padding, extra = case
    channels, per_group = 2 * groups, 2
    shape = (channels, per_group, *kernel)
    x = torch.ones(1, channels, *[-(-(k - 1) * d // s) + 4 for k, d, s in zip(kernel, dilation, stride, strict=True)])

    def operate(x, weight):
        return TRANSPOSED[spatial](x, weight, None, stride, padding, extra, groups, dilation)

    rows = transposed_rows(shape, groups, stride, dilation, order)
    expected = sets_of(rows, shape)
    assert len(expected) == groups * per_group
    for seen, phases in zip(summed_positions(operate, shape, x), expected, strict=True):
        assert phases <= seen, "every phase is attained inside"
        assert all(any(taps <= phase for phase in phases) for taps in seen), "and nothing outside of them is summed"
        assert sum(len(p) for p in phases) == channels // groups * int(np.prod(kernel)), "phases do not overlap"
    weight = numbered(shape)
    assert torch.equal(rows.merge(rows.split(weight)), weight)


def test_taps_of_a_phase_are_numbered_in_order():
    shape = (2, 1, 2, 2)  # two input channels, stride 1: one phase
    weight = numbered(shape)
    chw = transposed_rows(shape, 1, (1, 1), (1, 1), "chw").split(weight)
    hwc = transposed_rows(shape, 1, (1, 1), (1, 1), "hwc").split(weight)
    assert chw.flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert hwc.flatten().tolist() == [1, 5, 2, 6, 3, 7, 4, 8]


@pytest.mark.parametrize("tile", [1, 2, 3])
def test_tiles_of_phases_keep_to_their_phase(tile):
    shape = (3, 2, 3)
    whole = transposed_rows(shape, 1, (2,), (1,))  # phases of 6 and 3 taps
    tiled = transposed_rows(shape, 1, (2,), (1,), tile=tile)
    weight = numbered(shape)
    assert torch.equal(tiled.join(tiled.split(weight)), whole.split(weight))
    assert torch.equal(tiled.merge(tiled.split(weight)), weight)
    assert tiled.parts == 2 * -(-6 // tile)
    for channel, phases in zip(tiled.split(weight), whole.split(weight), strict=True):
        per_phase = channel.reshape(2, -1)
        for phase, parts in zip(phases, per_phase, strict=True):
            assert set(parts.tolist()) - {0} == set(phase.tolist()) - {0}


def test_splitting_and_merging_pass_gradients():
    for rows in (convolution_rows((2, 3, 2), "hwc", 4), transposed_rows((2, 2, 3), 1, (2,), (1,), "chw", 2)):
        weight = torch.randn(rows.shape, requires_grad=True)
        factor = torch.randn(rows.shape)
        (rows.merge(2 * rows.split(weight)) * factor).sum().backward()
        assert torch.equal(weight.grad, 2 * factor)


def test_short_phases_are_marked_as_padding():
    rows = transposed_rows((1, 1, 3), 1, (2,), (1,))
    assert rows.split(torch.tensor([[[7, 8, 9]]])).tolist() == [[[7, 9], [8, 0]]]
    assert rows.valid(torch.device("cpu")).tolist() == [[[True, True], [True, False]]]
    assert transposed_rows((1, 1, 4), 1, (2,), (1,)).valid(torch.device("cpu")) is None


def test_more_phases_than_one_dimension():
    shape = (1, 1, 2, 3)
    rows = transposed_rows(shape, 1, (2, 2), (1, 1))
    assert rows.phases == 4
    split = rows.split(numbered(shape))[0]
    found = {frozenset(part[part > 0].tolist()) for part in split}
    by_hand = {
        frozenset(1 + 3 * h + w for h, w in itertools.product(range(2), range(3)) if (h % 2, w % 2) == phase)
        for phase in itertools.product((0, 1), (0, 1))
    }
    assert found == by_hand
