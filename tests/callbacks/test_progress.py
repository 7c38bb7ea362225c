from __future__ import annotations

import copy
import fcntl
import io
import os
import pickle
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest
import torch

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, ProgressBar, RichProgressBar
from trainkit.callbacks import console as console_module
from trainkit.callbacks import progress as progress_module
from trainkit.callbacks import run_facts as run_facts_module
from trainkit.callbacks import timer as timer_module
from trainkit.callbacks.console import RichProgressBarTheme, Terminal, duration_text, number_text, rate_text
from trainkit.callbacks.run_facts import Frame
from trainkit.errors import MisconfigurationException

# One process on a pseudo-terminal plays all scenes. Its metrics are chosen, so that rows can be told in advance.
PROGRAM = """
import fcntl, os, struct, sys, termios, time, warnings
import torch
from trainkit import Callback, Module, Trainer, seed_everything
from trainkit.callbacks import ModelCheckpoint, RichProgressBar

torch.set_num_threads(1)

class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(0.005)
        self.log("train_loss", 1.0 / (1 + self.current_epoch), prog_bar=True)
        return self.layer(batch).mean()

    def validation_step(self, batch, batch_idx):
        time.sleep(0.005)
        self.log("val_loss", [0.5, 0.25, 0.75][self.current_epoch], prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Do(Callback):
    def __init__(self, act): self.act = act
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 10): self.act()

class Wait(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 10): time.sleep(0.2)  # the next frame is due

def loader(n): return torch.utils.data.DataLoader(torch.ones(n, 2))

def fit(*callbacks, epochs=3, bar=None, again=0, validate=False):
    checkpoint = ModelCheckpoint(f"{sys.argv[1]}/{name}", monitor="val_loss")
    callbacks = [bar or RichProgressBar(), checkpoint, Wait(), *callbacks]
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, logger=False, default_root_dir=sys.argv[1])
    trainer.command = "trainkit fit --config a.yaml"
    net = Net()
    trainer.fit(net, loader(25), loader(5))
    if again:
        trainer.max_epochs = epochs + again
        trainer.fit(net, loader(25), loader(5))
    if validate:
        trainer.validate(net, loader(5))

def scene(text):
    global name
    name = text
    print(f"=== {name}", flush=True)

os.chdir(sys.argv[1])
seed_everything(7, verbose=False)

scene("file")
terminal, file = os.dup(1), os.open("file.txt", os.O_CREAT | os.O_WRONLY)
os.dup2(file, 1); fit(); print("rich loaded:", "rich" in sys.modules, flush=True); os.dup2(terminal, 1)

from rich.live import Live

def size(columns): fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
def fail(): raise RuntimeError("broken on purpose")

scene("whole"); fit(Do(lambda: print("from a print")), Do(lambda: warnings.warn("from a warning")))
scene("no_color"); os.environ["NO_COLOR"] = "1"; fit(); del os.environ["NO_COLOR"]
scene("narrow"); size(40); fit(); size(80)
scene("dumb"); os.environ["TERM"] = "dumb"; fit(); os.environ["TERM"] = "xterm-256color"
scene("ci"); os.environ["CI"] = "true"; fit(epochs=1); del os.environ["CI"]
scene("twice"); fit(epochs=1, again=1, validate=True)
scene("nested")
with Live("a Live of the user's", auto_refresh=False): fit(epochs=1)
scene("leave"); fit(epochs=2, bar=RichProgressBar(leave=True))
scene("exception")
try: fit(Do(fail))
except RuntimeError: print("stdout is", type(sys.stdout).__name__)
class UntilCtrlC(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 10):
            print("press ctrl-c now")
            for _ in range(1000):
                if not trainer.interrupted: time.sleep(0.01)

scene("ctrl-c")
try: fit(UntilCtrlC())
except KeyboardInterrupt: print("left")
"""


class Scene:
    """What came through the pseudo-terminal between two marks: the final screen, and the live lines on the way."""

    def __init__(self, data: bytes, columns: int) -> None:
        self.bytes = data
        screen = pyte.Screen(columns, 60)
        stream = pyte.ByteStream(screen)
        self.live: list[str] = []
        for piece in re.split(rb"(?=\r)", data):
            stream.feed(piece)
            line = screen.display[screen.cursor.y].rstrip()
            if re.match(r"(epoch \d+/|validate|sanity)", line):
                self.live.append(line)
        self.lines = [re.sub(r"\d:\d\d\b", "0:00", line.rstrip()) for line in screen.display if line.strip()]
        self.text = "".join(line.ljust(columns) for line in screen.display)  # wrapped lines are whole again
        self.cursor_is_hidden = screen.cursor.hidden

    @property
    def colours(self) -> set[int]:
        codes = re.findall(rb"\x1b\[([0-9;]*)m", self.bytes)
        return {int(part) for code in codes for part in code.split(b";") if part} - {0, 1, 2}


@pytest.fixture(scope="module")
def scenes(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    """Run all scenes in one process on a pseudo-terminal of 80 columns, and press Ctrl-C when it asks for it."""
    folder = tmp_path_factory.mktemp("terminal")
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "COLUMNS")}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": str(checkout), "PYTHONWARNINGS": "default"}
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # else Ctrl-C is only a character
    )  # fmt: skip
    os.close(slave)
    received, pressed = b"", False
    while select.select([master], [], [], 60)[0]:
        try:
            data = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        received += data
        if not pressed and b"press ctrl-c now" in received:
            pressed = True
            time.sleep(0.05)  # let the print return: the interrupt belongs into the step
            os.write(master, b"\x03")
    os.close(master)
    assert process.wait(60) == 0, received.decode(errors="replace")
    parts = (part.partition(b"\n") for part in received.split(b"=== ")[1:])
    named = {name.decode().strip(): body for name, _, body in parts}
    named["file"] = (folder / "file.txt").read_bytes()
    return {name: Scene(body, 40 if name == "narrow" else 80) for name, body in named.items()}


TITLES = "epoch  train_loss  val_loss     time"
ROWS = [
    "    1       1.000    0.5000     0:00  \u2605 best",
    "    2      0.5000    0.2500     0:00  \u2605 best",
    "    3      0.3333    0.7500     0:00",
]


# ---------------------------------------------------------------------- on a terminal
def test_a_terminal_keeps_a_header_a_row_per_epoch_and_how_to_go_on(scenes: dict[str, Scene]) -> None:
    scene = scenes["whole"]
    assert scene.lines[0].startswith("run     /")
    assert scene.lines[1:8] == [
        "model   Net, 3 parameters",
        "data    train 25 samples, val 5 samples",
        "device  cpu, 32-true, seed 7",
        "layer  type    parameters  mode",
        "layer  Linear           3  train",
        "total                   3  under 0.01 MB",
        "all trainable",
    ]
    assert [line for line in scene.lines if line in (TITLES, *ROWS)] == [TITLES, *ROWS]
    assert scene.lines[-4:] == [
        "done    3 epochs, 75 steps in 0:00",
        "best    val_loss 0.2500 in epoch 2, step 50",
        "saved   whole/epoch=1-step=50.ckpt",
        "resume  trainkit fit --config a.yaml --ckpt_path whole/epoch=1-step=50.ckpt",
    ]


def test_the_live_line_has_epoch_bar_pace_times_and_training_metrics(scenes: dict[str, Scene]) -> None:
    # nothing is read for the frame before an epoch's first batch
    training = [line for line in scenes["whole"].live if line.startswith("epoch 2/3") and " 0/25" not in line]
    assert training
    for line in training:
        assert re.fullmatch(r"epoch 2/3  [━╸─]+  [ \d]\d/25  [ \d.]{4} it/s  0:0\d < 0:0\d  train_loss 0.5000", line), (
            line
        )


def test_live_lines_leave_nothing_behind(scenes: dict[str, Scene]) -> None:
    for name in ("whole", "no_color", "narrow", "twice", "exception", "ctrl-c"):
        assert scenes[name].live, name
        assert not [line for line in scenes[name].lines if re.match(r"epoch \d+/|validate  |sanity", line)], name
        assert not scenes[name].cursor_is_hidden, name


def test_prints_and_warnings_go_above_the_live_line_once(scenes: dict[str, Scene]) -> None:
    lines = scenes["whole"].lines
    assert lines.count("from a print") == 1
    assert sum("UserWarning: from a warning" in line for line in lines) == 1
    assert lines.index(ROWS[0]) < lines.index("from a print") < lines.index(ROWS[1])


def test_no_color_keeps_the_bar_and_the_mark(scenes: dict[str, Scene]) -> None:
    assert scenes["whole"].colours
    scene = scenes["no_color"]
    assert scene.colours == set()
    assert any("━" in line for line in scene.live)
    assert [line for line in scene.lines if line in ROWS] == ROWS


def test_forty_columns_show_what_fits(scenes: dict[str, Scene]) -> None:
    scene = scenes["narrow"]
    assert max(map(len, scene.live)) <= 37
    assert any(re.fullmatch(r"epoch 2/3  ([━╸─]+  )?[ \d]\d/25  .*0:0\d < 0:0\d.*", line) for line in scene.live)
    assert "epoch  val_loss     time" in scene.lines  # what is monitored is the last column to go
    assert "    2    0.2500     0:00  \u2605 best" in scene.lines
    assert "resume  trainkit fit --config a.yaml --ckpt_path narrow/epoch=1-step=50.ckpt" in scene.text


@pytest.mark.parametrize("name", ["dumb", "ci"])
def test_a_dumb_terminal_and_ci_get_plain_lines(scenes: dict[str, Scene], name: str) -> None:
    text = scenes[name].bytes.replace(b"\r\n", b"\n")  # the terminal's own line ends
    assert b"\r" not in text
    assert b"\x1b" not in text
    assert text.isascii()
    assert b"epoch=1/" in text


def test_a_second_fit_repeats_neither_header_nor_summary(scenes: dict[str, Scene]) -> None:
    lines = scenes["twice"].lines
    starts = Counter(line.split(" ")[0] for line in lines)
    assert (starts["model"], starts["layer"], starts["total"]) == (1, 2, 1)  # "layer" is also this layer's name
    assert (starts["epoch"], starts["done"], starts["resume"]) == (2, 2, 2)


def test_a_validation_alone_shows_a_live_line_and_keeps_none(scenes: dict[str, Scene]) -> None:
    alone = [line for line in scenes["twice"].live if line.startswith("validate  ") and "/5" in line]
    assert alone
    assert scenes["twice"].lines[-2:] == ["Validate metric   DataLoader 0", "val_loss                  0.75"]


def test_an_active_live_of_the_user_gets_plain_lines(scenes: dict[str, Scene]) -> None:
    lines = scenes["nested"].lines
    assert "epoch=1/1 step=25 train_loss=1.000 val_loss=0.5000 elapsed=0:00 best=yes" in lines
    assert lines[-1] == "a Live of the user's"


def test_leave_keeps_each_epochs_live_line(scenes: dict[str, Scene]) -> None:
    kept = [line for line in scenes["leave"].lines if line.startswith("epoch ") and "25/25" in line]
    assert [line[:9] for line in kept] == ["epoch 1/2", "epoch 2/2"]


def test_an_error_is_told_in_a_line_and_stdout_is_given_back(scenes: dict[str, Scene]) -> None:
    scene = scenes["exception"]
    assert "failed with RuntimeError after step 36, newest checkpoint: exception/epoch=0-step=25.ckpt" in scene.text
    assert "resume  trainkit fit --config a.yaml --ckpt_path exception/epoch=0-step=25.ckpt" in scene.text
    assert scene.lines[-1] == "stdout is TextIOWrapper"


def test_ctrl_c_tells_where_the_run_was_saved_and_how_to_resume(scenes: dict[str, Scene]) -> None:
    scene = scenes["ctrl-c"]
    assert "interrupted after step 36, checkpoint saved: ctrl-c/last.ckpt" in scene.lines
    assert "resume  trainkit fit --config a.yaml --ckpt_path ctrl-c/last.ckpt" in scene.lines
    assert scene.lines[-1] == "left"


# ---------------------------------------------------------------------- not on a terminal
def test_a_file_gets_plain_lines_and_no_rich(scenes: dict[str, Scene]) -> None:
    text = scenes["file"].bytes
    assert b"\r" not in text
    assert b"\x1b" not in text
    assert text.isascii()
    header, *lines = re.sub(r"\d:\d\d\b", "0:00", text.decode()).splitlines()
    assert header.startswith("run=/")
    assert header.endswith("model=Net parameters=3 train_samples=25 val_samples=5 device=cpu precision=32-true seed=7")
    assert lines[4:] == [
        "epoch=1/3 step=25 train_loss=1.000 val_loss=0.5000 elapsed=0:00 best=yes",
        "epoch=2/3 step=50 train_loss=0.5000 val_loss=0.2500 elapsed=0:00 best=yes",
        "epoch=3/3 step=75 train_loss=0.3333 val_loss=0.7500 elapsed=0:00",
        "done epochs=3 step=75 elapsed=0:00 best_val_loss=0.2500 best_epoch=2 best_step=50 "
        "checkpoint=file/epoch=1-step=50.ckpt",
        "resume: trainkit fit --config a.yaml --ckpt_path file/epoch=1-step=50.ckpt",
        "rich loaded: False",
    ]


class Net(Module):
    """Takes one second a step on a clock of the test's, and logs what it is told to."""

    def __init__(self, clock: Clock | None = None, **logs: dict[str, Any]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.clock, self.logs = clock, logs

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.clock is not None:
            self.clock.now += self.clock.step
        for name, options in self.logs.items():
            if not name.startswith("val"):
                self.log(name, 1.0, **options)
        return self.layer(batch).mean() * 0 + 0.25

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.clock is not None:
            self.clock.now += self.clock.step
        for name, options in self.logs.items():
            if name.startswith("val"):
                self.log(name, 2.0 + self.current_epoch, **options)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Clock:
    def __init__(self, step: float) -> None:
        self.now, self.step = 1000.0, step

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Clock]:
    """A clock that the test moves, in place of the monotonic one."""

    def make(step: float) -> Clock:
        made = Clock(step)
        monkeypatch.setattr(progress_module, "monotonic", made)
        monkeypatch.setattr(run_facts_module, "monotonic", made)
        monkeypatch.setattr(timer_module, "monotonic", made)
        return made

    return make


def loader(batches: int) -> Any:
    return torch.utils.data.DataLoader(torch.ones(batches, 2))


def run(
    net: Module, *callbacks: Callback, train: int = 4, val: int | None = None, again: bool = False, **settings: Any
) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "max_epochs": 1}
    trainer = Trainer(callbacks=list(callbacks), **{**quiet, **settings})
    trainer.fit(net, loader(train), loader(val) if val else None)
    return trainer


def terminal(width: int = 80, **options: Any) -> tuple[RichProgressBar, io.StringIO]:
    """Return a bar that draws as if on a terminal, and where it draws."""
    file = io.StringIO()
    kwargs = {"file": file, "force_terminal": True, "width": width, "legacy_windows": False, "_environ": {}}
    return RichProgressBar(console_kwargs=kwargs, **options), file


def plain(file: io.StringIO) -> str:
    """Return all that was drawn, a line for each time, without styles and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()))


def screen(file: io.StringIO, width: int = 80) -> list[str]:
    """Return the lines a terminal would show in the end."""
    display = pyte.Screen(width, 100)
    pyte.Stream(display).feed(file.getvalue().replace("\n", "\r\n"))
    return [line.rstrip() for line in display.display if line.strip()]


def test_the_first_status_line_comes_after_5_seconds_then_one_every_30(
    clock: Callable[[float], Clock], capsys: pytest.CaptureFixture[str]
) -> None:
    run(Net(clock(1.0)), train=80)
    lines = [line for line in capsys.readouterr().out.splitlines() if "batch=" in line]
    assert lines == [
        "epoch=1/1 batch=5/80 step=5 rate=1.00/s elapsed=0:05 remaining=1:15 loss=0.2500",
        "epoch=1/1 batch=35/80 step=35 rate=1.00/s elapsed=0:35 remaining=0:45 loss=0.2500",
        "epoch=1/1 batch=65/80 step=65 rate=1.00/s elapsed=1:05 remaining=0:15 loss=0.2500",
    ]


def test_an_epochs_line_counts_as_a_sign_of_life(
    clock: Callable[[float], Clock], capsys: pytest.CaptureFixture[str]
) -> None:
    run(Net(clock(1.0)), train=4, max_epochs=10)
    assert not [line for line in capsys.readouterr().out.splitlines() if "batch=" in line]


def test_a_long_validation_shows_signs_of_life_too(
    clock: Callable[[float], Clock], capsys: pytest.CaptureFixture[str]
) -> None:
    run(Net(clock(1.0), val_loss={}), train=3, val=40, num_sanity_val_steps=0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "validate=" in line]
    assert [re.sub(r" rate.*", "", line) for line in lines] == ["epoch=1/1 validate=2/40", "epoch=1/1 validate=32/40"]


# ---------------------------------------------------------------------- cost
def test_a_step_costs_one_call_and_less_than_a_microsecond() -> None:
    bar, _ = terminal()
    calls: list[str] = []
    costs: list[float] = []

    class Measure(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            bar._due += 60.0  # no frame is due

            def step() -> None:
                bar.on_train_batch_end(trainer, module, outputs, batch, batch_idx)

            def profile(frame: Any, event: str, argument: Any) -> None:
                if event in ("call", "c_call"):
                    calls.append(frame.f_code.co_name if event == "call" else argument.__name__)

            before = sys.getprofile()
            sys.setprofile(profile)
            bar.on_train_batch_end(trainer, module, outputs, batch, batch_idx)
            sys.setprofile(before)
            costs.append(min(timeit.repeat(step, number=2000, repeat=10)) / 2000)

    run(Net(), bar, Measure(), train=1)
    assert calls == ["on_train_batch_end", "monotonic", "setprofile"]
    assert costs[0] < 1e-6


def test_metrics_are_read_for_frames_only_and_frames_come_at_most_five_times_a_second(
    clock: Callable[[float], Clock],
) -> None:
    reads = 0

    class Counting(RichProgressBar):
        def get_metrics(self, trainer: Any, module: Any) -> dict[str, Any]:
            nonlocal reads
            reads += 1
            return super().get_metrics(trainer, module)

    _, file = terminal()
    bar = Counting(console_kwargs={"file": file, "force_terminal": True, "width": 80})
    run(Net(clock(0.01), loss={"prog_bar": True}), bar, train=500)
    assert 20 <= reads <= 25 + 1  # 5 seconds, and the row
    assert len(re.findall(r"epoch 1/1", file.getvalue())) <= 5 * 5 + 2  # prints redraw the last one


def test_refresh_rate_is_how_often_a_second_it_draws_at_most(clock: Callable[[float], Clock]) -> None:
    for rate, frames in ((0.5, 5), (1, 10), (2, 20), (100, 50)):
        bar, file = terminal(refresh_rate=rate)
        run(Net(clock(0.1)), bar, train=100)
        drawn = len(set(re.findall(r" (\d+)/100", plain(file))))
        assert frames * 0.6 <= drawn <= frames + 1, rate


def test_refresh_rate_0_shows_nothing_and_a_bad_one_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    bar = RichProgressBar(refresh_rate=0)
    assert bar.is_disabled
    run(Net(), bar)
    assert capsys.readouterr().out == ""
    with pytest.raises(MisconfigurationException, match="refresh_rate"):
        RichProgressBar(refresh_rate=-1)


# ---------------------------------------------------------------------- rows
def test_columns_appear_when_their_metrics_do(clock: Callable[[float], Clock]) -> None:
    bar, file = terminal()
    run(Net(loss={}, val_loss={}), bar, train=2, val=1, max_epochs=3, check_val_every_n_epoch=2, num_sanity_val_steps=0)
    assert [re.sub(r"\d:\d\d$", "", line).split() for line in screen(file)[4:-1]] == [
        ["epoch", "loss", "time"],
        ["1", "1.000"],
        ["epoch", "loss", "val_loss", "time"],
        ["2", "1.000", "3.000"],
        ["3", "1.000"],  # no validation in this epoch: the old value is not its
    ]


def test_a_metric_of_step_and_epoch_is_one_column_and_one_live_metric(clock: Callable[[float], Clock]) -> None:
    bar, file = terminal()
    run(Net(clock(1.0), loss={"prog_bar": True, "on_step": True, "on_epoch": True}), bar)
    text = file.getvalue()
    assert "loss_step" not in text
    assert "loss_epoch" not in text
    assert "loss 1.000" in text


def test_metrics_of_the_bar_and_the_monitored_one_get_the_room() -> None:
    bar, file = terminal(width=60)
    options: dict[str, dict[str, Any]] = {f"metric_number_{n}": {"on_epoch": True} for n in range(8)}
    options["metric_number_6"]["prog_bar"] = True
    run(Net(**options, val_loss={}), bar, EarlyStopping("val_loss"), val=1, num_sanity_val_steps=0)
    titles = next(line for line in screen(file, 60) if line.startswith("epoch"))
    assert titles.split() == ["epoch", "metric_number_6", "val_loss", "time"]


@pytest.mark.parametrize(("mode", "stars"), [("min", [True, False, False]), ("max", [True, True, True])])
def test_the_mark_goes_by_the_monitored_metric_and_its_mode(mode: str, stars: list[bool]) -> None:
    bar, file = terminal()
    run(Net(val_loss={}), bar, EarlyStopping("val_loss", mode=mode, patience=9), val=1, max_epochs=3)
    assert ["best" in line for line in screen(file)[5:8]] == stars


def test_without_anything_monitored_nothing_is_marked() -> None:
    bar, file = terminal()
    run(Net(val_loss={}), bar, val=1, max_epochs=2)
    assert not any("best" in line for line in screen(file))


def test_a_resumed_run_says_so_and_marks_only_what_beats_the_best_before_it() -> None:
    bar, file = terminal()
    for epochs, path, progress in ((1, None, []), (2, "kept/epoch=0-step=4.ckpt", [bar])):
        checkpoint = ModelCheckpoint("kept", monitor="val_loss")
        trainer = Trainer(
            max_epochs=epochs, callbacks=[*progress, checkpoint], logger=False, enable_model_summary=False
        )
        trainer.fit(Net(val_loss={}), loader(4), loader(1), ckpt_path=path)
    lines = screen(file)
    assert lines[1] == "from    kept/epoch=0-step=4.ckpt"
    assert lines[6].split()[:2] == ["2", "3.000"]
    assert "best" not in lines[6]
    assert lines[8] == "best    val_loss 2.000 before this run"
    assert lines[-1] == 'resume  trainer.fit(model, ckpt_path="kept/epoch=0-step=4.ckpt")'


def test_an_epoch_stopped_by_max_steps_has_its_row_and_its_time_left(clock: Callable[[float], Clock]) -> None:
    bar, file = terminal()
    run(Net(clock(1.0), loss={}), bar, train=100, max_steps=10)
    assert "4/100  1.00 it/s  0:04 < 0:06" in plain(file)
    assert screen(file)[-1] == "done    0 of 1 epochs, 10 steps in 0:10"
    assert screen(file)[-2].split()[:2] == ["1", "1.000"]


# ---------------------------------------------------------------------- time left
def test_time_left_is_the_whole_fits_with_its_validations(clock: Callable[[float], Clock]) -> None:
    bar, file = terminal()
    run(Net(clock(1.0), val_loss={}), bar, train=10, val=5, max_epochs=4, num_sanity_val_steps=0)
    left = re.findall(r"epoch (\d)/4 .*?(\d+)/10 .*? (\S+) < (\S+)", plain(file))
    assert ("1", "4", "0:04", "0:36") in left  # nobody knows yet how long a validation takes
    assert ("2", "1", "0:16", "0:44") in left
    assert ("4", "10", "0:55", "0:05") in left


def test_time_left_of_a_fit_without_an_end_is_the_epochs(clock: Callable[[float], Clock]) -> None:
    bar, file = terminal()

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.should_stop = True

    run(Net(clock(1.0)), bar, Stop(), train=8, max_epochs=-1)
    assert re.search(r"^epoch 1  .* 3/8  1.00 it/s  0:03 < 0:05", plain(file), re.MULTILINE)


def test_time_left_ends_with_max_time(clock: Callable[[float], Clock]) -> None:
    bar, file = terminal()
    run(Net(clock(1.0)), bar, train=8, max_epochs=1000, max_time={"seconds": 20})
    assert "1.00 it/s  0:08 < 0:12" in plain(file)


def test_a_loader_without_a_length_has_counts_and_no_bar(clock: Callable[[float], Clock]) -> None:
    bar, file = terminal()

    class Endless:
        def __iter__(self) -> Iterator[Any]:
            return (torch.ones(1, 2) for _ in range(5))

    trainer = Trainer(max_epochs=1, callbacks=[bar], logger=False, enable_checkpointing=False)
    trainer.fit(Net(clock(1.0)), Endless())
    assert "data    train unknown" in screen(file)
    assert "epoch 1/1  4 batches  1.00 it/s  0:04  loss 0.2500" in plain(file)


# ---------------------------------------------------------------------- using it
def test_it_can_be_switched_off_and_on_during_a_run(clock: Callable[[float], Clock]) -> None:
    bar, file = terminal()

    class Switch(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            (bar.disable if trainer.current_epoch == 1 else bar.enable)()

    run(Net(clock(1.0), loss={}), Switch(), bar, max_epochs=3)
    assert [line.split()[0] for line in screen(file)[4:7]] == ["epoch", "1", "3"]


def test_a_bar_with_metrics_of_its_own_shows_those(clock: Callable[[float], Clock]) -> None:
    class Mine(RichProgressBar):
        def get_metrics(self, trainer: Any, module: Any) -> dict[str, Any]:
            return {**super().get_metrics(trainer, module), "temperature": torch.tensor(36.6), "note": "ok"}

    file = io.StringIO()
    run(Net(clock(1.0)), Mine(console_kwargs={"file": file, "force_terminal": True, "width": 100}))
    assert "loss 0.2500  temperature 36.60  note ok" in plain(file)


def test_it_can_be_copied_and_pickled_during_a_run() -> None:
    bar, file = terminal()
    copies: list[RichProgressBar] = []

    class Copy(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            copies.append(copy.deepcopy(bar))

    run(Net(), bar, Copy(), train=1)
    assert copies[0].is_enabled
    assert pickle.loads(pickle.dumps(RichProgressBar(leave=True))).leave
    assert screen(file)[-1].startswith("done")


def test_the_base_knows_sizes_and_metrics_and_draws_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    with pytest.raises(TypeError, match="no trainer yet"):
        _ = bar.trainer
    seen: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.append((bar.total_train_batches, bar.total_val_batches, bar.get_metrics(trainer, module)))

    trainer = run(Net(loss={"prog_bar": True}, val_loss={}), bar, Look(), train=1, val=3)
    assert seen == [(1, 3, {"loss": 1.0})]
    assert trainer.progress_bar_callback is bar
    bar.print("a", 1, sep="-")
    assert capsys.readouterr().out == "a-1\n"


def test_a_failed_setup_shows_what_was_printed_before_and_no_ending(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Net):
        def on_fit_start(self) -> None:
            self.trainer.print("about to break")
            raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        run(Broken(), RichProgressBar())
    assert capsys.readouterr().out == "about to break\n"


def test_a_rate_that_is_published_becomes_a_column() -> None:
    bar, file = terminal()
    trainer = Trainer(max_epochs=1, callbacks=[bar, LearningRateMonitor()], log_every_n_steps=1, limit_train_batches=2)
    trainer.fit(Net(), loader(4))
    assert any(line.split() == ["epoch", "lr-SGD", "time"] for line in screen(file))


# ---------------------------------------------------------------------- the parts
@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00"), (1.9, "0:01"), (723, "12:03"), (3723, "1:02:03"), (360000, "100:00:00")]
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (0.5, "0.5000"), (1.0, "1.000"), (12.345, "12.35"), (1234.5, "1234"), (0.0123, "0.0123"),
     (0.001, "0.00100"), (1e-5, "1.00e-05"), (2.5e7, "2.50e+07"), (-0.25, "-0.2500"), (float("nan"), "nan"),
     (float("-inf"), "-inf"), (3, "3"), (True, "True"), ("text", "text")],
)  # fmt: skip
def test_numbers_keep_about_four_digits_and_their_width(value: Any, text: str) -> None:
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(0.05, "0.0500"), (5.0, "5.00"), (54.1, "54.1"), (99.97, " 100"), (12345.6, "12346")]
)
def test_rates_keep_their_width(rate: float, text: str) -> None:
    assert rate_text(rate) == f"{text} it/s"


@pytest.mark.parametrize("width", [1, 10, 20, 40, 60, 77, 117, 200])
def test_a_live_line_never_is_wider_than_its_room(width: int) -> None:
    metrics = {f"a_metric_with_a_name_{n}": n / 7 for n in range(20)}
    frame = Frame("fit", "123/1000", 312, 4500, 9999, 54.1, 4321.0, 98765.0, metrics)
    display = Terminal(RichProgressBarTheme(), False, {"file": io.StringIO(), "width": width + 3})
    line = display.live_line(frame, width).plain
    assert len(line) <= max(width, len("epoch 123/1000   312/4500"))


def test_a_terminal_that_can_only_do_ascii_gets_ascii() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    bar = RichProgressBar(console_kwargs={"file": file, "force_terminal": True, "width": 80})
    run(Net(val_loss={}), bar, EarlyStopping("val_loss"), val=1)
    file.seek(0)
    assert "* best" in file.read()


def test_a_theme_sets_styles_and_the_form_of_numbers(clock: Callable[[float], Clock]) -> None:
    bar, file = terminal(theme=RichProgressBarTheme(metrics="red", metrics_format=".1f", progress_bar="blue"))
    run(Net(clock(1.0), loss={"prog_bar": True}), bar)
    assert "\x1b[31mloss 1.0" in file.getvalue()
    assert "\x1b[34m\u2501" in file.getvalue()


@pytest.mark.parametrize("variable", ["TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_richs_variables_can_turn_the_live_line_off(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("CI", "TERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert console_module.shows_live_line(Tty())
    monkeypatch.setenv(variable, "0")
    assert not console_module.shows_live_line(Tty())
    assert not console_module.shows_live_line(None)
