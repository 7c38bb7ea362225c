"""`python -m benchmarks`: the hand-written loop, trainkit and its peers, side by side."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.bars import judge
from benchmarks.machine import CHECKOUT, describe_machine, find_commit, find_versions
from benchmarks.peers import PEERS
from benchmarks.plot import draw
from benchmarks.report import bars_text, page, table, wrapped
from benchmarks.runner import missing_peers, run_workload
from benchmarks.summary import as_data, compare_work, summarise
from benchmarks.workloads import NAMES

QUICK_PEERS = ["hand", "trainkit"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--workloads", default=",".join(NAMES), help="comma-separated; default: all of %(default)s")
    parser.add_argument("--peers", help=f"comma-separated; default: {','.join(PEERS)}; with --quick: hand,trainkit")
    parser.add_argument("--rounds", type=int, help="of each workload; default: what each workload's file says")
    parser.add_argument(
        "--quick", action="store_true", help="a minute, to see that everything runs; numbers mean nothing"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for results; default: benchmarks/results, or runs/benchmarks unless all is run"
    )
    options = parser.parse_args(arguments)
    options.workloads = names_of(parser, "--workloads", options.workloads, list(NAMES))
    peers = options.peers or ",".join(QUICK_PEERS if options.quick else PEERS)
    options.peers = names_of(parser, "--peers", peers, list(PEERS))
    whole = not options.quick and (options.workloads, options.peers) == (list(NAMES), list(PEERS))
    options.out = options.out or (CHECKOUT / "benchmarks" / "results" if whole else Path("runs", "benchmarks"))
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1. Received: {options.rounds}.")
    return options


def names_of(parser: argparse.ArgumentParser, option: str, given: str, known: list[str]) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        parser.error(f"{option} knows {', '.join(known)}. Received: {given!r}.")
    return [name for name in known if name in names]


def find_images(quick: bool) -> str:
    """Let the CNN's processes find Fashion-MNIST, as examples/fashion_mnist.py does, and say what they train on."""
    if quick:
        return "noise of Fashion-MNIST's shape (a quick run)"
    spec = importlib.util.spec_from_file_location("fashion", CHECKOUT / "examples" / "data" / "fashion.py")
    assert spec is not None
    assert spec.loader is not None
    fashion = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fashion)
    try:
        os.environ["BENCH_FASHION"] = str(fashion.find_or_fetch())
    except Exception as error:
        print(error)
        return "noise of Fashion-MNIST's shape (it could not be had)"
    return "Fashion-MNIST"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    began = time.time()
    missing = missing_peers(options.peers)
    for line in missing:
        print(line)
    peers = [name for name in options.peers if PEERS[name].installed]
    workloads = {name: importlib.import_module(f"benchmarks.workloads.{name}") for name in options.workloads}
    report: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks", *(sys.argv[1:] if arguments is None else arguments)]),
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "commit": find_commit(),
        "quick": options.quick,
        "machine": describe_machine(),
        "versions": find_versions(),
        "images": find_images(options.quick) if "cnn" in workloads or "memory" in workloads else "not used",
        "problems": missing,
    }
    results: dict[str, Any] = {}
    for name, workload in workloads.items():
        start = time.time()
        results[name], problems = run_workload(name, workload, peers, options.rounds, options.quick, tell)
        tell("")
        print(f"{name}: {time.time() - start:.0f} s", flush=True)
        report["problems"] = report["problems"] + problems
    write(report, results, workloads, options.out, time.time() - began)
    return 1 if any(" failed: " in problem for problem in report["problems"]) else 0


def tell(what: str) -> None:
    """Show what is measured now, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what[:79]}", end="", file=sys.stderr, flush=True)


def write(
    report: dict[str, Any], results: dict[str, Any], workloads: dict[str, Any], out: Path, seconds: float
) -> None:
    """Print the table, and write JSON, picture and page."""
    blocks = summarise(results, workloads)
    titles = {name: workload.TITLE for name, workload in workloads.items()}
    out.mkdir(parents=True, exist_ok=True)
    report |= {"seconds": round(seconds), "bars": judge(blocks), "work": compare_work(results, workloads)}
    report["plot"] = draw(blocks, out / "results.png")
    (out / "results.json").write_text(
        json.dumps(report | {"summary": as_data(blocks), "results": results}, indent=1) + "\n"
    )
    (out / "README.md").write_text(page(report, titles, blocks))
    print(table(blocks, titles))
    print(bars_text(report["bars"]))
    if report["quick"]:
        print("  This was a quick run: its numbers mean nothing, and so do its verdicts.")
    print("\n".join(["", *map(wrapped, report["work"]), *map(wrapped, report["problems"])]))
    if not report["plot"]:
        print("No picture: pip install matplotlib, and measure one of mlp, logging, cnn, transformer, data.")
    print(f"\nWritten to {out}: results.json, README.md{', results.png' if report['plot'] else ''}")


if __name__ == "__main__":
    sys.exit(main())
