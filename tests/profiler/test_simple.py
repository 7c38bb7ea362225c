"""SimpleProfiler: durations, counts and the table of them."""

from __future__ import annotations

import time

import pytest

from trainkit.profiler import SimpleProfiler


def test_durations_are_those_of_the_block() -> None:
    profiler = SimpleProfiler()
    for seconds in (0.01, 0.03):
        with profiler.profile("sleep"):
            time.sleep(seconds)
    first, second = profiler.recorded_durations["sleep"]
    assert 0.01 <= first < 0.03 <= second < 0.3
    assert profiler.current_actions == {}


def test_actions_nest_and_may_overlap() -> None:
    profiler = SimpleProfiler()
    profiler.start("a")
    profiler.start("b")
    profiler.stop("a")
    profiler.stop("b")
    assert {name: len(times) for name, times in profiler.recorded_durations.items()} == {"a": 1, "b": 1}


def test_what_can_not_be_measured_is_refused() -> None:
    profiler = SimpleProfiler()
    with pytest.raises(ValueError, match="'a' was stopped, but it was not started"):
        profiler.stop("a")
    profiler.start("a")
    with pytest.raises(ValueError, match="'a' was started, but it is under way already"):
        profiler.start("a")
    with pytest.raises(ValueError, match="under way already"), profiler.profile("a"):
        pass
    profiler.stop("a")  # the one that is under way is still measured
    assert len(profiler.recorded_durations["a"]) == 1


def recorded() -> SimpleProfiler:
    profiler = SimpleProfiler()
    profiler.recorded_durations.update({"often": [1.0, 1.0, 1.0], "slow": [2.0], "longest": [4.0]})
    return profiler


def test_the_table_begins_with_what_took_longest() -> None:
    profiler = recorded()
    profiler.start_time = time.perf_counter() - 10
    profiler.setup("validate")
    lines = profiler.summary().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert lines[0] == "VALIDATE Profiler Report"
    assert cells[0] == ["Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %"]
    assert [cells[1][0], cells[1][2], cells[1][4]] == ["Total", "5", "100 %"]
    assert [row[:4] for row in cells[2:]] == [
        ["longest", "4.0", "1", "4.0"],
        ["often", "1.0", "3", "3.0"],
        ["slow", "2.0", "1", "2.0"],
    ]
    assert [float(row[4]) for row in cells[2:]] == pytest.approx([40, 30, 20], rel=0.01)


def test_the_short_table_is_sorted_by_the_mean() -> None:
    profiler = recorded()
    profiler.extended = False
    text = profiler.summary()
    assert "Num calls" not in text
    assert text.index("longest") < text.index("slow") < text.index("often")


@pytest.mark.parametrize("extended", [True, False])
def test_nothing_recorded_is_an_empty_table(extended: bool) -> None:
    assert SimpleProfiler(extended=extended).summary().startswith("Profiler Report\n")
