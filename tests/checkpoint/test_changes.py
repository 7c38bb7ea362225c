"""A run that goes on from a checkpoint hears how it differs from the one that wrote it, before anything is changed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from trainkit import Module, Trainer, seed_everything
from trainkit.errors import CheckpointError


class Net(Module):
    def __init__(self, width: int = 3, dropout: float = 0.0, lr: float = 0.1, optimizer: str = "SGD") -> None:
        super().__init__()
        self.save_hyperparameters("width")
        self.body = nn.Sequential(nn.Linear(2, width), nn.Dropout(dropout), nn.Linear(width, 1))
        self.lr, self.optimizer = lr, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.body(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=self.lr)


def loader(samples: int = 12, **options: Any) -> DataLoader[Any]:
    options = {"batch_size": 2, "shuffle": True, **options}
    return DataLoader(TensorDataset(torch.arange(2.0 * samples).view(samples, 2)), **options)


def trainer(**settings: Any) -> Trainer:
    off = dict.fromkeys(["enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"], False)
    return Trainer(accelerator="cpu", **{**off, "max_steps": 9, **settings})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint inside the first epoch."""
    seed_everything(1, verbose=False)
    run = trainer(max_steps=4)
    run.fit(Net(), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def resume(path: Path, module: Module | None = None, data: Any = None, strict: bool = True, **settings: Any) -> Trainer:
    run = trainer(**settings)
    run.fit(module or Net(), data if data is not None else loader(), ckpt_path=path, ckpt_strict=strict)
    return run


def test_a_run_that_is_the_same_hears_nothing(path: Path) -> None:
    assert resume(path).global_step == 9


def test_more_epochs_workers_and_logging_are_no_difference(path: Path) -> None:
    resume(path, data=loader(num_workers=1), max_epochs=7, log_every_n_steps=3, num_sanity_val_steps=0)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (lambda: loader(samples=14), "order   train_dataloader, samples: 12 -> 14"),
        (lambda: loader(batch_size=3), "order   train_dataloader, batch size: 2 -> 3"),
        (lambda: loader(drop_last=True), "order   train_dataloader, drop_last: False -> True"),
        (lambda: loader(shuffle=False), "order   train_dataloader, order: RandomSampler -> SequentialSampler"),
        (lambda: {"a": loader(), "b": loader()}, "order   training loaders: 1 -> 2"),
        (
            lambda: loader(shuffle=False, sampler=WeightedRandomSampler([1.0] * 12, 12)),
            "order   train_dataloader, order: RandomSampler -> WeightedRandomSampler",
        ),
    ],
)
def test_other_samples_are_refused_and_the_module_is_as_it_was(path: Path, data: Any, line: str) -> None:
    module = Net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match="ckpt_strict=False") as refusal:
        resume(path, module, data())
    assert line in str(refusal.value)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_they_are_taken_when_that_is_said(path: Path) -> None:
    with pytest.warns(UserWarning, match="batch size: 2 -> 3\norder: other samples come"):
        run = resume(path, data=loader(batch_size=3), strict=False)
    assert run.global_step == 9


def test_what_changes_the_numbers_is_a_warning(path: Path) -> None:
    with pytest.warns(UserWarning, match="set up differently") as caught:
        resume(path, Net(dropout=0.5), accumulate_grad_batches=2, gradient_clip_val=1.0, precision="bf16-mixed")
    (message,) = [str(warning.message) for warning in caught if "set up differently" in str(warning.message)]
    assert message.splitlines()[1:-1] == [
        "  result  Trainer(precision): 32-true -> bf16-mixed",
        "  result  Trainer(accumulate_grad_batches): 1 -> 2",
        "  result  Trainer(gradient_clip_val): None -> 1.0",
        "  result  model.body.1: Dropout(p=0.0, inplace=False) -> Dropout(p=0.5, inplace=False)",
    ]


def test_what_the_checkpoint_keeps_is_said(path: Path) -> None:
    seed_everything(2, verbose=False)
    module = Net(lr=5.0)
    with pytest.warns(UserWarning, match=r"SGD\(lr\): 0.1 -> 5.0\n  kept    seed: 1 -> 2\nkept: the checkpoint's"):
        run = resume(path, module)
    assert run.optimizers[0].param_groups[0]["lr"] == 0.1


def test_sums_in_another_order_are_said(path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(
            UserWarning, match=rf"bits    threads: {threads} -> {threads + 1}\nbits: equal up to rounding"
        ):
            resume(path)
    finally:
        torch.set_num_threads(threads)


def test_a_hyperparameter_without_an_effect_on_the_weights_is_named(path: Path) -> None:
    class Renamed(Net):
        pass

    module = Net()
    module.hparams["width"] = 3.5
    with pytest.warns(UserWarning, match="maybe   hyperparameter width: 3 -> 3.5"):
        resume(path, module)


def test_weights_of_another_dtype_are_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the dtypes differ: body.0.weight \(module torch.float64"):
        resume(path, precision="64-true")


def test_parameters_in_another_order_are_refused_although_torch_would_take_them(tmp_path: Path) -> None:
    class Groups(Module):
        def __init__(self, reverse: bool) -> None:
            super().__init__()
            self.a, self.b, self.reverse = nn.Linear(2, 2), nn.Linear(2, 2), reverse

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.b(self.a(batch[0])).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            parameters = list(self.parameters())
            return torch.optim.Adam(parameters[::-1] if self.reverse else parameters)

    run = trainer(max_steps=2)
    run.fit(Groups(reverse=False), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    module = Groups(reverse=True)
    weights = module.a.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"parameter 0 of group 0 of Adam was a\.weight, and is b\.bias now"):
        resume(tmp_path / "x.ckpt", module)
    assert torch.equal(module.a.weight, weights)


def test_a_second_optimizer_that_does_not_fit_leaves_the_first_alone(tmp_path: Path) -> None:
    class Two(Net):
        def __init__(self, kinds: tuple[str, str]) -> None:
            super().__init__()
            self.kinds = kinds

        def configure_optimizers(self) -> Any:
            halves = self.body[0].parameters(), self.body[2].parameters()
            return [getattr(torch.optim, kind)(half, lr=0.1) for kind, half in zip(self.kinds, halves, strict=True)]

    run = trainer(max_steps=2)
    run.fit(Two(("Adam", "Adam")), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    module, again = Two(("Adam", "SGD")), trainer()
    weights = module.body[0].weight.detach().clone()
    with pytest.raises(CheckpointError, match="returned SGD"):
        again.fit(module, loader(), ckpt_path=tmp_path / "x.ckpt")
    assert not again.optimizers[0].state
    assert torch.equal(module.body[0].weight, weights)


def test_data_without_a_length_are_not_compared(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([[torch.ones(2)]] * 5)

    run = trainer(max_steps=3)
    run.fit(Net(), DataLoader(Stream(), batch_size=1))
    run.save_checkpoint(tmp_path / "x.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume(tmp_path / "x.ckpt", data=DataLoader(Stream(), batch_size=1))
    assert not [warning for warning in caught if "set up differently" in str(warning.message)]
