"""rank_zero_only and its relatives: what the first process does, the others leave alone."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest

from trainkit.rank_zero import (
    LightningDeprecationWarning,
    WarningCache,
    current_rank,
    rank_prefixed_message,
    rank_zero_debug,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the process with rank 1."""
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)


def test_the_first_process_does_the_work_and_keeps_the_name() -> None:
    @rank_zero_only
    def add(a: int, b: int = 1) -> int:
        """Add."""
        return a + b

    assert add(2, b=3) == 5
    assert (add.__name__, add.__doc__) == ("add", "Add.")
    assert current_rank() == 0


@pytest.mark.usefixtures("second")
def test_the_others_get_the_default() -> None:
    calls: list[int] = []
    assert rank_zero_only(calls.append)(1) is None
    assert rank_zero_only(lambda: 3, default=7)() == 7
    assert calls == []
    assert current_rank() == 1


def test_a_rank_that_is_not_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", None, raising=False)
    with pytest.raises(RuntimeError, match=r"rank_zero_only.rank is not set"):
        rank_zero_only(lambda: 3)()


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_launchers_say_the_rank_in_the_environment(variable: str) -> None:
    program = "from trainkit.rank_zero import rank_zero_only; print(rank_zero_only.rank)"
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path), variable: "3"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


def test_messages_are_logged_and_warnings_warned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "trainkit.rank_zero"):
        rank_zero_info("%d files", 3)
        rank_zero_debug("looked")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "3 files"),
        ("DEBUG", "looked"),
    ]
    with pytest.warns(UserWarning, match="careful"):
        rank_zero_warn("careful")
    with pytest.warns(FutureWarning, match="soon"):
        rank_zero_warn("soon", category=FutureWarning)
    with pytest.warns(LightningDeprecationWarning, match="old"):
        rank_zero_deprecation("old")


@pytest.mark.usefixtures("second")
def test_other_processes_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "trainkit.rank_zero"), warnings.catch_warnings():
        warnings.simplefilter("error")
        rank_zero_info("a")
        rank_zero_debug("a")
        rank_zero_warn("a")
        rank_zero_deprecation("a")
        WarningCache().warn("a")
    assert caplog.records == []


def test_a_warning_points_at_the_line_that_warns() -> None:
    with pytest.warns(UserWarning, match="here") as caught:
        rank_zero_warn("here")
    assert caught[0].filename == __file__


def test_a_cache_says_everything_once(caplog: pytest.LogCaptureFixture) -> None:
    cache = WarningCache()
    with pytest.warns(UserWarning, match="twice"):
        cache.warn("twice")
    cache.warn("twice")  # warnings are errors here
    with caplog.at_level(logging.INFO, "trainkit.rank_zero"):
        cache.info("news")
        cache.info("news")
    assert caplog.messages == ["news"]
    with pytest.warns(LightningDeprecationWarning, match="old"):
        cache.deprecation("old")
    cache.deprecation("old")
    assert set(cache) == {"twice", "news", "old"}


def test_a_message_can_say_whose_it_is() -> None:
    assert rank_prefixed_message("done", 2) == "[rank: 2] done"
    assert rank_prefixed_message("done", None) == "done"
