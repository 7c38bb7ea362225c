"""Several loaders as one: the class by itself, in training, in evaluations, and a restart in the middle of it all."""

from __future__ import annotations

import random
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, WeightedRandomSampler

from trainkit import Callback, Module, Trainer
from trainkit.data import CombinedLoader
from trainkit.data.combined import MODES
from trainkit.errors import MisconfigurationException

BARE: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
Pair = namedtuple("Pair", "x y")


def numbers(size: int, **settings: Any) -> DataLoader[Any]:
    return DataLoader(range(size), **settings)  # type: ignore[arg-type]


# ---------------------------------------------------------------- by itself
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [("a", 0), ("b", 1)]),
        ("max_size", [("a", 0), ("b", 1), ("c", None)]),
        ("max_size_cycle", [("a", 0), ("b", 1), ("c", 0)]),
    ],
)
def test_drawing_from_all_at_once_gives_their_structure(mode: Any, expected: list[Any]) -> None:
    for make, take in [
        (lambda x, y: [x, y], tuple),
        (lambda x, y: {"x": x, "y": y}, lambda batch: (batch["x"], batch["y"])),
        (Pair, tuple),
        (lambda x, y: {"deep": [x, {"er": y}]}, lambda batch: (batch["deep"][0], batch["deep"][1]["er"])),
    ]:
        combined = CombinedLoader(make("abc", range(2)), mode)
        assert [(take(batch), idx, which) for batch, idx, which in combined] == [
            (pair, idx, 0) for idx, pair in enumerate(expected)
        ]
        assert len(combined) == len(expected)


def test_one_after_the_other_tells_whose_batch_it_is() -> None:
    combined = CombinedLoader({"x": "ab", "y": [range(1)]}, "sequential")
    assert list(combined) == [("a", 0, 0), ("b", 1, 0), (0, 0, 1)]
    assert len(combined) == 3


def test_sequential_opens_each_when_its_turn_comes_and_none_that_is_left_out() -> None:
    opened = []

    class Notes:
        def __init__(self, name: str) -> None:
            self.name = name

        def __iter__(self) -> Iterator[str]:
            opened.append(self.name)
            return iter([self.name] * 2)

    combined = CombinedLoader([Notes("a"), Notes("b"), Notes("c")], "sequential")
    combined.limits = [1, 0, 2]
    iterator = iter(combined)
    assert opened == []
    assert next(iterator) == ("a", 0, 0)
    assert opened == ["a"]
    assert list(combined)[1:] == [("c", 0, 2), ("c", 1, 2)]
    assert opened == ["a", "a", "c"]


def test_the_length_is_known_when_it_is_iterated_over() -> None:
    combined = CombinedLoader([range(3), iter(range(5))], "min_size")
    with pytest.raises(RuntimeError, match="known after iter"):
        len(combined)
    with pytest.raises(RuntimeError, match="no next batch before iter"):
        next(combined)
    iter(combined)
    assert len(combined) == 3
    with pytest.raises(TypeError, match="has no length"):
        len(iter(CombinedLoader([range(3), iter(range(5))], "max_size")))


def test_limits_are_for_each_or_for_all() -> None:
    combined = CombinedLoader([range(3), range(5)], "max_size")
    combined.limits = 2
    assert combined.limits == [2, 2]
    assert len(iter(combined)) == 2
    with pytest.raises(ValueError, match=r"limits must have one entry for each of the 2 iterables. Received: 3"):
        combined.limits = [1, 2, 3]


def test_other_iterables_may_take_the_places() -> None:
    combined = CombinedLoader({"x": range(3), "y": range(5)}, "min_size")
    combined.flattened = [[{"a"}, {"b"}], [{"c"}, {"d"}]]
    assert combined.iterables == {"x": [{"a"}, {"b"}], "y": [{"c"}, {"d"}]}
    assert [batch for batch, _, _ in combined] == [{"x": {"a"}, "y": {"c"}}, {"x": {"b"}, "y": {"d"}}]
    with pytest.raises(ValueError, match="flattened must have one entry"):
        combined.flattened = []


def test_what_loaders_have_in_common_is_shown_in_their_structure() -> None:
    combined = CombinedLoader({"x": numbers(4, batch_size=2), "y": range(3)})
    assert isinstance(combined.sampler["x"], SequentialSampler)
    assert combined.sampler["y"] is None
    assert combined.batch_sampler["x"].batch_size == 2


def test_a_mode_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mode must be one of 'min_size'.*Received: 'longest'"):
        CombinedLoader([], "longest")  # type: ignore[arg-type]


# ---------------------------------------------------------------- in a run
class Sums(Module):
    """Notes what each step gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(plain(batch))
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append((dataloader_idx, plain(batch)))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return dataloader_idx, plain(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def plain(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [plain(value) for value in batch]
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def test_training_draws_from_all_and_begins_the_shorter_again() -> None:
    module, trainer = Sums(), Trainer(**BARE, max_epochs=1)
    loaders = {"a": numbers(2), "b": [numbers(3)]}
    trainer.fit(module, loaders)
    assert module.seen == [
        {"a": [0], "b": [[0]]},
        {"a": [1], "b": [[1]]},
        {"a": [0], "b": [[2]]},
    ]
    assert trainer.num_training_batches == 3
    assert trainer.train_dataloader is loaders


@pytest.mark.parametrize(("mode", "steps"), [("min_size", 2), ("max_size", 5), ("max_size_cycle", 5)])
@pytest.mark.parametrize(("limit", "most"), [(1.0, 9), (3, 3), (0.5, None)])
def test_training_in_every_mode_counts_as_many_batches_as_it_takes(
    mode: Any, steps: int, limit: float, most: int | None
) -> None:
    trainer = Trainer(**BARE, max_epochs=2, limit_train_batches=limit)
    module = Sums()
    trainer.fit(module, CombinedLoader([numbers(5), numbers(2)], mode))
    wanted = min(steps, most) if most else {"min_size": 1, "max_size": 2, "max_size_cycle": 2}[mode]
    assert trainer.num_training_batches == wanted
    assert len(module.seen) == trainer.global_step == 2 * wanted
    assert trainer.estimated_stepping_batches == 2 * wanted


def test_training_one_after_the_other_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="mode='sequential', which only evaluations"):
        Trainer(**BARE, max_epochs=1).fit(Sums(), CombinedLoader([numbers(5), numbers(2)], "sequential"))


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [(0, [[0], [0]])]),
        ("max_size", [(0, [[0], [0]]), (0, [[1], None])]),
        ("max_size_cycle", [(0, [[0], [0]]), (0, [[1], [0]])]),
        ("sequential", [(0, [0]), (0, [1]), (1, [0])]),
    ],
)
def test_evaluations_go_through_loaders_in_every_mode(stage: str, mode: Any, expected: list[Any]) -> None:
    module = Sums()
    getattr(Trainer(**BARE), stage)(module, CombinedLoader([numbers(2), numbers(1)], mode), verbose=False)
    assert module.seen == expected


def test_validation_inside_fit_may_draw_from_all_at_once() -> None:
    module, trainer = Sums(), Trainer(**BARE, max_epochs=1, limit_train_batches=1)
    val = CombinedLoader({"a": numbers(2), "b": numbers(1)}, "max_size")
    trainer.fit(module, numbers(1), val)
    assert module.seen[1:] == [(0, {"a": [0], "b": [0]}), (0, {"a": [1], "b": None})]
    assert trainer.num_val_batches == [2, 1]


def test_predictions_come_in_a_list_for_each_loader() -> None:
    assert Trainer(**BARE).predict(Sums(), OrderedDict(a=numbers(2), b=numbers(1))) == [
        [(0, [0]), (0, [1])],
        [(1, [0])],
    ]
    for mode in set(MODES) - {"sequential"}:
        with pytest.raises(MisconfigurationException, match=f"mode='{mode}'; predict goes through loaders one after"):
            Trainer(**BARE).predict(Sums(), CombinedLoader([numbers(2), numbers(1)], mode))


# ---------------------------------------------------------------- a restart in the middle of it
class Noisy(Dataset[torch.Tensor]):
    """Samples that are augmented with whatever random source there is."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), float(torch.rand(()))])


class NoisyStream(IterableDataset[torch.Tensor]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in torch.randperm(self.size).tolist():
            yield torch.tensor([index, random.random(), np.random.rand(), float(torch.rand(()))])


class Learns(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scale = random.random() + np.random.rand()
        return sum((self.net(part) * scale).square().mean() for part in batch.values() if part is not None)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.net(batch).mean() * random.random())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class Saves(Callback):
    def __init__(self, path: Path, at: int) -> None:
        self.path, self.at = path, at

    def on_save_point(self, trainer: Trainer, module: Module) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


def resumes_exactly(make: Any, path: Path, at: int) -> None:
    """Train with what `make` makes, uninterrupted and from a checkpoint in the middle, and compare the ends."""
    ends = []
    for resumed in (False, True):
        torch.manual_seed(1)
        random.seed(2)
        np.random.seed(3)
        module = Learns()
        if resumed:  # another process has other random states
            for seed in (torch.manual_seed, random.seed, np.random.seed):
                seed(7)
        val = DataLoader(Noisy(4), 2)
        trainer = Trainer(**BARE, max_epochs=3, val_check_interval=2, callbacks=Saves(path, at))
        trainer.fit(module, make(), val, ckpt_path=path if resumed else None)
        ends.append((module.state_dict(), trainer.callback_metrics["val"], trainer.global_step))
    (before, metric, steps), (after, metric_after, steps_after) = ends
    assert steps == steps_after
    assert torch.equal(metric, metric_after)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("at", [7, 9])
def test_a_restart_inside_an_epoch_is_exact_in_every_mode(mode: Any, workers: int, at: int, tmp_path: Path) -> None:
    if workers and at == 9:
        pytest.skip("the same with processes: once is enough")

    def make() -> Any:
        long = DataLoader(Noisy(13), 2, shuffle=True, num_workers=workers)
        short = DataLoader(Noisy(9 if mode == "min_size" else 3), 2, shuffle=True, drop_last=mode == "min_size")
        return CombinedLoader({"long": long, "short": short}, mode)

    resumes_exactly(make, tmp_path / "middle.ckpt", at)


@pytest.mark.filterwarnings("ignore:.*can't be repositioned")
@pytest.mark.parametrize("at", [6, 7])
def test_a_restart_is_exact_with_streams_and_other_samplers_too(tmp_path: Path, at: int) -> None:
    def make() -> Any:
        weighted = DataLoader(Noisy(8), 2, sampler=WeightedRandomSampler([1.0] * 8, 8))
        return {"weighted": weighted, "stream": DataLoader(NoisyStream(6), 2)}

    resumes_exactly(make, tmp_path / "middle.ckpt", at)


def test_what_a_data_set_draws_is_the_same_in_workers_and_without() -> None:
    class Notes(Sums):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)

    seen = []
    for workers in (0, 1, 2):
        torch.manual_seed(1)
        module = Notes()
        Trainer(**BARE, max_epochs=2).fit(module, DataLoader(Noisy(7), 2, shuffle=True, num_workers=workers))
        seen.append(module.seen)
    assert seen[0] == seen[1] == seen[2]


def test_the_order_does_not_depend_on_who_was_asked_first() -> None:
    def order(**settings: Any) -> list[Any]:
        torch.manual_seed(1)
        module = Sums()
        trainer = Trainer(**{**BARE, "max_epochs": 2, **settings})
        trainer.fit(module, numbers(9, shuffle=True), [numbers(4)])
        return [entry for entry in module.seen if not isinstance(entry, tuple)]

    class AsksFirst(Callback):
        def on_fit_start(self, trainer: Trainer, module: Module) -> None:
            assert trainer.estimated_stepping_batches == 18

    assert order() == order(num_sanity_val_steps=2) == order(limit_val_batches=0) == order(callbacks=AsksFirst())
