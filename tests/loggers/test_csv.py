"""CSVLogger: what goes in reads back, whatever happens in between."""

from __future__ import annotations

import copy
import csv
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from trainkit.loggers import CSVLogger

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda name: name != "step")
NUMBERS = st.floats() | st.integers(-(2**60), 2**60)


def read(logger: CSVLogger) -> list[dict[str, float]]:
    """Return the rows as they were logged: numbers by name, without the cells that are empty."""
    with open(Path(logger.log_dir, "metrics.csv"), newline="", encoding="utf-8") as file:
        return [
            {name: float(value) for name, value in row.items() if value != ""}
            for row in csv.DictReader(file, strict=True, restkey="surplus", restval="missing")
        ]


def same(left: list[dict[str, float]], right: list[dict[str, float]]) -> bool:
    return repr([dict(sorted(row.items())) for row in left]) == repr(
        [{name: float(row[name]) for name in sorted(row)} for row in right]
    )


@given(
    rows=st.lists(st.dictionaries(NAMES, NUMBERS, min_size=1, max_size=4), max_size=12),
    flush_every=st.integers(1, 5),
    reopen_at=st.integers(0, 12),
)
@example(rows=[{"": math.nan}, {"a,b\n": -math.inf}, {'"': -0.0, "\r": 5e-324}], flush_every=1, reopen_at=2)
def test_every_row_reads_back_whatever_the_order_of_its_names(
    rows: list[dict[str, float]], flush_every: int, reopen_at: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        logger = CSVLogger(directory, version=0, flush_logs_every_n_steps=flush_every)
        for step, row in enumerate(rows):
            if step == reopen_at:  # another process appends to the same fixed version
                logger.close()
                logger = CSVLogger(directory, version=0, flush_logs_every_n_steps=flush_every)
            logger.log_metrics(row, step)
        logger.finalize("success")
        assert not rows or same(read(logger), [{"step": step, **row} for step, row in enumerate(rows)])


@given(
    steps=st.lists(st.integers(0, 30), min_size=1, max_size=20).map(sorted),
    resume_at=st.integers(0, 31),
    torn=st.booleans(),
)
def test_a_resumed_run_keeps_what_came_before_and_drops_what_comes_again(
    steps: list[int], resume_at: int, torn: bool
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        first = CSVLogger(directory)
        for step in steps:
            first.log_metrics({"loss": step / 7}, step)
        first.finalize("failed")
        if torn:
            with open(Path(first.log_dir, "metrics.csv"), "a") as file:
                file.write("1,0.1428")
        before = Path(first.log_dir, "metrics.csv").read_bytes()

        second = CSVLogger(directory)
        second.continue_run(Path(first.log_dir), resume_at)
        second.check_writable()
        assert Path(first.log_dir, "metrics.csv").read_bytes() == before, "nothing changes before the first write"
        second.log_metrics({"accuracy": 0.5}, 31)
        second.log_metrics({"loss": 0.5}, 32)
        second.finalize("success")
        kept = [{"step": step, "loss": step / 7} for step in steps if step < resume_at]
        assert same(read(second), [*kept, {"step": 31, "accuracy": 0.5}, {"step": 32, "loss": 0.5}])


def test_the_file_is_a_plain_table(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"train_loss": 0.1, "epoch": 0}, step=49)
    logger.log_metrics({"val_loss": torch.tensor(0.5), "epoch": True}, step=49)
    logger.save()
    text = Path(logger.log_dir, "metrics.csv").read_text()
    assert text == "step,train_loss,epoch,val_loss\n49,0.1,0,\n49,,1,0.5\n"


def test_the_file_is_written_anew_only_when_a_name_is_new(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    inodes = []
    for step in range(6):
        logger.log_metrics({"loss": 1.0} if step < 3 else {"loss": 1.0, "accuracy": 0.5}, step)
        inodes.append(os.stat(Path(logger.log_dir, "metrics.csv")).st_ino)
    assert inodes[0] == inodes[1] == inodes[2] != inodes[3] == inodes[4] == inodes[5]
    assert os.listdir(logger.log_dir) == ["metrics.csv"]


@pytest.mark.parametrize(("every", "written"), [(1, [1, 2, 3, 4]), (100, [0, 0, 3, 3]), (1000, [0, 0, 0, 0])])
def test_rows_are_written_when_enough_steps_have_gone_by(tmp_path: Path, every: int, written: list[int]) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=every)
    counts = []
    for step in (49, 99, 149, 199):
        logger.log_metrics({"loss": 1.0}, step)
        counts.append(len(read(logger)) if Path(logger.log_dir, "metrics.csv").exists() else 0)
    assert counts == written
    logger.save()
    assert len(read(logger)) == 4


def test_many_rows_at_one_step_are_written_too(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=10)
    for _ in range(10):
        logger.log_metrics({"loss": 1.0}, 5)
    assert len(read(logger)) == 10


def test_the_x_value_is_the_argument_or_the_metric_called_step_or_the_next(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0})
    logger.log_metrics({"loss": 1.0}, step=7)
    logger.log_metrics({"loss": 1.0})
    logger.log_metrics({"loss": 1.0, "step": torch.tensor(20.0)}, step=9)
    logger.save()
    assert [row["step"] for row in read(logger)] == [0, 7, 8, 20]


def test_prefixes_and_mappings_become_part_of_the_names(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, prefix="run")
    logger.log_metrics({"loss": {"train": 1.0, "val": 2.0}, "epoch": 0}, step=0)
    logger.save()
    assert read(logger) == [{"step": 0, "run-loss/train": 1.0, "run-loss/val": 2.0, "run-epoch": 0}]


def test_a_fixed_version_appends_to_what_is_there(tmp_path: Path) -> None:
    Path(tmp_path, "version_0").mkdir()
    Path(tmp_path, "version_0", "metrics.csv").write_bytes(b"epoch,l\xf6ss\r\n0,0.5\r\n1,to")
    logger = CSVLogger(tmp_path, name="", version=0)
    logger.log_metrics({"epoch": 1}, step=3)
    logger.save()
    written = Path(tmp_path, "version_0", "metrics.csv").read_bytes()
    assert written == b"epoch,l\xf6ss,step\n0,0.5,\n1,,3\n", "the torn row is gone, foreign bytes stay"


def test_a_copy_does_not_write_the_rows_of_the_original_again(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    twin = copy.deepcopy(logger)
    logger.save()
    twin.save()
    assert len(read(logger)) == 1


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_the_flush_interval_must_be_a_positive_int(value: object) -> None:
    with pytest.raises(ValueError, match="flush_logs_every_n_steps must be a positive int, not"):
        CSVLogger("logs", flush_logs_every_n_steps=value)  # type: ignore[arg-type]


def test_a_full_disk_loses_no_row_and_leaves_no_half_one(tmp_path: Path, checkout: Path) -> None:
    code = """if True:
        import resource
        from trainkit.loggers import CSVLogger
        logger = CSVLogger("logs", name="", version=0)
        logger.log_metrics({"loss": 0.5}, 0)
        logger.save()
        for step in range(1, 100):
            logger.log_metrics({"loss": step / 7}, step)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        try:
            logger.save()
        except OSError as error:
            print(error)
        print(open("logs/version_0/metrics.csv").read())
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        logger.finalize("success")
        """
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "version_0/metrics.csv could not be written: File too large. 99 rows are kept" in result.stdout
    assert result.stdout.endswith("step,loss\n0,0.5\n\n")
    assert [row["step"] for row in read(CSVLogger("logs", name="", version=0))] == list(range(100))


KILLED = """
import itertools, sys
from pathlib import Path
from trainkit.loggers import CSVLogger
begin = int(sys.argv[1])
logger = CSVLogger("logs", flush_logs_every_n_steps=7)
if begin:
    logger.continue_run(Path("logs/lightning_logs/version_0"), begin)
for step in itertools.count(begin):
    logger.log_metrics({f"loss_{step // 400}": step / 7}, step)
    if step % 50 == 49:
        logger.save()
        print(step + 1, flush=True)
"""


def test_a_run_killed_again_and_again_has_each_row_once(tmp_path: Path, checkout: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    begin = 0
    for saves in (4, 7, 10):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(begin)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        for _ in range(saves):
            begin = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.communicate()

    logger = CSVLogger("logs")
    logger.continue_run(Path("logs/lightning_logs/version_0"), begin)
    logger.log_metrics({"last": 0.0}, begin)
    logger.finalize("success")
    rows = read(logger)
    assert rows.pop() == {"step": begin, "last": 0.0}
    assert rows == [{"step": step, f"loss_{step // 400}": step / 7} for step in range(begin)]
    assert os.listdir("logs/lightning_logs") == ["version_0"]
