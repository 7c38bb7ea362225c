from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.duration import parse_duration


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("00:00:00:00", 0),
        ("00:00:10:00", 600),
        ("01:02:03:04", 93784),
        ("100:00:00:00", 8640000),
        ("00:36:00:00", 129600),
        (" 00:00:00:05 ", 5),
        (timedelta(minutes=2), 120),
        ({"hours": 1, "seconds": 1.5}, 3601.5),
        ({}, 0),
    ],
)
def test_a_string_a_timedelta_and_a_dict_all_give_a_timedelta(value: object, seconds: float) -> None:
    assert parse_duration(value) == timedelta(seconds=seconds)  # type: ignore[arg-type]


@given(st.integers(0, 9999), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_every_clock_reading_comes_back_as_the_time_it_says(days: int, hours: int, minutes: int, seconds: int) -> None:
    expected = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    assert parse_duration(f"{days:02d}:{hours:02d}:{minutes:02d}:{seconds:02d}") == expected


@pytest.mark.parametrize("text", ["", "12", "12:00", "1:2:3:4", "00:10:00", "00:00:10:00:00", "-1:00:00:00", "1 day"])
def test_a_string_of_another_shape_is_an_error_that_shows_the_right_one(text: str) -> None:
    with pytest.raises(ValueError, match=r'max_time must be a string "DD:HH:MM:SS".*Received'):
        parse_duration(text, argument="max_time")


@pytest.mark.parametrize("value", [None, 3, 2.5, True, ["00:00:00:01"]])
def test_a_value_of_another_type_is_an_error_that_names_the_argument(value: object) -> None:
    with pytest.raises(TypeError, match="max_time must be a string"):
        parse_duration(value, argument="max_time")  # type: ignore[arg-type]


def test_a_number_gets_the_hint_that_yaml_reads_unquoted_times_as_numbers() -> None:
    with pytest.raises(TypeError, match="quote it"):
        parse_duration(216000)  # type: ignore[arg-type]


def test_an_unknown_unit_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no unit hour: a dict takes weeks, days, hours"):
        parse_duration({"hour": 1})


@pytest.mark.parametrize("number", ["1", None, True, float("nan"), float("inf")])
def test_a_unit_without_a_finite_number_is_an_error(number: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration({"hours": number})  # type: ignore[dict-item]


@pytest.mark.parametrize("value", [timedelta(seconds=-1), {"hours": -1}])
def test_a_negative_duration_is_an_error(value: object) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        parse_duration(value)  # type: ignore[arg-type]


def test_a_duration_beyond_what_a_timedelta_holds_is_an_error() -> None:
    with pytest.raises(ValueError, match="longer than"):
        parse_duration("9999999999:00:00:00")
