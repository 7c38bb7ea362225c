"""When to save and what to keep, without a run and without a file."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from trainkit.checkpoint import policy
from trainkit.checkpoint.policy import Moment, Saved

scores = st.floats() | st.sampled_from([0.0, 1.0])
modes = st.sampled_from(["min", "max"])


def moment(event: policy.Event = "batch", epoch: int = 0, step: int = 0, seconds: float = 0.0) -> Moment:
    return Moment(event, epoch, step, seconds)


def kept_of(
    history: list[float], keep: policy.Keep, also: policy.Keep | None = None
) -> tuple[list[Saved], list[Saved], list[Saved]]:
    """Play a run; return what is kept at its end, what was written and what was removed."""
    saved: tuple[Saved, ...] = ()
    written: list[Saved] = []
    removed: list[Saved] = []
    for number, score in enumerate(history):
        plan = policy.plan(saved, Saved(str(number), score, number), keep, also)
        assert set(plan.remove) <= set(saved)
        assert not plan.write or plan.kept[-1].path == str(number)
        saved = plan.kept
        written += [plan.kept[-1]] if plan.write else []
        removed += plan.remove
    return list(saved), written, removed


# ---- when
def test_every_n_steps_saves_after_every_nth_update() -> None:
    when = policy.every_n_steps(3)
    assert [step for step in range(10) if when(moment(step=step))] == [3, 6, 9]
    assert not when(moment("validation", step=3))


def test_every_n_epochs_saves_in_the_nth_epoch() -> None:
    when = policy.every_n_epochs(2)
    assert [epoch for epoch in range(6) if when(moment("epoch", epoch=epoch))] == [1, 3, 5]


@pytest.mark.parametrize("when", [policy.every_n_steps(0), policy.every_n_epochs(0), policy.never])
def test_zero_is_never(when: policy.When) -> None:
    assert not any(when(moment(event, number, number)) for event in ("batch", "epoch") for number in range(5))


def test_every_seconds_saves_after_the_first_batch_that_ends_so_late() -> None:
    when = policy.every_seconds(10)
    assert [seconds for seconds in (0, 9.9, 10, 30) if when(moment(seconds=seconds))] == [10, 30]
    assert not when(moment("epoch", seconds=30))


def test_policies_can_be_put_together() -> None:
    either = policy.any_of(policy.every_n_steps(4), policy.every_seconds(10))
    assert either(moment(step=4))
    assert either(moment(step=5, seconds=11))
    assert not either(moment(step=5))
    both = policy.all_of(policy.after("validation"), policy.every_n_epochs(2))
    assert both(moment("validation", epoch=1))
    assert not both(moment("validation", epoch=0))
    assert not both(moment("epoch", epoch=1))


# ---- what to keep
@given(history=st.lists(scores, max_size=30), k=st.integers(1, 6), mode=modes)
def test_the_best_k_of_all_that_were_offered_are_kept(history: list[float], k: int, mode: str) -> None:
    saved, written, removed = kept_of(history, policy.keep_best(k, mode))
    order = sorted(range(len(history)), key=lambda index: (policy.rank(history[index], mode), index))
    assert {one.path for one in saved} == {str(index) for index in order[:k]}
    assert len(saved) == min(k, len(history))
    assert len(written) - len(removed) == len(saved)
    assert not {one.path for one in saved} & {one.path for one in removed}


@given(history=st.lists(scores, min_size=1, max_size=20), mode=modes)
def test_what_is_finite_is_better_than_nan_and_infinity(history: list[float], mode: str) -> None:
    saved, _, _ = kept_of(history, policy.keep_best(1, mode))
    finite = [score for score in history if math.isfinite(score)]
    assert saved[0].score == (min(finite) if mode == "min" else max(finite)) if finite else saved[0].path == "0"


@given(history=st.lists(scores, max_size=20), k=st.integers(1, 5))
def test_the_last_k_are_kept(history: list[float], k: int) -> None:
    saved, written, _ = kept_of(history, policy.keep_last(k))
    assert [one.path for one in saved] == [str(index) for index in range(len(history))][-k:]
    assert len(written) == len(history)


@given(history=st.lists(scores, max_size=20), k=st.integers(1, 3), mode=modes)
def test_best_and_last_together_keep_both(history: list[float], k: int, mode: str) -> None:
    saved, _, _ = kept_of(history, policy.keep_best(k, mode), policy.keep_last(1))
    best, _, _ = kept_of(history, policy.keep_best(k, mode))
    assert {one.path for one in saved} == {one.path for one in best} | {str(len(history) - 1) for _ in history[-1:]}


def test_all_are_kept() -> None:
    saved, _, removed = kept_of([1.0, 2.0, 3.0], policy.keep_all)
    assert len(saved) == 3
    assert not removed


@given(history=st.lists(scores, min_size=1, max_size=10))
def test_a_policy_that_keeps_nothing_does_not_remove_the_only_checkpoint(history: list[float]) -> None:
    there = Saved("there", 0.5)
    plan = policy.plan([there], Saved("new", history[0]), policy.keep_last(0))
    assert plan == policy.Plan((there,), False, ())


def test_of_equal_scores_the_earliest_stays() -> None:
    saved, written, _ = kept_of([1.0, 1.0, 1.0], policy.keep_best(1, "min"))
    assert [one.path for one in saved] == ["0"]
    assert len(written) == 1


def test_a_smaller_k_than_before_lets_the_worst_go() -> None:
    before = [Saved("a", 1.0), Saved("b", 2.0), Saved("c", 3.0)]
    plan = policy.plan(before, Saved("d", 0.5), policy.keep_best(1, "min"))
    assert plan.kept == (Saved("d", 0.5),)
    assert plan.remove == tuple(before)


# ---- several reasons to keep one
@given(
    history=st.lists(scores, max_size=40), k=st.integers(0, 3), last=st.integers(0, 4), n=st.integers(1, 7), mode=modes
)
def test_the_best_the_newest_and_every_nth_are_kept_whatever_the_others_keep(
    history: list[float], k: int, last: int, n: int, mode: str
) -> None:
    also = policy.keep_any(policy.keep_last(last), policy.keep_every_n_steps(n))
    saved, _, _ = kept_of(history, policy.keep_best(k, mode), also)
    best, _, _ = kept_of(history, policy.keep_best(k, mode)) if k else ([], [], [])
    paths = {one.path for one in saved}
    expected = {one.path for one in best} | {str(number) for number in range(len(history))[len(history) - last :]}
    expected |= {str(number) for number in range(n, len(history), n)}
    if expected:
        assert expected <= paths
        assert len(paths - expected) <= 1  # the last one of all, when nothing wants it, stays
        assert {one.path for one in saved if one.best} >= {one.path for one in best}


def test_every_nth_is_the_first_at_or_after_a_multiple() -> None:
    saved = [Saved(str(step), step=step) for step in range(3, 40, 3)]
    assert [one.step for one in policy.keep_every_n_steps(10)(saved)] == [12, 21, 30]
    assert policy.keep_every_n_steps(0)(saved) == []


finite = st.lists(st.booleans(), min_size=1, max_size=20)
kinds = st.sampled_from(
    [
        policy.keep_last(1),
        policy.keep_last(2),
        policy.keep_best(1, "min"),
        policy.keep_best(2, "max"),
        policy.keep_last(0),
    ]
)


@given(finite=finite, best=kinds, also=kinds | st.none(), score=st.lists(scores, min_size=20, max_size=20))
def test_the_newest_one_with_finite_weights_goes_only_when_there_is_another(
    finite: list[bool], best: policy.Keep, also: policy.Keep | None, score: list[float]
) -> None:
    saved: tuple[Saved, ...] = ()
    for number, is_finite in enumerate(finite):
        before = any(one.finite for one in saved)
        plan = policy.plan(saved, Saved(str(number), score[number], number, is_finite), best, also)
        saved = plan.kept
        assert any(one.finite for one in saved) >= before
        assert len({one.path for one in saved}) == len(saved)


def test_without_a_metric_the_finite_one_is_kept_beside_the_newest_until_there_is_another() -> None:
    saved: tuple[Saved, ...] = ()
    there = []
    for number, is_finite in enumerate([True, False, False, True, True]):
        saved = policy.plan(saved, Saved(str(number), None, number, is_finite), policy.keep_last(1)).kept
        there.append([one.path for one in saved])
    assert there == [["0"], ["0", "1"], ["0", "2"], ["3"], ["4"]]


def test_weights_that_are_not_finite_rank_behind_every_metric() -> None:
    good, bad = Saved("a", 5.0), Saved("b", 0.1, finite=False)
    assert policy.plan([good], bad, policy.keep_best(1, "min")).kept == (good,)
    assert policy.plan([bad], good, policy.keep_best(1, "min")).kept == (good,)
    nan = Saved("c", math.nan)
    assert policy.plan([bad], nan, policy.keep_best(1, "min")).kept == (nan,)
