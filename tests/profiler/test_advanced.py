"""AdvancedProfiler: each call is in the report of the action it happened in."""

from __future__ import annotations

import pstats
from pathlib import Path
from typing import Any

import pytest

from trainkit import Trainer
from trainkit.errors import MisconfigurationException
from trainkit.profiler import AdvancedProfiler


def before() -> None:
    pass


def inside() -> None:
    pass


def after() -> None:
    pass


def reports(profiler: AdvancedProfiler) -> dict[str, str]:
    parts = profiler.summary().split("Profile stats for: ")[1:]
    return {part.split("\n", 1)[0]: part for part in parts}


def test_an_outer_action_goes_on_after_an_inner_one() -> None:
    profiler = AdvancedProfiler()
    with profiler.profile("outer"):
        before()
        with profiler.profile("inner"):
            inside()
        after()
    found = reports(profiler)
    assert [name in found["outer"] for name in ("(before)", "(inside)", "(after)")] == [True, False, True]
    assert [name in found["inner"] for name in ("(before)", "(inside)", "(after)")] == [False, True, False]


def test_an_action_may_end_after_the_one_around_it() -> None:
    profiler = AdvancedProfiler()
    profiler.start("first")
    profiler.start("second")
    profiler.stop("first")
    inside()
    profiler.stop("second")
    assert "(inside)" in reports(profiler)["second"]


def test_stopping_what_was_not_started_is_refused() -> None:
    profiler = AdvancedProfiler()
    for _ in range(2):
        with pytest.raises(ValueError, match="'a' was stopped, but it was not started"):
            profiler.stop("a")
        with profiler.profile("a"):
            pass


def test_the_number_of_functions_can_be_limited() -> None:
    def lines(restriction: float) -> int:
        profiler = AdvancedProfiler(line_count_restriction=restriction)
        with profiler.profile("a"):
            before(), inside(), after()
        return len([line for line in profiler.summary().split("(function)")[1].splitlines() if line.strip()])

    assert (lines(1), lines(2)) == (1, 2)
    assert lines(1.0) > 3


def test_profiles_are_kept_for_other_programs(tmp_path: Path) -> None:
    profiler = AdvancedProfiler(tmp_path / "new", filename="calls", dump_stats=True)
    profiler.setup("fit")
    with profiler.profile("[Own]a/b"):
        inside()
    profiler.describe()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["fit-calls-[Own]a_b.prof", "fit-calls.txt"]
    functions = pstats.Stats(str(tmp_path / "new" / "fit-calls-[Own]a_b.prof")).get_stats_profile().func_profiles
    assert "inside" in functions
    assert profiler.profiled_actions == {}


def test_profiles_need_a_place() -> None:
    profiler = AdvancedProfiler(dump_stats=True)
    with pytest.raises(MisconfigurationException, match="dump_stats=True needs a directory: give dirpath"):
        profiler.describe()


def test_a_run_reports_the_calls_of_each_action(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, num_sanity_val_steps=0,
        profiler=AdvancedProfiler(tmp_path, "calls"),
    )  # fmt: skip
    trainer.fit(TinyModule(), TinyData())
    report = (tmp_path / "fit-calls.txt").read_text()
    part = report.split("Profile stats for: [LightningModule]TinyModule.training_step\n")[1].split("Profile stats")[0]
    assert "(training_step)" in part
    assert "(mse_loss)" in part
