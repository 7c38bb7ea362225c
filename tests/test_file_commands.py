"""`trainkit inspect` and `trainkit convert`, as somebody at a terminal sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.checkpoint import archive, format, store, table
from trainkit.cli import main

THEIRS = Path(__file__).parent / "lightning" / "checkpoints"


def weights(count: int = 2) -> dict[str, torch.Tensor]:
    return {f"layers.{number}.weight": torch.full((3, 4), float(number)) for number in range(count)}


def damaged(path: Path, tensor: torch.Tensor) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(tensor.numpy().tobytes())] ^= 1
    path.write_bytes(content)


def test_inspect_shows_what_is_in_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(THEIRS / "callbacks.ckpt"), "x.ckpt"]) == 0
    capsys.readouterr()
    assert main(["inspect", "x.ckpt"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("x.ckpt\n  whole        yes, every byte of 18 records (13.6 kB) verified\n")
    for line in (
        f"  written by   trainkit 0.1.0 with torch {torch.__version__}",
        "  at           epoch 1, global_step 10",
        "  weights      2 tensors, 3 numbers, float32, all finite",
        "               layer.weight  float32   1 x 2",
        "               layer.bias    float32   1",
        "  optimizers   2 parameters in 1 group, lr 0.025",
        "  module takes lr         0.1",
        "               betas      (0.9, 0.99)",
        "  data takes   batch_size  4",
    ):
        assert f"{line}\n" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_inspect_says_which_record_is_damaged_and_still_shows_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("good.ckpt", "bad.ckpt"):
        store.save(name, {"epoch": 0, "global_step": 7, "state_dict": weights()})
    damaged(Path("bad.ckpt"), weights()["layers.1.weight"])
    assert main(["inspect", "good.ckpt", "bad.ckpt"]) == 1
    good, bad = capsys.readouterr().out.split("\n\n")
    assert "whole        yes" in good
    flat = " ".join(bad.split())
    assert "bad.ckpt whole no: it is damaged: the record data/1 (state_dict/layers.1.weight) was changed since" in flat
    assert "epoch 0, global_step 7" in flat


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere.ckpt", "it can't be read: no such file or directory"),
        (".", "it can't be read: is a directory"),
        (str(THEIRS / "middle.ckpt"), "One that Lightning or torch.save wrote is made into one by: trainkit convert"),
        (__file__, "it is not a checkpoint of trainkit"),
        ("/dev/null", "it is refused: it is a pipe or a device, not a file"),
    ],
)
def test_inspect_says_what_else_a_file_may_be(path: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", path]) == 1
    assert reason in " ".join(capsys.readouterr().out.split())


def test_inspect_says_that_weights_are_not_finite_and_lists_ten_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    store.save("x.ckpt", {"state_dict": {**weights(14), "bad": torch.tensor(float("nan"))}})
    assert main(["inspect", "x.ckpt"]) == 0
    shown = capsys.readouterr().out
    assert "15 tensors, 169 numbers, float32, NOT FINITE" in shown
    assert "layers.9.weight" in shown
    assert "layers.10.weight" not in shown
    assert "and 5 more: --all shows them" in shown
    assert main(["inspect", "x.ckpt", "--all"]) == 0
    assert "layers.13.weight  float32   3 x 4\n" in capsys.readouterr().out


def test_what_a_file_says_can_not_play_with_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    store.save(
        "x.ckpt", {"state_dict": {"\x1b[2J" + "n" * 300: torch.zeros(1)}, "hyper_parameters": {"\r\n\x07": "\x1b"}}
    )
    assert main(["inspect", "x.ckpt"]) == 0
    shown = capsys.readouterr().out
    assert not any(character in shown for character in "\x1b\x07\r")
    assert max(map(len, shown.splitlines())) <= 80


def test_inspect_is_not_led_astray_by_a_table_that_only_looks_like_one(capsys: pytest.CaptureFixture[str]) -> None:
    for shape in (["x"], 7, [[]]):
        tensor = {"record": "data/0", "dtype": "float32", "shape": shape}
        state = json.dumps({"state_dict": {"w": {"$tensor": tensor}}})
        with open("x.ckpt", "wb") as file:
            writer = archive.Writer(file)
            writer.add(archive.TABLE, table.compose(state, [], True, {}))
            writer.close()
        assert main(["inspect", "x.ckpt"]) == 1
        assert "no: its trainkit.json is not what trainkit writes." in capsys.readouterr().out


def test_inspect_answers_without_torch_and_into_a_closed_pipe(checkout: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    store.save("x.ckpt", {"state_dict": weights()})
    program = (
        "import sys; from trainkit.cli import main; code = main(['inspect', 'x.ckpt']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.endswith("\nFalse\n")
    command = f"{sys.executable} -m trainkit inspect x.ckpt x.ckpt x.ckpt | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("x.ckpt\n", "")


def test_a_checkpoint_goes_to_safetensors_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    store.save("x.ckpt", {"epoch": 0, "global_step": 7, "state_dict": weights()})
    assert main(["convert", "x.ckpt", "x.safetensors"]) == 0
    assert main(["convert", "x.safetensors", "back.ckpt"]) == 0
    assert "converted x.safetensors to back.ckpt: 2 tensors, " in capsys.readouterr().out
    back = format.read("back.ckpt")
    assert list(back) == ["state_dict"]
    assert all(torch.equal(back["state_dict"][name], weight) for name, weight in weights().items())


def test_a_plain_state_dict_becomes_a_checkpoint_with_weights() -> None:
    torch.save(torch.nn.BatchNorm1d(2).state_dict(), "x.pt")
    assert main(["convert", "x.pt", "x.ckpt"]) == 0
    assert format.read("x.ckpt")["state_dict"]._metadata == {"": {"version": 2}}
    assert main(["convert", "x.pt", "x.safetensors"]) == 0


def test_a_secret_in_somebody_elses_checkpoint_is_not_copied(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 0.1, "api_key": "marker"}}, "x.ckpt")
    assert main(["convert", "x.ckpt", "y.ckpt"]) == 0
    assert "'***' in the place of api_key" in capsys.readouterr().out
    assert b"marker" not in Path("y.ckpt").read_bytes()


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("it_ran",)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_would_run_code_is_not_converted(
    force: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"state_dict": {}, "x": Evil()}, "x.ckpt")
    assert main(["convert", "x.ckpt", "y.ckpt"]) == 1
    assert "x.ckpt was refused: it holds objects (posix.mkdir)" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["x.ckpt"]


def test_nothing_is_written_over_and_what_can_not_be_done_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    store.save("x.ckpt", {"global_step": 1, "note": "no weights"})
    torch.save({"state_dict": {"w": torch.zeros(1)}}, "theirs.ckpt")
    Path("there.ckpt").write_text("mine")
    os.symlink("nowhere", "link.ckpt")
    for source, target, reason in (
        ("theirs.ckpt", "there.ckpt", "there.ckpt is there already, and nothing is overwritten"),
        ("theirs.ckpt", "link.ckpt", "link.ckpt is there already"),
        ("theirs.ckpt", "y.pt", "y.pt must end in .ckpt or .safetensors"),
        ("x.ckpt", "y.ckpt", "x.ckpt is one of trainkit's checkpoints already"),
        ("x.ckpt", "y.safetensors", "x.ckpt has no 'state_dict'; it has: global_step, note"),
        ("nothing.ckpt", "y.ckpt", "there is no checkpoint nothing.ckpt"),
        ("nothing.safetensors", "y.ckpt", "nothing.safetensors could not be read"),
        ("https://example.org/x.ckpt", "y.ckpt", "is not read from the network"),
    ):
        assert main(["convert", source, target]) == 1
        assert reason in capsys.readouterr().err
    assert Path("there.ckpt").read_text() == "mine"
    assert not Path("y.ckpt").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["inspect"], "inspect needs a file"),
        (["inspect", "--everything", "x"], "inspect has no option --everything"),
        (["convert", "x"], "convert needs two files, IN and OUT. Received: x"),
        (["convert", "x", "y", "--force"], "convert has no option --force"),
    ],
)
def test_a_wrong_command_line_says_what_is_right(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {reason}\nsee `trainkit {words[0]} --help`\n"


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_there_is_a_help_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"trainkit {command}: ")
    assert max(map(len, page.splitlines())) <= 90
    assert main(["--help"]) == 0
    assert f"\n  {command}    " in capsys.readouterr().out
