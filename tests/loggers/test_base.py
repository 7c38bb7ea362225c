"""What every logger promises, and what the file loggers share: the run directory and hparams.yaml."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trainkit.errors import MisconfigurationException
from trainkit.loggers import CSVLogger, DummyLogger, FileLogger, JSONLinesLogger, Logger, TensorBoardLogger

FILE_LOGGERS = [CSVLogger, JSONLinesLogger, TensorBoardLogger]


@pytest.fixture(params=FILE_LOGGERS)
def file_logger(request: pytest.FixtureRequest) -> type[FileLogger]:
    return request.param


@pytest.fixture(params=[lambda path: Logger(), CSVLogger, TensorBoardLogger], ids=["Logger", "csv", "tensorboard"])
def logger(request: pytest.FixtureRequest, tmp_path: Path) -> Logger:
    return request.param(tmp_path)


class Colour(StrEnum):
    RED = "red"


@dataclass
class Options:
    rate: float = 0.1


def test_every_logger_takes_every_call_of_a_run(logger: Logger) -> None:
    logger.check_writable()
    logger.log_hyperparams({"lr": 0.1})
    logger.log_hyperparams(Namespace(width=3), metrics={"loss": 1.0})
    logger.log_graph(torch.nn.Linear(1, 1))
    for step in range(3):
        logger.log_metrics({"loss": 0.5, "count": 3, "tensor": torch.tensor([2.0])}, step=step)
    logger.log_metrics({"loss": 0.5})
    logger.log_metrics({})
    logger.save()
    logger.sync()
    logger.after_save_checkpoint(None)
    logger.finalize("success")
    logger.log_metrics({"test_loss": 0.5}, step=3)  # fit, then test
    logger.finalize("failed")
    logger.close()


def test_every_logger_survives_copies_and_pickles(logger: Logger) -> None:
    logger.check_writable()
    logger.log_metrics({"loss": 0.5}, step=0)
    for twin in (copy.deepcopy(logger), pickle.loads(pickle.dumps(logger))):
        assert twin.log_dir == logger.log_dir
        twin.log_metrics({"loss": 0.25}, step=1)
        twin.finalize("success")
    logger.finalize("success")


def test_the_base_logger_is_an_off_switch(in_tmp_path: Path) -> None:
    logger = Logger()
    assert (logger.name, logger.version, logger.save_dir, logger.root_dir, logger.log_dir) == (None,) * 5
    assert logger.group_separator == "/"
    logger.experiment.add_image("image", torch.zeros(3, 2, 2))
    logger.experiment.config["lr"] = 3
    logger.experiment.config["nested"].update(lr=3)
    logger.continue_run(in_tmp_path, 3)
    assert list(in_tmp_path.iterdir()) == []


def test_importing_the_loggers_loads_no_writer() -> None:
    code = (
        "import sys, trainkit.loggers; "
        "print([name for name in ('torch', 'tensorboard', 'yaml', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert result.stdout.strip() == "[]"


def test_the_log_dir_is_named_before_anything_is_made(file_logger: type[FileLogger], in_tmp_path: Path) -> None:
    logger = file_logger("runs", "digits")
    assert logger.log_dir == str(Path("runs", "digits", "version_0"))
    assert (logger.save_dir, logger.root_dir) == ("runs", str(Path("runs", "digits")))
    assert (logger.name, logger.version) == ("digits", 0)
    assert list(in_tmp_path.iterdir()) == []
    os.makedirs("runs/digits/version_0")
    assert logger.version == 0, "an answer once given stays, until the directory is claimed"
    logger.check_writable()
    assert logger.log_dir == str(Path("runs", "digits", "version_1"))
    assert os.listdir(logger.log_dir) == []


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("digits", None, "digits/version_0"),
        ("digits", 7, "digits/version_7"),
        ("digits", "first", "digits/first"),
        ("a/b", "", "a/b"),
        ("", 0, "version_0"),
        (None, None, "version_0"),
    ],
)
def test_names_and_versions_make_the_directory(
    file_logger: type[FileLogger], tmp_path: Path, name: str | None, version: int | str | None, expected: str
) -> None:
    logger = file_logger(tmp_path, name, version)
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.finalize("success")
    assert logger.log_dir == str(tmp_path / expected)
    assert os.listdir(logger.log_dir)


def test_numbers_go_on_after_the_highest(file_logger: type[FileLogger], tmp_path: Path) -> None:
    for name in ("version_2", "version_10", "version_x", "version_", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "version_11").touch()  # a file of that name stands in the way, too
    assert file_logger(tmp_path, "").version == 12


def test_the_home_and_variables_are_expanded(
    file_logger: type[FileLogger], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "there")
    assert file_logger("~/$WHERE", "", 0).log_dir == str(tmp_path / "there" / "version_0")


def test_processes_that_start_together_get_directories_of_their_own(tmp_path: Path) -> None:
    code = (
        "import sys; from trainkit.loggers import CSVLogger; logger = CSVLogger('runs'); logger.log_dir\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "logger.check_writable(); print(logger.version)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    versions = [process.communicate("go\n")[0].strip() for process in processes]
    assert sorted(versions) == ["0", "1", "2", "3"]


def test_a_file_in_the_way_is_named_with_what_to_change(file_logger: type[FileLogger], in_tmp_path: Path) -> None:
    Path("runs").touch()
    with pytest.raises(MisconfigurationException) as caught:
        file_logger("runs").check_writable()
    message = str(caught.value)
    assert "runs/lightning_logs/version_0 cannot be written: runs is not a directory" in message
    assert f"default_root_dir= of the Trainer or save_dir= of the {file_logger.__name__}" in message


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a directory in which even root can make nothing")
def test_a_place_where_nothing_can_be_made_is_named_with_the_reason(file_logger: type[FileLogger]) -> None:
    with pytest.raises(MisconfigurationException, match=r"/proc/runs/lightning_logs/version_0 cannot be written: \w+"):
        file_logger("/proc/runs").check_writable()


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX permissions")
def test_a_read_only_directory_is_named_with_the_reason(in_tmp_path: Path) -> None:
    Path("version_0").mkdir(mode=0o500)
    code = (
        "import os; from trainkit.loggers import CSVLogger\n"
        "if os.geteuid() == 0: os.seteuid(65534)  # root may write everywhere\n"
        "CSVLogger('.', '', 0).check_writable()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert "version_0 cannot be written: Permission denied. Choose another place" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"save_dir": 3}, TypeError, "save_dir must be a path, not 3"),
        ({"name": 3}, TypeError, "name must be a string or None, not 3"),
        ({"name": "../out"}, ValueError, "name must stay below save_dir"),
        ({"version": "/out"}, ValueError, "version must stay below save_dir"),
        ({"version": True}, TypeError, "version must be an int, a string or None, not True"),
        ({"version": -1}, ValueError, "version must not be negative, not -1"),
        ({"prefix": None}, TypeError, "prefix must be a string"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    file_logger: type[FileLogger], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        file_logger(**{"save_dir": "runs", **arguments})


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        ({"loss": "low"}, TypeError, r"The metric 'loss' is 'low' \(str\); a logger takes a number"),
        ({"loss": None}, TypeError, "The metric 'loss' is None"),
        ({"loss": {"train": "low"}}, TypeError, "The metric 'loss/train' is 'low'"),
        ({"loss": torch.zeros(2)}, ValueError, r"'loss' is a tensor of shape \(2,\).*Reduce it first"),
        ({"loss": 1j}, TypeError, "The metric 'loss' is 1j"),
        ({3: 1.0}, TypeError, "A metric's name must be a string, not 3"),
        (0.5, TypeError, r"log_metrics takes a mapping of names to values.*not 0.5 \(float\)"),
        ([("loss", 0.5)], TypeError, "log_metrics takes a mapping"),
        ({"step": 0.5, "loss": 1.0}, ValueError, "must be a whole number, not 0.5"),
    ],
)
def test_wrong_metrics_are_refused_and_nothing_is_written(
    file_logger: type[FileLogger], tmp_path: Path, metrics: Any, error: type[Exception], message: str
) -> None:
    logger = file_logger(tmp_path)
    with pytest.raises(error, match=message):
        logger.log_metrics(metrics, step=0)
    logger.finalize("success")
    assert not list(tmp_path.rglob("metrics.csv"))


def test_hparams_yaml_holds_plain_values(file_logger: type[FileLogger], tmp_path: Path) -> None:
    logger = file_logger(tmp_path)
    logger.log_hyperparams(
        {
            "lr": 1e-3,
            "name": "größe: 3",
            "none": None,
            "flag": True,
            "nested": {"layers": (64, 10), 3: {"deep": math.inf}},
            "path": Path("data"),
            "dtype": torch.float32,
            "scalar": torch.tensor(2),
            "colour": Colour.RED,
            "options": Options(),
            "function": math.sqrt,
            "kind": Logger,
            "set": {"b", "a"},
        }
    )
    written = Path(logger.log_dir, "hparams.yaml")
    assert yaml.safe_load(written.read_text(encoding="utf-8")) == {
        "lr": 1e-3,
        "name": "größe: 3",
        "none": None,
        "flag": True,
        "nested": {"layers": [64, 10], "3": {"deep": math.inf}},
        "path": "data",
        "dtype": "torch.float32",
        "scalar": 2,
        "colour": "red",
        "options": {"rate": 0.1},
        "function": "math.sqrt",
        "kind": "trainkit.loggers.base.Logger",
        "set": ["a", "b"],
    }
    logger.log_hyperparams(Namespace(lr=2.0, width=3))
    assert {"lr": 2.0, "width": 3, "flag": True}.items() <= yaml.safe_load(written.read_text(encoding="utf-8")).items()
    logger.finalize("success")


def test_hyper_parameters_that_are_no_mapping_are_refused(file_logger: type[FileLogger], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="log_hyperparams takes a mapping or a Namespace, not 'lr'"):
        file_logger(tmp_path).log_hyperparams("lr")  # type: ignore[arg-type]


@pytest.mark.parametrize("version", [None, 3, "version_3"])
def test_a_resumed_run_goes_on_in_its_directory(
    file_logger: type[FileLogger], tmp_path: Path, version: int | str | None
) -> None:
    directory = tmp_path / "digits" / "version_3"
    directory.mkdir(parents=True)
    logger = file_logger(tmp_path, "digits", version)
    logger.continue_run(directory, 10)
    assert (logger.log_dir, str(logger.version)) == (str(directory), str(version or 3))
    logger.check_writable()
    logger.log_metrics({"loss": 1.0}, step=10)
    logger.finalize("success")
    assert [path.name for path in directory.parent.iterdir()] == ["version_3"]


def test_a_run_resumed_from_elsewhere_goes_on_there(file_logger: type[FileLogger], tmp_path: Path) -> None:
    logger = file_logger(tmp_path / "new", "digits")
    logger.continue_run(tmp_path / "old" / "first", 10)
    assert logger.log_dir == str(tmp_path / "old" / "first")
    assert (logger.version, logger.save_dir, logger.name) == ("first", str(tmp_path / "old"), "")


def test_a_fixed_version_stays_where_it_is(file_logger: type[FileLogger], tmp_path: Path) -> None:
    logger = file_logger(tmp_path, "digits", 4)
    logger.continue_run(tmp_path / "digits" / "version_3", 10)
    assert logger.log_dir == str(tmp_path / "digits" / "version_4")


def test_a_logger_that_has_run_before_can_go_on_in_another_run(file_logger: type[FileLogger], tmp_path: Path) -> None:
    other = tmp_path / "version_0"
    other.mkdir()
    logger = file_logger(tmp_path, "")
    logger.log_metrics({"loss": 1.0}, step=0)
    assert logger.version == 1
    logger.continue_run(other, 10)
    logger.log_metrics({"loss": 1.0}, step=10)
    logger.finalize("success")
    assert logger.version == 0
    assert os.listdir(tmp_path / "version_1")
    assert os.listdir(other)


def environment() -> dict[str, str]:
    """The environment of a process that imports this checkout from any folder."""
    import trainkit

    return os.environ | {"PYTHONPATH": str(Path(trainkit.__file__).parents[1])}


@pytest.mark.parametrize("kind", [CSVLogger, JSONLinesLogger, TensorBoardLogger])
def test_a_subclass_may_have_a_name_and_a_version_of_its_own(kind: Any, tmp_path: Path) -> None:
    class Mine(kind):  # type: ignore[misc]
        name = "mine"
        version = "first"

    logger = Mine(tmp_path)
    assert (logger.root_dir, logger.log_dir) == (str(tmp_path / "mine"), str(tmp_path / "mine" / "first"))


def test_a_dummy_logger_takes_anything() -> None:
    logger = DummyLogger()
    logger.log_metrics("1", 2, three=3)
    logger.log_hyperparams("1", 2, three=3)
    assert logger.log_text("a", step=1) is None  # type: ignore[func-returns-value]
    logger.experiment["key"] = 1
    assert logger.experiment["key"] != 1


def test_a_value_that_is_no_number_is_a_type_error_and_a_value_error(tmp_path: Path) -> None:
    for kind in (TypeError, ValueError):
        with pytest.raises(kind, match="a logger takes a number"):
            CSVLogger(tmp_path).log_metrics({"x": [1, 2]})
