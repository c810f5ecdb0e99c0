"""Faults of sharded losses elsewhere, as tests: each says which library had it."""

from __future__ import annotations

import pytest
import torch
from inputs import make, upstream_of
from vocab_shards import assert_shards_match

WIDTHS = {
    "even": [10, 10, 10],
    "odd": [11, 9, 10],
    "one_empty": [15, 0, 15],
    "first_empty": [0, 20, 10],
    "last_empty": [16, 14, 0],
    "of_one_word": [1, 28, 1],
}


@pytest.mark.parametrize("name", WIDTHS)
def test_labels_at_the_edges_of_shards(name: str) -> None:
    """Cut Cross-Entropy #59, verl #2899, #5349: the word beside an edge was taken from none or two.

    Also of odd vocabularies, and of shards without a word.
    """
    widths = WIDTHS[name]
    logits, _ = make(30, sum(widths), torch.float32)
    labels = torch.arange(30)  # each word once, so every edge from both sides
    assert_shards_match(logits, labels, upstream_of(labels), widths)
