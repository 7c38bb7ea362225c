from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import ProgressBar, TQDMProgressBar
from trainkit.callbacks import tqdm_progress as tqdm_module
from trainkit.errors import MisconfigurationException
from trainkit.loggers import CSVLogger


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("loss", 0.5, prog_bar=True)
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", 0.25, prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(batches: int) -> DataLoader[Any]:
    return DataLoader(torch.ones(batches, 2))  # type: ignore[arg-type]


def trainer_with(bar: ProgressBar, *callbacks: Callback, **settings: Any) -> Trainer:
    options: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | settings
    return Trainer(callbacks=[bar, *callbacks], enable_model_summary=False, accelerator="cpu", **options)


class Screen:
    """What was drawn so far on something that says it is a terminal."""

    def __init__(self, captured: pytest.CaptureFixture[str]) -> None:
        self._captured, self._text = captured, ""

    def getvalue(self) -> str:
        self._text += self._captured.readouterr().out
        return self._text


@pytest.fixture
def screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setattr("_pytest.capture.CaptureIO.isatty", lambda _: True)
    return Screen(capsys)


class Clock:
    """A clock that goes on by itself, so much each time somebody looks."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 100.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def frames(text: str, name: str) -> list[str]:
    return [frame for frame in re.split(r"[\r\n]", text) if frame.startswith(name)]


def test_training_validation_and_sanity_check_have_a_bar_each(screen: Screen) -> None:
    bar = TQDMProgressBar()
    trainer_with(bar, max_epochs=2).fit(Net(), loader(4), [loader(3), loader(2)])
    text = screen.getvalue()
    assert "100%" in frames(text, "Epoch 0:")[-1]
    assert "4/4" in frames(text, "Epoch 1:")[-1]
    assert "loss=0.500" in frames(text, "Epoch 1:")[-1]
    assert "val_loss" in frames(text, "Epoch 1:")[-1]
    assert "2/2" in frames(text, "Sanity Checking DataLoader 1:")[-1]
    assert "3/3" in frames(text, "Validation DataLoader 0:")[-1]
    assert "2/2" in frames(text, "Validation DataLoader 1:")[-1]
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (4, 4)
    assert bar.val_progress_bar.total == 2


def test_test_and_predict_keep_their_bar(screen: Screen) -> None:
    bar = TQDMProgressBar()
    trainer = trainer_with(bar)
    trainer.test(Net(), loader(3), verbose=False)
    trainer.predict(torch_identity(), loader(2))
    assert "3/3" in frames(screen.getvalue(), "Testing DataLoader 0:")[-1]
    assert "2/2" in frames(screen.getvalue(), "Predicting DataLoader 0:")[-1]
    assert (bar.test_progress_bar.n, bar.predict_progress_bar.n) == (3, 2)


def torch_identity() -> Module:
    class Identity(Module):
        def forward(self, batch: Any) -> Any:
            return batch

    return Identity()


def test_the_methods_that_make_the_bars_can_be_overridden(screen: Screen) -> None:
    made: list[str] = []

    class Mine(TQDMProgressBar):
        BAR_FORMAT = "{desc} mine {n_fmt}"

        def init_sanity_tqdm(self) -> Any:
            made.append("sanity")
            return super().init_sanity_tqdm()

        def init_train_tqdm(self) -> Any:
            made.append("train")
            return super().init_train_tqdm()

        def init_validation_tqdm(self) -> Any:
            bar = super().init_validation_tqdm()
            made.append(f"validation at {bar.pos}, {'stays' if bar.leave else 'goes'}")
            return bar

        def init_test_tqdm(self) -> Any:
            made.append("test")
            return super().init_test_tqdm()

        @property
        def validation_description(self) -> str:
            return "how good?"

        def get_metrics(self, trainer: Any, module: Any) -> dict[str, Any]:
            items = super().get_metrics(trainer, module)
            items.pop("v_num", None)
            return {"seen": trainer.global_step}

    trainer = trainer_with(Mine())
    trainer.fit(Net(), loader(2), loader(2))
    trainer.validate(Net(), loader(2), verbose=False)
    trainer.test(Net(), loader(2), verbose=False)
    assert made == ["sanity", "train", "validation at -1, goes", "validation at 0, stays", "test"]
    assert "how good? DataLoader 0:  mine" in screen.getvalue()


def test_what_is_shown_has_the_runs_version(screen: Screen) -> None:
    bar = TQDMProgressBar()
    trainer = trainer_with(bar, logger=CSVLogger(".", version=7), log_every_n_steps=1)
    trainer.fit(Net(), loader(1))
    assert bar.get_metrics(trainer, trainer.module) == {"v_num": 7, "loss": 0.5}
    assert "v_num=7" in screen.getvalue()
    trainer = trainer_with(TQDMProgressBar(), logger=CSVLogger(".", version="a-long-name"), log_every_n_steps=1)
    trainer.fit(Net(), loader(1))
    assert "v_num=name" in screen.getvalue()


def test_metrics_are_read_ten_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch, screen: Screen) -> None:
    monkeypatch.setattr(tqdm_module, "monotonic", Clock(0.01))
    reads = 0

    class Counting(TQDMProgressBar):
        def get_metrics(self, trainer: Any, module: Any) -> dict[str, Any]:
            nonlocal reads
            reads += 1
            return {}

    trainer_with(Counting()).fit(Net(), loader(100))
    assert 8 <= reads <= 12


def test_a_file_gets_a_frame_every_30_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tqdm_module, "monotonic", Clock(1.0))
    trainer_with(TQDMProgressBar()).fit(Net(), loader(100))
    text = capsys.readouterr().out
    assert [re.findall(r" (\d+)/100", frame)[0] for frame in frames(text, "Epoch 0:") if "loss" in frame][:4] == [
        "1", "31", "61", "91",
    ]  # fmt: skip


def test_refresh_rate_moves_the_bar_at_multiples_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, screen: Screen
) -> None:
    monkeypatch.setattr(tqdm_module, "monotonic", Clock(1.0))
    trainer_with(TQDMProgressBar(refresh_rate=3)).fit(Net(), loader(7))
    drawn = [re.findall(r" (\d)/7", frame)[0] for frame in frames(screen.getvalue(), "Epoch 0:")]
    assert list(dict.fromkeys(drawn)) == ["0", "3", "6", "7"]


def test_refresh_rate_0_and_disable_show_nothing(screen: Screen) -> None:
    trainer_with(TQDMProgressBar(refresh_rate=0)).fit(Net(), loader(2), loader(2))
    bar = TQDMProgressBar()
    bar.disable()
    trainer_with(bar).fit(Net(), loader(2), loader(2))
    assert screen.getvalue() == ""
    assert (bar.is_enabled, bar.is_disabled) == (False, True)
    bar.enable()
    assert bar.is_enabled


def test_the_environment_sets_the_least_refresh_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_MINITERS", "5")
    assert (TQDMProgressBar().refresh_rate, TQDMProgressBar(refresh_rate=9).refresh_rate) == (5, 9)
    monkeypatch.delenv("TQDM_MINITERS")
    monkeypatch.setenv("COLAB_GPU", "1")
    assert (TQDMProgressBar().refresh_rate, TQDMProgressBar(refresh_rate=2).refresh_rate) == (20, 2)


def test_leave_keeps_a_bar_for_each_epoch(screen: Screen) -> None:
    trainer_with(TQDMProgressBar(leave=True), max_epochs=3).fit(Net(), loader(2))
    for epoch in range(3):
        assert re.search(rf"Epoch {epoch}: 100%[^\r\n]*\n", screen.getvalue())


def test_process_position_moves_every_bar_down() -> None:
    bar = TQDMProgressBar(process_position=2)
    seen = []

    class Look(Callback):
        def on_validation_end(self, trainer: Any, module: Any) -> None:
            if not trainer.sanity_checking:
                seen.append((bar.train_progress_bar.pos, bar.val_progress_bar.pos))

    trainer_with(bar, Look()).fit(Net(), loader(1), loader(1))
    assert seen == [(-4, -5)]


def test_prints_go_above_the_bars_and_are_there_without_one(screen: Screen) -> None:
    class Talks(Net):
        def on_train_epoch_start(self) -> None:
            self.print("inside", 1)

    bar = TQDMProgressBar()
    bar.print("before")
    trainer_with(bar).fit(Talks(), loader(2))
    bar.print("after", end="!\n")
    lines = re.split(r"[\r\n]+", screen.getvalue())
    assert [line for line in lines if line in ("before", "inside 1", "after!")] == ["before", "inside 1", "after!"]


def test_a_loader_without_a_length_has_no_total(screen: Screen) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(torch.ones(3, 2))

    bar = TQDMProgressBar()
    trainer_with(bar, max_steps=10).fit(Net(), DataLoader(Stream()))
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (3, None)


def test_an_error_closes_the_bars(screen: Screen) -> None:
    class Fails(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            raise RuntimeError("on purpose")

    bar = TQDMProgressBar()
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer_with(bar, num_sanity_val_steps=0).fit(Fails(), loader(2), loader(2))
    assert bar.train_progress_bar.disable
    assert bar.val_progress_bar.disable


def test_a_run_resumed_inside_an_epoch_goes_on_where_it_was(screen: Screen) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.should_stop = batch_idx == 2

    first = trainer_with(TQDMProgressBar(), Stop())
    first.fit(Net(), loader(8))
    first.save_checkpoint("here.ckpt")
    bar = TQDMProgressBar()
    trainer_with(bar).fit(Net(), loader(8), ckpt_path="here.ckpt")
    assert (bar.train_progress_bar.initial, bar.train_progress_bar.n, bar.train_progress_bar.total) == (3, 8, 8)


def test_a_bar_that_is_not_there_yet_says_so_and_the_callback_can_be_pickled(screen: Screen) -> None:
    bar = TQDMProgressBar(refresh_rate=2)
    for kind in ("train", "val", "test", "predict"):
        with pytest.raises(TypeError, match="not there yet"):
            getattr(bar, f"{kind}_progress_bar")
    trainer_with(bar).fit(Net(), loader(1))
    assert pickle.loads(pickle.dumps(bar)).refresh_rate == 2
    assert isinstance(bar.train_progress_bar, tqdm_module.Tqdm)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1"), (0.5, "0.500"), (12.0, "12.00"), (1e-7, "1e-7"), ("abc", "abc"), ("7", "7.000"), (float("nan"), "nan")],
)
def test_numbers_keep_their_width(value: Any, text: str) -> None:
    assert tqdm_module.Tqdm.format_num(value) == text


@pytest.mark.parametrize("arguments", [{"refresh_rate": -1}, {"refresh_rate": 0.5}, {"process_position": -1}])
def test_arguments_that_mean_nothing_are_errors(arguments: Any) -> None:
    with pytest.raises(MisconfigurationException, match=f"TQDMProgressBar\\({next(iter(arguments))}=...\\)"):
        TQDMProgressBar(**arguments)


def test_without_tqdm_it_says_how_to_get_it_and_everything_else_works() -> None:
    program = (
        "import sys; sys.modules['tqdm'] = None\n"
        "from trainkit.callbacks import RichProgressBar, TQDMProgressBar\n"
        "try: TQDMProgressBar()\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "pip install tqdm" in out
