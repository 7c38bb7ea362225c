"""What an error of a data set looks like when it arrives."""

from __future__ import annotations

import pickle
import traceback
from typing import Any

import pytest

from trainkit.data.failure import Failure, WorkerTraceback, named

WHERE = "data: loading the sample with index 7 failed."


class Broken(Exception):
    """Needs other arguments than it keeps."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path = path


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def arrived(error: BaseException) -> BaseException:
    failure: Failure = pickle.loads(pickle.dumps(Failure(named(raised(error), WHERE))))
    return failure.error()


@pytest.mark.parametrize("way", [lambda error: named(error, WHERE), arrived], ids=["here", "from a worker"])
@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ValueError, ("bad",), f"bad\n{WHERE}"),
        (ValueError, (), WHERE),
        (KeyError, ("label",), f"label\n{WHERE}"),
        (KeyError, (3,), "3"),  # the rest is a note, which the traceback shows
        (Broken, ("x.png", "bad"), f"x.png: bad\n{WHERE}"),
        (AssertionError, ("a", 3), "('a', 3)"),
    ],
)
def test_an_error_keeps_its_type_and_says_where_it_was(
    kind: type[Exception], arguments: tuple[Any, ...], message: str, way: Any
) -> None:
    got = way(kind(*arguments))
    assert type(got) is kind
    assert str(got) == message
    assert WHERE in "".join(traceback.format_exception(got))


@pytest.mark.parametrize("way", [lambda error: named(error, WHERE), arrived], ids=["here", "from a worker"])
def test_an_error_of_the_system_keeps_what_it_knows(way: Any) -> None:
    got = way(raised(FileNotFoundError(2, "No such file", "x.png")))
    assert (type(got), got.errno, got.filename) == (FileNotFoundError, 2, "x.png")
    assert WHERE in "".join(traceback.format_exception(got))


@pytest.mark.parametrize("error", [StopIteration(3), GeneratorExit(), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_what_would_end_more_than_a_sample_becomes_an_error(error: BaseException) -> None:
    got = arrived(error)
    assert type(got) is RuntimeError
    assert f"must not raise {type(error).__name__}" in str(got)
    assert WHERE in str(got)


def test_the_workers_traceback_is_shown_first_and_begins_with_the_users_line() -> None:
    got = arrived(ValueError("bad"))
    assert isinstance(got.__cause__, WorkerTraceback)
    shown = "".join(traceback.format_exception(got)).splitlines()
    assert shown[1] == "Traceback (most recent call last):"
    assert "raise error" in shown[3]
    assert "direct cause" in "".join(shown)


def test_an_error_that_can_not_travel_arrives_as_what_it_said() -> None:
    class Local(Exception):
        """Can't be found by name in another process."""

    got = arrived(Local("lost"))
    assert type(got) is RuntimeError
    assert str(got).startswith("lost\ndata: ")
    assert "Local: lost" in str(got.__cause__)
