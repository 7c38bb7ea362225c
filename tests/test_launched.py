"""What a process that a launcher started does for the others."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainkit import launched


def test_an_exception_is_noted_where_torchs_agent_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    launched.note(SystemExit(3))
    assert not path.exists()
    error = ValueError("broken")
    launched.note(error)
    first = json.loads(path.read_text())
    assert first["message"]["message"] == "ValueError: broken"
    assert "ValueError: broken" in first["message"]["extraInfo"]["py_callstack"]
    launched.note(error, uncaught=True)
    second = json.loads(path.read_text())["trainkit"]
    assert second == {"time": first["trainkit"]["time"], "lost": False, "uncaught": True}


def test_a_lost_connection_is_told_from_other_errors() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:30123")
    assert launched.is_lost(lost)
    caused = RuntimeError("the step failed")
    caused.__cause__ = lost
    assert launched.is_lost(caused)
    assert launched.is_lost(RuntimeError("prepare_data failed on rank 0: OSError: no"))
    assert not launched.is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not launched.is_lost(ValueError("Connection closed by peer"))


def test_warnings_of_other_ranks_go_to_the_log_of_the_run_and_early_ones_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings._showwarning_orig)  # type: ignore[attr-defined]
    with warnings.catch_warnings(record=True) as recorded:  # pytest does that, too
        launched.RankLog(3)._show("recorded", UserWarning, "x.py", 1)
    assert [str(one.message) for one in recorded] == ["recorded"]
    monkeypatch.setattr(warnings, "_showwarnmsg_impl", warnings.showwarning)
    log = launched.RankLog(3)
    log._show("early", UserWarning, "x.py", 1)
    log.keep_in("s3://bucket/run")
    log.keep_in(tmp_path / "run")
    log._show("late", UserWarning, "x.py", 2)
    said = (tmp_path / "run" / "logs" / "rank3.log").read_text()
    assert said.index("early") < said.index("late")
    log.close()
    assert capsys.readouterr().err == ""
    never = launched.RankLog(2)
    never._show("nowhere", UserWarning, "x.py", 1)
    never.close()
    assert "nowhere" in capsys.readouterr().err


def test_data_are_prepared_once_and_a_failure_is_raised_on_all(processes: Callable[..., list[Any]]) -> None:
    source = """
        from trainkit.environment import detect
        from trainkit.strategies import ParallelStrategy
        import torch.distributed as dist
        strategy = ParallelStrategy("cpu", detect())
        strategy.setup_environment()
        strategy.on_each_node("preparing", lambda: print("once", flush=True))
        strategy.on_rank_zero("preparing", lambda: print("again", flush=True))
        def fails():
            raise ZeroDivisionError("no data")
        try:
            strategy.on_each_node("preparing", fails)
        except (ZeroDivisionError, RuntimeError) as error:
            print(type(error).__name__, error, flush=True)
        dist.barrier()
    """
    first, second = processes(2, source)
    assert first.out == "once\nagain\nZeroDivisionError no data\n"
    assert second.out == "RuntimeError preparing failed on rank 0: ZeroDivisionError: no data\n"
    assert sys.platform != "linux" or "Traceback" not in second.err
