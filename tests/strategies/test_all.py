"""What every strategy must do: keep results as they are, survive pickling, run twice, answer for all processes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from trainkit import Module, Trainer
from trainkit.strategies import SingleDeviceStrategy, Strategy

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "fused_optimizers": False,  # the last bits of a plain loop
}
STRATEGIES = {
    "auto": "auto",
    "single_device": "single_device",
    "an object": SingleDeviceStrategy("cpu"),
    "its base": Strategy("cpu"),
}


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.line(batch).square().mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def batches() -> Any:
    data = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(data, batch_size=4)  # type: ignore[arg-type]


def by_hand(epochs: int) -> Net:
    module = Net()
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for batch in batches():
            optimizer.zero_grad()
            module.line(batch).square().mean().backward()
            optimizer.step()
    return module


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture(params=STRATEGIES)
def trainer(request: pytest.FixtureRequest) -> Trainer:
    return Trainer(accelerator="cpu", max_epochs=2, strategy=copy.deepcopy(STRATEGIES[request.param]), **QUIET)


def test_weights_are_those_of_a_loop_by_hand_in_two_fits_in_a_row(trainer: Trainer) -> None:
    module = Net()
    trainer.fit(module, batches())
    assert equal(module, by_hand(2))
    second = Net()
    trainer.progress = type(trainer.progress)()
    trainer.fit(second, batches())
    assert equal(second, by_hand(2))


def test_it_can_be_copied_and_pickled(trainer: Trainer) -> None:
    for strategy in (copy.deepcopy(trainer.strategy), pickle.loads(pickle.dumps(trainer.strategy))):
        assert type(strategy) is type(trainer.strategy)
        assert strategy.device == trainer.strategy.device


def test_one_process_is_all_of_them(trainer: Trainer) -> None:
    strategy, tensor = trainer.strategy, torch.arange(3.0)
    strategy.barrier()
    assert (strategy.world_size, strategy.global_rank, strategy.local_rank, strategy.node_rank) == (1, 0, 0, 0)
    assert strategy.is_global_zero
    assert trainer.is_global_zero
    assert strategy.root_device == torch.device("cpu")
    assert strategy.broadcast({"a": 1}) == {"a": 1}
    assert torch.equal(strategy.all_gather(tensor), tensor)
    assert torch.equal(strategy.reduce(tensor), tensor)
    assert strategy.reduce_boolean_decision(True)
    assert not strategy.reduce_boolean_decision(False, all=False)


def test_a_strategy_is_a_small_class() -> None:
    asked = [name for name, value in vars(Strategy).items() if callable(value) and not name.startswith("_")]
    assert len(asked) <= 14
