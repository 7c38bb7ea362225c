"""LightningCLI: config files and options make the Trainer and one's classes, and run them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import trainkit.lightning.pytorch as pl
from trainkit.checkpoint import store
from trainkit.lightning.pytorch.callbacks import EarlyStopping, Timer
from trainkit.lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerCallable,
    OptimizerCallable,
    ReduceLROnPlateau,
    SaveConfigCallback,
    instantiate_class,
)
from trainkit.lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from trainkit.lightning.pytorch.utilities.exceptions import MisconfigurationException

QUIET = [
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
]
SHORT = [*QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]


class Model(BoringModel):
    def __init__(self, width: int = 32, act: str = "relu") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width, self.act = width, act

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.step(batch)
        self.log("loss", loss, on_epoch=True)
        return loss


class Wide(Model):
    def __init__(self, extra: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extra = extra


class Plain(pl.LightningModule):
    """A model without optimizers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(32, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).square().mean())


class Encoder(torch.nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.depth = depth


class Encoding(Model):
    def __init__(self, encoder: torch.nn.Module, rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = encoder


class Data(BoringDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.classes = 77


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setitem(sys.modules, "models", sys.modules[__name__])  # what a config calls this module
    for cls in (Model, Wide, Plain, Encoder, Encoding, Data):
        monkeypatch.setattr(cls, "__module__", "models")
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")


def cli(*args: str, model: Any = Model, data: Any = None, kind: type[LightningCLI] = LightningCLI, **given: Any) -> Any:
    given.setdefault("save_config_callback", None)
    return kind(model, data, args=list(args), **given)


def made(*args: str, **given: Any) -> Any:
    """Make everything, run nothing."""
    return cli(*args, run=False, **given)


# ---------------------------------------------------------------- subcommands
def test_fit_trains_what_the_options_say() -> None:
    done = cli("fit", "--model.width=5", "--data.batch_size=3", *SHORT, data=Data)
    assert (done.subcommand, done.model.width, done.datamodule.batch_size) == ("fit", 5, 3)
    assert (done.trainer.state.fn, done.trainer.global_step) == ("fit", 1)
    assert done.config.fit.model.width == 5
    assert done.config_init.fit.model is done.model


@pytest.mark.parametrize(
    ("name", "option"),
    [("validate", "--verbose=false"), ("test", "--verbose=false"), ("predict", "--data.batch_size=2")],
)
def test_the_other_subcommands_run_too(name: str, option: str) -> None:
    limit = f"--trainer.limit_{'val' if name == 'validate' else name}_batches=1"
    done = cli(name, *QUIET, limit, option, data=Data)
    assert (done.trainer.state.fn, done.trainer.state.finished) == (name, True)


def test_without_run_everything_is_made_and_there_are_no_subcommands() -> None:
    done = made("--model.width=7", "--trainer.max_epochs=3")
    assert (done.subcommand, done.model.width, done.trainer.max_epochs) == (None, 7, 3)
    with pytest.raises(SystemExit):
        made("fit")


@pytest.mark.parametrize(
    "args", [[], ["fly"], ["fit", "--model.nope=1"], ["fit", "--model.width=abc"], ["fit", "--trainer.max_epochs=x"]]
)
def test_what_can_not_be_is_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli(*args)
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err


def test_hooks_are_called_around_what_they_name() -> None:
    calls: list[str] = []

    class Hooked(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            calls.append("arguments")

        def before_instantiate_classes(self) -> None:
            calls.append(f"before classes {hasattr(self, 'model')}")

        def after_instantiate_classes(self) -> None:
            calls.append(f"after classes {hasattr(self, 'trainer')}")

        def before_fit(self) -> None:
            calls.append(f"before fit {self.trainer.global_step}")

        def after_fit(self) -> None:
            calls.append(f"after fit {self.trainer.global_step}")

    cli("fit", *SHORT, kind=Hooked)
    assert calls[:4] == ["arguments"] * 4  # for each subcommand's parser
    assert calls[4:] == ["before classes False", "after classes True", "before fit 0", "after fit 1"]


def test_a_subcommand_may_be_a_method_of_ones_own() -> None:
    seen: list[Any] = []

    class Trains(pl.Trainer):
        def tune(self, model: pl.LightningModule, tries: int, rate: float = 1.0) -> None:
            """Try rates."""
            seen.append((type(model).__name__, tries, rate))

    class Tunes(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {**LightningCLI.subcommands(), "tune": {"model"}}

        def fit(self, model: Any, **kwargs: Any) -> None:
            seen.append(("mine", type(model).__name__))

    cli("tune", "--tries=3", *QUIET, kind=Tunes, trainer_class=Trains)
    cli("fit", *QUIET, kind=Tunes, trainer_class=Trains)
    assert seen == [("Model", 3, 1.0), ("mine", "Model")]


# ---------------------------------------------------------------- configs
def test_config_files_are_merged_in_order_and_options_win() -> None:
    Path("a.yaml").write_text("{model: {width: 11, act: tanh}, trainer: {max_epochs: 2}, seed_everything: 3}")
    Path("b.yaml").write_text("{model: {width: 12}}")
    Path("model.yaml").write_text("{width: 21}")
    done = made("--config=a.yaml", "--config", "b.yaml", "--trainer.max_epochs=5")
    assert (done.model.width, done.model.act, done.trainer.max_epochs) == (12, "tanh", 5)
    assert done.config.seed_everything == 3
    assert made("--model=model.yaml").model.width == 21


def test_default_config_files_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("defaults.yaml").write_text("{model: {width: 44}}")
    assert made(parser_kwargs={"default_config_files": ["defaults.yaml"]}).model.width == 44
    in_fit = {"fit": {"default_config_files": ["defaults.yaml"]}}
    assert cli("fit", *SHORT, parser_kwargs=in_fit).model.width == 44
    monkeypatch.setenv("PL_MODEL__WIDTH", "51")
    monkeypatch.setenv("MINE_MODEL__WIDTH", "52")
    assert made().model.width == 32
    assert made(parser_kwargs={"default_env": True}).model.width == 51
    assert made(parser_kwargs={"default_env": True, "env_prefix": "MINE"}).model.width == 52


def test_args_may_be_a_dict_and_then_the_command_line_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    done = LightningCLI(Model, run=False, args={"model": {"width": 5}})
    assert done.model.width == 5
    monkeypatch.setattr(sys, "argv", ["train.py", "--model.width=3"])
    assert LightningCLI(Model, run=False).model.width == 3
    with pytest.warns(UserWarning, match="does not read"):
        assert LightningCLI(Model, run=False, args=["--model.width=4"]).model.width == 4


def test_print_config_prints_a_config_that_can_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli("fit", "--model.width=9", "--print_config")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    printed = yaml.safe_load(text)
    assert text.startswith("# trainkit==")
    assert printed["model"] == {"width": 9, "act": "relu"}
    assert {"ckpt_path", "data", "optimizer", "lr_scheduler", "seed_everything", "trainer"} <= set(printed)
    Path("printed.yaml").write_text(text)
    assert cli("fit", "--config=printed.yaml", *SHORT).model.width == 9


@pytest.mark.parametrize(
    ("args", "default", "seed"),
    [([], True, 0), ([], 7, 7), ([], False, None), (["5"], True, 5), (["true"], False, 0), (["false"], True, None)],
)
def test_seed_everything(args: list[str], default: bool | int, seed: int | None) -> None:
    os.environ.pop("PL_GLOBAL_SEED")
    done = made(*[f"--seed_everything={value}" for value in args], seed_everything_default=default)
    assert os.environ.get("PL_GLOBAL_SEED") == (None if seed is None else str(seed))
    assert done.config.seed_everything == (False if seed is None else seed)


# ---------------------------------------------------------------- classes
def test_subclass_mode_takes_the_class_from_the_config() -> None:
    done = made("--model=models.Wide", "--model.extra=4", "--model.width=2", subclass_mode_model=True)
    assert (type(done.model), done.model.extra, done.model.width) == (Wide, 4, 2)
    done = made("--model=models.Model", "--data=models.Data", "--data.batch_size=5", model=None)
    assert (type(done.model), done.datamodule.batch_size) == (Model, 5)
    assert made("--model=BoringModel", model=None).datamodule is None
    with pytest.raises(SystemExit):
        made(model=None)


def test_functions_may_make_model_and_trainer() -> None:
    def make_model(width: int = 5) -> Model:
        return Model(width)

    def make_trainer(max_epochs: int = 3, callbacks: list[pl.Callback] | None = None) -> pl.Trainer:
        return pl.Trainer(max_epochs=max_epochs, callbacks=callbacks, logger=False)

    done = made("--model.width=6", "--trainer.max_epochs=4", model=make_model, trainer_class=make_trainer)
    assert (done.model.width, done.trainer.max_epochs) == (6, 4)
    with pytest.raises(MisconfigurationException, match="a function whose annotation says"):
        made(model=lambda: Model())


def test_callbacks_and_loggers_are_named_by_the_options() -> None:
    stopping = [
        "--trainer.callbacks=EarlyStopping",
        "--trainer.callbacks.monitor=loss",
        "--trainer.callbacks.patience=7",
    ]
    csv = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    done = made(*stopping, "--trainer.callbacks+=LearningRateMonitor", *csv)
    assert [type(callback).__name__ for callback in done.trainer.callbacks[:2]] == [
        "EarlyStopping",
        "LearningRateMonitor",
    ]
    assert (done.trainer.callbacks[0].monitor, done.trainer.callbacks[0].patience) == ("loss", 7)
    assert done.trainer.logger.save_dir == "logs"


def test_a_config_may_name_classes_as_lightning_does() -> None:
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "loss"}}
    logger = {"class_path": "pytorch_lightning.loggers.csv_logs.CSVLogger", "init_args": {"save_dir": "logs"}}
    Path("theirs.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [stopping], "logger": logger}}))
    done = cli("fit", "--config=theirs.yaml", *SHORT[1:], save_config_callback=SaveConfigCallback)
    assert isinstance(done.trainer.callbacks[0], EarlyStopping)
    assert not {"lightning", "pytorch_lightning"} & {name.partition(".")[0] for name in sys.modules}
    (saved,) = Path("logs").rglob("config.yaml")
    again = cli("fit", f"--config={saved}", "--trainer.logger.version=again")
    assert again.trainer.logger.save_dir == "logs"


def test_trainer_defaults_and_forced_callbacks() -> None:
    class Stops(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_lightning_class_args(EarlyStopping, "stopping")
            parser.set_defaults({"stopping.monitor": "loss", "stopping.patience": 5, "model.width": 3})

    defaults = {"max_epochs": 9, "callbacks": Timer("00:01:00:00"), "logger": False}
    done = made("--stopping.patience=8", kind=Stops, trainer_defaults=defaults)
    assert [type(callback) for callback in done.trainer.callbacks[:2]] == [EarlyStopping, Timer]
    assert (done.trainer.callbacks[0].patience, done.trainer.max_epochs, done.model.width) == (8, 9, 3)
    assert done.config.trainer.callbacks is None
    assert done.instantiate_trainer(max_epochs=2).max_epochs == 2


def test_arguments_are_linked_when_parsed_or_when_made() -> None:
    class Parsed(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("data.batch_size", "model.width", compute_fn=lambda size: size * 2)

    class Made(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("data.classes", "model.width", apply_on="instantiate")

    assert made("--data.batch_size=9", data=Data, kind=Parsed).model.width == 18
    done = made(data=Data, kind=Made)
    assert (done.model.width, done.model.hparams.width) == (77, 77)


# ---------------------------------------------------------------- optimizers
def test_an_optimizer_and_a_schedule_come_from_the_options() -> None:
    adam, steps = ["--optimizer=Adam", "--optimizer.lr=0.3"], ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=2"]
    done = cli("fit", *adam, *steps, *SHORT, model=Plain, data=Data)
    (optimizer,), (config,) = done.trainer.optimizers, done.trainer.lr_scheduler_configs
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.Adam, 0.3)
    assert config.scheduler.step_size == 2


def test_reduce_lr_on_plateau_knows_its_metric() -> None:
    plateau = ["--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=loss", "--lr_scheduler.factor=0.3"]
    done = cli("fit", "--optimizer=SGD", "--optimizer.lr=0.3", *plateau, *SHORT, model=Plain, data=Data)
    (config,) = done.trainer.lr_scheduler_configs
    assert isinstance(config.scheduler, ReduceLROnPlateau)
    assert (config.monitor, config.reduce_on_plateau, config.scheduler.factor) == ("loss", True, 0.3)


def test_the_options_win_over_configure_optimizers_and_say_so() -> None:
    with pytest.warns(UserWarning, match=r"Model\.configure_optimizers is not called"):
        done = cli("fit", "--optimizer=Adagrad", *SHORT)
    assert isinstance(done.trainer.optimizers[0], torch.optim.Adagrad)
    with pytest.raises(SystemExit):
        cli("fit", "--optimizer=Adam", *SHORT, auto_configure_optimizers=False)


def test_configure_optimizers_of_the_cli_may_be_ones_own() -> None:
    class ByStep(LightningCLI):
        @staticmethod
        def configure_optimizers(lightning_module: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": "step"}}

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args(torch.optim.SGD)
            parser.add_lr_scheduler_args(torch.optim.lr_scheduler.ExponentialLR)

    options = ["--optimizer.lr=0.5", "--lr_scheduler.gamma=0.1"]
    done = cli("fit", *options, *SHORT, model=Plain, data=Data, kind=ByStep)
    (config,) = done.trainer.lr_scheduler_configs
    assert (config.interval, config.scheduler.gamma, config.scheduler.get_last_lr()) == ("step", 0.1, [0.05])


def test_optimizers_may_be_linked_to_arguments_of_the_model() -> None:
    class Two(Plain):
        def __init__(self, first: dict[str, Any], second: dict[str, Any]) -> None:
            super().__init__()
            self.first, self.second = first, second

    class Linked(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args((torch.optim.Adam, torch.optim.SGD), "one", link_to="model.first")
            parser.add_optimizer_args(torch.optim.SGD, "two", link_to="model.second")

    done = made("--one=Adam", "--one.lr=0.5", "--two.lr=0.4", model=Two, kind=Linked)
    one, two = (instantiate_class(done.model.parameters(), init) for init in (done.model.first, done.model.second))
    assert (type(one), one.defaults["lr"]) == (torch.optim.Adam, 0.5)
    assert (type(two), two.defaults["lr"]) == (torch.optim.SGD, 0.4)


def test_two_optimizers_need_a_link() -> None:
    class Unlinked(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args(torch.optim.Adam, "one")
            parser.add_optimizer_args(torch.optim.SGD, "two")

    with pytest.raises(MisconfigurationException, match="one, two"):
        made(model=Plain, kind=Unlinked)


def test_what_makes_an_optimizer_can_be_an_argument() -> None:
    class Asks(Plain):
        def __init__(
            self,
            optimizer: OptimizerCallable = lambda parameters: torch.optim.SGD(parameters, lr=0.25),
            schedule: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
        ) -> None:
            super().__init__()
            self.optimizer, self.schedule = optimizer, schedule

    def lr_and_schedule(*options: str) -> Any:
        model = made(*options, model=Asks, auto_configure_optimizers=False).model
        optimizer = model.optimizer(model.parameters())
        return type(optimizer), optimizer.defaults["lr"], type(model.schedule(optimizer))

    schedules = torch.optim.lr_scheduler
    assert lr_and_schedule() == (torch.optim.SGD, 0.25, schedules.ConstantLR)
    options = ["--model.optimizer=Adam", "--model.optimizer.lr=0.5", "--model.schedule=StepLR"]
    assert lr_and_schedule(*options, "--model.schedule.step_size=3") == (torch.optim.Adam, 0.5, schedules.StepLR)


# ---------------------------------------------------------------- what is saved
class Keyed(Model):
    def __init__(self, api_key: str, service: dict[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)


@pytest.mark.filterwarnings("ignore:the hyperparameter .* looks like a secret")
def test_the_config_is_saved_without_secrets() -> None:
    options = [
        "--trainer.default_root_dir=run",
        "--model.api_key=marker",
        '--model.service={"token": "marker"}',
        *SHORT,
    ]
    with pytest.warns(UserWarning, match=r"'model.api_key', 'model.service.token' looks like a secret"):
        done = LightningCLI(Keyed, BoringDataModule, args=["fit", *options], seed_everything_default=0)
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (saved["model"]["api_key"], saved["model"]["service"]) == ("***", {"token": "***"})
    assert done.config.fit.model.api_key == "marker"


@pytest.mark.filterwarnings("ignore:the hyperparameter .* looks like a secret")
def test_a_secret_of_the_command_line_is_used_where_the_checkpoint_has_none() -> None:
    arguments = {"model_class": Keyed, "datamodule_class": BoringDataModule, "save_config_callback": None}
    LightningCLI(args=["fit", "--model.api_key=one", "--model.width=7", *SHORT], **arguments).trainer.save_checkpoint(
        "x"
    )
    tested = [
        "test",
        "--ckpt_path=x",
        "--model.api_key=two",
        "--trainer.limit_test_batches=1",
        "--verbose=false",
        *QUIET,
    ]
    model = LightningCLI(args=tested, **arguments).model
    assert (model.hparams.api_key, model.hparams.width) == ("two", 7)


def test_the_config_is_saved_where_the_run_is_and_runs_again() -> None:
    root = ["--trainer.default_root_dir=run", "--model.width=4"]
    cli("fit", *root, *SHORT, save_config_callback=SaveConfigCallback)
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (saved["model"]["width"], saved["trainer"]["max_epochs"], saved["seed_everything"]) == (4, 1, 0)
    assert cli("fit", "--config=run/config.yaml").model.width == 4
    with pytest.raises(RuntimeError, match="is there already"):
        cli("fit", *root, *SHORT, save_config_callback=SaveConfigCallback)
    options = {"overwrite": True, "config_filename": "config.yaml"}
    cli("fit", *root, *SHORT, save_config_callback=SaveConfigCallback, save_config_kwargs=options)


def test_no_config_is_saved_in_a_fast_dev_run_and_elsewhere_if_one_says_where() -> None:
    stages: list[str] = []

    class Elsewhere(SaveConfigCallback):
        def save_config(self, trainer: Any, module: Any, stage: str) -> None:
            stages.append(stage)

    root = "--trainer.default_root_dir=run"
    cli("fit", root, "--trainer.fast_dev_run=1", *QUIET, save_config_callback=SaveConfigCallback)
    only = {"save_to_log_dir": False}
    cli("fit", root, *SHORT, save_config_callback=Elsewhere, save_config_kwargs=only)
    assert (stages, Path("run/config.yaml").exists()) == (["fit"], False)
    with pytest.raises(ValueError, match="saves nothing"):
        made(save_config_callback=SaveConfigCallback, save_config_kwargs=only)


def test_a_config_of_several_files_is_saved_in_several() -> None:
    Path("model.yaml").write_text("width: 3")
    Path("config.yaml").write_text("model: model.yaml")
    options = {"save_config_callback": SaveConfigCallback, "save_config_kwargs": {"multifile": True}}
    cli("fit", "--config=config.yaml", "--trainer.default_root_dir=run", *SHORT, **options)
    assert yaml.safe_load(Path("run/config.yaml").read_text())["model"] == "model.yaml"
    assert yaml.safe_load(Path("run/model.yaml").read_text())["width"] == 3


def test_a_checkpoint_makes_the_model_again_from_its_config() -> None:
    done = cli("fit", "--model.encoder=models.Encoder", "--model.encoder.depth=9", *SHORT, model=Encoding)
    done.trainer.save_checkpoint("it.ckpt")
    assert done.model.hparams.encoder == {"class_path": "models.Encoder", "init_args": {"depth": 9}}
    again = Encoding.load_from_checkpoint("it.ckpt", rate=0.5)
    assert (type(again.encoder), again.encoder.depth, again.hparams.rate) == (Encoder, 9, 0.5)


def test_a_checkpoint_knows_its_class_in_subclass_mode() -> None:
    options = {"model": pl.LightningModule, "subclass_mode_model": True}
    cli("fit", "--model=models.Model", "--model.width=13", *SHORT, **options).trainer.save_checkpoint("it.ckpt")
    assert pl.LightningModule.load_from_checkpoint("it.ckpt").width == 13
    tested = ["test", "--ckpt_path=it.ckpt", "--verbose=false", "--trainer.limit_test_batches=1", *QUIET]
    assert cli(*tested, "--model=models.Model", **options).model.width == 13
    with pytest.raises(ValueError, match="not a subclass of Plain"):
        Plain.load_from_checkpoint("it.ckpt")


def test_the_checkpoints_hyperparameters_win_over_the_config() -> None:
    cli("fit", "--model.width=13", *SHORT).trainer.save_checkpoint("it.ckpt")
    tested = ["test", "--ckpt_path=it.ckpt", "--verbose=false", "--trainer.limit_test_batches=1", *QUIET]
    done = cli(*tested, "--model.width=99")
    assert (done.model.width, done.config.test.model.width) == (13, 13)


def test_a_checkpoint_that_names_a_class_nobody_imported_is_refused() -> None:
    options = {"model": pl.LightningModule, "subclass_mode_model": True}
    cli("fit", "--model=models.Model", *SHORT, **options).trainer.save_checkpoint("it.ckpt")
    checkpoint = torch.load("it.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["_class_path"] = "antigravity.Model"
    store.save("it.ckpt", checkpoint)
    with pytest.raises(ValueError, match="has not imported"):
        pl.LightningModule.load_from_checkpoint("it.ckpt")
    assert "antigravity" not in sys.modules


def test_a_checkpoint_that_names_a_function_is_refused_on_the_command_line() -> None:
    cli("fit", "--model.encoder=models.Encoder", *SHORT, model=Encoding).trainer.save_checkpoint("it.ckpt")
    checkpoint, evil = store.load("it.ckpt"), {"class_path": "os.mkdir", "init_args": {"path": "made"}}
    for more in ({}, {"_class_path": "models.Encoding"}):
        store.save("it.ckpt", {**checkpoint, "hyper_parameters": {"encoder": evil, **more}})
        with pytest.raises(ValueError, match="a file may not choose the code that is run"):
            cli("test", "--ckpt_path=it.ckpt", "--model.encoder=models.Encoder", *QUIET, model=Encoding)
    assert not os.path.exists("made")


@pytest.mark.parametrize("name", ["SimpleProfiler", "AdvancedProfiler", "PyTorchProfiler"])
def test_a_profiler_is_named_by_the_options(name: str) -> None:
    assert type(made(f"--trainer.profiler={name}").trainer.profiler).__name__ == name
    assert type(made("--trainer.profiler=simple").trainer.profiler).__name__ == "SimpleProfiler"
