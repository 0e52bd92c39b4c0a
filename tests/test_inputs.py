"""What models are called with: tensors, tuples, mappings, and rows without their padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accaware.inputs import call, feeds

CPU = torch.device("cpu")


def test_tensors_tuples_and_mappings_reach_the_model():
    class Sum(nn.Module):
        def forward(self, a, b=1):
            return a + b

    one = torch.ones(2)
    assert call(Sum(), one).tolist() == [2, 2]
    assert call(Sum(), (one, 3)).tolist() == [4, 4]
    assert call(Sum(), {"b": 5, "a": one}).tolist() == [6, 6]


def test_only_the_first_of_a_tuple_is_an_input():
    one, labels = torch.ones(2), torch.zeros(2)
    assert [x is one for x in feeds([one, (one, labels), [one, labels]], CPU)] == [True] * 3
    (found,) = feeds([({"x": one}, labels)], CPU)
    assert found == {"x": one}


def test_rows_come_by_their_lengths_without_padding():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])
    ids = torch.arange(16).reshape(4, 4)
    batch = {"input_ids": ids, "attention_mask": mask, "wide": ids[..., None].expand(4, 4, 2), "rows": ids[:, 0]}
    two, three = feeds([{**batch, "cache": None, "one": torch.ones(1)}], CPU)
    assert two["input_ids"].tolist() == [[0, 1], [10, 11]]
    assert three["input_ids"].tolist() == [[5, 6, 7]]
    assert two["attention_mask"].all()
    assert two["wide"][..., 1].tolist() == [[0, 1], [10, 11]]
    assert (two["rows"].tolist(), three["rows"].tolist()) == ([0, 8], [4])
    assert two["cache"] is None
    assert two["one"].tolist() == [1]


def test_a_batch_without_padding_stays_whole():
    batch = {"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": torch.ones(2, 3)}
    (found,) = feeds([batch], CPU)
    assert found["input_ids"] is batch["input_ids"]


@pytest.mark.parametrize("batch", [torch.ones(2, 3), {"x": torch.ones(2)}])
def test_one_batch_in_place_of_several_is_refused(batch):
    with pytest.raises(TypeError, match=r"batches must be several, such as a list of them, not one (Tensor|dict)"):
        list(feeds(batch, CPU))
