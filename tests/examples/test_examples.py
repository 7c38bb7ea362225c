"""Every example runs from its config, script or both, a few batches of it, and learns; all say what they are.

What each file is about is tested here in one or two sentences; the numbers in its docstring come from whole runs.
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import trainkit
from trainkit import Module, Trainer, seed_everything
from trainkit.cli import main

CHECKOUT = Path(__file__).resolve().parents[2]
FILES = sorted(path.stem for path in (CHECKOUT / "examples").glob("*.py"))

SMALL = {
    "cartpole": ["--model.games", "4"],
    "char_transformer": ["--model.width", "8", "--model.layers", "1"],
    "spread_transformer": ["--model.width", "16", "--model.layers", "1"],
    "finetuning": ["--trainer.callbacks.unfreeze_backbone_at_epoch", "1", "--trainer.max_epochs", "2"],
    "streaming": ["--data.num_workers", "1"],
}
"""Options that make two batches of an example cheap."""

PRINTED = {
    "char_transformer": r"\nThe for statement.{50}",
    "ema": r"(?s)(error with the weights at the end [0-9.]+ W/m², with their moving average [0-9.]+ W/m².*){3}",
    "finetuning": r"(?s)done epochs=1.*done epochs=1.*done epochs=1",
    "gan": r"(?m)(^[ .:+*#%@=-]{160}$\s){8}",
    "k_fold": r"(?s)accuracy of each fold: (0\.\d{4}(, )?){5}.*mean 0\.\d{4}, standard deviation 0\.\d{4}",
    "regression": r"test/error +\d+",
}
"""What the scripts print, besides the row of a run that is done."""

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Import an example by its name, as from the checkout."""
    monkeypatch.syspath_prepend(str(CHECKOUT))
    return lambda name: importlib.import_module(f"examples.{name}")


def make_trainer(**options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", log_every_n_steps=1, num_sanity_val_steps=0, **(quiet | options))


def fit(module: Module, data: Any = None, **options: Any) -> dict[str, float]:
    """Train and return what was logged last."""
    trainer = make_trainer(**options)
    trainer.fit(module, datamodule=data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


# ---------------------------------------------------------------- all of them
@pytest.mark.parametrize("name", FILES)
def test_it_has_a_config_less_than_120_lines_and_a_place_on_the_page(name: str) -> None:
    assert (CHECKOUT / "configs" / f"{name}.yaml").exists()
    assert len((CHECKOUT / "examples" / f"{name}.py").read_text().splitlines()) < 120
    assert f"examples/{name}.py" in (CHECKOUT / "docs" / "examples.md").read_text()


@pytest.mark.parametrize("name", FILES)
def test_the_docstring_names_the_command(name: str) -> None:
    docstring = (CHECKOUT / "examples" / f"{name}.py").read_text().partition('"""')[2].partition('"""')[0]
    text = " ".join(docstring.split())
    assert f"configs/{name}.yaml" in text
    assert f"python examples/{name}.py" in text or f"python -m examples.{name}" in text


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("digits", "fashion_mnist")])
def test_two_batches_of_the_config_run(name: str, load: Load, capfd: pytest.CaptureFixture[str]) -> None:
    load(name)
    limits = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "2", "--trainer.accelerator", "cpu"]
    limits += ["--trainer.max_epochs", "1", "--trainer.val_check_interval", "1.0", "--trainer.log_every_n_steps", "1"]
    config = str(CHECKOUT / "configs" / f"{name}.yaml")
    assert main(["fit", "--config", config, *limits, *SMALL.get(name, [])]) == 0, capfd.readouterr()
    assert list(Path(f"runs/{name}/version_0/checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("digits", "fashion_mnist")])
def test_the_script_runs(
    name: str, load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    less = {"max_epochs": 1, "max_steps": -1, "val_check_interval": 1.0, "log_every_n_steps": 1, "accelerator": "cpu"}
    less |= {"limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1}
    monkeypatch.setattr(trainkit, "Trainer", lambda **options: Trainer(**(options | less)))
    runpy.run_path(str(CHECKOUT / "examples" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(PRINTED.get(name, "done epochs=1"), printed)
    assert os.listdir() in ([], ["runs"])  # nothing lies around in the user's folder


# ---------------------------------------------------------------- each of them
def test_the_transformer_looks_back_only_and_writes_what_its_text_is_made_of(load: Load) -> None:
    example = load("char_transformer")
    seed_everything(1)
    module = example.CharTransformer(length=16, width=16, layers=1).eval()
    text = example.encode("if x is not None")
    changed = text.clone()
    changed[-1] = 0
    assert torch.allclose(module(text[None])[0, :-1], module(changed[None])[0, :-1], atol=1e-6)
    written = module.write("if", count=5)
    assert written.startswith("if")
    assert len(written) == 7


def test_the_transformer_beats_the_letters_frequencies_soon(load: Load) -> None:
    example = load("char_transformer")
    seed_everything(1)
    module, data = example.CharTransformer(length=32, width=32, layers=1), example.Manual(length=32)
    got = fit(module, data, max_steps=100, limit_val_batches=20, val_check_interval=100)
    letters = data.train.bincount(minlength=128).float().add(1)
    expected = -(letters / letters.sum()).log2()[data.held_back].mean()
    assert got["val/bits"] < expected - 0.5


SPREAD = """
import os, runpy, sys

checkout, *way = sys.argv[1:]
sys.path.insert(0, checkout)
import torch, trainkit
from trainkit import Trainer
from trainkit.cli import main

torch.set_num_threads(1)
if way[0] == "--strategy":
    less = {"max_steps": 3, "limit_val_batches": 2, "val_check_interval": 3, "accelerator": "cpu", "logger": False}
    trainkit.Trainer = lambda **options: Trainer(**(options | less))
    sys.argv[1:] = way
    script = os.path.join(checkout, "examples", "spread_transformer.py")
    trainer = runpy.run_path(script, run_name="__main__")["trainer"]
    print("bits", float(trainer.callback_metrics["val/bits"]), type(trainer.strategy).__name__)
else:
    limits = {"max_steps": 3, "limit_val_batches": 2, "val_check_interval": 3, "accelerator": "cpu", "logger": "false"}
    options = [f"--trainer.{name}={value}" for name, value in limits.items()]
    config = os.path.join(checkout, "configs", "spread_transformer.yaml")
    main(["fit", "--config", config, *options, "--data.batch_size=16", *way])
"""


def test_one_transformer_learns_the_same_under_ddp_fsdp_and_tensor_parallelism(
    processes: Callable[..., list[Any]],
) -> None:
    found = {}
    for way in ("ddp", "fsdp", "tp"):
        ranks = processes(2, SPREAD, CHECKOUT, "--strategy", way)
        said = [re.findall(r"bits ([0-9.]+) (\w+)", rank.out)[-1] for rank in ranks]
        assert said[0] == said[1]
        found[said[0][1]] = float(said[0][0])
    assert list(found) == ["DDPStrategy", "FSDPStrategy", "ModelParallelStrategy"]
    assert max(found.values()) - min(found.values()) < 1e-4


def test_a_config_spreads_the_transformer_by_the_name_of_a_strategy(processes: Callable[..., list[Any]]) -> None:
    for way in ("--trainer.strategy=fsdp", "--trainer.strategy.class_path=ModelParallelStrategy"):
        first, _ = processes(2, SPREAD, CHECKOUT, way)
        assert re.search(r"done epochs=\d step=3", first.out)


def test_the_gan_steps_both_optimizers_in_each_batch_and_comes_nearer_to_the_digits(load: Load) -> None:
    example, digits = load("gan"), load("digits")
    seed_everything(1)
    module, data = example.DigitsGAN(width=64), digits.Digits()
    before = [part.clone() for part in module.parameters()]
    untrained = make_trainer().validate(module, datamodule=data, verbose=False)[0]["val/distance"]
    got = fit(module, data, max_epochs=4)
    assert got["val/distance"] < untrained - 3
    assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_the_distance_of_two_sets_of_images_is_0_for_the_same_and_known_for_normal_ones(load: Load) -> None:
    example = load("gan")
    torch.manual_seed(0)
    images = torch.randn(5000, 1, 8, 8)
    assert example.frechet(images, images) == pytest.approx(0, abs=1e-6)
    assert example.frechet(images, 2 * images + 1) == pytest.approx(64 * (1 + 1), rel=0.02)


def test_the_carts_fall_when_pushed_one_way_and_the_policy_learns_to_keep_them_up(load: Load) -> None:
    example = load("cartpole")
    seed_everything(1)
    poles = example.CartPoles(8)
    for _ in range(8):
        poles.step(torch.ones(8))
    assert poles.up.all()
    for _ in range(7):
        poles.step(torch.ones(8))
    assert not poles.up.any()
    module = example.Balance(games=8)
    first = fit(module, max_epochs=1, limit_train_batches=1)["steps"]
    assert fit(module, max_epochs=2, limit_train_batches=20)["steps"] > 2 * first


def test_the_table_is_dark_at_night_and_brightest_for_a_panel_that_faces_the_sun(load: Load) -> None:
    example = load("regression")
    noon = [0.0, 81.0, 12.0]  # at the equator, on the day when the sun is above it
    rows = [[*noon, 0, 0], [*noon, 60, 0], [*noon, 90, 180], [60, 355, 6.0, 0, 0]]
    flat, tilted, wall, night = example.sunshine(torch.tensor(rows)).tolist()
    assert flat == pytest.approx(1353 * 0.7, rel=1e-3)
    assert tilted == pytest.approx(flat / 2, rel=1e-2)
    assert wall < 10
    assert night == 0


def test_the_regression_learns_and_its_scale_is_in_the_checkpoint(load: Load) -> None:
    example = load("regression")
    seed_everything(1)
    module, data = example.TableMLP(), example.Panels(rows=4000)
    assert fit(module, data, max_epochs=10)["val/error"] < 150  # the mean gives 259
    assert module.state_dict()["scale"][2].tolist() == pytest.approx([12, 3.46], rel=0.05)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_each_line_is_read_once_whatever_the_number_of_workers(load: Load, workers: int, tmp_path: Path) -> None:
    example = load("streaming")
    files = [(tmp_path / f"{number}.py", number) for number in range(5)]
    for path, number in files:
        path.write_text("".join(f"line {number} {line} of this file\n" for line in range(20 * number)))
    stream = DataLoader(example.Lines(files, waiting=10), batch_size=None, num_workers=workers)
    with pytest.raises(TypeError):
        len(stream)
    lines = [text for text, _ in stream]
    assert sorted(lines) == sorted(
        f"line {number} {line} of this file" for number in range(5) for line in range(20 * number)
    )
    assert lines != list(dict.fromkeys(sorted(lines)))
    assert lines != [text for text, _ in stream]  # another order in another epoch


def test_the_reader_of_lines_learns(load: Load) -> None:
    example = load("streaming")
    seed_everything(1)
    data = example.Library(num_workers=0, packages=["asyncio", "email"])
    assert fit(example.LineReader(classes=2, lr=0.03), data, max_epochs=1, limit_train_batches=60)["val/acc"] > 0.75


def test_the_backbone_is_frozen_first_and_trained_later(load: Load) -> None:
    example = load("finetuning")
    seed_everything(1)
    module = example.FineTuned()
    data = example.SomeDigits([5, 6, 7, 8, 9], per_digit=2, batch_size=10)
    kernel = module.backbone.layer4[1].conv2.weight
    seen = []

    class Watch(example.BackboneFinetuning):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: nn.Module) -> None:
            seen.append((kernel.requires_grad, kernel.detach().clone()))

    start = kernel.detach().clone()
    fit(module, data, max_epochs=2, callbacks=Watch(1, example.a_fifth_more, train_bn=False), limit_val_batches=0)
    assert [trained for trained, _ in seen] == [False, True]
    assert torch.equal(start, seen[0][1])
    assert not torch.equal(start, seen[1][1])


def test_a_trunk_gives_its_backbone_and_not_its_head(load: Load, tmp_path: Path) -> None:
    example = load("finetuning")
    data = example.SomeDigits([0, 1], per_digit=2, batch_size=4)
    trainer, trained = make_trainer(max_epochs=1, limit_val_batches=0), example.FineTuned(classes=2)
    trainer.fit(trained, datamodule=data)
    assert sorted(int(label) for label in data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)[1]) == [
        0,
        0,
        1,
        1,
    ]
    trainer.save_checkpoint("trunk.ckpt")
    module = example.FineTuned(trunk="trunk.ckpt")
    assert module.head.out_features == 5
    for name, value in trained.backbone.state_dict().items():
        assert torch.equal(value, module.backbone.state_dict()[name])


def test_the_average_is_what_is_validated_and_left_in_the_module(load: Load) -> None:
    example, digits = load("ema"), load("digits")
    seed_everything(1)
    average, data, module = (
        example.EMAWeightAveraging(decay=0.9),
        digits.Digits(),
        digits.DigitsCNN(lr=0.01, lr_decay=1),
    )
    trainer = make_trainer(max_epochs=2, callbacks=average)
    trainer.fit(module, datamodule=data)
    logged = float(trainer.callback_metrics["val/acc"])
    assert trainer.validate(module, datamodule=data, verbose=False)[0]["val/acc"] == pytest.approx(logged)
    assert logged > 0.95


def test_the_callback_remembers_the_largest_gradients_through_a_resume(
    load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    example, digits = load("own_callback"), load("digits")
    seed_everything(1)
    first = example.GradientNorms(every_n_steps=5)
    trainer = make_trainer(max_epochs=1, callbacks=first)
    trainer.fit(digits.DigitsCNN(), datamodule=digits.Digits())
    trainer.save_checkpoint("first.ckpt")
    assert {f"gradients/{name}" for name in first.largest} <= trainer.callback_metrics.keys()
    assert len(first.largest) == 4
    assert capsys.readouterr().out.count("largest gradient of layers") == 4
    again = example.GradientNorms(every_n_steps=1000)
    make_trainer(max_epochs=2, callbacks=again).fit(
        digits.DigitsCNN(), datamodule=digits.Digits(), ckpt_path="first.ckpt"
    )
    assert {name: float(norm) for name, norm in again.largest.items()} == {
        name: float(norm) for name, norm in first.largest.items()
    }


def test_few_labels_are_enough_to_learn_and_each_loader_of_validation_has_its_name(load: Load) -> None:
    example = load("several_loaders")
    seed_everything(1)
    module, data = example.FixMatch(), example.FewLabels()
    got = fit(module, data, max_epochs=4)
    assert {"val/acc", "val/acc_torn", "train/sure"} <= got.keys()
    assert got["val/acc"] > 0.6
    assert len(data.labelled) == 40
    assert sorted({int(label) for _, label in data.labelled}) == list(range(10))


def test_the_folds_are_disjoint_and_together_everything(load: Load) -> None:
    example = load("k_fold")
    held_back: list[int] = []
    for fold in range(5):
        data = example.Folds(fold)
        data.setup("fit")
        assert len(data.train) + len(data.held_back) == 1797
        assert set(data.train.indices).isdisjoint(data.held_back.indices)
        held_back += data.held_back.indices
    assert sorted(held_back) == list(range(1797))
    with pytest.raises(ValueError, match="fold must be from 0 to 4"):
        example.Folds(5)
