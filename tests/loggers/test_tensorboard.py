"""TensorBoardLogger: what TensorBoard's own reader finds in the files."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from trainkit import Module
from trainkit.errors import MisconfigurationException
from trainkit.loggers import TensorBoardLogger


def read(directory: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows of a run directory: the points of each tag."""
    reader = accumulator(directory)
    return {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def read_as_the_server_does(directory: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Return the same through the reader of `tensorboard --load_fast=false`, which has its own idea of a restart."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    reader = EventAccumulator(str(directory), tensor_size_guidance={"scalars": 0})
    reader.Reload()
    return {
        tag: [(point.step, point.tensor_proto.float_val[0]) for point in reader.Tensors(tag)]
        for tag in reader.PluginTagToContent("scalars")
    }


def accumulator(directory: str | Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    reader.Reload()
    return reader


def event_files(directory: str | Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if "tfevents" in name)


def test_scalars_read_back_from_one_event_file(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    for step in range(25):
        logger.log_metrics({"train/loss": step / 8, "epoch": step // 10, "tensor": torch.tensor([step])}, step)
    logger.log_metrics({"odd": math.nan, "large": math.inf, "small": -math.inf, "huge": 1e300}, 24)
    logger.experiment.add_text("note", "drawn through the SummaryWriter")
    logger.finalize("success")
    assert len(event_files(logger.log_dir)) == 1
    points = read(logger.log_dir)
    assert points["train/loss"] == [(step, step / 8) for step in range(25)]
    assert points["epoch"] == [(step, step // 10) for step in range(25)]
    assert points["tensor"] == [(step, step) for step in range(25)]
    assert math.isnan(points["odd"][0][1])
    assert [points[name] for name in ("large", "small", "huge")] == [
        [(24, math.inf)],
        [(24, -math.inf)],
        [(24, math.inf)],
    ]
    assert accumulator(logger.log_dir).Tensors("note/text_summary")


def test_the_experiment_is_a_summary_writer_opened_when_asked_for(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    assert list(tmp_path.iterdir()) == []
    writer = logger.experiment
    assert isinstance(writer, SummaryWriter)
    assert writer is logger.experiment
    writer.close()
    logger.log_metrics({"loss": 1.0}, 3)  # a writer that its user has closed is opened again
    logger.finalize("success")
    assert read(logger.log_dir) == {"loss": [(3, 1.0)]}


def test_events_are_seen_while_the_run_goes_on(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, max_queue=3, flush_secs=1000)
    seen = []
    for step in range(7):
        logger.log_metrics({"loss": 1.0}, step)
        seen.append(len(read(logger.log_dir).get("loss", [])))
    assert seen == [1, 1, 1, 4, 4, 4, 7]
    eager = TensorBoardLogger(tmp_path, flush_secs=0)
    eager.log_metrics({"loss": 1.0}, 0)
    eager.log_metrics({"loss": 1.0}, 1)
    assert len(read(eager.log_dir)["loss"]) == 2
    logger.close()
    eager.close()


def test_a_mapping_is_drawn_as_lines_of_one_chart(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, prefix="run")
    logger.log_metrics({"loss": {"train": 1.0, "val": torch.tensor(2.0)}, "epoch": 0}, 3)
    logger.log_metrics({"loss": {"train": 0.5}}, 4)
    logger.finalize("success")
    assert read(logger.log_dir) == {"run-epoch": [(3, 0.0)]}
    assert read(Path(logger.log_dir, "run-loss_train")) == {"run-loss": [(3, 1.0), (4, 0.5)]}
    assert read(Path(logger.log_dir, "run-loss_val")) == {"run-loss": [(3, 2.0)]}


def test_the_x_value_is_the_argument_or_the_metric_called_step_or_the_next(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": 1.0})
    logger.log_metrics({"loss": 1.0}, step=7)
    logger.log_metrics({"loss": 1.0})
    logger.log_metrics({"loss": 1.0, "step": 20.0}, step=9)
    logger.finalize("success")
    assert read(logger.log_dir) == {"loss": [(0, 1.0), (7, 1.0), (8, 1.0), (20, 1.0)]}


def test_files_lie_in_the_sub_directory(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "digits", 2, sub_dir="fold/1")
    assert logger.log_dir == str(tmp_path / "digits" / "version_2" / "fold" / "1")
    logger.log_hyperparams({"lr": 0.1})
    logger.finalize("success")
    assert Path(logger.log_dir, "hparams.yaml").exists()
    assert read(logger.log_dir) == {"hp_metric": [(0, -1.0)]}
    for directory in (logger.log_dir, tmp_path / "digits" / "version_2"):
        resumed = TensorBoardLogger(tmp_path, "digits", sub_dir="fold/1")
        resumed.continue_run(Path(directory), 5)
        assert (resumed.log_dir, resumed.version) == (logger.log_dir, 2)


def session(directory: str | Path) -> Any:
    """Return the HParams tab's records of a run: metric names, hyper-parameters, status or None."""
    from tensorboard.plugins.hparams import metadata

    contents = accumulator(directory).PluginTagToContent("hparams")
    experiment = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG])
    start = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    end = contents.get(metadata.SESSION_END_INFO_TAG)
    return (
        [info.name.tag for info in experiment.metric_infos],
        {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()},
        metadata.parse_session_end_info_plugin_data(end).status if end else None,
    )


def test_the_hparams_tab_gets_flat_values_and_a_placeholder_metric(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    params = {"lr": 0.1, "model": {"width": 64, "act": nn.ReLU, "layers": [1, 2]}, "clip": math.inf, "on": True}
    logger.log_hyperparams(params)
    logger.log_hyperparams(params)  # fit, then test
    logger.finalize("success")
    metrics, values, status = session(logger.log_dir)
    assert metrics == ["hp_metric"]
    assert values == {
        "lr": 0.1,
        "model/width": 64.0,
        "model/act": "torch.nn.modules.activation.ReLU",
        "model/layers": "[1, 2]",
        "clip": "inf",
        "on": True,
    }
    assert status == 1, "success"
    assert read(logger.log_dir) == {"hp_metric": [(0, -1.0)]}
    assert yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())["model"]["layers"] == [1, 2]


def test_metrics_given_with_hyper_parameters_stand_in_the_hparams_tab(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_hyperparams({"lr": 0.1}, {"val/acc": 0})
    logger.log_metrics({"val/acc": 0.5}, 9)
    logger.finalize("failed")
    assert session(logger.log_dir) == (["val/acc"], {"lr": 0.1}, None)
    assert read(logger.log_dir) == {"val/acc": [(0, 0.0), (9, 0.5)]}


def test_no_placeholder_metric_means_hparams_yaml_only(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_hyperparams({"lr": 0.1})
    logger.finalize("success")
    assert os.listdir(logger.log_dir) == ["hparams.yaml"]


@pytest.mark.parametrize("resume_at", [0, 1, 7, 10, 11])
def test_a_resumed_run_shows_each_step_once(tmp_path: Path, resume_at: int) -> None:
    first = TensorBoardLogger(tmp_path)
    first.log_hyperparams({"lr": 0.1}, {"val/acc": 0})
    for step in range(10):
        first.log_metrics({"loss": float(step), "lines": {"a": float(step)}}, step)
    first.finalize("failed")

    second = TensorBoardLogger(tmp_path)
    second.continue_run(Path(first.log_dir), resume_at)
    assert len(event_files(first.log_dir)) == 1, "nothing changes before the first write"
    second.check_writable()
    second.log_hyperparams({"lr": 0.1}, {"val/acc": 0})
    for step in range(resume_at, 12):
        second.log_metrics({"loss": step + 0.5, "lines": {"a": step + 0.5}}, step)
    second.finalize("success")

    assert second.log_dir == first.log_dir
    points = [(step, float(step)) for step in range(min(resume_at, 10))]
    points += [(step, step + 0.5) for step in range(resume_at, 12)]
    assert read(first.log_dir) == {"loss": points, "val/acc": [(0, 0.0)]}
    assert read(Path(first.log_dir, "lines_a")) == {"lines": points}
    for directory in (first.log_dir, Path(first.log_dir, "lines_a")):
        assert read_as_the_server_does(directory) == read(directory)
    assert len(event_files(first.log_dir)) == 2
    assert session(first.log_dir) == (["val/acc"], {"lr": 0.1}, 1)


def test_a_resumed_run_is_read_last_though_the_clock_was_set_back(tmp_path: Path) -> None:
    first = TensorBoardLogger(tmp_path)
    for step in range(10):
        first.log_metrics({"loss": float(step)}, step)
    first.finalize("failed")
    (name,) = event_files(first.log_dir)
    later = name.replace(name.split(".")[3], "2999999999")
    os.rename(Path(first.log_dir, name), Path(first.log_dir, later))

    second = TensorBoardLogger(tmp_path)
    second.continue_run(Path(first.log_dir), 5)
    second.log_metrics({"loss": -1.0}, 5)
    second.finalize("success")
    assert read(first.log_dir) == {"loss": [*((step, float(step)) for step in range(5)), (5, -1.0)]}
    assert event_files(first.log_dir)[0] == later


KILLED = """
import itertools, sys, torch
from trainkit.loggers import TensorBoardLogger
logger = TensorBoardLogger("logs")
for step in itertools.count():
    logger.log_metrics({"loss": step / 8}, step)
    if step % 25 == 24:
        logger.save()
        print(step, flush=True)
"""


def test_a_killed_run_loses_no_point_before_its_checkpoint(tmp_path: Path, checkout: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    saved = [int(process.stdout.readline()) for _ in range(4)][-1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (name,) = event_files("logs/lightning_logs/version_0")
    with open(Path("logs/lightning_logs/version_0", name), "ab") as file:
        file.write(b"\x20\x00\x00\x00\x00\x00\x00\x00torn")  # the kill may have hit the middle of a write

    logger = TensorBoardLogger("logs")
    logger.continue_run(Path("logs/lightning_logs/version_0"), saved + 1)
    for step in range(saved + 1, saved + 10):
        logger.log_metrics({"loss": step / 8}, step)
    logger.finalize("success")
    assert read(logger.log_dir) == {"loss": [(step, step / 8) for step in range(saved + 10)]}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 8)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(8).eval()
        self.example_input_array = torch.zeros(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.drop(self.hidden(x)))


def test_the_graph_is_recorded_and_the_module_stays_as_it_was(tmp_path: Path) -> None:
    module = Branches()
    before = torch.get_rng_state()
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    logger.log_graph(module)
    logger.finalize("success")
    names = [node.name for node in accumulator(logger.log_dir).Graph().node]
    assert any("hidden" in name for name in names)
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in module.modules()] == [True, True, True, False]


def test_the_graph_needs_an_input(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    with pytest.warns(UserWarning, match="Set self.example_input_array in the module"):
        logger.log_graph(nn.Linear(1, 1))
    TensorBoardLogger(tmp_path).log_graph(nn.Linear(1, 1))
    assert list(tmp_path.iterdir()) == []


def test_arguments_of_the_summary_writer_are_passed_on_and_checked(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, filename_suffix=".mine")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    assert event_files(logger.log_dir)[0].endswith(".mine")
    with pytest.raises(MisconfigurationException, match="no argument 'flush_sec', and neither has SummaryWriter"):
        TensorBoardLogger(tmp_path, flush_sec=3).check_writable()
    with pytest.raises(TypeError, match="it is made of save_dir, name and version"):
        TensorBoardLogger(tmp_path, log_dir="here")
    with pytest.raises(ValueError, match="sub_dir must stay below save_dir"):
        TensorBoardLogger(tmp_path, sub_dir="../out")


def test_a_directory_that_is_gone_is_named(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "", 0)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.log_metrics({"loss": 1.0}, 1)
    (tmp_path / "version_0").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"Events could not be written to .*version_0: No such file"):
        logger.save()
    (tmp_path / "elsewhere").rename(tmp_path / "version_0")
    logger.finalize("success")
    assert read(logger.log_dir) == {"loss": [(0, 1.0), (1, 1.0)]}


def test_the_graph_of_a_module_without_a_run_is_recorded(tmp_path: Path) -> None:
    class Line(Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.example_input_array = nn.Linear(2, 1), torch.ones(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.line(x)  # type: ignore[no-any-return]

    logger, line = TensorBoardLogger(tmp_path, log_graph=True), Line()
    logger.log_graph(line)
    logger.save()
    assert accumulator(logger.log_dir).Tags()["graph"]
    with pytest.raises(RuntimeError, match="not attached"):
        _ = line.trainer
    line.example_input_array = {"x": torch.ones(3, 2)}
    with pytest.warns(UserWarning, match="by position only.*It is a dict"):
        logger.log_graph(line)
