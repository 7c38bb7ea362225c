"""Processes that wait for each other: a barrier with a name and a time, and how long a process group waits."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from trainkit.strategies import DDPStrategy, Strategy

BODY = """
import json, os, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from trainkit import Trainer
from trainkit.errors import MissingRankError
from trainkit.strategies import DDPStrategy

strategy = DDPStrategy(timeout=timedelta(minutes=20), step_timeout=timedelta(seconds=7))
trainer = Trainer(accelerator="cpu", strategy=strategy, logger=False)
strategy.setup_environment()
told = {}
for _ in range(3):
    strategy.barrier("ready", timeout=20)
strategy.barrier("ready")
strategy.barrier()
store = _get_default_store()
told["kept"] = [store.check([f"trainkit/barrier/ready/{number}"]) for number in range(3)]
if strategy.global_rank != 1:
    try:
        strategy.barrier("checkpoint", timeout=timedelta(seconds=0.5))
    except MissingRankError as error:
        told["error"], told["ranks"] = str(error), error.ranks
strategy.barrier("after", timeout=20)


def waits():  # how long the group waits now
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    return backend.options._timeout.total_seconds()


told["at first"] = waits()
strategy.be_quick(timedelta(seconds=3), strategy.patience)
told["in steps"] = waits()
strategy.be_patient()
told["at an epoch's end"] = waits()
strategy.be_quick(timedelta(seconds=3), strategy.patience - 1)
told["seen too late"] = waits()
strategy.be_quick(timedelta(seconds=60), strategy.patience)
told["in long steps"] = waits()
print(json.dumps(told))
"""


def test_a_barrier_with_a_time_names_who_did_not_come(processes: Callable[..., Any]) -> None:
    told = [json.loads(rank.out.splitlines()[-1]) for rank in processes(3, BODY)]
    for rank in (0, 2):
        assert told[rank]["ranks"] == [1]
        assert told[rank]["error"].startswith("rank 1 did not come to the barrier 'checkpoint' within 0.5 s.")
    for one in told:
        assert one["kept"] == [False, False, True]  # what earlier ones left is gone
        assert one["at first"] == one["at an epoch's end"] == one["seen too late"] == 20 * 60
        assert one["in steps"] == 7
        assert one["in long steps"] == 60


@pytest.mark.parametrize("timeout", [None, 1, timedelta(seconds=1)])
def test_one_process_waits_for_nobody(timeout: Any) -> None:
    Strategy().barrier("alone", timeout=timeout)


def test_a_strategy_can_be_copied_and_pickled() -> None:
    import copy
    import pickle

    strategy = DDPStrategy(step_timeout=timedelta(minutes=1))
    assert copy.deepcopy(strategy).step_timeout == timedelta(minutes=1)
    assert pickle.loads(pickle.dumps(strategy)).timeout == timedelta(minutes=30)
