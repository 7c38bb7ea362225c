"""How many workers fit a machine."""

from __future__ import annotations

import os

import pytest

from trainkit.data.workers import suggested_max_num_workers


@pytest.mark.parametrize(("cores", "processes", "workers"), [(8, 1, 7), (8, 2, 3), (8, 8, 1), (8, 20, 1), (1, 1, 1)])
def test_one_core_is_left_to_each_process(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert suggested_max_num_workers(processes) == workers


def test_a_system_that_does_not_say_counts_as_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert suggested_max_num_workers(1) == 1


def test_no_process_is_an_error() -> None:
    with pytest.raises(ValueError, match="local_world_size must be at least 1"):
        suggested_max_num_workers(0)
