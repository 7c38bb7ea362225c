"""Files that Lightning wrote (see make_checkpoints.py): asked for by name, or converted, their runs go on as if nothing
had happened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Callback, DataModule, Module, Trainer
from trainkit.callbacks import EarlyStopping, ModelCheckpoint
from trainkit.checkpoint import foreign, store
from trainkit.errors import CheckpointError
from trainkit.lightning import LightningCheckpointIO, load_checkpoint
from trainkit.precision import MixedPrecision

HERE = Path(__file__).parent / "checkpoints"
EXPECTED: dict[str, list[float]] = json.loads((HERE / "expected.json").read_text())


class Line(Module):
    """The module of make_checkpoints.py."""

    def __init__(self, lr: float = 0.1, optimizer: str = "Adam", betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = nn.functional.mse_loss(self.layer(x), y)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.layer(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = getattr(torch.optim, self.hparams.optimizer)(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.answer = checkpoint["mine"]["answer"]
        self.lightning = checkpoint["pytorch-lightning_version"]
        self.completed = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"answer": 42}


class Numbers(DataModule):
    """The data of make_checkpoints.py."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.seen = 0

    def train_dataloader(self) -> Any:
        x = torch.arange(40.0).reshape(20, 2) / 40
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True) * 2 - 1), batch_size=self.hparams.batch_size)

    val_dataloader = test_dataloader = train_dataloader

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


def trainer(**settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"plugins": [LightningCheckpointIO()], **settings}
    return Trainer(**{"max_epochs": 3, "enable_checkpointing": False, "num_sanity_val_steps": 0, **quiet, **settings})


def weights(module: Line) -> list[float]:
    return [*module.layer.weight.flatten().tolist(), *module.layer.bias.tolist()]


SETTINGS: dict[str, dict[str, Any]] = {
    "middle": {},
    "accumulate": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
    "scaled": {"precision": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))},
    "callbacks": {},
}


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_of_lightning_goes_on_here_to_the_same_weights(name: str, converted: bool, tmp_path: Path) -> None:
    module, data = Line(), Numbers()
    where: list[tuple[int, int, int]] = []

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, module: Module) -> None:
            where.append((trainer.current_epoch, trainer.progress.batch, trainer.global_step))

    path, plugins = HERE / f"{name}.ckpt", [LightningCheckpointIO()]
    if converted:
        store.save(tmp_path / "it.ckpt", foreign.made_plain(foreign.load(path)))
        path, plugins = tmp_path / "it.ckpt", []
    run = trainer(callbacks=[Look()], plugins=plugins, **SETTINGS[name])
    run.fit(module, datamodule=data, ckpt_path=path)
    begins = {"accumulate": (1, 4, 5), "callbacks": (2, 0, 10)}
    assert where == [begins.get(name, (1, 3, 8))]
    assert weights(module) == pytest.approx(EXPECTED[name], abs=1e-6)
    assert run.global_step == (9 if name == "accumulate" else 15)
    assert (module.answer, data.seen, run.lr_scheduler_configs[0].scheduler.last_epoch) == (42, 7, 3)


def test_the_scale_of_float16_gradients_goes_on(tmp_path: Path) -> None:
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    trainer(precision=precision).fit(Line(), datamodule=Numbers(), ckpt_path=HERE / "scaled.ckpt")
    assert precision.scaler is not None
    assert precision.scaler.state_dict()["scale"] == 64.0
    assert precision.scaler.state_dict()["_growth_tracker"] == 8 + 7


def test_callbacks_take_up_what_lightnings_counted(tmp_path: Path) -> None:
    shutil.copy(HERE / "callbacks.ckpt", tmp_path / "best-epoch=1.ckpt")
    stopping = EarlyStopping("val_loss", patience=5)
    best = ModelCheckpoint(tmp_path, "best-{epoch}", monitor="val_loss", save_top_k=2, save_last=True)
    seen: dict[str, Any] = {}

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, module: Module) -> None:
            seen.update(stop=float(stopping.best_score), best=best.best_model_path, score=float(best.best_model_score))

    run = trainer(callbacks=[stopping, best, Look()], enable_checkpointing=True)
    run.fit(Line(), datamodule=Numbers(), ckpt_path=tmp_path / "best-epoch=1.ckpt")
    assert seen["stop"] == seen["score"] == pytest.approx(0.6378, abs=1e-4)
    assert Path(seen["best"]).name == "best-epoch=1.ckpt"
    assert Path(best.best_model_path).name == "best-epoch=2.ckpt"


@pytest.mark.parametrize("path", sorted(HERE.glob("*.ckpt")), ids=lambda path: path.stem)
def test_load_from_checkpoint_makes_module_and_data_again(path: Path) -> None:
    module = Line.load_from_checkpoint(load_checkpoint(path), lr=0.5)
    saved = torch.load(path, weights_only=True)
    assert dict(module.hparams) == {"lr": 0.5, "optimizer": "Adam", "betas": (0.9, 0.99)}
    assert torch.equal(module.layer.weight, saved["state_dict"]["layer.weight"])
    assert (module.answer, module.lightning) == (42, "2.6.6")
    data = Numbers.load_from_checkpoint(load_checkpoint(path))
    assert (data.hparams.batch_size, data.seen) == (4, 7)


def test_a_run_can_be_evaluated_from_a_file_of_lightning() -> None:
    results = trainer(logger=False).test(Line(), datamodule=Numbers(), ckpt_path=HERE / "callbacks.ckpt", verbose=False)
    assert results == [{"val_loss": pytest.approx(0.6378, abs=1e-4)}]


@pytest.mark.parametrize("use", ["fit", "validate", "test", "predict"])
def test_without_being_asked_for_by_name_they_do_not_load(use: str) -> None:
    run, path = trainer(plugins=None), HERE / "middle.ckpt"
    with pytest.raises(CheckpointError, match=rf"no record trainkit.json.*: trainkit convert {path} NEW\.ckpt"):
        getattr(run, use)(Line(), datamodule=Numbers(), ckpt_path=path)


@pytest.mark.parametrize("cls", [Line, Numbers])
def test_without_being_asked_for_by_name_they_make_no_object(cls: Any) -> None:
    with pytest.raises(CheckpointError, match=r"trainkit convert .*middle\.ckpt NEW\.ckpt"):
        cls.load_from_checkpoint(HERE / "middle.ckpt")


def test_files_of_lightning_in_a_checkpoints_folder_do_not_hinder_their_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    path = shutil.copy(HERE / "middle.ckpt", tmp_path / "checkpoints" / "it.ckpt")
    run = trainer()
    run.fit(Line(), datamodule=Numbers(), ckpt_path=path)
    assert run.global_step == 15


def test_what_is_asked_for_by_name_may_be_trainkits_own(tmp_path: Path) -> None:
    run = trainer(max_epochs=1)
    run.fit(Line(), datamodule=Numbers())
    run.save_checkpoint(tmp_path / "own.ckpt")
    assert load_checkpoint(tmp_path / "own.ckpt")["global_step"] == 5
    content = bytearray((tmp_path / "own.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "own.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="is not read from the network"):
        load_checkpoint("https://example.org/x.ckpt")


def test_a_file_with_weights_only_is_no_run() -> None:
    with pytest.raises(CheckpointError, match="has only weights"):
        trainer().fit(Line(), datamodule=Numbers(), ckpt_path=HERE / "weights.ckpt")


def test_a_file_that_does_not_say_where_its_run_was_is_refused(tmp_path: Path) -> None:
    checkpoint = torch.load(HERE / "middle.ckpt", weights_only=True)
    del checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match="does not say how far its run was"):
        trainer().fit(Line(), datamodule=Numbers(), ckpt_path=tmp_path / "old.ckpt")


def test_a_checkpoint_of_ours_has_the_keys_that_lightnings_has(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, "ours", monitor="val_loss")
    trainer(max_epochs=2, enable_checkpointing=True, callbacks=best).fit(Line(), datamodule=Numbers())
    ours = torch.load(tmp_path / "ours.ckpt", weights_only=True)
    theirs = torch.load(HERE / "callbacks.ckpt", weights_only=True)
    assert not set(theirs) - set(ours)
    assert (ours["epoch"], ours["global_step"]) == (theirs["epoch"], theirs["global_step"])
    assert (
        ours["optimizer_states"][0]["param_groups"][0].keys() == theirs["optimizer_states"][0]["param_groups"][0].keys()
    )

    def shape(value: Any) -> Any:
        return {key: shape(inner) for key, inner in value.items()} if isinstance(value, dict) else type(value)

    assert shape(ours["loops"]) == shape(theirs["loops"])
    for key in ("epoch_progress", "epoch_loop.state_dict"):
        assert ours["loops"]["fit_loop"][key] == theirs["loops"]["fit_loop"][key]
    batches = [file["loops"]["fit_loop"]["epoch_loop.batch_progress"] for file in (ours, theirs)]
    assert batches[0] == batches[1]


def test_after_fit_its_epochs_are_complete(tmp_path: Path) -> None:
    run = trainer(max_epochs=2)
    run.fit(Line(), datamodule=Numbers())
    run.save_checkpoint(tmp_path / "after.ckpt")
    loops = torch.load(tmp_path / "after.ckpt", weights_only=True)["loops"]
    assert loops["fit_loop"]["epoch_progress"]["current"] == dict.fromkeys(
        ("ready", "started", "processed", "completed"), 2
    )
