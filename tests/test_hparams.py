"""save_hyperparameters in all its forms, and modules and data modules that are copied and pickled."""

from __future__ import annotations

import argparse
import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainkit import DataModule, Module, Trainer
from trainkit.hparams import AttributeDict, HyperParameters, merged_hparams, plain_hparams
from trainkit.lightning import load_checkpoint


class Plain(Module):
    def __init__(self, width: int, depth: int = 2, *, lr: float = 0.1, **extra: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


class Base(Module):
    def __init__(self, width: int, act: str = "relu", **kwargs: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


class Child(Base):
    def __init__(self, heads: int, *args: Any, **kwargs: Any) -> None:
        local = heads * 2  # noqa: F841  # not an argument
        super().__init__(*args, **kwargs)


@dataclass
class Settings:
    lr: float = 0.1
    sizes: list[int] = field(default_factory=lambda: [1, 2])


# ---------------------------------------------------------------- which arguments
def test_all_arguments_are_kept_with_their_defaults_and_extras_flat() -> None:
    assert Plain(3, lr=0.5, seed=7).hparams == {"width": 3, "depth": 2, "lr": 0.5, "seed": 7}


def test_subclasses_arguments_are_kept_when_the_base_class_saves() -> None:
    assert Child(4, 8, act="gelu", extra=1).hparams == {"heads": 4, "width": 8, "act": "gelu", "extra": 1}


def test_a_subclass_may_override_what_it_hands_on() -> None:
    class Fixed(Base):
        def __init__(self, width: int) -> None:
            super().__init__(width * 2)

    assert Fixed(3).hparams == {"width": 3, "act": "relu"}  # what Fixed has to be made with again


def test_each_class_of_a_hierarchy_may_save() -> None:
    class Both(Base):
        def __init__(self, heads: int, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.hparams.seen = True
            self.save_hyperparameters()

    assert Both(2, width=3).hparams == {"width": 3, "act": "relu", "heads": 2, "seen": True}


def test_it_may_be_called_from_a_method_that_init_calls() -> None:
    class Later(Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.build()

        def build(self) -> None:
            self.save_hyperparameters()

    assert Later(3).hparams == {"width": 3}


def test_the_frame_of_init_may_be_given() -> None:
    import inspect

    def save(owner: Any, frame: Any) -> None:
        owner.save_hyperparameters("width", frame=frame)

    class Helped(Module):
        def __init__(self, width: int, depth: int) -> None:
            super().__init__()
            save(self, inspect.currentframe())

    assert Helped(3, 4).hparams == {"width": 3}


def test_it_may_come_before_the_base_classes_init() -> None:
    class Early(Module):
        def __init__(self, width: int) -> None:
            self.save_hyperparameters()
            super().__init__()
            self.line = nn.Linear(width, 1)

    assert Early(3).hparams.width == 3


def test_a_module_made_inside_another_ones_init_keeps_its_own_arguments_only() -> None:
    class Outer(Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner = Plain(width + 1, depth=5)
            self.save_hyperparameters()

    outer = Outer(3)
    assert outer.hparams == {"width": 3}
    assert outer.inner.hparams == {"width": 4, "depth": 5, "lr": 0.1}


def test_arguments_that_a_lambda_or_an_inner_class_uses_are_kept_too() -> None:
    class Captured(Module):
        def __init__(self, width: int, scale: float) -> None:
            super().__init__()
            self.scaled = lambda x: x * scale + self.hparams.width
            self.save_hyperparameters()

    module = Captured(3, 2.0)
    assert module.hparams == {"width": 3, "scale": 2.0}
    assert module.scaled(1) == 5.0


def test_a_class_made_by_a_factory_keeps_what_the_factory_gave() -> None:
    def instantiate(class_: type, **arguments: Any) -> Any:  # as jsonargparse does it
        return class_(**arguments)

    assert instantiate(Child, heads=1, width=2).hparams == {"heads": 1, "width": 2, "act": "relu"}


def test_a_dataclass_keeps_its_fields() -> None:
    @dataclass
    class Data(DataModule):
        root: str = "data"
        batch_size: int = 4

        def __post_init__(self) -> None:
            self.save_hyperparameters(ignore="root")

    assert Data(batch_size=8).hparams == {"batch_size": 8}


def test_names_choose() -> None:
    class Some(Module):
        def __init__(self, a: int, b: int, c: int) -> None:
            super().__init__()
            self.save_hyperparameters("a", "c")

    assert Some(1, 2, 3).hparams == {"a": 1, "c": 3}


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    class Misspelt(Module):
        def __init__(self, width: int, depth: int) -> None:
            super().__init__()
            self.save_hyperparameters("widht")

    with pytest.raises(KeyError, match=r"Misspelt\.__init__ has no argument 'widht'; it has: width, depth"):
        Misspelt(1, 2)


@pytest.mark.parametrize("ignore", ["b", ["b"], ("b",), {"b", "not there"}])
def test_ignored_names_are_left_out(ignore: Any) -> None:
    class Ignores(Module):
        def __init__(self, a: int, b: Any) -> None:
            super().__init__()
            self.save_hyperparameters(ignore=ignore)

    assert Ignores(1, nn.Linear(1, 1)).hparams == {"a": 1}


def test_what_a_subclass_ignores_is_gone_although_the_base_class_kept_it() -> None:
    class Ignores(Base):
        def __init__(self, net: Any, width: int) -> None:
            super().__init__(width)
            self.save_hyperparameters(ignore="net")

    with pytest.warns(UserWarning, match="hyperparameter 'net' is an nn.Module"):
        module = Ignores(nn.Linear(1, 1), 3)
    assert module.hparams == module.hparams_initial == {"width": 3, "act": "relu"}


# ---------------------------------------------------------------- objects instead of arguments
@pytest.mark.parametrize(
    "given",
    [
        {"lr": 0.1, "sizes": [1, 2]},
        argparse.Namespace(lr=0.1, sizes=[1, 2]),
        AttributeDict(lr=0.1, sizes=[1, 2]),
        Settings(),
    ],
    ids=lambda given: type(given).__name__,
)
def test_an_objects_contents_are_kept_instead(given: Any) -> None:
    class Takes(Module):
        def __init__(self, settings: Any, other: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters(settings)

    module = Takes(given)
    assert module.hparams == {"lr": 0.1, "sizes": [1, 2]}
    assert module.hparams.lr == 0.1


@pytest.mark.parametrize("given", [3, 1.5, [1, 2], Settings, ({"a": 1}, {"b": 2}), ("a", {"b": 2})], ids=repr)
def test_anything_else_is_refused(given: Any) -> None:
    class Takes(Module):
        def __init__(self, a: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters(*given) if isinstance(given, tuple) else self.save_hyperparameters(given)

    with pytest.raises(ValueError, match="save_hyperparameters takes names of arguments, or one"):
        Takes()


# ---------------------------------------------------------------- what is kept
def test_hparams_change_and_hparams_initial_do_not() -> None:
    sizes = [1, 2]
    module = Plain(3, sizes=sizes)
    module.hparams.width = 5
    module.hparams["depth"] = 7
    sizes.append(3)
    module.hparams_initial["lr"] = 9
    assert (module.hparams.width, module.hparams.depth) == (5, 7)
    assert module.hparams_initial == {"width": 3, "depth": 2, "lr": 0.1, "sizes": [1, 2]}


def test_without_save_hyperparameters_there_are_none_and_some_may_be_set() -> None:
    module = Module()
    assert module.hparams == {}
    assert module.hparams_initial == {}
    module.hparams.width = 3
    assert module.hparams == {"width": 3}


def test_a_missing_hyperparameter_is_an_attribute_error_that_lists_those_there() -> None:
    with pytest.raises(AttributeError, match="no hyperparameter 'widht'; there is: width, depth, lr"):
        _ = Plain(3).hparams.widht
    assert not hasattr(Plain(3).hparams, "widht")


def test_a_module_among_the_hyperparameters_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"'net' is an nn.Module.*save_hyperparameters\(ignore=\['net'\]\)"):
        Plain(3, net=nn.Linear(1, 1))


@pytest.mark.parametrize(
    "make", [threading.Lock, lambda: (i for i in range(3)), lambda: torch.ones(1, requires_grad=True) * 2, lambda: open]
)
def test_what_can_not_be_copied_is_no_error(make: Callable[[], Any]) -> None:
    value = make()
    module = Plain(3, thing=value, things=[value])
    assert module.hparams.thing is value
    assert module.hparams_initial.get("things") is not None


def test_a_checkpoint_takes_what_is_plain_and_warns_of_the_rest() -> None:
    plain = {"a": 1, "b": [1.5, "x", None, {"c": (True,)}], "t": torch.ones(1), "d": torch.float32}
    assert plain_hparams(plain) == plain
    assert plain_hparams({"root": Path("x"), "lr": np.float64(0.5)}) == {"root": "x", "lr": 0.5}
    for value in (threading.Lock(), Settings(), {1, 2}, [print], nn.Linear(1, 1)):
        with pytest.warns(UserWarning, match=r"hyperparameter 'odd' .* load_from_checkpoint\(path, odd=\.\.\.\)"):
            assert plain_hparams({"a": 1, "odd": value}) == {"a": 1}


# ---------------------------------------------------------------- for the loggers
class Data(DataModule):
    def __init__(self, batch_size: int = 4, lr: Any = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_those_of_module_and_data_module_are_merged() -> None:
    assert merged_hparams([Plain(3), Data()]) == {"width": 3, "depth": 2, "lr": 0.1, "batch_size": 4}


def test_different_values_of_one_name_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"different values of the hyperparameter 'lr': 0\.1 and 0\.2"):
        merged_hparams([Plain(3), Data(lr=0.2)])


def test_arrays_of_one_name_are_no_reason_to_fail() -> None:
    merged = merged_hparams([Plain(3, lr=np.zeros(3)), Data(lr=np.zeros(3))])
    assert merged["lr"].shape == (3,)


def test_those_that_are_not_for_loggers_stay_away() -> None:
    class Quiet(Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters(logger=False)

    assert merged_hparams([Quiet(3), Module()]) == {}


# ---------------------------------------------------------------- copies
class Trained(Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.line = nn.Linear(width, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.line(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TrainedData(DataModule):
    def __init__(self, count: int = 2) -> None:
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(self.hparams.count, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_keep_the_hyperparameters_and_leave_the_run(copied: Callable[[Any], Any]) -> None:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1,
    )  # fmt: skip
    module, data = Trained(), TrainedData()
    trainer.fit(module, datamodule=data)
    again, data_again = copied(module), copied(data)
    assert again.hparams == {"width": 3}
    assert type(again.hparams) is AttributeDict
    assert torch.equal(again.line.weight, module.line.weight)
    assert data_again.hparams.count == 2
    assert data_again.trainer is None
    assert data.trainer is trainer
    with pytest.raises(RuntimeError, match="not attached"):
        _ = again.trainer


def test_attribute_dicts_are_dicts() -> None:
    hparams = AttributeDict(a=1, b={"c": 2})
    assert pickle.loads(pickle.dumps(hparams)) == copy.deepcopy(hparams) == {"a": 1, "b": {"c": 2}}
    assert isinstance(hparams, dict)
    assert repr(hparams) == '"a": 1\n"b": {\'c\': 2}'
    assert issubclass(Module, HyperParameters)


def test_contents_that_were_kept_go_back_to_the_argument_they_came_from(tmp_path: Path) -> None:
    class Takes(Module):
        def __init__(self, settings: Any, width: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters(settings)
            self.line = nn.Linear(self.hparams.inputs, width)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch

    module = Takes({"inputs": 3})
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.predict(module, [[torch.ones(1)]])
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    again = Takes.load_from_checkpoint(tmp_path / "kept.ckpt")
    assert again.hparams == {"inputs": 3}
    assert torch.equal(again.line.weight, module.line.weight)
    other = Takes.load_from_checkpoint(tmp_path / "kept.ckpt", settings={"inputs": 3, "more": 1})
    assert other.hparams == {"inputs": 3, "more": 1}


def test_a_module_that_takes_anything_is_made_again_with_all_of_it(tmp_path: Path) -> None:
    class Anything(Module):
        def __init__(self, width: int, **kwargs: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(1, 1)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.predict(Anything(3, extra=1), [[torch.ones(1)]])
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    assert Anything.load_from_checkpoint(tmp_path / "kept.ckpt").hparams == {"width": 3, "extra": 1}
    assert Anything.load_from_checkpoint(tmp_path / "kept.ckpt", extra=2).hparams == {"width": 3, "extra": 2}


def test_a_namespace_among_the_arguments_comes_back_as_one(tmp_path: Path) -> None:
    class Takes(Module):
        def __init__(self, args: argparse.Namespace, settings: AttributeDict | None = None) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(1, args.width)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.predict(Takes(argparse.Namespace(width=3), AttributeDict(depth=2)), [[torch.ones(1)]])
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    assert torch.load(tmp_path / "kept.ckpt", weights_only=True)["hyper_parameters"]["args"] == {"width": 3}
    hparams = Takes.load_from_checkpoint(tmp_path / "kept.ckpt").hparams
    assert hparams == {"args": argparse.Namespace(width=3), "settings": {"depth": 2}}


def test_an_attribute_dict_prints_in_order_and_forgets_attributes() -> None:
    values = AttributeDict(width=3, act="relu")
    assert str(values) == '"act":   relu\n"width": 3'
    del values.act
    assert values == {"width": 3}


def test_arguments_are_kept_in_their_order_and_those_of_kwargs_last() -> None:
    class Takes(Module):
        def __init__(self, a: int, *, b: int = 2, **kwargs: Any) -> None:
            super().__init__()
            self.save_hyperparameters()

    assert list(Takes(1, c=3, b=4).hparams) == ["a", "b", "c"]


class Weighing(Plain):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("key", ["module_arguments", "hparams"])
def test_what_early_files_of_lightning_call_the_hyperparameters_is_understood(key: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(1)}, key: {"width": 5, "depth": 7}}, tmp_path / "x.ckpt")
    loaded = Weighing.load_from_checkpoint(load_checkpoint(tmp_path / "x.ckpt"))
    assert (loaded.hparams.width, loaded.hparams.depth) == (5, 7)


def test_classes_say_where_in_a_checkpoint_their_hyperparameters_are(tmp_path: Path) -> None:
    assert (Module.CHECKPOINT_HYPER_PARAMS_KEY, Module.CHECKPOINT_HYPER_PARAMS_NAME) == (
        "hyper_parameters",
        "hparams_name",
    )
    assert DataModule.CHECKPOINT_HYPER_PARAMS_KEY == "datamodule_hyper_parameters"
