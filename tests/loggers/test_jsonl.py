"""JSONLinesLogger: one line a call, read back as it was logged, whatever happens in between."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.loggers import JSONLinesLogger

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda name: name != "step")
NUMBERS = st.floats() | st.integers(-(2**60), 2**60)


def read(logger: JSONLinesLogger) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(logger.metrics_file_path).read_text(encoding="utf-8").splitlines()]


@given(rows=st.lists(st.dictionaries(NAMES, NUMBERS, min_size=1, max_size=4), min_size=1, max_size=8))
def test_every_row_reads_back(rows: list[dict[str, float]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        logger = JSONLinesLogger(directory, version=0)
        for step, row in enumerate(rows):
            logger.log_metrics(row, step)
        lines = read(logger)
        assert [line.pop("step") for line in lines] == list(range(len(rows)))
        values = [{name: float(value) for name, value in line.items()} for line in lines]
        assert repr(values) == repr([{name: float(value) for name, value in row.items()} for row in rows])


def test_lines_are_plain_json(tmp_path: Path) -> None:
    logger = JSONLinesLogger(tmp_path, name="digits", prefix="run")
    logger.log_metrics({"loss": torch.tensor(0.5), "count": 3, "bad": math.nan, "far": -math.inf}, 4)
    logger.log_metrics({"pair": {"a": 1, "b": 2.0}})
    logger.log_metrics({"step": 9, "loss": 1.0}, 7)
    logger.log_metrics({})
    assert logger.metrics_file_path == str(tmp_path / "digits" / "version_0" / "metrics.jsonl")
    assert Path(logger.metrics_file_path).read_text() == (
        '{"step": 4, "run-loss": 0.5, "run-count": 3, "run-bad": "NaN", "run-far": "-Infinity"}\n'
        '{"step": 5, "run-pair/a": 1, "run-pair/b": 2.0}\n'
        '{"step": 9, "run-loss": 1.0}\n'
    )


def test_a_resumed_run_drops_the_rows_that_come_again(tmp_path: Path) -> None:
    logger = JSONLinesLogger(tmp_path)
    for step in range(5):
        logger.log_metrics({"loss": float(step)}, step)
    with open(logger.metrics_file_path, "a") as file:
        file.write("not ours\n")
    again = JSONLinesLogger(tmp_path)
    again.continue_run(Path(logger.log_dir), 3)
    again.log_metrics({"loss": 30.0}, 3)
    lines = Path(again.metrics_file_path).read_text().splitlines()
    assert again.metrics_file_path == logger.metrics_file_path
    assert [json.loads(line)["loss"] for line in lines if line != "not ours"] == [0, 1, 2, 30]
    assert "not ours" in lines  # what is no row of a run is nobody's to take out


def test_a_killed_process_loses_no_row_and_leaves_no_half_one(tmp_path: Path) -> None:
    program = (
        "import os, signal\n"
        "from trainkit.loggers import JSONLinesLogger\n"
        f"logger = JSONLinesLogger({str(tmp_path)!r}, version=0)\n"
        "for step in range(3): logger.log_metrics({'loss': step}, step)\n"
        "open(logger.metrics_file_path, 'a').write('{\"step\": 3, \"lo')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    logger = JSONLinesLogger(tmp_path, version=0)
    logger.log_metrics({"loss": 3}, 3)
    assert [row["loss"] for row in read(logger)] == [0, 1, 2, 3]


def test_a_file_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    logger = JSONLinesLogger(tmp_path, version=0)
    Path(logger.log_dir, "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(OSError, match=r"metrics.jsonl could not be written"):
        logger.log_metrics({"loss": 1.0}, 0)
