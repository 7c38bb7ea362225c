"""The helper that other tests run processes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def test_processes_join_a_group_and_say_what_they_print(processes: Callable[..., list[Any]]) -> None:
    source = """
        import sys, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        one = torch.ones(1)
        dist.all_reduce(one)
        print(one.item(), *sys.argv[1:])
        dist.destroy_process_group()
    """
    ranks = processes(2, source, "word", 3)
    assert [(rank.rank, rank.out, rank.code) for rank in ranks] == [(0, "2.0 word 3\n", 0), (1, "2.0 word 3\n", 0)]
    with pytest.raises(AssertionError, match="rank 1 ended with 1"):
        processes(2, "import os\nif os.environ['RANK'] == '1': raise ValueError('no')")
