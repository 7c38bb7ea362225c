"""WandbLogger, with wandb itself in offline mode."""

from __future__ import annotations

import json
import pickle
import struct
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.errors import MisconfigurationException
from trainkit.loggers import WandbLogger

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(wandb|pydantic|google).*")  # their own


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    import wandb

    wandb.finish()


def offline(path: Path, **settings: Any) -> WandbLogger:
    return WandbLogger(save_dir=path, offline=True, **settings)


def records(path: Path) -> list[Any]:
    """Close the run and return what is in its file; wandb's own process may need a moment to write it."""
    import wandb

    wandb.finish()
    (file,) = path.glob("wandb/offline-run-*/*.wandb")
    until = time.monotonic() + 60
    while not (found := parsed(file.read_bytes())) or not found[-1].HasField("exit"):
        assert time.monotonic() < until, f"{file} has no end"
        time.sleep(0.05)
    return found


def parsed(data: bytes) -> list[Any]:
    """Return the protocol buffers in a LevelDB log, which has blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, found, parts = 7, [], b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if at > len(data):  # not whole yet
            break
        if kind in (1, 4):  # a whole record, or the last piece of one
            found.append(Record.FromString(parts))
            parts = b""
    return found


def rows(found: list[Any]) -> list[dict[str, Any]]:
    return [
        {
            key: json.loads(item.value_json)
            for item in record.history.item
            if not (key := item.key or "/".join(item.nested_key)).startswith("_")
        }
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]


def test_metrics_are_in_the_file_with_their_x_axis(tmp_path: Path) -> None:
    logger = offline(tmp_path, prefix="run")
    logger.log_metrics({"loss": 0.5}, step=4)
    logger.log_metrics({"loss": 0.25, "acc": torch.tensor(1.0).item()}, step=5)
    logger.log_metrics({})
    found = records(tmp_path)
    assert rows(found) == [
        {"run-loss": 0.5, "trainer/global_step": 4},
        {"run-loss": 0.25, "run-acc": 1.0, "trainer/global_step": 5},
    ]
    axes = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in found if r.HasField("metric")}
    assert axes["*"] == "trainer/global_step"


def test_hyper_parameters_are_in_the_config(tmp_path: Path) -> None:
    logger = offline(tmp_path)
    logger.log_hyperparams({"lr": 0.1, "nested": {"a": [1, 2]}, "odd": object})
    logger.log_hyperparams(Namespace(lr=0.2))  # it may change
    config = dict(logger.experiment.config)
    assert (config["lr"], config["nested"], type(config["odd"])) == (0.2, {"a": [1, 2]}, str)


def test_name_version_and_place(tmp_path: Path) -> None:
    logger = offline(tmp_path / "new", project="digits", version="abc123", name="first")
    assert (logger.name, logger.version, logger.save_dir) == ("digits", "abc123", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    run = logger.experiment
    assert (run.id, run.project, run.name, logger.version) == ("abc123", "digits", "first", "abc123")
    assert logger.log_dir is None
    assert list((tmp_path / "new" / "wandb").glob("offline-run-*-abc123"))


def test_a_copy_goes_on_with_the_open_run_without_a_word(tmp_path: Path) -> None:
    logger = offline(tmp_path)
    run = logger.experiment
    twin = pickle.loads(pickle.dumps(logger))
    assert twin.experiment is run
    assert twin.version == logger.version


def test_a_run_that_is_open_already_is_gone_on_with_and_told_of(tmp_path: Path) -> None:
    run = offline(tmp_path).experiment
    other = offline(tmp_path)
    with pytest.warns(UserWarning, match="a wandb run is open already"):
        assert other.experiment is run


def test_a_run_of_ones_own_is_used(tmp_path: Path) -> None:
    import wandb

    run = wandb.init(mode="offline", dir=str(tmp_path), project="own")
    logger = WandbLogger(experiment=run)
    assert logger.experiment is run
    assert logger.version == run.id


def test_a_run_stays_open_when_a_fit_ends(tmp_path: Path) -> None:
    logger = offline(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    logger.log_metrics({"loss": 2.0}, 1)
    assert [row["loss"] for row in rows(records(tmp_path))] == [1.0, 2.0]


def test_gradients_are_watched(tmp_path: Path) -> None:
    logger = offline(tmp_path)
    model = torch.nn.Linear(2, 1)
    logger.watch(model, log="all", log_freq=1)
    model(torch.ones(3, 2)).sum().backward()
    logger.log_metrics({"loss": 1.0}, 0)
    logger.experiment.unwatch(model)
    (row,) = rows(records(tmp_path))
    assert row["gradients/weight/_type"] == "histogram"
    assert row["parameters/bias/_type"] == "histogram"


def test_tables_texts_and_media_are_recorded(tmp_path: Path) -> None:
    logger = offline(tmp_path)
    logger.log_text("notes", columns=["a"], data=[["hello"]], step=1)
    logger.log_table("table", columns=["x", "y"], data=[[1, "one"], [2, "two"]], step=1)
    logger.log_image("pictures", [torch.rand(3, 4, 4)], step=2, caption=["noise"])
    found = rows(records(tmp_path))
    assert [row["trainer/global_step"] for row in found[:3]] == [1, 1, 2]
    assert found[0]["notes/_type"] == "table-file"
    assert (found[1]["table/nrows"], found[1]["table/ncols"]) == (2, 2)
    assert found[2]["pictures/captions"] == ["noise"]
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/pictures_*.png"))


def test_media_come_in_lists_of_one_length(tmp_path: Path) -> None:
    logger = offline(tmp_path)
    with pytest.raises(TypeError, match=r"images must be a list\. Received: Tensor"):
        logger.log_image("a", torch.rand(3, 4, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="caption must have one value for each of the 2 images"):
        logger.log_image("a", [1, 2], caption=["one"])


@pytest.mark.parametrize("log_model", [True, "all"])
def test_checkpoints_can_not_be_uploaded_offline(tmp_path: Path, log_model: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"log_model=.*, offline=True\) can't work"):
        offline(tmp_path, log_model=log_model)


def test_an_artifact_is_made_of_a_checkpoint(tmp_path: Path) -> None:
    import wandb

    class Saver:
        best_model_path = str(tmp_path / "a.ckpt")
        best_model_score = torch.tensor(0.5)

    Path(Saver.best_model_path).write_bytes(b"weights")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="own", id="abc")
    logger = WandbLogger(experiment=run, log_model="all")
    logger.after_save_checkpoint(Saver())
    logger.after_save_checkpoint(Saver())  # it is there already
    found = [record.artifact for record in records(tmp_path) if record.HasField("artifact")]
    found = [each for each in found if each.type == "model"]
    assert [(each.name, each.type, sorted(each.aliases)) for each in found] == [
        ("model-abc", "model", ["best", "latest"])
    ]
    assert json.loads(found[0].metadata)["score"] == 0.5
