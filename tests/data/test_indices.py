from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler

from trainkit.data.indices import Noted, note_indices
from trainkit.data.loader import Loader


def test_the_queue_is_as_long_as_the_loader_reads_ahead() -> None:
    data: Any = list(range(100))
    loader = Loader(DataLoader(data, 1, num_workers=2, prefetch_factor=3), name="data", argument="limit")
    drawn = note_indices(loader)
    assert drawn is not None
    longest = 0
    for index, batch, _ in loader.epoch(0):
        longest = max(longest, len(drawn))
        assert drawn.popleft() == batch.tolist() == [index]
    assert longest <= 2 * 3 + 2
    assert not drawn


def test_two_may_note_the_same_loader_and_an_epoch_begins_with_an_empty_queue() -> None:
    data: Any = list(range(6))
    loader = Loader(DataLoader(data, 2), name="data", argument="limit", limit=2)
    first, second = note_indices(loader), note_indices(loader)
    for epoch in range(2):
        list(loader.epoch(epoch))
        assert list(first or []) == list(second or []) == [[0, 1], [2, 3]]


def test_what_notes_a_sampler_is_the_sampler_in_everything_else() -> None:
    sampler = RandomSampler(range(3), generator=torch.Generator())
    noted = Noted(sampler)
    assert (len(noted), noted.replacement, noted.num_samples) == (3, False, 3)
    assert len(copy.copy(noted)) == 3
