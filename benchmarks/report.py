"""What people read: a table for an 80-column terminal, and a page in Markdown made from the JSON file."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from benchmarks.case import Metric
from benchmarks.summary import Block, Row, Spread

SCALE = {"us": (1e6, "µs"), "MB": (1, "MB"), "%": (1, "%"), "x": (1, "times"), "samples/s": (1, "samples/s")}


def scaled(value: float, unit: str) -> str:
    """A number in its unit: "98.3 µs", "1.24 s", "35 ms"."""
    if unit == "ratio":
        return f"{value:.3f}"
    if unit == "s":
        return f"{value:.2f} s" if abs(value) >= 1 else f"{value * 1000:.3g} ms"
    if unit == "us" and abs(value) >= 0.01:
        return f"{value * 1000:.1f} ms"
    factor, name = SCALE[unit]
    value *= factor
    digits = f"{value:.3f}" if unit == "x" else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"
    return f"{digits} {name}"


def ratio_text(spread: Spread | None) -> tuple[str, str]:
    if spread is None:
        return "", ""
    middle, least, most = (
        f"{value:.3f}" if value >= 0.1 else f"{value:.1g}" for value in (spread.median, spread.least, spread.most)
    )
    return middle, f"{least} to {most}"


def value_range(row: Row, metric: Metric) -> str:
    return f"{scaled(row.value.least, metric.unit)} to {scaled(row.value.most, metric.unit)}"


def table(blocks: Sequence[Block], titles: dict[str, str]) -> str:
    """The table for a terminal: medians; where a ratio to the loop by hand is, least and most are of the ratios."""
    lines = []
    for workload, of_workload in groupby(blocks, key=lambda block: block.workload):
        lines += ["", titles[workload]]
        for block in of_workload:
            heading = f"  {block.title}: {block.metric.title}"
            lines += [heading] if len(heading) < 80 else [f"  {block.title}:", f"    {block.metric.title}"]
            for row in block.rows:
                ratio, spread = ratio_text(row.ratio)
                if row.ratio is None:
                    spread = value_range(row, block.metric)
                value, rounds = scaled(row.value.median, block.metric.unit), f"{row.value.count}x"
                lines.append(f"    {row.peer:<13}{value:>17} {ratio:>7}  {spread:<27.27}{rounds:>4}".rstrip())
    return "\n".join(lines)


def verdict_line(verdict: dict[str, Any]) -> str:
    sign = "at least" if verdict["at_least"] else "at most"
    measured = "" if verdict["median"] is None else f", measured {scaled(verdict['median'], verdict['unit'])}"
    limit = scaled(verdict["limit"], verdict["unit"])
    return f"{verdict['verdict'].upper()}: {verdict['bar']}: {sign} {limit}{measured}"


def bars_text(verdicts: Sequence[dict[str, Any]]) -> str:
    return "\n".join(["", "Bars", *(wrapped(f"  {verdict_line(verdict)}") for verdict in verdicts)])


def wrapped(line: str) -> str:
    """The line, broken so that it fits a terminal of 80 columns."""
    return textwrap.fill(line, 79, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def page(report: dict[str, Any], titles: dict[str, str], blocks: Sequence[Block]) -> str:
    """The results page."""
    machine, versions = report["machine"], report["versions"]
    missed = [verdict for verdict in report["bars"] if verdict["verdict"] == "missed"]
    measured = [verdict for verdict in report["bars"] if verdict["verdict"] != "not measured"]
    lines = [
        "# Results",
        "",
        f"Made by `{report['command']}` on {report['date']}, commit {report['commit']}, in "
        f"{report['seconds'] / 60:.0f} minutes. This page is written from "
        "[results.json](results.json), which holds each measured value; "
        "[how to read it](../README.md).",
        "",
    ]
    if report["quick"]:
        lines += ["**A quick run: it shows that everything works. Its numbers mean nothing.**", ""]
    lines += [
        f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['ram_gb']} GB, {machine['os']}; load when it "
        f"began: {machine['load']}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"- the CNN's images: {report['images']}",
        "",
        "![The same step in each framework](results.png)" if report["plot"] else "",
        "",
        "## Bars",
        "",
        f"Of {len(measured)} bars that were measured, {len(measured) - len(missed)} are met and {len(missed)} missed.",
        "",
        "| bar | limit | measured, median (least to most) | |",
        "|---|---|---|---|",
    ]
    for verdict in report["bars"]:
        sign, unit = "≥" if verdict["at_least"] else "≤", verdict["unit"]
        value = "" if verdict["median"] is None else scaled(verdict["median"], unit)
        if value:
            value += f" ({scaled(verdict['least'], unit)} to {scaled(verdict['most'], unit)})"
        word = f"**{verdict['verdict']}**" if verdict["verdict"] == "missed" else verdict["verdict"]
        lines.append(f"| {verdict['bar']} | {sign} {scaled(verdict['limit'], unit)} | {value} | {word} |")
    lines += [
        "",
        "The bars of (f) end where the first step begins. In a fresh process torch imports its compiler, a second of "
        "CPU time, and trainkit puts that off into the first update: it is not saved. The tables of (f) have both, "
        "and in those to the first update done it is in everybody's numbers.",
        "",
        "Python calls in a step, and reads of the device between log points, are counted exactly: by the tests.",
        "",
    ]
    for workload, of_workload in groupby(blocks, key=lambda block: block.workload):
        lines += [f"## {titles[workload]}", ""]
        for block in of_workload:
            lines += block_lines(block)
    lines += ["## The same work", "", *(f"- {line}" for line in report["work"]), ""]
    if report["problems"]:
        lines += ["## Left out, or failed", "", *(f"- {line}" for line in report["problems"]), ""]
    return "\n".join(lines)


def block_lines(block: Block) -> list[str]:
    lines = [
        f"{block.title}: {block.metric.title}",
        "",
        "| | median | least to most | ratio | least to most | rounds |",
    ]
    lines.append("|---|---:|---|---:|---|---:|")
    for row in block.rows:
        ratio, spread = ratio_text(row.ratio)
        value = scaled(row.value.median, block.metric.unit)
        lines.append(
            f"| {row.peer} | {value} | {value_range(row, block.metric)} | {ratio} | {spread} | {row.value.count} |"
        )
    return [*lines, ""]
