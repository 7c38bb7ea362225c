"""DataModule: its hooks in a run, its state, its hyperparameters, and the short ways to make one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from trainkit import DataModule, Module, Trainer
from trainkit.data import CombinedLoader
from trainkit.data_hooks import DataHooks
from trainkit.errors import MisconfigurationException
from trainkit.hooks import is_overridden

KINDS = ("train", "val", "test", "predict")


def numbers(size: int) -> DataLoader[Any]:
    return DataLoader(torch.arange(float(size)).reshape(-1, 1))  # type: ignore[arg-type]


class Line(Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.line(batch).sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.001)


class Told(DataModule):
    """Notes everything that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.loaded: Any = None

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")

    def train_dataloader(self) -> Any:
        self.calls.append("train")
        return numbers(2)

    def val_dataloader(self) -> Any:
        self.calls.append("val")
        return numbers(1)

    def test_dataloader(self) -> Any:
        self.calls.append("test")
        return [numbers(1), numbers(1)]

    def predict_dataloader(self) -> Any:
        self.calls.append("predict")
        return numbers(1)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append(("before", dataloader_idx))
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.calls.append(("move", str(device)))
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append(("after", dataloader_idx))
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"files": 3}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls.append("load_state_dict")
        self.loaded = state_dict

    def on_exception(self, exception: BaseException) -> None:
        self.calls.append(("exception", exception))


def trainer_of(**settings: Any) -> Trainer:
    bare = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**{"accelerator": "cpu", "max_epochs": 1, **bare, **settings})


def moved(dataloader_idx: int = 0) -> list[Any]:
    return [("before", dataloader_idx), ("move", "cpu"), ("after", dataloader_idx)]


# ---------------------------------------------------------------- in a run
def test_fit_asks_for_everything_in_order() -> None:
    data, trainer = Told(), trainer_of()
    trainer.fit(Line(), datamodule=data)
    assert data.calls == [
        "prepare_data",
        "setup fit",
        "val",  # for the sanity check
        *moved(),
        "train",
        *moved() * 2,
        *moved(),
        "teardown fit",
    ]
    assert trainer.datamodule is data
    assert data.trainer is trainer


@pytest.mark.parametrize("named", [True, False])
def test_evaluations_ask_for_their_own_loaders(named: bool) -> None:
    for stage, kind, batches in (
        ("validate", "val", moved()),
        ("test", "test", moved(0) + moved(1)),
        ("predict", "predict", moved()),
    ):
        data = Told()
        arguments: dict[str, Any] = {} if stage == "predict" else {"verbose": False}
        if named:
            getattr(trainer_of(), stage)(Line(), datamodule=data, **arguments)
        else:
            getattr(trainer_of(), stage)(Line(), data, **arguments)
        assert data.calls == ["prepare_data", f"setup {stage}", kind, *batches, f"teardown {stage}"]


def test_its_state_comes_back_before_its_loaders_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    trainer = trainer_of()
    trainer.fit(Line(), datamodule=Told())
    trainer.save_checkpoint(path)
    for stage in ("fit", "validate", "test", "predict"):
        data = Told()
        getattr(trainer_of(max_epochs=2), stage)(Line(), datamodule=data, ckpt_path=path)
        assert data.loaded == {"files": 3}
        assert data.calls[:3] == ["prepare_data", f"setup {stage}", "load_state_dict"]


def test_it_hears_of_an_exception_wherever_it_comes_from() -> None:
    error = KeyError("here")

    class Breaks(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise error

    data = Told()
    with pytest.raises(KeyError):
        trainer_of().fit(Breaks(), datamodule=data)
    assert data.calls[-2:] == [("exception", error), "teardown fit"]


def test_loaders_and_a_data_module_are_one_too_many() -> None:
    for given in ({"train_dataloaders": numbers(1)}, {"val_dataloaders": numbers(1)}):
        with pytest.raises(MisconfigurationException, match="loaders"):
            trainer_of().fit(Line(), datamodule=Told(), **given)
    with pytest.raises(MisconfigurationException, match="loaders"):
        trainer_of().test(Line(), numbers(1), datamodule=Told())


def test_beside_a_data_module_the_modules_own_loaders_do_not_count() -> None:
    class Brings(Line):
        def train_dataloader(self) -> Any:
            return numbers(5)

        def val_dataloader(self) -> Any:
            raise AssertionError("nobody needs it")

    class TrainsOnly(DataModule):
        def train_dataloader(self) -> Any:
            return numbers(2)

    trainer = trainer_of()
    trainer.fit(Brings(), datamodule=TrainsOnly())
    assert (trainer.num_training_batches, trainer.num_val_batches) == (2, [])


def test_a_data_module_that_does_not_call_its_base_works() -> None:
    class Bare(DataModule):
        def __init__(self) -> None:
            self.size = 3

        def train_dataloader(self) -> Any:
            return numbers(self.size)

    trainer = trainer_of()
    trainer.fit(Line(), Bare())
    assert trainer.global_step == 3


def test_a_loader_that_nobody_wrote_is_an_error_that_names_it() -> None:
    for owner in (DataModule(), Module()):
        for kind in KINDS:
            with pytest.raises(MisconfigurationException, match=f"has no {kind}_dataloader"):
                getattr(owner, f"{kind}_dataloader")()
    for stage in ("fit", "validate", "test", "predict"):
        with pytest.raises(MisconfigurationException, match="data"):
            getattr(trainer_of(), stage)(Line(), datamodule=DataModule())


def test_the_same_hooks_serve_the_module_and_the_data_module() -> None:
    hooks = [name for name, value in vars(DataHooks).items() if callable(value) and not name.startswith("_")]
    assert set(hooks) == {
        "prepare_data",
        *(f"{kind}_dataloader" for kind in KINDS),
        "on_before_batch_transfer",
        "transfer_batch_to_device",
        "on_after_batch_transfer",
    }
    for name in hooks:
        assert not is_overridden(Line(), name)
        assert not is_overridden(DataModule(), name)
        assert is_overridden(Told(), name)
    assert DataModule.prepare_data_per_node is Module.prepare_data_per_node is True
    assert DataModule.allow_zero_length_dataloader_with_multiple_devices is False


def test_an_empty_loader_may_be_allowed() -> None:
    class Empty(DataModule):
        allow_zero_length_dataloader_with_multiple_devices = True

        def train_dataloader(self) -> Any:
            return numbers(2)

        def val_dataloader(self) -> Any:
            return [numbers(0), numbers(1)]

    trainer = trainer_of()
    trainer.fit(Line(), datamodule=Empty())
    assert trainer.num_val_batches == [0, 1]


# ---------------------------------------------------------------- hyperparameters and checkpoints
class Sized(DataModule):
    def __init__(self, size: int, batch_size: int = 2, *, name: str = "a") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.seen = 0

    def train_dataloader(self) -> Any:
        return numbers(self.hparams.size)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": 9}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


def test_it_is_made_again_from_a_checkpoint_with_its_hyperparameters_and_state(tmp_path: Path) -> None:
    path, trainer = tmp_path / "run.ckpt", trainer_of()
    trainer.fit(Line(), datamodule=Sized(3, name="b"))
    trainer.save_checkpoint(path)
    again = Sized.load_from_checkpoint(path)
    assert dict(again.hparams) == {"size": 3, "batch_size": 2, "name": "b"}
    assert again.seen == 9
    assert Sized.load_from_checkpoint(path, size=7).hparams.size == 7
    with pytest.raises(FileNotFoundError):
        Sized.load_from_checkpoint(tmp_path / "nowhere.ckpt")

    class Needs(Sized):
        def __init__(self, size: int, folder: str) -> None:
            super().__init__(size)

    with pytest.raises(TypeError, match="Needs needs 'folder'"):
        Needs.load_from_checkpoint(path)


# ---------------------------------------------------------------- from data sets
DATA = TensorDataset(torch.arange(4.0).reshape(-1, 1))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(torch.arange(3.0).reshape(-1, 1))


def test_data_sets_become_loaders_and_only_training_is_shuffled() -> None:
    data = DataModule.from_datasets(DATA, DATA, DATA, DATA, batch_size=3)
    for kind in KINDS:
        loader = getattr(data, f"{kind}_dataloader")()
        assert type(loader.sampler) is (RandomSampler if kind == "train" else SequentialSampler)
        assert (loader.dataset, loader.batch_size, loader.num_workers) == (DATA, 3, 0)
    only = DataModule.from_datasets(val_dataset=DATA)
    assert is_overridden(only, "val_dataloader")
    for kind in ("train", "test", "predict"):
        assert not is_overridden(only, f"{kind}_dataloader")
        with pytest.raises(MisconfigurationException):
            getattr(only, f"{kind}_dataloader")()


def test_several_data_sets_become_several_loaders() -> None:
    data = DataModule.from_datasets({"a": DATA, "b": Stream()}, [DATA, DATA], (DATA, Stream()))
    train, val, test = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert set(train) == {"a", "b"}
    assert type(train["a"].sampler) is RandomSampler
    assert [type(loader.sampler) for loader in val] == [SequentialSampler] * 2
    assert test[0].dataset is DATA
    trainer = trainer_of()

    class Takes(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.line(batch["a"][0] + batch["b"]).sum()

    trainer.fit(Takes(), datamodule=data)
    assert trainer.global_step == 4


def test_a_class_gets_the_arguments_that_it_takes() -> None:
    made = Sized.from_datasets(DATA, batch_size=7, size=3, name="c")
    assert dict(made.hparams) == {"size": 3, "batch_size": 7, "name": "c"}

    class Anything(DataModule):
        def __init__(self, **given: Any) -> None:
            super().__init__()
            self.given = given

    assert Anything.from_datasets(DATA, batch_size=7, num_workers=0, more=1).given == {
        "batch_size": 7,
        "num_workers": 0,
        "more": 1,
    }
    with pytest.raises(TypeError):
        Sized.from_datasets(DATA, size=3, nonsense=1)


# ---------------------------------------------------------------- print(datamodule)
def test_it_tells_how_many_samples_it_has() -> None:
    class Shows(DataModule):
        def train_dataloader(self) -> Any:
            return {"a": numbers(3), "b": numbers(4)}

        def val_dataloader(self) -> Any:
            return CombinedLoader([numbers(5)])

        def test_dataloader(self) -> Any:
            return DataLoader(Stream())

    assert str(Shows()).splitlines() == [
        "{Train dataloader: 1. size=3 ; 2. size=4}",
        "{Validation dataloader: size=NA}",
        "{Test dataloader: size=NA}",
        "{Predict dataloader: None}",
    ]
