"""From answers of processes to medians, ratios to the hand-written loop, and whether all did the same work."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from benchmarks.case import Metric
from benchmarks.peers import PEERS

Answers = list[dict[str, Any]]
PER_SCALAR = Metric("per_scalar", "what one logged scalar adds, in steps by hand", "%", ratio=False)
TOLERANCE = 1e-3  # between the sums of weights after the warm-up; a fused optimizer rounds differently


@dataclass(frozen=True)
class Spread:
    median: float
    least: float
    most: float
    count: int


@dataclass(frozen=True)
class Row:
    """A number of a peer: over the rounds, and as ratios to the hand-written loop's of the same round."""

    peer: str
    value: Spread
    ratio: Spread | None


@dataclass(frozen=True)
class Block:
    """One metric of a case, with a row for each peer."""

    workload: str
    case: str
    title: str
    metric: Metric
    rows: list[Row]

    def row(self, peer: str) -> Row | None:
        return next((row for row in self.rows if row.peer == peer), None)


def summarise(results: dict[str, Any], workloads: dict[str, ModuleType]) -> list[Block]:
    blocks = []
    for name, cases in results.items():
        for case in workloads[name].CASES:
            for metric in case.metrics:
                rows = rows_of(cases[case.name], metric)
                if rows:
                    blocks.append(Block(name, case.name, case.title, metric, rows))
        if name == "logging":
            blocks += per_scalar(cases)
    return blocks


def rows_of(answers: dict[str, Answers], metric: Metric) -> list[Row]:
    by_hand = by_round(answers.get("hand", []), metric.name)
    rows = []
    for peer in PEERS:
        values = by_round(answers.get(peer, []), metric.name)
        if not values:
            continue
        ratios = [value / by_hand[number] for number, value in values.items() if by_hand.get(number)]
        spread = spread_of(ratios) if metric.ratio and ratios else None
        rows.append(Row(peer, spread_of(values.values()), spread))
    return rows


def by_round(answers: Answers, name: str) -> dict[int, float]:
    return {answer["round"]: answer[name] for answer in answers if name in answer}


def spread_of(values: Iterable[float]) -> Spread:
    found = sorted(values)
    return Spread(statistics.median(found), found[0], found[-1], len(found))


def per_scalar(cases: dict[str, dict[str, Answers]]) -> list[Block]:
    """How much a logged scalar adds to a step with the defaults on, in percent of the hand-written step."""
    blocks = []
    for case, scalars in (("one", 1), ("five", 5)):
        rows = []
        for peer in PEERS:
            logging, silent = (ratios_to_hand(cases[name], peer) for name in (case, "none"))
            added = [100 * (logging[r] - silent[r]) / scalars for r in logging if r in silent]
            if peer != "hand" and added:
                rows.append(Row(peer, spread_of(added), None))
        if rows:
            blocks.append(Block("logging", case, f"{case} logged", PER_SCALAR, rows))
    return blocks


def ratios_to_hand(answers: dict[str, Answers], peer: str) -> dict[int, float]:
    """A step's CPU time over that of the loop by hand, by round."""
    by_hand, theirs = (by_round(answers.get(name, []), "cpu") for name in ("hand", peer))
    return {number: value / by_hand[number] for number, value in theirs.items() if number in by_hand}


def compare_work(results: dict[str, Any], workloads: dict[str, ModuleType]) -> list[str]:
    """Say for each case who had the hand-written loop's weights when measuring began, and who had not, and why."""
    lines = []
    for name, cases in results.items():
        for case in workloads[name].CASES:
            answers = {peer: found[0] for peer, found in cases[case.name].items() if found}
            if not case.same_work or len(answers) < 2 or "hand" not in answers:
                continue
            wanted = answers.pop("hand")
            same = [peer for peer, answer in answers.items() if is_same(answer, wanted)]
            lines.append(
                f"{name}/{case.name}: the weights are those of the loop by hand in {', '.join(same) or 'none'}."
            )
            for peer in answers.keys() - set(same):
                why = PEERS[peer].note or "it did other work, so its numbers here can't be compared"
                lines.append(f"{name}/{case.name}: other weights in {peer}: {why}.")
    return lines


def is_same(answer: dict[str, Any], wanted: dict[str, Any]) -> bool:
    difference = abs(answer["checksum"] - wanted["checksum"])
    return answer["steps"] == wanted["steps"] and difference <= TOLERANCE * abs(wanted["checksum"])


def as_data(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    return [asdict(block) for block in blocks]
