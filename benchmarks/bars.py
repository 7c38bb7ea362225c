"""The limits that trainkit has set itself, and whether a run keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.summary import Block


@dataclass(frozen=True)
class Bar:
    """A limit for one number of trainkit's.

    Args:
        title: what must hold, in words.
        where: workload, case and metric.
        unit: "ratio", to the loop by hand, or that of the value.
        limit: in the unit of the answers, seconds for times.
        at_least: whether the number must reach the limit; False: must not exceed it.
    """

    title: str
    where: tuple[str, str, str]
    unit: str
    limit: float
    at_least: bool = False


BARS = [
    Bar("(a) tiny MLP, everything off", ("mlp", "off", "cpu"), "ratio", 1.05),
    Bar("(a) tiny MLP, defaults on, nothing logged", ("mlp", "defaults", "cpu"), "ratio", 1.10),
    Bar("(b) one scalar logged, each adds", ("logging", "one", "per_scalar"), "%", 6),
    Bar("(b) five scalars logged, each adds", ("logging", "five", "per_scalar"), "%", 6),
    Bar("(c) CNN, an epoch end to end", ("cnn", "epoch", "epoch"), "ratio", 1.01),
    Bar("(c) CNN, a step", ("cnn", "epoch", "cpu"), "ratio", 1.01),
    Bar("(d) Transformer, a step", ("transformer", "steps", "cpu"), "ratio", 1.01),
    Bar("(e) tensors, no workers, through the loop", ("data", "tensors-0", "rate"), "ratio", 2.5, at_least=True),
    Bar("(e) tensors, no workers, the loader alone", ("data", "tensors-0", "alone"), "ratio", 2.5, at_least=True),
    Bar("(f) import over torch, CPU time", ("startup", "off", "import_cpu"), "s", 0.080),
    Bar("(f) fit to first step begun, optimizer made before, off", ("startup", "warm", "fit_wall"), "s", 0.150),
    Bar("(f) fit to first step begun, the same, defaults on", ("startup", "warm-defaults", "fit_wall"), "s", 0.150),
    Bar("(f) fit to first step begun, fresh process, off", ("startup", "off", "fit_wall"), "s", 0.150),
    Bar("(f) fit to first step begun, fresh process, defaults on", ("startup", "defaults", "fit_wall"), "s", 0.150),
    Bar("(i) step near a million over step near 1,000", ("growth", "million", "growth"), "x", 1.02),
    Bar("(i) memory over a million steps", ("growth", "million", "memory"), "MB", 5),
    Bar("(j) first of 10^9 shuffled samples", ("shuffle", "9", "first"), "s", 0.050),
    Bar("(j) memory for that", ("shuffle", "9", "peak"), "MB", 20),
    Bar("(k) DDP with two processes, tiny MLP", ("ddp", "tiny", "cpu"), "ratio", 1.05),
    Bar("(k) DDP with two processes, four layers of 512", ("ddp", "wide", "cpu"), "ratio", 1.05),
]


def judge(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Return, for each bar, "met", "missed" or "not measured", with the median that says so."""
    found = {(block.workload, block.case, block.metric.name): block for block in blocks}
    verdicts = []
    for bar in BARS:
        block = found.get(bar.where)
        row = block.row("trainkit") if block is not None else None
        spread = None if row is None else row.ratio if bar.unit == "ratio" else row.value
        verdict = "not measured"
        if spread is not None:
            met = spread.median >= bar.limit if bar.at_least else spread.median <= bar.limit
            verdict = "met" if met else "missed"
        verdicts.append(
            {
                "bar": bar.title,
                "verdict": verdict,
                "limit": bar.limit,
                "at_least": bar.at_least,
                "unit": bar.unit,
                "median": None if spread is None else spread.median,
                "least": None if spread is None else spread.least,
                "most": None if spread is None else spread.most,
            }
        )
    return verdicts
