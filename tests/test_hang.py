"""What the states of all processes say together."""

from __future__ import annotations

from typing import Any

import pytest

from trainkit.hang import culprits, is_hang, named, sentence


def state(kind: str, doing: str, still: float = 40.0, limit: float = 30.0, **more: Any) -> dict[str, Any]:
    return {
        "kind": kind, "doing": doing, "still": still, "limit": limit, "done": 7, "slow": False, "quiet": False,
        "counted": True, **more,
    }  # fmt: skip


WAITS = state("waits", "waits in all_reduce")
READS = state("runs", "is in dataset.__getitem__ (examples/x.py:41)")


def test_the_sentence_names_the_late_rank_first() -> None:
    assert sentence([WAITS, READS, WAITS], {}) == (
        "rank 1 is in dataset.__getitem__ (examples/x.py:41), the others wait in all_reduce since 40 s"
    )
    assert sentence([WAITS, READS], {}) == (
        "rank 1 is in dataset.__getitem__ (examples/x.py:41), rank 0 waits in all_reduce since 40 s"
    )
    assert sentence([WAITS, WAITS, {}], {2: 41.2}) == (
        "rank 2 has not been heard of since 41 s, the others wait in all_reduce since 40 s"
    )
    assert sentence([READS, READS, READS], {}) == ("ranks 0-2 are in dataset.__getitem__ (examples/x.py:41) since 40 s")


def test_ranks_in_different_collectives_wait_for_each_other() -> None:
    states = [WAITS, state("waits", "waits in broadcast (x.py:3)"), WAITS]
    assert culprits(states, ()) == []
    assert is_hang(states, ())
    assert sentence(states, {}) == (
        "ranks 0 and 2 wait in all_reduce since 40 s, rank 1 waits in broadcast (x.py:3) since 40 s: "
        "each waits for the others, as they do not call the same"
    )


def test_whoever_has_done_fewer_batches_is_the_late_one_of_those_who_wait() -> None:
    assert culprits([WAITS, {**WAITS, "done": 6}, WAITS], ()) == [1]


@pytest.mark.parametrize(
    ("late", "hangs"),
    [
        (READS, True),
        ({**READS, "limit": 300.0}, False),  # a checkpoint is being written
        ({**READS, "quiet": True}, False),  # a download
        ({**READS, "still": 1.0}, False),  # it goes on
        ({**READS, "counted": False, "slow": True}, True),  # the others wait for it, for ten times as long
    ],
)
def test_it_is_a_hang_when_the_late_one_has_no_reason(late: dict[str, Any], hangs: bool) -> None:
    assert is_hang([WAITS, late], ()) is hangs
    assert is_hang([WAITS, late], (1,))  # nobody knows what it does


def test_nobody_is_told_of_a_long_beginning_in_which_nobody_waits() -> None:
    assert not is_hang([{**READS, "counted": False}] * 2, ())
    assert not is_hang([{**READS, "slow": True}] * 2, ())
    assert is_hang([READS] * 2, ())


def test_many_ranks_are_named_in_short() -> None:
    assert named([4]) == "rank 4"
    assert named([0, 1]) == "ranks 0 and 1"
    assert named([7, 0, 1, 2, 3]) == "ranks 0-3 and 7"
