"""Watchdog: says who waits for whom when a run stands still, and why it was given up.

A thread looks every few seconds at the counters that the loop keeps, writes what this process is doing on a board that
all processes can read, and goes back to sleep. The loop has no line for it. When nothing has moved for far longer than
a step of this run takes,

    rank 0 reads the board, and prints one sentence: "rank 1 is in ..., the others wait in all_reduce since 40 s"
    each rank writes its step, its phase and the stacks of all its threads to logs/rank<n>.log in the run's directory

Once a hang, then at doubling distances; one line says when the run goes on. A step may take `FACTOR` times the
median, and the floor in any case; `LONGER` times that what is no plain step: the first ones, validation, a checkpoint,
the hooks of an epoch. The thread also shortens what the process group waits, once steps take their usual time
(`ParallelStrategy.be_quick`), and when that strikes, `watching` raises an error that names who was missing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit import hang, launched, stacks
from trainkit.errors import MissingRankError
from trainkit.strategies import meeting

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

FLOOR = 30.0
"""Seconds that a step may take before anybody wonders."""
FACTOR, LONGER = 10, 10
TICKS, SHORTEST, LONGEST = 10, 0.1, 3.0  # looks in the time of the floor; seconds between two of them
KNOWN = 3  # so many looks at steps say how long they take
MEMORY = 100
SILENT = 3  # looks after which a process that has written nothing counts as silent
PATIENCE = 20  # medians that the process group waits for a step
FRESH = 60.0  # seconds after which a verdict was about something else
VERDICT = 2.0  # seconds that a process whose connection broke waits for one that knows why
TIMEOUTS = ("Timed out waiting", "timeout", "timed out")


class Watchdog:
    """Watch one run.

    Args:
        trainer: whose.
        floor: seconds that a step may take in any case.
    """

    def __init__(self, trainer: Trainer, floor: float = FLOOR) -> None:
        self.trainer, self.floor = trainer, floor
        self.rank, self.size = trainer.global_rank, trainer.world_size
        self.tick = min(max(floor / TICKS, SHORTEST), LONGEST)
        self.board: Any = None
        self.steps: deque[float] = deque(maxlen=MEMORY)
        """Seconds that steps took, at the last looks."""
        self._main = threading.get_ident()  # of the thread that runs it
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trainkit-watchdog", daemon=True)
        self._seen = self._counters()
        self._mark: str | None = None
        self._began_at = trainer.progress.total_batch
        self._moved = self._looked = time.monotonic()
        self._silence = max(SILENT * self.tick, 1.0)
        self._spent = self._cpu()
        self._idle = False
        self._patience = trainer.strategy.patience
        self._last: dict[int, tuple[float, float]] = {}  # what each rank wrote last, and when that was new here
        self._next = 0.0  # seconds of standing still at which it is told again; 0 before the first time
        self._alarm = 0
        self._worker: str | None = None
        self._first: int | None = None  # the process of rank 0, which keeps the store
        self.state: dict[str, Any] = {}
        """What this process is doing, as it was written last."""

    # ---- it begins and ends with the run
    def start(self) -> None:
        """Begin to watch."""
        if self.size > 1:
            from trainkit.board import Board

            with contextlib.suppress(RuntimeError, ValueError):  # no group of torch, or a store that does not answer
                self.board = Board(self.rank, self.size, meeting.word)
                self._alarm = int(self.board.posted("alarm").get("number", 0))
        self._thread.start()

    def stop(self) -> None:
        """End, and leave nothing behind."""
        gave_up = self._over.is_set()
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=3.0)
        if self.board is not None:
            if not gave_up:  # else the others may still ask what it did
                with contextlib.suppress(RuntimeError):
                    self.board.write({**self.state, "at": time.time(), "kind": "runs", "doing": "has ended its run"})
            self.board.close()
            self.board = None
        self.trainer.strategy.be_patient()

    def _run(self) -> None:
        while not self._over.wait(self.tick):
            try:
                self._look()
            except RuntimeError:  # the store is gone or does not answer: its process may stand still or have ended
                with contextlib.suppress(Exception):
                    self._wonder_alone()
            except Exception as error:  # a run is not lost for who watches it
                self._log(f"it can't watch any more: {type(error).__name__}: {error}")
                return

    # ---- one look
    def _counters(self) -> tuple[Any, ...]:
        trainer = self.trainer
        progress = trainer.progress
        return progress.total_batch, progress.epoch, progress.batch, trainer.evaluation_idx, trainer.state.stage

    def _cpu(self) -> float:
        """Return the seconds that the main thread has computed."""
        clock = getattr(time, "pthread_getcpuclockid", None)
        return time.clock_gettime(clock(self._main)) if clock is not None else 0.0

    def _look(self) -> None:
        now, before = time.monotonic(), self._looked
        self._looked = now
        if now - before > 5 * self.tick + 1.0:  # this process itself was stopped meanwhile
            self._moved += now - before
        counters, seen = self._counters(), self._seen
        spent = self._cpu()
        self._idle, self._spent = spent - self._spent < 0.2 * (now - before), spent
        frames = stacks.frames_of(self._main)
        place = stacks.place_of(frames, self._idle)
        mark = None if self._in_a_loop() and not place.slow else str(place)  # outside of a loop nothing is counted
        if counters != seen or mark != self._mark:
            self._mark = mark
            self._learn(seen, counters, now - self._moved)
            self._seen, self._worker = counters, None
            if self._next:
                self._tell_of_end(now - self._moved)
            self._moved = now
        still = now - self._moved
        self.state = self._describe(frames, place, still)
        if self.board is not None:
            self.board.write(self.state)
            if self._first is None and self.rank > 0:
                self._first = self.board.posted("0").get("pid")
        if still > self.short:
            self._wonder(still)
        elif still > self.short / 2 and self.board is not None and self.rank == 0:
            self._silent(self.board.read())  # so that it is known then who still writes

    def _learn(self, before: tuple[Any, ...], after: tuple[Any, ...], seconds: float) -> None:
        """Take down how long steps took, if there was nothing else between two looks."""
        strategy, patience = self.trainer.strategy, self._patience
        self._patience = strategy.patience
        batches = after[0] - before[0]
        if batches <= 0 or before[0] == self._began_at or before[1:2] + before[3:] != after[1:2] + after[3:]:
            return
        self.steps.append(seconds / batches)
        if self.steady and patience == self._patience:
            strategy.be_quick(timedelta(seconds=PATIENCE * self.median), patience)

    @property
    def median(self) -> float:
        """Seconds of a step, 0 while that is not known."""
        return statistics.median(self.steps) if self.steps else 0.0

    @property
    def short(self) -> float:
        """Seconds that a plain step may take."""
        return max(self.floor, FACTOR * self.median)

    @property
    def steady(self) -> bool:
        """Whether the run trains, and it is known how long a step takes."""
        return self.trainer.training and self.trainer.fitting and len(self.steps) >= KNOWN

    def _describe(self, frames: list[stacks.Frame], place: stacks.Place, still: float) -> dict[str, Any]:
        """Return what this process is doing."""
        trainer, progress = self.trainer, self.trainer.progress
        plain = self.steady and progress.batch > 0 and not place.slow
        if place.kind == "worker" and still > self.short:
            if self._worker is None:
                self._worker = self._of_worker(frames)
            place = place._replace(name=self._worker)
        return {
            "at": time.time(), "pid": os.getpid(), "node": trainer.node_rank, "done": progress.total_batch,
            "still": still,
            "limit": self.short if plain else LONGER * self.short, "kind": place.kind, "doing": str(place),
            "slow": place.slow, "quiet": place.quiet, "counted": self._in_a_loop(),
        }  # fmt: skip

    def _in_a_loop(self) -> bool:
        """Whether batches are being counted, and one was."""
        trains = self.trainer.training and self.trainer.progress.total_batch > self._began_at
        return trains or (not self.trainer.training and self.trainer.evaluation_idx > 0)

    def _of_worker(self, frames: list[stacks.Frame]) -> str:
        found = stacks.waited_for(frames)
        if found is None:
            return "its data loader's worker"
        worker, pid = found
        place = stacks.place_in(stacks.worker_stack(pid))
        return f"its data loader's worker {worker} (pid {pid}), which {place or 'does not answer'}"

    # ---- when nothing moves
    def _wonder(self, still: float) -> None:
        if self.board is not None and self.rank > 0:
            self._listen(still)
            return
        states: list[dict[str, Any]] = [self.state] if self.board is None else self.board.read()
        silent = self._silent(states)
        if hang.is_hang(states, silent) and still > self._next:
            self._alarm += 1
            self._next = 2 * still
            if self.board is not None:
                self.board.post("alarm", {"number": self._alarm})
            told = hang.sentence(states, {rank: _since(states[rank]) for rank in silent})
            _say(f"{told}.\n  {self._where()} Stacks: {self._file().with_name('rank*.log')}")
            self._write_stacks(told)

    def _silent(self, states: list[dict[str, Any]]) -> set[int]:
        """Return the ranks that have written nothing for some looks."""
        now, silent = time.monotonic(), set()
        for rank, state in enumerate(states):
            at = float(state.get("at", 0.0))
            if rank not in self._last or self._last[rank][0] != at:
                self._last[rank] = (at, now)
            if now - self._last[rank][1] > self._silence:
                silent.add(rank)
            elif not state:
                states[rank] = {**self.state, "still": 0.0, "kind": "runs", "doing": hang.NEVER}  # for now
        return silent

    def _listen(self, still: float) -> None:
        """Write down what this process is doing when rank 0 says that something is wrong, or says nothing."""
        number = int(self.board.posted("alarm").get("number", 0))
        if number > self._alarm:
            self._alarm, self._next = number, 2 * still
            self._write_stacks(f"rank {self.rank} {self.state['doing']} since {still:.0f} s")

    def _wonder_alone(self) -> None:
        """Write down what this process is doing when the board can't be read, which rank 0 keeps."""
        still = time.monotonic() - self._moved
        if still > max(self._next, 2 * self.state["limit"]):
            self._next = 2 * still
            told = f"rank {self.rank} {self.state['doing']} since {still:.0f} s, and the store does not answer"
            self._log(f"{told}: rank 0, which keeps it, {hang.NEVER}.")
            self._write_stacks(told)

    def _tell_of_end(self, seconds: float) -> None:
        self._next = 0.0
        text = f"the run goes on after {seconds:.0f} s, at {self._at()}."
        self._log(text)
        if self.rank == 0:
            _say(text)

    # ---- words
    def _at(self) -> str:
        progress, stage = self.trainer.progress, self.trainer.state.stage
        phase = "no loop" if stage is None else stage.value
        return f"{phase}, epoch {progress.epoch}, batch {progress.batch}, step {progress.step}"

    def _where(self) -> str:
        usual = f" A step took {self.median:.3g} s before." if self.steps else ""
        return f"This was at {self._at()}.{usual}"

    def _file(self) -> Path:
        folder = self.trainer.log_dir or self.trainer.default_root_dir
        folder = self.trainer.default_root_dir if "://" in folder else folder
        path = Path(folder) / "logs" / f"rank{self.rank}.log"
        with contextlib.suppress(ValueError):
            return path.relative_to(Path.cwd())
        return path

    def _log(self, text: str) -> None:
        with contextlib.suppress(OSError):
            path = self._file()
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"[{datetime.now():%Y-%m-%d %H:%M:%S}] watchdog: {text}\n")

    def _write_stacks(self, told: str) -> None:
        text = f"{told}.\nrank {self.rank}, at {self._at()}\n{stacks.all_stacks()}"
        found = stacks.waited_for(stacks.frames_of(self._main))
        if found is not None and (stack := stacks.worker_stack(found[1])):
            text += f"Worker {found[0]} of the data loader (pid {found[1]}):\n{stack}"
        self._log(text.rstrip())

    # ---- when the process group has waited too long
    def explained(self, error: BaseException) -> MissingRankError | None:
        """Return an error that says who was missing, None when another one than a timeout is the cause."""
        timed_out = is_timeout(error)
        if self.board is None or not (timed_out or launched.is_lost(error)):
            return None
        self._over.set()
        with contextlib.suppress(RuntimeError):
            return self._verdict(0.0 if timed_out else VERDICT) or (self._missing() if timed_out else None)
        if not timed_out:
            return None
        if self._first is not None and self.trainer.node_rank == 0:
            _wake(self._first)
        told = f"rank 0, which keeps the store of the run, {hang.NEVER}, rank {self.rank} {self.state['doing']}"
        with contextlib.suppress(RuntimeError):
            self._post([0], told)
        return self._error([0], f"{told} ({self._at()})")

    def _verdict(self, patience: float) -> MissingRankError | None:
        """Return what another process has found out, if one has."""
        until = time.monotonic() + patience
        while True:
            verdict = self.board.posted("missing")
            if verdict and time.time() - verdict["at"] < FRESH:
                return self._error(verdict["ranks"], verdict["told"])
            if time.monotonic() >= until:
                return None
            time.sleep(0.05)

    def _missing(self) -> MissingRankError:
        """Find out who was missing, and tell the others."""
        states = self.board.read()
        ages = {rank: _since(state) for rank, state in enumerate(states)}
        silent = {rank: age for rank, age in ages.items() if age is None or age > self._silence}
        silent.pop(self.rank, None)
        states[self.rank] = self.state
        late = hang.culprits(states, silent)
        told = f"{hang.sentence(states, silent)} ({self._at()})"
        self._post(late, told)
        for rank in silent:
            if states[rank].get("node") == self.trainer.node_rank:
                _wake(states[rank]["pid"])
        return self._error(late, told)

    def _post(self, late: list[int], told: str) -> None:
        self.board.post("missing", {"at": time.time(), "ranks": late, "told": told})

    def _error(self, late: list[int], told: str) -> MissingRankError:
        who = hang.named(late) if late else "some rank"
        me = " (this one)" if late == [self.rank] else ""
        return MissingRankError(
            f"the processes waited too long for each other, and {who}{me} was missing: {told}. {self._advice()}", late
        )

    def _advice(self) -> str:
        return (
            f"See {self._file().with_name('rank*.log')} for their stacks. If a step may take that long on one process, "
            "give the strategy a longer step_timeout, such as DDPStrategy(step_timeout=timedelta(hours=1)); of the "
            "first step and of what is no step, it is timeout."
        )


def _wake(pid: int) -> None:
    """Let a process go on that was stopped: it could not hear that it is to end."""
    with contextlib.suppress(OSError, AttributeError):
        os.kill(pid, signal.SIGCONT)


def _say(text: str) -> None:
    """Tell who looks at the terminal."""
    with contextlib.suppress(OSError, ValueError):
        print(f"watchdog: {text}", file=sys.stderr, flush=True)


def _since(state: hang.State) -> float | None:
    return max(time.time() - state["at"], 0.0) if state else None


def is_timeout(error: BaseException) -> bool:
    """Whether a collective has waited too long."""
    from torch.distributed import DistError

    text = str(error)
    of_torch = isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in text)
    return of_torch and any(words in text for words in TIMEOUTS)


def watchdog_of(trainer: Trainer) -> Watchdog | None:
    """Return what watches a run, None when nobody does: by default only several processes are watched."""
    wish = trainer.watchdog
    if wish is False or (wish is None and (trainer.world_size == 1 or trainer.barebones)):
        return None
    return Watchdog(trainer, FLOOR if wish is None or wish is True else float(wish))


@contextmanager
def watching(trainer: Trainer) -> Iterator[None]:
    """Watch a run.

    Raises:
        MissingRankError: the process group gave a rank up.
    """
    watchdog = watchdog_of(trainer)
    if watchdog is None:
        yield
        return
    watchdog.start()
    try:
        yield
    except Exception as error:
        launched.note(error)  # now: who looks for the reason may be ended meanwhile
        told = watchdog.explained(error)
        if told is None:
            raise
        raise told from error
    finally:
        watchdog.stop()
