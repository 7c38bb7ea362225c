"""File names from templates."""

from __future__ import annotations

import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from trainkit.checkpoint import naming
from trainkit.errors import MisconfigurationException

METRICS = {"epoch": 2, "step": 300, "val_loss": torch.tensor(0.12345), "val/acc": 0.5, "a.b[0]": 1.0}


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{epoch}-{step}", "epoch=2-step=300"),
        ("{epoch:03d}-{val_loss:.2f}", "epoch=002-val_loss=0.12"),
        ("best-{val/acc:.3f}", "best-val_acc=0.500"),
        ("{a.b[0]:.0f}", "a.b[0]=1"),
        ("{missing:.1f}", "missing=0.0"),
        ("{missing}-{missing:d}", "missing=0-missing=0"),
        ("{val/acc:d}", "val_acc=0"),
        ("runs/{epoch}", "runs/epoch=2"),
        ("plain", "plain"),
        ("{{epoch}}", "{epoch}"),
        ("", ""),
    ],
)
def test_values_are_put_in_behind_their_names(template: str, name: str) -> None:
    assert naming.fill(template, METRICS) == name


def test_names_can_be_left_out_and_written_by_hand() -> None:
    assert naming.fill("epoch={epoch}-acc={val/acc:.2f}", METRICS, insert_names=False) == "epoch=2-acc=0.50"


def test_what_a_template_asks_for_can_be_listed() -> None:
    assert naming.names_in("{epoch}-{val/acc:.2f}-x") == {"epoch", "val/acc"}


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("/{epoch}", "below dirpath"),
        ("../{epoch}", "below dirpath"),
        ("{epoch}/", "below dirpath"),
        ("{epoch", "expected '}'"),
        ("{}", "only the name of a metric"),
        ("{0}", "only the name of a metric"),
        ("{epoch!r}", "only the name of a metric"),
        ("{epoch:{step}}", "only the name of a metric"),
        ("{val_loss:2q}", "'val_loss' can't be written with the format '2q'"),
        ("{epoch:%Y}", "can't be written"),
        (7, "must be a string"),
    ],
)
def test_a_template_that_makes_no_file_name_is_refused(template: object, reason: str) -> None:
    with pytest.raises(MisconfigurationException, match=reason):
        naming.check_template(template)


@given(template=st.text(max_size=30), value=st.floats())
def test_a_template_that_is_accepted_gives_a_name_below_the_directory(template: str, value: float) -> None:
    try:
        naming.check_template(template)
    except MisconfigurationException:
        return
    name = naming.fill(template, {**dict.fromkeys(naming.names_in(template), value), "epoch": 1, "step": 1})
    assert not os.path.isabs(name)
    assert os.path.normpath(name).split(os.sep)[0] != ".." or not os.path.dirname(name)
    assert "\0" not in name
