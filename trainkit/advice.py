"""What a fit's time says: the table of its parts, and advice where something is wrong, each with its evidence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch.utils.data import DataLoader

from trainkit.data.indexed import in_memory
from trainkit.data.workers import suggested_max_num_workers
from trainkit.memory import swapped_out
from trainkit.timing import PARTS

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

FEW = 20
"""Steps; fewer say nothing."""
SHORT = 0.5
"""Seconds; what takes less is not worth a word."""
WAITING, WAITED = 0.15, 0.0005
"""The share of the training time, and the seconds a step, from which waiting for data is worth a word."""
CALLBACK = 0.05
VALIDATION = 0.5
IDLE = 0.9
RECOMPILES = 4
SWAPPED = 64 * 2**20


class Advice(NamedTuple):
    """One thing that is wrong, in one line."""

    share: float
    """Of the run's time, that it costs, or an estimate; the larger comes first."""
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Report:
    """Where the time of a fit went. `print(report)` shows the table."""

    steps: int
    """Without the first."""
    first_step: float
    """Seconds of the first step, which warms up and is in none of the parts."""
    seconds: dict[str, float]
    """By part: data_wait, transfer, forward_backward, optimizer, callbacks, logging, checkpoint, validation, other."""
    owners: dict[str, float]
    """Seconds of each callback's hooks and of the module's own, the longest first."""
    advice: list[Advice]
    """What is wrong, the worst first."""

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    def share(self, part: str) -> float:
        """Return the share of the time that a part took, between 0 and 1."""
        return self.seconds[part] / self.total if self.total else 0.0

    @property
    def line(self) -> str:
        """The parts from one percent on, the largest first, in one line."""
        shares = sorted(((self.share(part), part) for part in self.seconds), reverse=True)
        return ", ".join(f"{PARTS[part]} {share:.0%}" for share, part in shares if share >= 0.01)

    def __str__(self) -> str:
        if not self.steps:
            return "no timing yet: a fit of at least two steps has one"
        lines = [
            f"{self.steps + 1:,} steps in {self.total + self.first_step:.2f} s; the first, which took "
            f"{self.first_step:.3f} s, is not in the table",
            f"{'part':<20}{'seconds':>10}{'share':>8}{'a step':>12}",
        ]
        for part, seconds in self.seconds.items():
            each = "" if part == "validation" else f"{seconds / self.steps * 1e3:.3f} ms"
            lines.append(f"{PARTS[part]:<20}{seconds:>10.3f}{self.share(part):>8.1%}{each:>12}")
        longest = [(name, seconds) for name, seconds in self.owners.items() if seconds >= 0.001 * self.total][:5]
        lines += [f"  hooks of {name:<30}{seconds:>8.3f} s" for name, seconds in longest]
        lines += [f"advice: {advice}" for advice in self.advice]
        return "\n".join(lines)


def report(trainer: Trainer) -> Report:
    """Return where the time of the last fit, or of the one that runs, went so far."""
    timing = trainer.fit_timing
    split = timing.split()
    owners = {name: sum(hooks.values()) for name, hooks in timing.owners().items()}
    made = Report(
        steps=split.steps,
        first_step=timing.first or 0.0,
        seconds=split.seconds,
        owners=dict(sorted(owners.items(), key=lambda owner: -owner[1])),
        advice=[],
    )
    if made.steps >= FEW and made.total >= SHORT:
        made.advice.extend(sorted(_advice(trainer, made), reverse=True))
    return made


def _advice(trainer: Trainer, made: Report) -> Iterator[Advice]:
    yield from _waiting_for_data(trainer, made)
    yield from _callbacks(trainer, made)
    yield from _validation(trainer, made)
    yield from _idle_device(trainer, made)
    yield from _recompiles(trainer)
    yield from _swapped(trainer)


def _waiting_for_data(trainer: Trainer, made: Report) -> Iterator[Advice]:
    waited, share = made.seconds["data_wait"] / made.steps, made.share("data_wait")
    training = made.total - made.seconds["validation"]
    if waited < WAITED or made.seconds["data_wait"] < WAITING * training:
        return
    sources = [part.source for loader in trainer.sources.loaders.get("train", ()) for part in loader.parts]
    loaders = [source for source in sources if isinstance(source, DataLoader)]
    workers = [loader.num_workers for loader in loaders]
    most = suggested_max_num_workers(1)
    if not workers:
        what = "the loader is not a DataLoader: one with num_workers prepares batches while the model computes"
    elif any(map(in_memory, loaders)):  # for which no workers are started
        what = (
            "data in memory gathered already, which workers would only slow down: samples of fewer bytes (uint8, "
            "float16), made floats by the step, are gathered faster"
        )
    elif max(workers) < most:
        what = f"num_workers={max(workers)}: try DataLoader(..., num_workers={most})"
    elif not max(workers):
        what = "num_workers=0: a machine with more cores could load ahead; here only cheaper loading helps"
    else:
        what = (
            f"num_workers={max(workers)} on {most + 1} cores: load more cheaply (smaller files, a batch at a time by "
            "__getitems__), or raise prefetch_factor if some samples take much longer than others"
        )
    yield Advice(share, f"{share:.0%} of the time is waiting for data, {waited * 1e3:.3g} ms a step, with {what}.")


def _callbacks(trainer: Trainer, made: Report) -> Iterator[Advice]:
    hooks = trainer.fit_timing.owners()
    for name, seconds in made.owners.items():
        share = seconds / made.total
        if share <= CALLBACK:
            continue
        longest = max(hooks[name], key=lambda hook: hooks[name][hook])
        each = hooks[name][longest]
        text = f"{name} takes {share:.0%} of the time, {seconds:.3g} s, {each / seconds:.0%} of it in {longest}"
        if any(type(callback).__name__ == name and callback.saves for callback in trainer.callbacks):
            text += ": save less often (every_n_epochs, every_n_train_steps), or with asynchronous=True"
        else:
            text += ": do less there, or not in every batch"
        yield Advice(share, f"{text}.")


def _validation(trainer: Trainer, made: Report) -> Iterator[Advice]:
    share = made.share("validation")
    if share > VALIDATION:
        yield Advice(
            share,
            f"validation takes {share:.0%} of the time, {made.seconds['validation']:.3g} s: validate less often "
            "(check_val_every_n_epoch, val_check_interval), on fewer batches (limit_val_batches), or in larger ones.",
        )


def _idle_device(trainer: Trainer, made: Report) -> Iterator[Advice]:
    idle = trainer.fit_timing.idle
    if idle is not None and idle >= IDLE and made.share("data_wait") < WAITING:
        yield Advice(
            0.5 * idle,
            f"in {idle:.0%} of the steps looked at, the {trainer.device.type} device had finished before the host had "
            'given it more: the batches are too small for it. Larger ones, or compile="graph", keep it busy.',
        )


def _recompiles(trainer: Trainer) -> Iterator[Advice]:
    count = trainer.recompiles
    if count >= RECOMPILES:
        yield Advice(
            0.1,
            f"the step was compiled again {count} times; the warnings say why. Inputs of one shape, or "
            'compile={"dynamic": True}, avoid it.',
        )


def _swapped(trainer: Trainer) -> Iterator[Advice]:
    grown = swapped_out() - trainer.fit_timing.swapped
    if grown >= SWAPPED:
        yield Advice(
            0.3,
            f"{grown / 2**20:,.0f} MB of this process's memory were swapped out during the run: fewer workers, smaller "
            "batches or a smaller cache would fit.",
        )
