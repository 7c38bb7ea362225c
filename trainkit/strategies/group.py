"""Group: several processes that hold one process group of torch's, and what they tell each other through it."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parameter import is_lazy

from trainkit.errors import MissingRankError
from trainkit.hang import named
from trainkit.rank_zero import rank_zero_only
from trainkit.strategies.meeting import SHORTEST, looks, store_of
from trainkit.strategies.processes import Processes
from trainkit.tree import map_tensors
from trainkit.world import World

LONGEST_IDLING = 2.0  # seconds until threads that do not come to rest are left alone
LONGEST_LEAVE = 30.0  # seconds that the others wait for rank 0 to leave when a signal has ended a run
LEFT = "trainkit/left"
QUIET_LOOKS = 10  # so often one after the other threads are seen to wait before they are believed to
_ours = False  # whether this process joined the process group here, and not in the user's code
_pace = threading.Lock()  # for who sets the group's timeout
_met: Counter[str] = Counter()  # how often each barrier with a timeout was reached
_calls = itertools.count()  # of on_rank_zero, by all strategies of the process: the group has one store
OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


class Group(Processes):
    """Several processes in torch's process group, which each joins once and leaves when it ends.

    Args:
        device: where this process's module and batches live.
        world: the processes.
        process_group_backend: torch's name of it; None takes nccl for cuda beside gloo for the host, gloo elsewhere.
        timeout: how long a process waits for the others before that is an error, where nobody knows better: up to
            the first training step's end, and in all that is no training step.
        step_timeout: how long in a training step, once it is known how long these take; or 20 times as long as they
            do, if that is more. It is the Trainer's watchdog that knows. None: `timeout`, always.
    """

    parallel = True

    def __init__(
        self,
        device: torch.device | str = "cpu",
        world: World | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        step_timeout: timedelta | None = timedelta(minutes=5),
    ) -> None:
        super().__init__(device)
        self.process_group_backend, self.timeout, self.step_timeout = process_group_backend, timeout, step_timeout
        self._waits = timeout
        self.world = world or World()

    @property
    def backend(self) -> str:
        """The process group's backend, with gloo beside nccl for what lives on the host."""
        return self.process_group_backend or ("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def setup_environment(self) -> None:
        """Join the process group, once a process: it is left when the process ends."""
        global _ours
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]
        if dist.is_initialized():
            if _ours:  # an earlier Trainer's
                set_timeout(self.timeout)
            return
        device = self.device if self.device.type == "cuda" else None
        if not self.world.launcher:  # one process, which nobody launched
            dist.init_process_group(self.backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device)  # type: ignore[attr-defined]
            atexit.register(leave_process_group)
            return
        dist.init_process_group(
            self.backend,
            store=store_of(self.world, self.timeout),
            rank=self.global_rank,
            world_size=self.world_size,
            timeout=self.timeout,
            device_id=device,
        )
        _ours = True
        atexit.register(leave_process_group)

    def same_everywhere(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the values that rank 0 has."""
        for tensor in tensors:
            if not is_lazy(tensor):
                dist.broadcast(tensor.detach(), 0)

    def be_patient(self) -> None:
        """Wait `timeout` for the others from here on: one of them may have something to do that is no step."""
        with _pace:
            self.patience += 1
            self._wait_for(self.timeout)

    def be_quick(self, timeout: timedelta, patience: int) -> None:
        """Wait only so long for the others, but not less than `step_timeout`.

        Args:
            timeout: how long.
            patience: what `self.patience` was when it was seen that only steps are done; if it is more by now,
                something else has begun.
        """
        with _pace:
            if self.step_timeout is not None and patience == self.patience:
                self._wait_for(min(max(timeout, self.step_timeout), self.timeout))

    def _wait_for(self, timeout: timedelta) -> None:
        if _ours and abs(timeout - self._waits) > 0.2 * self._waits:
            set_timeout(timeout)
            self._waits = timeout

    def barrier(self, name: str | None = None, timeout: float | timedelta | None = None) -> None:
        """Wait for all processes.

        Args:
            name: what for, for the error.
            timeout: how long, in seconds or as a timedelta; None waits as long as in any collective.

        Raises:
            MissingRankError: some did not come in time; it names the barrier and their ranks.
        """
        if timeout is not None:
            seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
            meet(name or "", seconds, self.global_rank, self.world_size)
        elif self.device.type == "cuda":
            dist.barrier(device_ids=[self.device.index])
        else:
            dist.barrier()

    def on_rank_zero(self, what: str, function: Callable[[], Any]) -> Any:
        """Run a function on rank 0 while the others wait, however long it takes, and return what it returned on all.

        They do not wait inside of a collective: that would be over after the group's timeout.

        Args:
            what: what it does, for the error of the others.
            function: what rank 0 runs; what it returns is pickled.

        Raises:
            RuntimeError: it failed on rank 0, which raises the error itself.
        """
        key, store = f"trainkit/{next(_calls)}", _get_default_store()
        if self.global_rank == 0:
            try:
                value = function()
            except BaseException as error:
                store.set(key, pickle.dumps((f"{type(error).__name__}: {error}", None)))  # type: ignore[arg-type]
                raise
            store.set(key, pickle.dumps((None, value)))  # type: ignore[arg-type]
            return value
        return _answer(store, key, f"{what} failed on rank 0")

    def on_each_node(self, what: str, function: Callable[[], Any]) -> None:
        """Run a function on the first process of each node, while all others wait, however long it takes.

        Args:
            what: what it does, for the error of the others.
            function: what the first processes run.

        Raises:
            RuntimeError: it failed on a node, whose first process raises the error itself.
        """
        key, store = f"trainkit/{next(_calls)}", _get_default_store()
        if self.local_rank == 0:
            try:
                function()
            except BaseException as error:
                store.set(f"{key}/{self.node_rank}", pickle.dumps((f"{type(error).__name__}: {error}", None)))  # type: ignore[arg-type]
                raise
            store.set(f"{key}/{self.node_rank}", pickle.dumps((None, None)))  # type: ignore[arg-type]
        for node in range(self.world.num_nodes):
            where = f"node {node}" if self.world.num_nodes > 1 else "rank 0"
            _answer(store, f"{key}/{node}", f"{what} failed on {where}")

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """Return the value that one process has."""
        values = [value]
        dist.broadcast_object_list(values, src)
        return values[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every process's value, by rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Put the sum, the minimum or the maximum of every process's tensor in its place."""
        dist.all_reduce(tensor, OPS[op])
        return tensor

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Return every process's tensors, stacked in a new first dimension."""
        return map_tensors(lambda tensor: _gathered(tensor, group, sync_grads), data)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: str | None = "mean") -> Any:
        """Return the mean (or sum) of every process's tensor; anything else is returned as it is."""
        if not isinstance(tensor, Tensor):
            return tensor
        op = str(reduce_op).lower()
        if op in ("mean", "avg") and not tensor.is_floating_point():
            tensor = tensor.float()
        reduced = tensor.detach().clone()
        dist.all_reduce(reduced, OPS["sum" if op in ("mean", "avg", "none") else op], group=group)
        return reduced / dist.get_world_size(group) if op in ("mean", "avg", "none") else reduced

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all processes, or any of them, say so."""
        said = torch.tensor(float(decision), device=self.device)
        return bool(self.all_reduce(said, "min" if all else "max").item())


def _gathered(tensor: Tensor, group: Any, sync_grads: bool) -> Tensor:
    if sync_grads and torch.is_grad_enabled():
        from torch.distributed.nn.functional import all_gather

        return torch.stack(list(all_gather(tensor, group or dist.group.WORLD)))  # type: ignore[no-untyped-call]
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.stack(parts)


def _answer(store: Any, key: str, failed: str) -> Any:
    """Wait for what another process puts into the store, and return it.

    Raises:
        RuntimeError: that one failed.
    """
    for _ in looks():
        if store.check([key]):
            break
    problem, value = pickle.loads(store.get(key))
    if problem is not None:
        raise RuntimeError(f"{failed}: {problem}")
    return value


_leaves_after_rank_zero = False


def leave_after_rank_zero() -> None:
    """Let this process end after rank 0 has: an agent ends all when the first one leaves, and rank 0 still saves."""
    global _leaves_after_rank_zero
    _leaves_after_rank_zero = True


def set_timeout(timeout: timedelta) -> None:
    """Set how long collectives wait that are called from here on, in all process groups."""
    change = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        change(timeout, group)


def meet(name: str, seconds: float, rank: int, size: int) -> None:
    """Wait until all processes are here, or so many seconds.

    Not in a collective: whoever gives up can go on, or save what it has.

    Raises:
        MissingRankError: some did not come.
    """
    store: Any = _get_default_store()
    time_of_name, key = _met[name], f"trainkit/barrier/{name}/{_met[name]}"
    _met[name] += 1
    store.set(f"{key}/{rank}", "here")
    if store.add(key, 1) == size:
        store.set(f"{key}/all", "here")
        if time_of_name:  # all have left the one before
            earlier = f"trainkit/barrier/{name}/{time_of_name - 1}"
            for old in (earlier, f"{earlier}/all", *(f"{earlier}/{other}" for other in range(size))):
                store.delete_key(old)
    for _ in looks(seconds):
        if store.check([f"{key}/all"]):
            return
    missing = [other for other in range(size) if not store.check([f"{key}/{other}"])]
    what = f"the barrier {name!r}" if name else "a barrier"
    raise MissingRankError(
        f"{named(missing)} did not come to {what} within {seconds:g} s. Received: {size - len(missing)} of "
        f"{size} processes. All of them have to call it; look at what the others do in logs/rank*.log.",
        missing,
    )


def leave_process_group() -> None:
    """Leave the group when the process ends; torch warns where nobody does."""
    if not dist.is_initialized():
        return
    if _leaves_after_rank_zero:
        store = _get_default_store()
        with contextlib.suppress(Exception):  # rank 0 and its store may be gone
            if dist.get_rank() == 0:
                store.set(LEFT, "")
            for _ in looks(LONGEST_LEAVE):
                if store.check([LEFT]):
                    break
    dist.destroy_process_group()
    _let_gloo_finish()


def _let_gloo_finish() -> None:
    """Wait until gloo's threads have let go of the last tensors, for which they need Python's lock.

    torch's DDP keeps the group alive, and with it these threads. One that still waits for the lock when the interpreter
    ends is ended in the middle of C++, which aborts the process ("terminate called without an active exception").
    """
    idle, until = 0, time.monotonic() + LONGEST_IDLING
    while idle < QUIET_LOOKS and time.monotonic() < until:
        time.sleep(SHORTEST)  # without the lock
        idle = idle + 1 if all(state == "S" for state in _states("pt_gloo_runloop")) else 0


def _states(name: str) -> Iterator[str]:
    """Return what the threads of that name do, as Linux's /proc/self/task/*/stat says it: R runs, S waits."""
    for stat in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            before, _, after = stat.read_text().rpartition(")")
            if before.endswith(f"({name}"):
                yield after.split()[0]
