"""python -m benchmarks: it runs, writes what it measured, and says what is missed. Nothing here looks at a clock."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def found(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(checkout))


def benchmark(checkout: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a quick run of a workload printed, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("benchmarks")
    options = ["--quick", "--peers", "hand,trainkit,skorch", "--workloads", "mlp", "--out", "out"]
    done = benchmark(checkout, folder, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder / "out"


def answer(number: int, cpu: float, **more: Any) -> dict[str, Any]:
    return {"round": number, "cpu": cpu, "steps": 10, "checksum": 1.0} | more


def test_the_json_holds_each_value_with_machine_versions_and_commit(quick: tuple[str, Path]) -> None:
    report = json.loads((quick[1] / "results.json").read_text())
    assert report["quick"]
    assert {"cpu", "cores", "ram_gb", "os"} <= report["machine"].keys()
    assert {"python", "torch"} <= report["versions"].keys()
    assert report["commit"]
    for case in ("off", "defaults"):
        for peer in ("hand", "trainkit"):
            [found] = report["results"]["mlp"][case][peer]
            assert found["cpu"] > 0
            assert found["steps"] == 300


def test_trainkit_and_the_loop_by_hand_end_with_the_very_same_weights(quick: tuple[str, Path]) -> None:
    cases = json.loads((quick[1] / "results.json").read_text())["results"]["mlp"]
    sums = {cases[case][peer][0]["final_checksum"] for case in cases for peer in ("hand", "trainkit")}
    assert len(sums) == 1


def test_the_table_fits_80_columns_and_names_each_peer_and_bar(quick: tuple[str, Path]) -> None:
    printed = quick[0]
    table = printed[printed.index("(a) Tiny MLP") : printed.index("\nBars")]
    assert max(map(len, printed.splitlines())) < 80
    assert "hand" in table
    assert "trainkit" in table
    bars = printed[printed.index("\nBars") :]
    assert "(a) tiny MLP, everything off: at most 1.050, measured" in bars
    assert "NOT MEASURED: (f) import over torch" in bars


def test_what_is_left_out_is_said(quick: tuple[str, Path]) -> None:
    if importlib.util.find_spec("skorch") is not None:
        pytest.skip("skorch is installed")
    said = "skorch is left out: it is not installed (pip install skorch)"
    assert said in quick[0]
    assert said in (quick[1] / "README.md").read_text()


def test_the_page_says_that_a_quick_run_means_nothing(quick: tuple[str, Path]) -> None:
    page = (quick[1] / "README.md").read_text()
    assert "Its numbers mean nothing." in page
    assert "| (a) tiny MLP, everything off | ≤ 1.050 |" in page
    assert "| (f) import over torch, CPU time | ≤ 80 ms |  | not measured |" in page


def test_a_picture_is_drawn(quick: tuple[str, Path]) -> None:
    pytest.importorskip("matplotlib")
    assert (quick[1] / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_missed_bar_is_said_to_be_missed() -> None:
    bars, report, summary = (importlib.import_module(f"benchmarks.{name}") for name in ("bars", "report", "summary"))
    workloads = {"mlp": importlib.import_module("benchmarks.workloads.mlp")}
    cases = {
        "off": {"hand": [answer(0, 1e-4), answer(1, 2e-4)], "trainkit": [answer(0, 1.04e-4), answer(1, 2.08e-4)]},
        "defaults": {"hand": [answer(0, 1e-4)], "trainkit": [answer(0, 1.5e-4)]},
    }
    blocks = summary.summarise({"mlp": cases}, workloads)
    verdicts = bars.judge(blocks)
    assert [verdict["verdict"] for verdict in verdicts[:3]] == ["met", "missed", "not measured"]
    assert [verdict["median"] for verdict in verdicts[:2]] == pytest.approx([1.04, 1.5])
    assert report.verdict_line(verdicts[1]).startswith("MISSED: (a) tiny MLP, defaults on")


def test_ratios_are_of_the_same_round() -> None:
    summary = importlib.import_module("benchmarks.summary")
    workloads = {"mlp": importlib.import_module("benchmarks.workloads.mlp")}
    slow_then_fast = {"hand": [answer(0, 2.0), answer(1, 1.0)], "lightning": [answer(0, 6.0), answer(1, 2.0)]}
    [block] = summary.summarise({"mlp": {"off": slow_then_fast, "defaults": {}}}, workloads)
    ratio = block.row("lightning").ratio
    assert (ratio.least, ratio.median, ratio.most, ratio.count) == (2.0, 2.5, 3.0, 2)


def test_what_a_scalar_adds_is_counted_in_steps_by_hand() -> None:
    summary = importlib.import_module("benchmarks.summary")
    cases = {
        "none": {"hand": [answer(0, 1.0)], "trainkit": [answer(0, 1.1)]},
        "one": {"hand": [answer(0, 2.0)], "trainkit": [answer(0, 2.3)]},  # the machine was slower then
        "five": {"hand": [answer(0, 1.0)], "trainkit": [answer(0, 1.2)]},
    }
    assert [block.row("trainkit").value.median for block in summary.per_scalar(cases)] == pytest.approx([5, 2])


def test_a_peer_that_did_other_work_is_named() -> None:
    summary = importlib.import_module("benchmarks.summary")
    workloads = {"mlp": importlib.import_module("benchmarks.workloads.mlp")}
    off = {
        "hand": [answer(0, 1.0)],
        "trainkit": [answer(0, 1.0)],
        "ignite": [answer(0, 1.0, checksum=1.1)],
        "fastai": [answer(0, 1.0, steps=9)],
    }
    same, *other = summary.compare_work({"mlp": {"off": off, "defaults": {}}}, workloads)
    assert same.endswith("by hand in trainkit.")
    assert {line.partition(" weights in ")[2].partition(":")[0] for line in other} == {"ignite", "fastai"}


def test_peers_take_turns_and_each_round_begins_with_another_one() -> None:
    runner = importlib.import_module("benchmarks.runner")
    mlp = importlib.import_module("benchmarks.workloads.mlp")
    turns = [
        (number, peer)
        for number, cases, peer in runner.schedule(mlp, ["hand", "trainkit", "ignite"], None, quick=False)
        if cases[0].name == "off"
    ]
    assert [peer for number, peer in turns if number < 2] == [
        *("hand", "trainkit", "ignite"),
        *("trainkit", "ignite", "hand"),
    ]
    rounds = {peer: sum(1 for _, other in turns if other == peer) for peer in ("hand", "trainkit", "ignite")}
    assert rounds == {"hand": mlp.ROUNDS[0], "trainkit": mlp.ROUNDS[0], "ignite": mlp.ROUNDS[1]}


def test_a_measurement_that_fails_says_why() -> None:
    runner = importlib.import_module("benchmarks.runner")
    assert "no_such_workload" in runner.in_process("no_such_workload", ["off"], "hand", quick=True)["off"]["failed"]


def test_each_file_is_listed(checkout: Path) -> None:
    peers, workloads = importlib.import_module("benchmarks.peers"), importlib.import_module("benchmarks.workloads")
    for folder, listed in (("peers", peers.PEERS), ("workloads", workloads.NAMES)):
        assert {path.stem for path in (checkout / "benchmarks" / folder).glob("[a-z]*.py")} == set(listed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workloads", "mpl"], "--workloads knows mlp, logging,"),
        (["--peers", "hand,torchtnt"], "--peers knows hand, trainkit,"),
        (["--rounds", "0"], "--rounds must be at least 1. Received: 0."),
    ],
)
def test_a_wrong_option_is_answered_with_what_is_possible(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.__main__").parse(options)
    assert message in " ".join(capsys.readouterr().err.split())
