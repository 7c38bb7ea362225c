"""The table of hooks: who answers, in which order, and which signatures are refused."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainkit import Callback, DataModule, Module, Trainer
from trainkit.callbacks import EarlyStopping
from trainkit.hooks import ARGUMENTS, CALLBACK_ONLY, Hooks, fitted, is_overridden

# on_load_checkpoint is called with a checkpoint, before there is a run; on_gpu is a fact, not a hook
NOT_IN_THE_TABLE = {"on_load_checkpoint", "on_gpu"}


class Line(Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.line(batch).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", 1.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader[Any]:
    return DataLoader(torch.ones(4, 1))  # type: ignore[arg-type]


def trainer_of(*callbacks: Callback, **settings: Any) -> Trainer:
    bare = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**bare, **settings})


def hooks_of(kind: type) -> set[str]:
    names = {name for name in vars(kind) if re.fullmatch(r"on_.*|setup|teardown", name)}
    return {name for name in names if "batch_transfer" not in name and "_model_" not in name} - NOT_IN_THE_TABLE


# ---------------------------------------------------------------- one list of hooks
def test_the_table_callback_and_module_have_the_same_hooks() -> None:
    assert hooks_of(Callback) == set(ARGUMENTS)
    assert hooks_of(Module) == set(ARGUMENTS) - CALLBACK_ONLY


@pytest.mark.parametrize("name", ARGUMENTS)
def test_callback_and_module_take_what_the_table_says(name: str) -> None:
    assert tuple(inspect.signature(getattr(Callback, name)).parameters) == (
        "self",
        "trainer",
        "pl_module",
        *ARGUMENTS[name],
    )
    if name not in CALLBACK_ONLY:
        assert tuple(inspect.signature(getattr(Module, name)).parameters) == ("self", *ARGUMENTS[name])


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_hook_has_a_sentence(name: str) -> None:
    sentence = inspect.getdoc(getattr(Callback, name)) or ""
    assert sentence.startswith("Called ")
    assert sentence.endswith(".")


def test_the_picture_above_callback_shows_every_hook() -> None:
    import trainkit.callback

    picture = trainkit.callback.__doc__ or ""
    for name in [*ARGUMENTS, "on_load_checkpoint"]:
        assert name in picture or re.sub("_(validation|test|predict)_", "_{stage}_", name) in picture, name


# ---------------------------------------------------------------- who answers
def test_a_hook_nobody_overrides_is_one_shared_no_op() -> None:
    class Answers(Line):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...

    hooks = Hooks(trainer_of(), Answers(), [Callback(), Callback()])
    idle = {getattr(hooks, name) for name in ARGUMENTS if name != "on_train_batch_end"}
    assert len(idle) == 1
    assert idle.pop()("anything") is None


def answering(trace: list[str], who: str, *names: str, **attributes: Any) -> Callback:
    def note(self: Any, *_: Any) -> None:
        trace.append(who)

    return type(who, (Callback,), {**dict.fromkeys(names, note), **attributes})()


def test_callbacks_answer_as_listed_and_then_the_module() -> None:
    trace: list[str] = []

    class Answers(Line):
        def on_train_start(self) -> None:
            trace.append("module")

    first, second = answering(trace, "first", "on_train_start"), answering(trace, "second", "on_train_start")
    trainer_of(first, Callback(), second).fit(Answers(), loader())
    assert trace == ["first", "second", "module"]


def test_who_watches_a_metric_hears_of_an_epochs_end_after_the_module() -> None:
    trace: list[str] = []

    class Answers(Line):
        def on_train_epoch_end(self) -> None:
            trace.append("module")

        def on_train_start(self) -> None:
            trace.append("module")

    hooks = ("on_train_start", "on_train_epoch_end")
    watches = answering(trace, "watches", *hooks, monitors=True)
    plain = answering(trace, "plain", *hooks)
    trainer_of(watches, plain).fit(Answers(), loader())
    assert trace == ["watches", "plain", "module", "plain", "module", "watches"]
    assert EarlyStopping.monitors


def test_a_hook_may_be_set_on_an_instance() -> None:
    trace: list[str] = []
    callback, module = Callback(), Line()
    callback.on_train_start = lambda trainer, module: trace.append("callback")  # type: ignore[method-assign]
    module.on_train_start = lambda: trace.append("module")  # type: ignore[method-assign]
    trainer_of(callback).fit(module, loader())
    assert trace == ["callback", "module"]


@pytest.mark.parametrize("skipping", ["first", "second", "module", "all"])
@pytest.mark.parametrize("others", [0, 1, 2])
def test_minus_one_from_anybody_skips_the_rest_of_the_epoch(skipping: str, others: int) -> None:
    def answer(who: str) -> Any:
        def on_train_batch_start(self: Any, *arguments: Any) -> int | None:
            heard.append(who)
            return -1 if skipping in (who, "all") and arguments[-1] == 2 else None

        return {"on_train_batch_start": on_train_batch_start}

    heard: list[str] = []
    callbacks = [type(who, (Callback,), answer(who))() for who in ("first", "second")]
    idle = [Callback() for _ in range(others)]
    trainer = trainer_of(*idle, *callbacks)
    trainer.fit(type("Skips", (Line,), answer("module"))(), loader())
    assert trainer.global_step == 2
    assert heard == ["first", "second", "module"] * 3  # all are asked, whoever skips


def test_what_a_hook_returns_is_nobodys_business() -> None:
    class Returns(Callback):
        def on_train_batch_start(self, *arguments: Any) -> Any:
            return torch.zeros(2)  # "is it -1?" has no answer

        def on_after_backward(self, *arguments: Any) -> Any:
            return torch.zeros(2)

    trainer = trainer_of(Returns())
    trainer.fit(Line(), loader())
    assert trainer.global_step == len(loader())


def test_the_table_can_be_printed() -> None:
    class Answers(Line):
        def on_train_start(self) -> None: ...

    class Watches(Callback):
        def on_train_start(self, trainer: Trainer, module: Module) -> None: ...

    lines = str(Hooks(trainer_of(), Answers(), [Watches()])).splitlines()
    assert len(lines) == len(ARGUMENTS)
    assert [line.split()[0] for line in lines] == list(ARGUMENTS)
    assert any(re.fullmatch(r"on_train_start +Watches, Answers", line) for line in lines)
    assert sum(line.endswith("-") for line in lines) == len(ARGUMENTS) - 1


# ---------------------------------------------------------------- signatures
@pytest.mark.parametrize(
    ("hook", "method", "message"),
    [
        (
            "on_train_batch_end",
            lambda self, trainer, pl_module, batch: None,
            r"Wrong\.on_train_batch_end takes \(trainer, pl_module, batch\) but is called with "
            r"\(trainer, pl_module, outputs, batch, batch_idx\)",
        ),
        ("on_train_start", lambda self: None, r"takes \(\) but is called with \(trainer, pl_module\)"),
        ("setup", lambda self, trainer, pl_module: None, r"\(trainer, pl_module, stage\)"),
        ("on_train_batch_start", lambda self, trainer, pl_module, batch, batch_idx, more: None, "batch_idx, more"),
        ("on_train_end", lambda self, trainer, pl_module, *, needed: None, "takes .*needed"),
        ("on_validation_batch_end", lambda self, trainer, pl_module, outputs, batch: None, "dataloader_idx"),
        ("on_exception", lambda self, trainer, pl_module: None, "exception"),
    ],
)  # fmt: skip
def test_a_callbacks_wrong_signature_is_refused_before_anything_runs(hook: str, method: Any, message: str) -> None:
    trace: list[str] = []
    callback = type("Wrong", (Callback,), {hook: method})()
    with pytest.raises(TypeError, match=message):
        trainer_of(callback, answering(trace, "sets_up", "setup")).fit(Line(), loader())
    assert trace == []


def test_a_modules_wrong_signature_is_refused_too() -> None:
    class Wrong(Line):
        def on_train_batch_end(self, batch: Any) -> None: ...  # type: ignore[override]

    with pytest.raises(
        TypeError, match=r"Wrong\.on_train_batch_end takes \(batch\) but is called with \(outputs, batch"
    ):
        trainer_of().fit(Wrong(), loader())


@pytest.mark.parametrize(
    "method",
    [
        lambda self, trainer, pl_module, outputs, batch, batch_idx: None,
        lambda self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx: None,
        lambda self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0, more=None: None,
        lambda self, *arguments: None,
        lambda self, trainer, *arguments, **more: None,
    ],
)
def test_a_method_may_leave_out_the_loaders_index_or_take_anything(method: Any) -> None:
    callback = type("Right", (Callback,), {"on_validation_batch_end": method})()
    trainer_of(callback).fit(Line(), loader(), loader())


def test_a_method_gets_as_many_arguments_as_it_takes() -> None:
    def two(a: int, b: int) -> tuple[int, ...]:
        return a, b

    def at_least_one(a: int, b: int = 0, c: int = 0) -> tuple[int, ...]:
        return a, b, c

    names = ("a", "b", "c")
    assert fitted(two, "two", names, least=1)(1, 2, 3) == (1, 2)
    assert fitted(at_least_one, "x", names, least=1) is at_least_one
    assert fitted(max, "max", names, least=3)(1, 3, 2) == 3  # no signature to look at
    with pytest.raises(TypeError, match=r"two takes \(a, b\) but is called with \(a, b, c\)"):
        fitted(two, "two", names, least=3)


def test_overriding_is_seen_wherever_it_happens() -> None:
    class Mixin:
        def on_train_start(self) -> None: ...

    class WithMixin(Mixin, Line): ...

    class Data(DataModule):
        def val_dataloader(self) -> Any: ...

    assert is_overridden(Line(), "training_step")
    assert not is_overridden(Line(), "test_step")
    assert is_overridden(WithMixin(), "on_train_start")
    assert is_overridden(Data(), "val_dataloader")
    assert not is_overridden(Data(), "train_dataloader")
    assert not is_overridden(Data(), "no_such_method")
