"""MLFlowLogger, with MLflow itself: files in a folder, and a database."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trainkit import Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.loggers import MLFlowLogger

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(mlflow|pydantic|google).*")  # their own


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a new database takes MLflow seconds
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def run_of(logger: MLFlowLogger) -> Any:
    return logger.experiment.get_run(logger.run_id)


def history(logger: MLFlowLogger, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in logger.experiment.get_metric_history(logger.run_id, name)]


def test_metrics_and_hyper_parameters_read_back(tmp_path: Path) -> None:
    logger = MLFlowLogger("digits", run_name="first", save_dir=tmp_path, tags={"who": "me"}, prefix="run")
    logger.log_hyperparams({"lr": 0.1, "nested": {"a": [1, 2], "b": {}}, "parts": [{"x": 1}]})
    logger.log_hyperparams(Namespace(long="y" * 600))
    logger.log_metrics({"loss": 0.5, "count": torch.tensor(3)}, step=4)
    logger.log_metrics({"loss": 0.25})
    logger.finalize("success")
    run = run_of(logger)
    assert run.data.params == {
        "lr": "0.1", "nested/a": "[1, 2]", "nested/b": "{}", "parts/0/x": "1", "long": "y" * 500,
    }  # fmt: skip
    assert history(logger, "run-loss") == [(4, 0.5), (5, 0.25)]
    assert run.data.metrics["run-count"] == 3
    assert (run.data.tags["who"], run.info.run_name, run.info.status) == ("me", "first", "FINISHED")
    assert logger.experiment.get_experiment(logger.experiment_id).name == "digits"
    assert (logger.name, logger.version) == (logger.experiment_id, logger.run_id)
    assert logger.save_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("status", "known"), [("success", "FINISHED"), ("failed", "FAILED"), ("interrupted", "KILLED")]
)
def test_the_end_of_a_run_is_told_in_mlflows_words(tmp_path: Path, status: str, known: str) -> None:
    logger = MLFlowLogger(save_dir=tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize(status)
    assert run_of(logger).info.status == known


def test_nothing_is_made_before_it_is_needed(tmp_path: Path) -> None:
    logger = MLFlowLogger(save_dir=tmp_path / "runs")
    logger.finalize("success")
    assert not (tmp_path / "runs").exists()


def test_a_run_can_be_gone_on_with(tmp_path: Path) -> None:
    first = MLFlowLogger(save_dir=tmp_path)
    first.log_metrics({"loss": 1.0}, 0)
    first.log_hyperparams({"lr": 0.1})
    second = MLFlowLogger(save_dir=tmp_path, run_id=first.run_id)
    second.log_metrics({"loss": 2.0}, 1)
    with pytest.warns(UserWarning, match=r"keeps its parameters lr; they can't be changed"):
        second.log_hyperparams({"lr": 0.2, "width": 3})
    assert history(second, "loss") == [(0, 1.0), (1, 2.0)]
    assert run_of(first).data.params == {"lr": "0.1", "width": "3"}
    assert second.experiment_id == first.experiment_id


def test_two_loggers_with_folders_of_their_own_stay_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        logger = MLFlowLogger(save_dir=tmp_path / name)
        logger.log_metrics({"loss": 1.0}, 0)
        assert (tmp_path / name / logger.experiment_id / logger.run_id).is_dir()


def test_the_environment_names_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/elsewhere")
    logger = MLFlowLogger(save_dir=tmp_path / "here")
    logger.log_metrics({"loss": 1.0}, 0)
    assert (tmp_path / "elsewhere" / logger.experiment_id).is_dir()
    assert not (tmp_path / "here").exists()


def test_names_and_values_that_mlflow_does_not_take_are_told_of(tmp_path: Path) -> None:
    logger = MLFlowLogger(save_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"'a:b\[0\]' becomes 'ab0'"):
        logger.log_metrics({"a:b[0]": 1.0}, 0)
    with pytest.warns(UserWarning, match="the metric 'note' is the text 'hello', and is left out"):
        logger.log_metrics({"note": "hello", "loss": 2.0}, 1)
    assert run_of(logger).data.metrics == {"ab0": 1.0, "loss": 2.0}


def test_more_parameters_than_one_call_takes(tmp_path: Path) -> None:
    logger = MLFlowLogger(save_dir=tmp_path)
    logger.log_hyperparams({f"p{index}": index for index in range(250)})
    assert len(run_of(logger).data.params) == 250


def test_checkpoints_of_a_fit_are_uploaded(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    logger = MLFlowLogger(save_dir=tmp_path / "runs", log_model=True)
    Trainer(
        accelerator="cpu", max_epochs=2, log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        logger=logger, callbacks=ModelCheckpoint(tmp_path / "saved", monitor="val_loss"),
    ).fit(TinyModule(), TinyData())  # fmt: skip
    (folder,) = logger.experiment.list_artifacts(logger.run_id)
    files = {Path(file.path).name for file in logger.experiment.list_artifacts(logger.run_id, folder.path)}
    assert files == {f"{folder.path}.ckpt", "metadata.yaml", "aliases.txt"}
    where = Path(logger.experiment.download_artifacts(logger.run_id, folder.path))
    metadata = yaml.safe_load((where / "metadata.yaml").read_text())
    assert metadata["original_filename"] == f"{folder.path}.ckpt"
    assert metadata["ModelCheckpoint"]["monitor"] == "val_loss"
    assert (where / "aliases.txt").read_text() == "['latest', 'best']"
    assert run_of(logger).data.params == {"lr": "0.05"}


def test_a_database_stands_in_where_files_are_refused(tmp_path: Path) -> None:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "false"
    logger = MLFlowLogger("digits", save_dir=tmp_path / "runs")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.experiment.log_text(logger.run_id, "hello", "note.txt")
    assert (tmp_path / "runs" / "mlflow.db").exists()
    assert history(logger, "loss") == [(0, 1.0)]
    assert [path.read_text() for path in (tmp_path / "runs").rglob("note.txt")] == ["hello"]
