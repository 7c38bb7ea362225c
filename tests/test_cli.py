"""The command `trainkit` as a person uses it: files, options, mistakes, runs, signals."""

from __future__ import annotations

import csv
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from trainkit import cli
from trainkit.cli import main

PROJECT = '''
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Callback, DataModule, Module


class Net(Module):
    """A line through four numbers."""

    def __init__(self, width: int = 8, lr: float = 0.1, dropout: float = 0.0, sleep: float = 0.0) -> None:
        super().__init__()
        self.lr, self.sleep = lr, sleep
        self.layers = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

    def training_step(self, batch, batch_idx):
        time.sleep(self.sleep)
        loss = nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self.layers(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.layers(batch[0]).argmax(1)


class Deep(Net):
    """Its `**kwargs` are those of Net."""

    def __init__(self, depth: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.depth = depth


class Own(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Untyped(Own):
    def __init__(self, width, lr=0.1):
        super().__init__(width=width, lr=lr)


class Stepless(Module):
    def train_dataloader(self): ...

    def configure_optimizers(self):
        return None


class Fragile(Own):
    def __init__(self, number: int = 1) -> None:
        super().__init__()
        self.check(number)

    def check(self, number):
        raise RuntimeError("the fragile net broke")


class Fickle(Own):
    def training_step(self, batch, batch_idx):
        self.log("loss", 1.0, on_epoch=batch_idx > 0)
        return super().training_step(batch, batch_idx)


class Deaf(Callback):
    def on_train_batch_end(self, trainer):
        pass


class Failing(Own):
    def training_step(self, batch, batch_idx):
        raise ZeroDivisionError("in the step")


class Numbers(DataModule):
    def __init__(self, batch_size: int = 8, name: str = "numbers") -> None:
        super().__init__()
        self.batch_size = batch_size

    def loader(self):
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class Quiet(Callback):
    def __init__(self, level: int = 1, names: list[str] | None = None) -> None:
        self.level = level


def not_a_class() -> None: ...
'''

CONFIG = """\
trainer:
  max_epochs: 2
  callbacks:
    - class_path: EarlyStopping
      init_args:
        monitor: val/loss
        patience: 5
model:
  class_path: cli_project.Net
  init_args:
    lr: 1e-1
    width: 8
data: cli_project.Numbers
optimizer:
  class_path: Adam
  init_args:
    lr: 0.01
"""

QUIET = (
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the user's module, importable in this process."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "cli_project.py").write_text(PROJECT)
    (folder / "cli_broken.py").write_text("import there_is_no_such_package\n")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def run(project: Path, capsys: Capture) -> Callable[..., Result]:
    """Run a command line in this process."""

    def run(*words: str) -> Result:
        code = main(list(words))
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def process(*words: str, cwd: Path, checkout: Path, **options: object) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "PYTHON"))}
    return subprocess.Popen(
        [sys.executable, "-m", "trainkit", *words],
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )


# ---------------------------------------------------------------- help
@pytest.mark.parametrize("words", [["--help"], ["-h"], *([command, "--help"] for command in cli.DOES)], ids=" ".join)
def test_every_help_page_is_short(words: list[str], run: Run) -> None:
    result = run(*words)
    assert result.code == 0
    assert 5 < len(result.out.splitlines()) <= 60
    assert max(map(len, result.out.splitlines())) <= 100
    assert not result.err


def test_the_version_is_the_packages(run: Run) -> None:
    assert run("--version").out == f"trainkit {cli.__version__}\n"


def test_without_a_command_the_help_page_is_an_error(run: Run) -> None:
    result = run()
    assert result.code == 2
    assert "usage: trainkit COMMAND" in result.err


def test_the_trainers_help_has_every_argument_with_type_default_and_meaning(run: Run) -> None:
    result = run("fit", "--trainer.help")
    assert result.code == 0
    assert "--trainer.max_epochs  a whole number or null  (default: null)" in result.out
    assert "--trainer.accumulate_grad_batches" in result.out
    assert "update the weights every n batches" in result.out


def test_a_slots_help_lists_the_classes_that_fit(run: Run) -> None:
    out = run("fit", "--trainer.callbacks.help").out
    assert "EarlyStopping" in out
    assert "ModelCheckpoint" in out
    assert "TensorBoardLogger" not in out
    assert "CosineAnnealingLR" in run("fit", "--lr_scheduler.help").out


def test_a_class_s_help_lists_its_arguments(run: Run) -> None:
    out = run("fit", "--trainer.callbacks.help", "EarlyStopping").out
    assert "--trainer.callbacks.monitor  a string  (required)" in out
    out = run("fit", "--model.help", "cli_project.Deep").out
    assert "--model.depth  a whole number  (required)" in out
    assert "--model.lr  a number  (default: 0.1)" in out
    assert "--optimizer.params" not in run("fit", "--optimizer.help=SGD").out


def test_help_for_what_is_not_there_says_what_is(run: Run) -> None:
    result = run("fit", "--trainer.calbacks.help")
    assert result.code == 2
    assert "did you mean 'callbacks'?" in result.err
    assert "no module 'nowhere'" in run("fit", "--model.help", "nowhere.Net").err


# ---------------------------------------------------------------- mistakes in a file
class Mistake(NamedTuple):
    """A file made wrong by replacing text, and what the message must hold."""

    replace: str
    by: str
    message: tuple[str, ...]


MISTAKES = {
    "an unknown key": Mistake(
        "max_epochs: 2", "turbo_mode: true", ("unknown key 'turbo_mode' in 'trainer'", "run.yaml:2:3", "fast_dev_run")
    ),
    "a misspelt key": Mistake(
        "max_epochs: 2",
        "max_epoch: 2",
        ("unknown key 'max_epoch' in 'trainer'", "(trainer.max_epoch)", "did you mean 'max_epochs'?"),
    ),
    "a misspelt key at the top": Mistake("trainer:", "trianer:", ("unknown key 'trianer'", "did you mean 'trainer'?")),
    "a command in the file": Mistake("trainer:", "fit:", ("unknown key 'fit'", "at the top level")),
    "a wrong type": Mistake(
        "max_epochs: 2",
        "max_epochs: three",
        ("expected a whole number or null, got 'three'", "run.yaml:2:15", "(trainer.max_epochs)"),
    ),
    "a fraction for a whole number": Mistake("max_epochs: 2", "max_epochs: 2.5", ("a whole number", "got 2.5")),
    "a wrong type in the model": Mistake(
        "lr: 1e-1", "lr: fast", ("expected a number, got 'fast'", "(model.init_args.lr)", "run.yaml:11:9")
    ),
    "a number for a string": Mistake(
        "data: cli_project.Numbers",
        "data: {class_path: cli_project.Numbers, init_args: {name: 7}}",
        ("expected a string, got 7", 'write it in quotes: "7"', "(data.init_args.name)"),
    ),
    "a word that is not among the choices": Mistake(
        "max_epochs: 2",
        "gradient_clip_algorithm: nrom",
        ('expected "norm", "value" or null', "did you mean 'norm'?", "(trainer.gradient_clip_algorithm)"),
    ),
    "a missing argument": Mistake(
        "cli_project.Net",
        "cli_project.Deep",
        ("missing key 'depth' in 'model.init_args'", "Deep needs it: a whole number", "run.yaml:9:15"),
    ),
    "a missing argument without a type": Mistake(
        "cli_project.Net\n  init_args:\n    lr: 1e-1\n    width: 8",
        "cli_project.Untyped",
        ("missing key 'width' in 'model.init_args'", "Untyped needs it: anything", "run.yaml:9:15"),
    ),
    "a missing argument of a callback": Mistake(
        "        monitor: val/loss\n",
        "",
        ("missing key 'monitor' in 'trainer.callbacks[0].init_args'", "EarlyStopping needs it: a string"),
    ),
    "a module that is not there": Mistake(
        "cli_project.Net", "cli_projcet.Net", ("no module 'cli_projcet'", "run.yaml:9:15", "(model.class_path)")
    ),
    "a class that is not in its module": Mistake(
        "cli_project.Net", "cli_project.Nett", ("no class 'Nett' in module 'cli_project'", "did you mean 'Net'?")
    ),
    "a module that can't be imported": Mistake(
        "cli_project.Net",
        "cli_broken.Net",
        ("importing cli_broken failed", "there_is_no_such_package", "cli_broken.py:1"),
    ),
    "a function for a class": Mistake(
        "cli_project.Net", "cli_project.not_a_class", ("cli_project.not_a_class is a function, not a class",)
    ),
    "a class that is no module": Mistake(
        "cli_project.Net", "cli_project.Numbers", ("is not a Module", "those go under 'data'", "(model.class_path)")
    ),
    "a class that is no data module": Mistake(
        "data: cli_project.Numbers", "data: cli_project.Net", ("is not a DataModule", "under 'model'", "run.yaml:13:7")
    ),
    "a class that is no callback": Mistake(
        "EarlyStopping", "cli_project.Net", ("cli_project.Net is not a Callback", "(trainer.callbacks[0].class_path)")
    ),
    "a logger among the callbacks": Mistake(
        "EarlyStopping",
        "CSVLogger",
        ("no Callback is called 'CSVLogger'", "it is a Logger; those go under 'trainer.logger'"),
    ),
    "a class of torch that is no module of ours": Mistake(
        "cli_project.Net", "torch.nn.Linear", ("torch.nn.Linear is not a Module", "it must inherit Module")
    ),
    "a short name that nobody has": Mistake(
        "EarlyStopping", "EarlyStoping", ("no Callback is called 'EarlyStoping'", "did you mean 'EarlyStopping'?")
    ),
    "an optimizer that nobody has": Mistake(
        "class_path: Adam", "class_path: Adamm", ("no Optimizer is called 'Adamm'", "did you mean 'Adam'?")
    ),
    "a class of Lightning's": Mistake(
        "class_path: EarlyStopping",
        "class_path: lightning.pytorch.callbacks.EarlyStopping",
        ("no module 'lightning'", "trainkit's own is called 'EarlyStopping'"),
    ),
    "a wrong argument of a callback": Mistake(
        "patience",
        "patiense",
        (
            "unknown key 'patiense': EarlyStopping has no such argument",
            "run.yaml:7:9",
            "(trainer.callbacks[0].init_args.patiense)",
            "did you mean 'patience'?",
        ),
    ),
    "a wrong argument of the optimizer": Mistake(
        "    lr: 0.01", "    lrr: 0.01", ("unknown key 'lrr': Adam has no such argument", "did you mean 'lr'?")
    ),
    "an argument beside the class path": Mistake(
        "data: cli_project.Numbers",
        "data: {class_path: cli_project.Numbers, batch_size: 4}",
        ("unknown key 'batch_size' in 'data'", "the arguments of Numbers go under 'init_args'"),
    ),
    "arguments without a class": Mistake(
        "  class_path: cli_project.Net\n", "", ("missing key 'class_path' in 'model'", "run.yaml:8:1")
    ),
    "an argument without its value": Mistake(
        "monitor: val/loss", "monitor:", ("expected a string, got nothing", "init_args.monitor)", "run.yaml:6:17")
    ),
    "an unclosed bracket": Mistake("max_epochs: 2", "max_epochs: [2", ("not YAML", "run.yaml:2:15", "not closed")),
    "a tab": Mistake("  max_epochs: 2", "\tmax_epochs: 2", ("not YAML", "run.yaml:2:1", "no tabs")),
    "a missing space": Mistake("lr: 1e-1\n    width: 8", "lr:1e-1\n    width: 8", ("not YAML", "run.yaml:1", "quotes")),
    "a duplicate key": Mistake(
        "  max_epochs: 2", "  max_epochs: 2\n  max_epochs: 3", ("duplicate key 'max_epochs'", "run.yaml:3:3", "line 2")
    ),
    "a tag": Mistake(
        "max_epochs: 2",
        'max_epochs: !!python/object/apply:os.system ["true"]',
        ("no tags like '!!python", "run.yaml:2:15"),
    ),
    "an alias inside itself": Mistake(
        "data: cli_project.Numbers", "data: &d {class_path: *d}", ("alias", "run.yaml:13")
    ),
    "a value out of range": Mistake(
        "max_epochs: 2",
        "max_epochs: -7",
        ("max_epochs must be at least -1", "-7", "run.yaml:2:3", "(trainer.max_epochs)"),
    ),
    "two arguments that exclude each other": Mistake(
        "max_epochs: 2",
        "enable_checkpointing: false\n  callbacks: ModelCheckpoint\nx:",
        ("unknown key 'x'", "run.yaml:4:1"),
    ),
    "a value out of range in a callback": Mistake(
        "class_path: EarlyStopping\n      init_args:\n        monitor: val/loss\n        patience: 5",
        "class_path: ModelCheckpoint\n      init_args:\n        save_top_k: -3",
        ("ModelCheckpoint", "save_top_k", "(trainer.callbacks[0].init_args.save_top_k)", "run.yaml:6:9"),
    ),
    "a seed out of range": Mistake(
        "trainer:", "seed_everything: -1\ntrainer:", ("seed_everything must be", "run.yaml:1:1")
    ),
    "two optimizers": Mistake(
        "cli_project.Net",
        "cli_project.Own",
        ("Own.configure_optimizers makes its own optimizer", "run.yaml:14:1", "(optimizer)", "only one can win"),
    ),
    "no optimizer": Mistake(
        CONFIG[CONFIG.index("optimizer:") :],
        "",
        ("no optimizer: Net has no configure_optimizers", "run.yaml", "(optimizer)", "optimizer: Adam"),
    ),
    "a learning rate that the optimizer refuses": Mistake(
        "    lr: 0.01", "    lr: -1.0", ("Adam: Invalid learning rate: -1.0", "run.yaml:14:1", "(optimizer)")
    ),
    "a schedule without a metric": Mistake(
        "optimizer:", "lr_scheduler: ReduceLROnPlateau\noptimizer:", ("needs a metric to watch", "monitor: val/loss")
    ),
    "a wrong interval": Mistake(
        "optimizer:",
        "lr_scheduler: {class_path: ConstantLR, interval: batch}\noptimizer:",
        ('expected "epoch", "step" or null', "(lr_scheduler.interval)", "run.yaml:14:50"),
    ),
    "a frequency out of range": Mistake(
        "optimizer:",
        "lr_scheduler: {class_path: ConstantLR, frequency: 0}\noptimizer:",
        ("frequency must be at least 1", "(lr_scheduler.frequency)"),
    ),
    "no model": Mistake(
        CONFIG[CONFIG.index("model:") : CONFIG.index("data:")], "", ("no model given", "run.yaml", "(model)", "--model")
    ),
    "no data": Mistake("data: cli_project.Numbers\n", "", ("no data given", "run.yaml", "(data)", "train_dataloader")),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_file_ends_in_one_short_message(mistake: Mistake, config: Path, run: Run) -> None:
    text = CONFIG.replace(mistake.replace, mistake.by, 1)
    assert text != CONFIG
    config.write_text(text)
    result = run("fit", "--config", "run.yaml", *QUIET)
    assert result.code == 2, result.err
    assert not result.out
    assert len(result.err.splitlines()) <= 12, result.err
    assert result.err.startswith("error: ")
    assert result.err.endswith("nothing was started; see `trainkit fit --help`\n")
    assert "Traceback" not in result.err
    for part in (*mistake.message, "run.yaml"):
        assert part in result.err, result.err


FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "an empty file": (b"", ("the config file is empty", "file.yaml")),
    "a file of comments": (b"# nothing\n", ("the config file is empty", "file.yaml")),
    "a list": (b"- 1\n- 2\n", ("not a mapping of keys", "file.yaml")),
    "a text": (b"hello\n", ("not a mapping of keys", "file.yaml")),
    "bytes that are not UTF-8": (b"model: \xff\xfe\n", ("not UTF-8", "byte 7 is 0xff", "file.yaml")),
    "two documents": (b"model: a\n---\nmodel: b\n", ("not YAML", "file.yaml:2")),
    "a control character": (b"model: a\x07\n", ("not YAML", "file.yaml")),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_config_says_so(content: bytes, message: tuple[str, ...], tmp_path: Path, run: Run) -> None:
    (tmp_path / "file.yaml").write_bytes(content)
    result = run("fit", "--config", "file.yaml")
    assert result.code == 2
    assert len(result.err.splitlines()) <= 12
    for part in message:
        assert part in result.err, result.err


def test_a_missing_file_names_its_neighbours(config: Path, run: Run) -> None:
    result = run("fit", "--config", "rnu.yaml")
    assert result.code == 2
    assert "no config file 'rnu.yaml'" in result.err
    assert "did you mean 'run.yaml'?" in result.err


def test_a_directory_is_no_config_file(config: Path, tmp_path: Path, run: Run) -> None:
    result = run("fit", "--config", str(tmp_path))
    assert result.code == 2
    assert "is a directory" in result.err
    assert "run.yaml" in result.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_says_why(config: Path, run: Run) -> None:
    config.chmod(0)
    assert "can't be read: Permission denied" in run("fit", "--config", "run.yaml").err


def test_all_mistakes_of_all_files_are_told_at_once(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.yaml").write_text(CONFIG.replace("max_epochs", "max_epoch").replace("patience", "patiense"))
    (tmp_path / "b.yaml").write_text("model:\n  init_args:\n    width: wide\n    width: x\n")
    result = run("fit", "--config", "a.yaml", "-c", "b.yaml", "--trainer.max_stesp=3")
    assert result.code == 2
    assert result.err.endswith("5 problems; nothing was started; see `trainkit fit --help`\n")
    for part in ("a.yaml:2:3", "a.yaml:7:9", "duplicate key 'width'", "b.yaml:4:12", "'--trainer.max_steps'"):
        assert part in result.err, result.err


def test_a_mistake_that_a_later_file_covers_is_still_told(config: Path, run: Run) -> None:
    config.write_text(CONFIG.replace("max_epochs: 2", "max_epochs: two"))
    result = run("fit", "--config", "run.yaml", "--trainer.max_epochs=3")
    assert "got 'two'" in result.err
    assert "run.yaml:2:15" in result.err


def test_the_excerpt_has_a_caret_under_what_is_meant(config: Path, run: Run) -> None:
    config.write_text(CONFIG.replace("max_epochs: 2", "max_epochs: three"))
    lines = run("fit", "--config", "run.yaml").err.splitlines()
    assert lines[2:4] == ["   2 |   max_epochs: three", "     |               ^^^^^"]


JUNK = [
    "[",
    "{",
    ": ",
    "- ",
    "null",
    "'",
    "&a ",
    "*a",
    "!x ",
    "1:",
    "|",
    "\t",
    "%",
    "@",
    "#",
    "é",
    "true",
    "3",
    "{a: b}",
    "X.y",
]


@pytest.mark.parametrize("seed", range(24))
def test_a_damaged_file_is_a_config_or_a_message_and_never_an_exception(seed: int, config: Path, run: Run) -> None:
    draw = random.Random(seed)
    lines = CONFIG.splitlines()
    index = draw.randrange(len(lines))
    damaged = lines[index]
    start = draw.randrange(len(damaged) + 1)
    junk = draw.choice(JUNK)
    name = damaged.split(":")[0]
    lines[index] = draw.choice([damaged[:start], damaged[:start] + junk + damaged[start:], f"{name}: {junk}"])
    if draw.random() < 0.3:
        del lines[draw.randrange(len(lines))]
    config.write_text("\n".join(lines))
    result = run("fit", "-c", "run.yaml", "--print_config")
    assert result.code in (0, 2)
    if result.code == 2:
        assert result.err.startswith("error: ")
        assert "run.yaml:" in result.err
        for raw in ("Traceback", "Parser key", "Problem with given", "Does not validate", "Namespace", "<class"):
            assert raw not in result.err


# ---------------------------------------------------------------- mistakes on the command line
OPTIONS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "an unknown command": (["fti"], ("no command 'fti'", "did you mean 'fit'?")),
    "a forgotten command": (["--config", "run.yaml"], ("no command", "trainkit fit --config run.yaml")),
    "a forgotten --config": (["fit", "run.yaml"], ("unexpected 'run.yaml'", "did you mean --config run.yaml?")),
    "a misspelt option": (["fit", "--confg", "x"], ("unknown key 'confg'", "did you mean '--config'?")),
    "an abbreviated option": (
        ["fit", "-c", "run.yaml", "--trainer.max_epoch", "9"],
        ("unknown key 'max_epoch'", "command line: --trainer.max_epoch 9", "did you mean '--trainer.max_epochs'?"),
    ),
    "a misspelt group": (
        ["fit", "-c", "run.yaml", "--trianer.max_epochs=9"],
        ("unknown key 'trianer'", "did you mean '--trainer.max_epochs'?"),
    ),
    "a misspelt argument of the model": (
        ["fit", "-c", "run.yaml", "--model.widht", "9"],
        ("unknown key 'widht': Net has no such argument", "did you mean '--model.width'?"),
    ),
    "a misspelt argument of a callback": (
        ["fit", "-c", "run.yaml", "--trainer.callbacks.patiense=9"],
        ("unknown key 'patiense'", "did you mean '--trainer.callbacks.patience'?"),
    ),
    "a wrong type": (
        ["fit", "-c", "run.yaml", "--trainer.max_epochs", "three"],
        ("expected a whole number or null, got 'three'", "command line: --trainer.max_epochs three"),
    ),
    "a value out of range": (
        ["fit", "-c", "run.yaml", "--trainer.max_epochs", "-7"],
        ("max_epochs must be at least -1", "command line: --trainer.max_epochs -7"),
    ),
    "a missing value": (["fit", "-c", "run.yaml", "--trainer.max_epochs"], ("--trainer.max_epochs needs a value",)),
    "an option for a value": (
        ["fit", "--trainer.max_epochs", "--config", "x"],
        ("--trainer.max_epochs needs a value",),
    ),
    "a missing config file": (["fit", "--config"], ("--config needs a value", "config.yaml")),
    "no model": (["fit"], ("no model given", "--model examples.digits.DigitsCNN")),
    "a model that is not there": (
        ["fit", "--model", "cli_project.Nett"],
        ("no class 'Nett'", "command line: --model cli_project.Nett", "did you mean 'Net'?"),
    ),
    "an argument without its class": (
        ["fit", "--trainer.logger.save_dir", "x"],
        ("missing key 'class_path' in 'trainer.logger'", "--trainer.logger"),
    ),
    "a callback without its argument": (
        ["fit", "-c", "run.yaml", "--trainer.callbacks+=EarlyStopping"],
        ("missing key 'monitor' in 'trainer.callbacks[1].init_args'", "--trainer.callbacks+=EarlyStopping"),
    ),
    "a schedule without its class": (
        ["fit", "-c", "run.yaml", "--lr_scheduler.interval=step"],
        ("there is no lr_scheduler", "command line: --lr_scheduler.interval step"),
    ),
    "an unknown way to print": (["fit", "-c", "run.yaml", "--print_config=short"], ("'short'", "skip_default")),
}


@pytest.mark.parametrize(("words", "message"), OPTIONS.values(), ids=OPTIONS)
def test_a_mistake_on_the_command_line_ends_in_one_short_message(
    words: list[str], message: tuple[str, ...], config: Path, run: Run
) -> None:
    result = run(*words)
    assert result.code == 2, result.err
    assert not result.out
    assert len(result.err.splitlines()) <= 12
    assert "Traceback" not in result.err
    assert "usage" not in result.err
    for part in message:
        assert part in result.err, result.err


# ---------------------------------------------------------------- what a config becomes
def printed(run: Run, *words: str) -> dict[str, object]:
    result = run("fit", *words, "--print_config")
    assert result.code == 0, result.err
    plain = yaml.safe_load(result.out)
    assert isinstance(plain, dict)
    return plain


def find(plain: object, key: str) -> object:
    for part in key.split("."):
        plain = plain[int(part)] if isinstance(plain, list) else plain[part]  # type: ignore[index]
    return plain


def test_options_win_over_files_and_later_files_over_earlier_ones(tmp_path: Path, config: Path, run: Run) -> None:
    (tmp_path / "more.yaml").write_text("trainer: {max_epochs: 5, min_epochs: 4}\nmodel: {init_args: {width: 3}}\n")
    words = (
        "--trainer.max_steps",
        "7",
        "-c",
        "run.yaml",
        "--model.lr=0.5",
        "--config=more.yaml",
        "--trainer.min_epochs=1",
    )
    plain = printed(run, *words)
    assert find(plain, "trainer.max_epochs") == 5
    assert find(plain, "trainer.min_epochs") == 1
    assert find(plain, "trainer.max_steps") == 7
    assert find(plain, "model.init_args.width") == 3
    assert find(plain, "model.init_args.lr") == 0.5
    assert find(plain, "trainer.callbacks.0.init_args.patience") == 5


def test_a_run_needs_no_file(run: Run) -> None:
    plain = printed(
        run, "--model", "cli_project.Net", "--model.lr", "1e-3", "--data=cli_project.Numbers", "--optimizer=SGD"
    )
    assert find(plain, "model.class_path") == "cli_project.Net"
    assert find(plain, "model.init_args.lr") == 1e-3
    assert find(plain, "optimizer.class_path") == "torch.optim.SGD"
    assert find(plain, "data.init_args.batch_size") == 8


def test_arguments_behind_kwargs_are_known(run: Run) -> None:
    plain = printed(run, "--model", "cli_project.Deep", "--model.depth=2", "--model.width=3")
    assert find(plain, "model.init_args.width") == 3


def test_short_names_mean_the_classes_of_trainkit_and_torch(config: Path, run: Run) -> None:
    words = ("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--lr_scheduler=CosineAnnealingLR")
    plain = printed(run, "-c", "run.yaml", *words, "--lr_scheduler.T_max=9")
    assert find(plain, "trainer.logger.class_path") == "trainkit.loggers.CSVLogger"
    assert find(plain, "trainer.callbacks.0.class_path") == "trainkit.callbacks.EarlyStopping"
    assert find(plain, "lr_scheduler.class_path") == "torch.optim.lr_scheduler.CosineAnnealingLR"


def test_callbacks_are_added_with_plus_and_the_last_one_takes_arguments(config: Path, run: Run) -> None:
    words = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=2", "--trainer.callbacks+=Timer")
    plain = printed(run, "-c", "run.yaml", *words, "--trainer.callbacks.duration=00:00:01:00")
    callbacks = find(plain, "trainer.callbacks")
    assert isinstance(callbacks, list)
    assert [callback["class_path"].rpartition(".")[2] for callback in callbacks] == [
        "EarlyStopping",
        "ModelCheckpoint",
        "Timer",
    ]
    assert find(plain, "trainer.callbacks.1.init_args.save_top_k") == 2
    assert find(plain, "trainer.callbacks.2.init_args.duration") == "00:00:01:00"


def test_a_file_can_add_to_the_callbacks_of_the_files_before(tmp_path: Path, config: Path, run: Run) -> None:
    (tmp_path / "more.yaml").write_text("trainer:\n  callbacks+:\n    - class_path: Timer\n    - ModelSummary\n")
    callbacks = find(printed(run, "-c", "run.yaml", "-c", "more.yaml"), "trainer.callbacks")
    assert isinstance(callbacks, list)
    assert [callback["class_path"].rpartition(".")[2] for callback in callbacks] == [
        "EarlyStopping",
        "Timer",
        "ModelSummary",
    ]
    (tmp_path / "more.yaml").write_text("trainer:\n  callbacks+:\n    - class_path: Tiemr\n")
    result = run("fit", "-c", "run.yaml", "-c", "more.yaml")
    assert "more.yaml:3:19  (trainer.callbacks[1].class_path)" in result.err
    assert "did you mean 'Timer'?" in result.err


def test_a_file_that_lightning_wrote_for_a_command_is_accepted(tmp_path: Path, project: Path, run: Run) -> None:
    (tmp_path / "lightning.yaml").write_text(
        """\
# lightning.pytorch==2.6.6
seed_everything: 0
trainer:
  accelerator: auto
  strategy: auto
  devices: auto
  precision: null
  logger: null
  callbacks: null
  fast_dev_run: false
  max_epochs: 3
  limit_val_batches: 1.0
  overfit_batches: 0.0
  val_check_interval: null
  inference_mode: true
  default_root_dir: null
model:
  class_path: cli_project.Own
  init_args:
    width: 8
data:
  class_path: cli_project.Numbers
  init_args:
    batch_size: 4
optimizer: null
lr_scheduler: null
ckpt_path: null
weights_only: null
"""
    )
    plain = printed(run, "-c", "lightning.yaml")
    assert find(plain, "trainer.max_epochs") == 3
    assert run("fit", "-c", "lightning.yaml", "--trainer.fast_dev_run=true", *QUIET).code == 0


def test_changing_the_class_keeps_the_arguments_that_fit(config: Path, run: Run) -> None:
    plain = printed(run, "-c", "run.yaml", "--model=cli_project.Deep", "--model.depth=1")
    assert find(plain, "model.init_args") == {"depth": 1, "width": 8, "lr": 0.1, "dropout": 0.0, "sleep": 0.0}
    plain = printed(run, "-c", "run.yaml", "--data=cli_project.Numbers", "--optimizer=SGD")
    assert find(plain, "optimizer.init_args.lr") == 0.01


def test_the_schedules_keys_stand_beside_its_class(config: Path, run: Run) -> None:
    config.write_text(CONFIG + "lr_scheduler:\n  class_path: ConstantLR\n  interval: step\n  monitor: val/loss\n")
    plain = printed(run, "-c", "run.yaml", "--lr_scheduler.frequency", "3")
    scheduler = find(plain, "lr_scheduler")
    assert isinstance(scheduler, dict)
    assert {key: scheduler[key] for key in ("interval", "frequency", "monitor")} == {
        "interval": "step",
        "frequency": 3,
        "monitor": "val/loss",
    }


def test_sections_may_be_empty(config: Path, run: Run) -> None:
    config.write_text("trainer:\nmodel:\n  class_path: cli_project.Net\n  init_args:\ndata:\noptimizer:\n")
    assert find(printed(run, "-c", "run.yaml"), "model.init_args.width") == 8


@pytest.mark.parametrize(
    ("text", "value"), [('"3"', 3), ("'3'", 3), ("3", 3), ("0x3", 3), ("1_000", 1000), ("null", None), ("~", None)]
)
def test_a_number_may_be_quoted(text: str, value: object, config: Path, run: Run) -> None:
    config.write_text(CONFIG.replace("max_epochs: 2", f"max_epochs: {text}"))
    assert find(printed(run, "-c", "run.yaml"), "trainer.max_epochs") == value


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", '"1e-3"', "0.001", ".001"])
def test_a_learning_rate_may_be_written_as_usual(text: str, config: Path, run: Run) -> None:
    config.write_text(CONFIG.replace("lr: 1e-1", f"lr: {text}"))
    assert find(printed(run, "-c", "run.yaml"), "model.init_args.lr") == 1e-3


def test_a_printed_config_is_a_config(config: Path, tmp_path: Path, run: Run) -> None:
    words = ("--lr_scheduler=ConstantLR", "--lr_scheduler.interval=step", "--trainer.limit_train_batches=1.0")
    result = run("fit", "-c", "run.yaml", *words, "--print_config")
    (tmp_path / "printed.yaml").write_text(result.out)
    assert run("fit", "-c", "printed.yaml", "--print_config").out == result.out
    assert "limit_train_batches: 1.0\n" in result.out


def test_a_config_can_be_printed_without_defaults(config: Path, run: Run) -> None:
    result = run("fit", "-c", "run.yaml", "--print_config=skip_default")
    assert "accelerator" not in result.out
    assert find(yaml.safe_load(result.out), "trainer.max_epochs") == 2
    assert "null" not in run("fit", "-c", "run.yaml", "--print_config=skip_null").out


def test_a_template_can_be_printed_before_there_is_a_model(run: Run) -> None:
    assert find(printed(run), "trainer.max_epochs") is None


def test_part_of_a_config_may_stand_in_a_file_of_its_own(tmp_path: Path, config: Path, run: Run) -> None:
    (tmp_path / "model.yaml").write_text("class_path: cli_project.Deep\ninit_args: {depth: 4}\n")
    (tmp_path / "trainer.yaml").write_text("max_epochs: 11\n")
    plain = printed(run, "-c", "run.yaml", "--model=model.yaml", "--trainer=trainer.yaml")
    assert find(plain, "model.init_args.depth") == 4
    assert find(plain, "trainer.max_epochs") == 11
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "net.yaml").write_text("class_path: cli_project.Untyped\ninit_args: {width: 3}\n")
    (tmp_path / "configs" / "run.yaml").write_text("model: net.yaml\n")
    assert find(printed(run, "-c", "configs/run.yaml"), "model.class_path") == "cli_project.Untyped"
    (tmp_path / "model.yaml").write_text("class_path: cli_project.Deep\ninit_args: {depht: 4}\n")
    result = run("fit", "-c", "run.yaml", "--model=model.yaml")
    assert "unknown key 'depht'" in result.err
    assert "model.yaml:2:13" in result.err


# ---------------------------------------------------------------- runs in this process
def test_a_fit_uses_the_configs_optimizer_and_schedule(config: Path, run: Run) -> None:
    from trainkit.config import build

    made = []
    usual = build.configured_optimizers

    def remember(*arguments: object) -> object:
        made.append(usual(*arguments))  # type: ignore[arg-type]
        return made[-1]

    build.configured_optimizers = remember  # type: ignore[assignment]
    try:
        words = ("--lr_scheduler=ConstantLR", "--lr_scheduler.interval=step", "--optimizer.lr=0.25")
        result = run("fit", "-c", "run.yaml", *words, *QUIET)
    finally:
        build.configured_optimizers = usual
    assert result.code == 0, result.err
    (returned,) = made
    assert isinstance(returned["optimizer"], torch.optim.Adam)
    assert returned["optimizer"].defaults["lr"] == 0.25
    assert isinstance(returned["lr_scheduler"]["scheduler"], torch.optim.lr_scheduler.ConstantLR)
    assert returned["lr_scheduler"]["interval"] == "step"


def test_an_error_in_the_users_constructor_names_the_key_and_the_users_lines(config: Path, run: Run) -> None:
    result = run("fit", "--model=cli_project.Fragile", "--data=cli_project.Numbers", *QUIET)
    assert result.code == 1
    assert "Fragile raised RuntimeError: the fragile net broke" in result.err
    assert "command line: --model cli_project.Fragile" in result.err
    assert re.search(r"cli_project\.py:\d+ in __init__: self\.check\(number\)", result.err)
    assert re.search(r"cli_project\.py:\d+ in check: raise RuntimeError", result.err)
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) <= 12


def test_an_error_in_the_users_step_keeps_its_traceback(run: Run) -> None:
    with pytest.raises(ZeroDivisionError, match="in the step"):
        main(["fit", "--model=cli_project.Failing", "--data=cli_project.Numbers", *QUIET])


@pytest.mark.parametrize("section", ["[1]", "[]", "true", "3"])
def test_a_trainer_section_that_is_no_mapping_is_refused(section: str, config: Path, run: Run) -> None:
    Path("more.yaml").write_text(f"trainer: {section}\n")
    result = run("fit", "-c", "run.yaml", "-c", "more.yaml", "--trainer.max_epochs=1")
    assert result.code == 2
    assert "expected a mapping: the arguments of Trainer" in result.err
    assert "more.yaml:1" in result.err


def test_a_checkpoint_that_is_not_there_is_one_message(run: Run) -> None:
    words = ("--model=cli_project.Own", "--data=cli_project.Numbers", "--ckpt_path=nowhere.ckpt")
    result = run("validate", *words, *QUIET)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert "nowhere.ckpt" in result.err
    assert "Traceback" not in result.err


def test_what_the_trainer_refuses_before_the_first_step_is_one_message(run: Run) -> None:
    result = run("fit", "--model=cli_project.Stepless", *QUIET)
    assert result.code == 2
    assert result.err.startswith("error: Stepless has no training_step")
    assert "nothing was started" in result.err


def test_a_callback_that_a_hook_can_t_call_is_one_message(run: Run) -> None:
    words = ("--model=cli_project.Own", "--data=cli_project.Numbers", "--trainer.callbacks+=cli_project.Deaf")
    result = run("fit", *words, *QUIET)
    assert result.code == 2
    assert result.err.startswith("error: Deaf.on_train_batch_end takes")
    assert "Traceback" not in result.err


def test_what_the_trainer_refuses_during_the_run_names_the_users_line(run: Run) -> None:
    words = ("--model=cli_project.Fickle", "--data=cli_project.Numbers", "--trainer.max_epochs=1")
    result = run("fit", *words, *QUIET)
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert re.search(r"--> .*cli_project\.py:\d+ in training_step: self\.log\(", result.err)
    assert "nothing was started" not in result.err


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin `time.sleep")
@pytest.mark.parametrize("compile", ["true", "max-autotune", "auto", "{backend: eager, dynamic: true}"])
def test_steps_are_compiled_from_a_file(compile: str, config: Path, run: Run) -> None:
    config.write_text(CONFIG.replace("trainer:", f"trainer:\n  compile: {compile}\n  fast_dev_run: true"))
    if compile.startswith("{"):
        done = run("fit", "--config", str(config), "--trainer.accelerator=cpu", *QUIET)
        assert done.code == 0, done.err
    shown = run("fit", "--config", str(config), "--print_config")
    assert yaml.safe_load(shown.out)["trainer"]["compile"] == yaml.safe_load(compile)


def test_a_graph_on_the_cpu_is_one_message(config: Path, run: Run) -> None:
    done = run("fit", "--config", str(config), "--trainer.accelerator=cpu", "--trainer.compile=graph")
    assert done.code == 2
    assert "needs a cuda device" in done.err


def test_validate_and_test_print_their_metrics(config: Path, run: Run) -> None:
    for command in ("validate", "test"):
        result = run(command, "-c", "run.yaml", *QUIET)
        assert result.code == 0, result.err
        assert "val/loss" in result.out


def test_predictions_are_kept_on_request(config: Path, tmp_path: Path, run: Run) -> None:
    result = run("predict", "-c", "run.yaml", *QUIET)
    assert result.code == 0, result.err
    assert "--output FILE" in result.out
    result = run("predict", "-c", "run.yaml", "--output=out.pt", *QUIET)
    assert "out.pt" in result.out
    predictions = torch.load(tmp_path / "out.pt", weights_only=True)
    assert [len(batch) for batch in predictions] == [8, 8, 8, 8]
    assert not list(tmp_path.glob("*.unfinished"))


def test_predictions_that_could_not_be_written_are_refused_at_once(config: Path, run: Run) -> None:
    result = run("predict", "-c", "run.yaml", "--output=nowhere/out.pt", *QUIET)
    assert result.code == 2
    assert "there is no directory" in result.err


def test_the_command_leaves_the_process_as_it_was(config: Path, run: Run) -> None:
    path = list(sys.path)
    run("validate", "-c", "run.yaml", *QUIET)
    assert sys.path == path


# ---------------------------------------------------------------- the command that goes on
def test_the_command_that_starts_again_is_quoted_and_has_no_checkpoint() -> None:
    words = ["fit", "-c", "my run.yaml", "--ckpt_path", "last", "--model.name=a b", "--ckpt_path=x"]
    assert cli.read(words).again == "trainkit fit -c 'my run.yaml' '--model.name=a b'"


def test_a_word_with_a_dash_is_a_value_unless_it_has_two() -> None:
    line = cli.read(["fit", "--trainer.max_steps", "-1", "--x=--y"])
    assert line.options == [("trainer.max_steps", "-1"), ("x", "--y")]


# ---------------------------------------------------------------- real processes
def test_a_run_from_a_file_is_recorded_and_runs_the_same_again(project: Path, checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "cli_project.py").write_text(PROJECT)
    (tmp_path / "run.yaml").write_text(CONFIG)
    options = ("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.name=runs")

    def fit(*words: str) -> str:
        child = process("fit", *words, cwd=tmp_path, checkout=checkout)
        out, _ = child.communicate(timeout=100)
        assert child.returncode == 0, out
        return out

    out = fit("--config", "run.yaml", *options, "--model.lr=0.2")
    first = tmp_path / "logs" / "runs" / "version_0"
    recorded = yaml.safe_load((first / "config.yaml").read_text())
    assert recorded["seed_everything"] == 0
    assert recorded["model"]["init_args"]["lr"] == 0.2
    assert recorded["trainer"]["accumulate_grad_batches"] == 1
    assert "model" in yaml.safe_load((first / "hparams.yaml").read_text())

    fit("--config", str(first / "config.yaml"))
    second = first.with_name("version_1")
    with open(first / "metrics.csv") as a, open(second / "metrics.csv") as b:
        assert list(csv.reader(a)) == list(csv.reader(b))
    assert yaml.safe_load((second / "config.yaml").read_text()) == recorded

    resume = re.search(r"^ *resume:? +python -m trainkit (fit .*)$", out, re.MULTILINE)
    assert resume is not None, out
    fit(*resume.group(1).split()[1:], "--trainer.max_epochs=3")
    assert (first / "config.resume-1.yaml").exists()
    assert (first / "config.yaml").exists()


SECRETIVE = """
import torch
from trainkit import Module

class Service(Module):
    def __init__(self, api_key: str, depth: int = 1):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(2, 1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


def test_no_file_of_a_run_has_the_secrets_of_its_command_line(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "cli_secretive.py").write_text(SECRETIVE)
    words = ["--model=cli_secretive.Service", "--model.api_key=marker", "--trainer.max_epochs=1"]
    child = process(
        "fit", *words, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", cwd=tmp_path, checkout=checkout
    )
    out, _ = child.communicate(timeout=100)
    assert child.returncode == 0, out
    assert "warning: the config's 'model.init_args.api_key' looks like a secret" in out
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "cli_secretive.py"]
    assert {"config.yaml", "hparams.yaml"} <= {path.name for path in written}
    assert not [path for path in written if b"marker" in path.read_bytes()]
    (recorded,) = tmp_path.rglob("config.yaml")
    assert "--model.api_key=***" in recorded.read_text().splitlines()[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_ends_in_its_exit_code_and_the_command_to_go_on(
    number: int, code: int, checkout: Path, tmp_path: Path
) -> None:
    (tmp_path / "cli_project.py").write_text(PROJECT)
    (tmp_path / "run.yaml").write_text(CONFIG.replace("max_epochs: 2", "max_epochs: 500"))
    # with a bar for one and without for the other: somebody tells the command in both cases
    bar = "true" if number == signal.SIGINT else "false"
    words = ("--model.sleep=0.02", f"--trainer.enable_progress_bar={bar}", "--trainer.enable_model_summary=false")
    child = process("fit", "--config=run.yaml", *words, cwd=tmp_path, checkout=checkout)
    assert child.stdout is not None
    checkpoints = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    for _ in range(1000):
        if checkpoints.exists() and any(checkpoints.glob("*.ckpt")):
            break
        try:
            child.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    child.send_signal(number)
    out = child.communicate(timeout=60)[0]
    assert child.returncode == code, out
    assert "Traceback" not in out
    assert len(re.findall(r"^interrupted.*", out, re.M)) == 1, out  # told once
    assert re.search(r"interrupted after step \d+", out), out
    resume = re.search(r"resume:? +python -m trainkit fit --config=run\.yaml .* --ckpt_path (\S+\.ckpt)$", out, re.M)
    assert resume is not None, out
    assert (tmp_path / resume.group(1)).exists()


def test_a_reader_that_goes_away_is_no_error(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "cli_project.py").write_text(PROJECT)
    (tmp_path / "run.yaml").write_text(CONFIG)
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = f"{sys.executable} -m trainkit fit -c run.yaml --print_config | head -c 1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "s"
    assert not done.stderr
