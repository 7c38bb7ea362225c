"""examples/digits.py: the data is what its note says, the split is fixed, and the first run is quick and right."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trainkit import Trainer, seed_everything
from trainkit.errors import MisconfigurationException


@pytest.fixture
def digits(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(checkout))
    return importlib.import_module("examples.digits")


def run(checkout: Path, *words: str) -> str:
    """Run python with some arguments in the current folder, as from the checkout, and return what it printed."""
    paths = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_file_is_the_one_that_its_licence_note_describes(checkout: Path) -> None:
    data = checkout / "examples" / "data"
    note = (data / "README.md").read_text()
    assert hashlib.sha256((data / "digits.csv.gz").read_bytes()).hexdigest() in note
    assert "https://creativecommons.org/licenses/by/4.0/" in note
    assert "Alpaydin" in note
    assert "Kaynak" in note


def test_the_images_are_8x8_from_0_to_1_with_every_digit_about_equally_often(
    digits: ModuleType, checkout: Path
) -> None:
    images, labels = digits.read_digits(checkout / "examples" / "data" / "digits.csv.gz")
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert labels.dtype == torch.int64
    counts = labels.bincount()
    assert len(counts) == 10
    assert counts.min() > 170


def test_the_split_is_80_to_20_and_the_same_in_every_run(digits: ModuleType) -> None:
    first, second, other = digits.Digits(), digits.Digits(), digits.Digits(split_seed=1)
    for seed, data in enumerate((first, second, other)):
        torch.manual_seed(seed)
        data.setup("fit")
    assert (len(first.train), len(first.held_back)) == (1438, 359)
    assert set(first.train.indices).isdisjoint(first.held_back.indices)
    assert first.held_back.indices == second.held_back.indices
    assert first.held_back.indices != other.held_back.indices


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file"),
        (b"", "expected rows of 64 pixels"),
        (b"0,1,2\n", "gzip"),
        (gzip.compress(b"0," * 5000)[:-12], "ended before"),
        (gzip.compress(b"no numbers\n"), "no numbers"),
        (gzip.compress(b"1,2,3\n"), "expected rows of 64 pixels"),
        (gzip.compress(b"17," + b"0," * 63 + b"1\n"), "expected rows of 64 pixels"),
        (gzip.compress(b"0," * 64 + b"10\n"), "expected rows of 64 pixels"),
        (gzip.compress(b"0," * 64 + b"1\n" + b"0,1\n"), "expected sequence of length 65"),
    ],
    ids=["missing", "empty", "not gzip", "cut off", "no numbers", "few columns", "pixel 17", "digit 10", "ragged"],
)
def test_a_file_that_can_not_be_used_is_named_with_what_to_do(
    digits: ModuleType, tmp_path: Path, content: bytes | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / "digits.csv.gz").write_bytes(content)
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(MisconfigurationException, match=expected) as caught:
        trainer.fit(digits.DigitsCNN(), datamodule=digits.Digits(root=str(tmp_path)))
    assert str(tmp_path / "digits.csv.gz") in str(caught.value)
    assert "git checkout" in str(caught.value)
    assert trainer.global_step == 0


def test_it_reaches_0_985_in_under_30_seconds_and_predicts_what_it_was_tested_on(digits: ModuleType) -> None:
    seed_everything(3)
    module, data = digits.DigitsCNN(), digits.Digits()
    trainer = Trainer(
        max_epochs=10,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    began = time.process_time()  # of one thread: whatever else runs on this machine
    trainer.fit(module, datamodule=data)
    assert time.process_time() - began < 30
    accuracy = trainer.validate(module, datamodule=data, verbose=False)[0]["val/acc"]
    assert accuracy >= 0.985
    assert trainer.test(module, datamodule=data, verbose=False)[0]["test/acc"] == accuracy
    predicted = torch.cat(trainer.predict(module, datamodule=data))
    expected = torch.tensor([int(data.held_back[i][1]) for i in range(len(data.held_back))])
    assert float((predicted == expected).float().mean()) == pytest.approx(accuracy)


def test_the_script_runs_to_its_end(checkout: Path, tmp_path: Path) -> None:
    printed = run(checkout, str(checkout / "examples" / "digits.py"))
    assert "epoch=10/10" in printed
    assert list(tmp_path.glob("runs/digits/**/checkpoints/last.ckpt"))


def test_the_config_runs(checkout: Path, tmp_path: Path) -> None:
    config = str(checkout / "configs" / "digits.yaml")
    run(checkout, "-m", "trainkit", "fit", "--config", config, "--trainer.max_epochs", "1")
    assert list(tmp_path.glob("runs/digits/version_0/checkpoints/last.ckpt"))
    assert list(tmp_path.glob("runs/digits/version_0/events.out.tfevents.*"))
