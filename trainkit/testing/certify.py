"""certify_resume: kill a run at random instants, let it go on, and compare it with one that was never killed.

two runs to the end     do they agree to the last bit? if not, no resume can be exact, and it says where
trial                   start, SIGKILL, start again, SIGKILL, ..., let it finish
compare                 every batch, loss, weight, metric and logged row with the first run's
"""

from __future__ import annotations

import csv
import fnmatch
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from trainkit.errors import MisconfigurationException

LINES, OUTPUT = "record.jsonl", "output.txt"
RUN = Path("log", "version_0")
"""Where a logger of the run writes, and its checkpoints lie."""
NEVER = 1 << 40
CAUSES = {
    "batch": "The batches differ: other samples, another order, or random draws that the run does not control. A data "
    "set or a transform with a random generator of its own is the usual reason; let it draw from torch's, numpy's "
    "or python's global one.",
    "output": "The same batches gave other outputs: training_step or a callback draws from a random generator of its "
    "own, keeps state that is in no checkpoint, or the kernels are not deterministic (Trainer(deterministic=True)).",
    "weights": "The same outputs led to other weights: an optimizer, a schedule or a callback has state that is in no "
    "checkpoint (state_dict, load_state_dict).",
    "metric": "A metric keeps state that is in no checkpoint: use self.log or a torchmetrics object, or give its owner "
    "state_dict and load_state_dict. One that measures time can be left out with ignore.",
    "row": "The loggers' rows differ: something is logged from state that is in no checkpoint.",
}


class Difference(NamedTuple):
    """The first place where two runs disagree."""

    step: int
    """Batches trained on before it."""
    key: str
    """What differs: "batch", "output loss", "weights", "metric val_loss", ..."""
    expected: Any
    found: Any

    def __str__(self) -> str:
        cause = next((CAUSES[word] for word in CAUSES if self.key.startswith(word)), "")
        return f"step {self.step}, {self.key}: expected {self.expected}, found {self.found}. {cause}".rstrip()


@dataclass
class Trial:
    """What one killed run did."""

    seed: int
    killed: list[str] = field(default_factory=list)
    """When: "at step 12 (3.2 s)", one for each kill."""
    difference: Difference | None = None

    def __str__(self) -> str:
        kills = f"killed {', '.join(self.killed)}" if self.killed else "was over before it could be killed"
        return f"{kills}: {'exact' if self.difference is None else f'DIFFERS at {self.difference}'}"


@dataclass
class Certificate:
    """What `certify_resume` found."""

    steps: int
    trials: list[Trial]
    deterministic: Difference | None = None
    """Where two runs that nobody killed differ, None when they agree."""

    @property
    def difference(self) -> Difference | None:
        """The first difference, None when the run is exact."""
        if self.deterministic is not None:
            return self.deterministic
        return next((trial.difference for trial in self.trials if trial.difference is not None), None)

    @property
    def exact(self) -> bool:
        """Whether no run differed from the one that was not killed."""
        return self.difference is None

    @property
    def kills(self) -> int:
        """How often a run was killed."""
        return sum(len(trial.killed) for trial in self.trials)

    def __str__(self) -> str:
        if self.deterministic is not None:
            return f"not deterministic: two runs that nobody killed differ at {self.deterministic}"
        if self.exact:
            return f"exact: {len(self.trials)} runs of {self.steps} batches, {self.kills} kills, no difference"
        wrong = next(trial for trial in self.trials if trial.difference is not None)
        return f"not exact: the run with seed {wrong.seed} was {wrong}"


class NotExactError(AssertionError):
    """A run that was killed and went on differs from one that was not; `certificate` has the details."""

    def __init__(self, certificate: Certificate) -> None:
        super().__init__(str(certificate))
        self.certificate = certificate


class Process(Protocol):
    """A run in a process of its own."""

    @property
    def pid(self) -> int | None: ...
    @property
    def exitcode(self) -> int | None: ...
    def join(self, timeout: float | None = None) -> None: ...


Start = Callable[[Path, int], Process]
"""Start the run in a directory, saving every so many steps, from its newest checkpoint if there is one."""


def certify_resume(
    module_fn: Callable[[], Any],
    data_fn: Callable[[], Any],
    trainer_fn: Callable[[], Any] | None = None,
    *,
    trials: int = 3,
    kills: int = 2,
    seed: int = 0,
    save_every: int | None = None,
    ignore: Sequence[str] = (),
    timeout: float = 300.0,
    start_method: Literal["fork", "spawn"] = "fork",
    **trainer_arguments: Any,
) -> Certificate:
    """Kill a run at random instants in processes of its own, resume it, and raise unless it ends bit for bit the same.

    Args:
        module_fn: returns the Module.
        data_fn: returns a training loader, a tuple of training and validation loaders, or a DataModule.
        trainer_fn: returns the Trainer, new each time; None makes it of `trainer_arguments`.
        trials: how many runs are killed.
        kills: how often each of them is.
        seed: what the run is seeded with, and the instants are drawn from.
        save_every: save every n updates, beside what the run saves of its own accord; None: a tenth of the run.
        ignore: patterns of names that may differ, "metric seconds" or "metric time/*" for example.
        timeout: seconds after which a run counts as one that hangs.
        start_method: "fork" takes any functions; "spawn" takes only those of a module that can be imported, and is
            needed where this process has used CUDA.
        trainer_arguments: for the Trainer, when there is no `trainer_fn`.

    Returns:
        What was found; it prints as one line.

    Raises:
        NotExactError: a run differs; the message says at which step, in what, and where to look. An AssertionError.
        MisconfigurationException: the run fails by itself, or is over before anything could be killed.

    Example:
        def test_my_run_survives_kills():
            certify_resume(MyModule, MyData, max_epochs=2, accumulate_grad_batches=2)
    """
    from trainkit.testing import run

    make = trainer_fn if trainer_fn is not None else Arguments(trainer_arguments)
    context: Any = multiprocessing.get_context(start_method)

    def start(directory: Path, every: int) -> Process:
        process = context.Process(
            target=run.of_functions, args=(module_fn, data_fn, make, seed, directory, every), daemon=False
        )
        with warnings.catch_warnings():  # of forking beside threads: the child asks torch for none
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        started: Process = process
        return started

    certificate = certify(start, trials, kills, seed, save_every, ignore, timeout)
    if not certificate.exact:
        raise NotExactError(certificate)
    return certificate


class Arguments:
    """Make a quiet Trainer of arguments."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
        self.arguments = {"accelerator": "cpu", **quiet, **arguments}

    def __call__(self) -> Any:
        from trainkit import Trainer

        return Trainer(**self.arguments)


def certify(
    start: Start,
    trials: int,
    kills: int,
    seed: int,
    save_every: int | None = None,
    ignore: Sequence[str] = (),
    timeout: float = 300.0,
    tell: Callable[[str], None] = lambda line: None,
) -> Certificate:
    """Do what `certify_resume` does, for a run that `start` starts; `tell` hears of it as it happens."""
    with tempfile.TemporaryDirectory(prefix="trainkit-certify-") as root:
        began = time.monotonic()
        reference = _finished(start, Path(root, "reference"), timeout)
        took = time.monotonic() - began
        steps = reference[-1]["at"]
        tell(f"a run to the end: {steps} batches, {reference[-1]['step']} updates in {took:.1f} s")
        again = _finished(start, Path(root, "again"), timeout)
        expected = dict(_keyed(reference))
        difference = _first_difference(expected, again, ignore)
        if difference is not None:
            return Certificate(steps, [], difference)
        tell("a second one: the same to the last bit")
        every = save_every or max(1, reference[-1]["step"] // 10)
        done = []
        for number in range(trials):
            trial = _trial(start, Path(root, str(number)), (seed, number), kills, every, steps, took, timeout)
            trial.difference = _first_difference(expected, _lines(Path(root, str(number))), ignore)
            rows = _rows(Path(root, "reference")), _rows(Path(root, str(number)))
            if trial.difference is None:
                trial.difference = _row_difference(*rows, ignore)
            done.append(trial)
            tell(f"run {number + 1} of {trials}: {trial}")
            shutil.rmtree(Path(root, str(number)))
            if trial.difference is not None:
                break
        return Certificate(steps, done)


# ---------------------------------------------------------------------- runs
def _finished(start: Start, directory: Path, timeout: float) -> list[dict[str, Any]]:
    directory.mkdir()
    process = start(directory, NEVER)
    _end(process, directory, timeout)
    lines = _lines(directory)
    if not lines or lines[-1]["event"] != "end" or not lines[-1]["at"]:
        raise MisconfigurationException(
            f"the run trained on no batch, so there is nothing to certify. {_tail(directory)}"
        )
    return lines


def _trial(
    start: Start,
    directory: Path,
    seeds: tuple[int, int],
    kills: int,
    every: int,
    steps: int,
    seconds: float,
    timeout: float,
) -> Trial:
    """Run once, killed so many times on the way."""
    directory.mkdir()
    instants = random.Random(f"{seeds[0]}:{seeds[1]}")
    trial = Trial(seeds[1])
    for left in range(kills, 0, -1):
        process, began = start(directory, every), time.monotonic()
        before = _last(directory)
        # most while it trains, so that all of them find it alive; the others at any time: while it starts or saves
        trains = before < steps and instants.random() < 0.7
        goal = before + instants.randint(1, max(1, 2 * (steps - before) // (left + 1))) if trains else None
        pause = instants.random() * (2 * seconds / max(steps, 1) if trains else seconds / left)
        while goal is not None and process.exitcode is None and _last(directory) < goal:
            if time.monotonic() - began > timeout:
                break
            process.join(0.002)
        process.join(pause)
        if process.exitcode is not None:
            break  # over before its time came
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        trial.killed.append(f"at step {_last(directory)} after {time.monotonic() - began:.2f} s")
    else:
        process = start(directory, every)
    _end(process, directory, timeout)
    return trial


def _end(process: Process, directory: Path, timeout: float) -> None:
    process.join(timeout)
    if process.exitcode is None:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        raise MisconfigurationException(
            f"the run was not over after {timeout:g} s. Give it a longer timeout, or less to do. {_tail(directory)}"
        )
    if process.exitcode != 0:
        raise MisconfigurationException(f"the run ended with exit code {process.exitcode}. {_tail(directory)}")


def _tail(directory: Path, most: int = 4000) -> str:
    try:
        text = (directory / OUTPUT).read_text(errors="replace")[-most:].strip()
    except OSError:
        return "It printed nothing."
    return f"It printed:\n{text}" if text else "It printed nothing."


# ---------------------------------------------------------------------- records
def _lines(directory: Path) -> list[dict[str, Any]]:
    try:
        text = (directory / LINES).read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _last(directory: Path) -> int:
    """Return how many batches were trained on, whichever attempt got furthest last."""
    try:
        with open(directory / LINES, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            lines = [line for line in file.readlines() if line.endswith(b"\n") and line.startswith(b"{")]
        return int(json.loads(lines[-1])["at"]) if lines else 0
    except FileNotFoundError:
        return 0


def _keyed(lines: Iterable[dict[str, Any]]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield each line under what it is about; an event may happen several times at one place."""
    seen: dict[tuple[Any, ...], int] = {}
    for line in lines:
        if line["event"] in ("begin", "end"):  # another attempt tells of the same places again
            seen = {}
        if line["event"] == "begin":
            continue
        place = (line["event"], line["at"])
        seen[place] = seen.get(place, 0) + 1
        yield (*place, seen[place]), line


def _first_difference(
    expected: dict[tuple[Any, ...], dict[str, Any]], lines: list[dict[str, Any]], ignore: Sequence[str]
) -> Difference | None:
    """Compare every line of every attempt; in the end each expected one must have been there."""
    found = set()
    for key, line in _keyed(lines):
        found.add(key)
        known = expected.get(key)
        if known is None:
            return Difference(line["at"], line["event"], "nothing", "one more")
        for name in [*known, *(name for name in line if name not in known)]:
            if known.get(name) != line.get(name) and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore):
                return Difference(line["at"], name, known.get(name), line.get(name))
    for key, line in expected.items():
        if key not in found:
            return Difference(line["at"], line["event"], "one", "none: it was left out")
    return None


def _rows(directory: Path) -> list[dict[str, str]]:
    """Return the logged rows without where their time went, which is another in every run."""
    try:
        with open(directory / RUN / "metrics.csv", newline="") as file:
            found = list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    rows = [{name: value for name, value in row.items() if not name.startswith("time/")} for row in found]
    return [row for row in rows if any(value for name, value in row.items() if name not in ("epoch", "step"))]


def _row_difference(
    expected: list[dict[str, str]], found: list[dict[str, str]], ignore: Sequence[str]
) -> Difference | None:
    for number, (one, other) in enumerate(zip(expected, found, strict=False)):
        for name in [*one, *(name for name in other if name not in one)]:
            old, new = one.get(name) or "", other.get(name) or ""
            if old != new and not any(fnmatch.fnmatch(f"metric {name}", pattern) for pattern in ignore):
                return Difference(int(one.get("step") or 0), f"row {number + 1}, {name}", old, new)
    if len(expected) != len(found):
        return Difference(0, "rows of the loggers", len(expected), len(found))
    return None
