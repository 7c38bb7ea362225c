"""Who has a method of their own."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest

from trainkit import Callback, DataModule, Module
from trainkit.overrides import is_overridden


class Own(Module):
    def training_step(self, batch: Any, batch_idx: int) -> None: ...
    def extra(self) -> None: ...


@pytest.mark.parametrize(
    ("name", "instance", "parent", "answer"),
    [
        ("training_step", Own(), None, True),
        ("validation_step", Own(), None, False),
        ("training_step", Own(), Own, False),
        ("training_step", None, None, False),
        ("missing", Own(), None, False),
        ("setup", DataModule(), None, False),
        ("setup", type("D", (DataModule,), {"setup": lambda self, stage: None})(), None, True),
        ("on_fit_end", type("C", (Callback,), {"on_fit_end": lambda self, *_: None})(), None, True),
        ("extra", Own(), Own, False),
    ],
)
def test_methods_are_compared_with_those_of_the_base(name: str, instance: Any, parent: Any, answer: bool) -> None:
    assert is_overridden(name, instance, parent) is answer


def test_a_decorator_that_keeps_what_it_wraps_is_no_override() -> None:
    module = Module()

    @wraps(module.validation_step)
    def timed(*args: Any) -> Any:
        return Module.validation_step(module, *args)

    module.validation_step = timed  # type: ignore[method-assign]
    assert not is_overridden("validation_step", module)
    module.validation_step = lambda *_: None  # type: ignore[method-assign]
    assert is_overridden("validation_step", module)


def test_what_can_not_be_compared_is_an_error() -> None:
    with pytest.raises(ValueError, match="base class as parent: list is not derived"):
        is_overridden("append", [])
    with pytest.raises(ValueError, match="Module has no 'extra'"):
        is_overridden("extra", Own())
