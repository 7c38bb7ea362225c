"""Balance a pole: reinforcement learning, with data that the model makes while it learns (REINFORCE).

Run it with `trainkit fit --config configs/cartpole.yaml`, or without YAML with `python examples/cartpole.py`. There
is no data set: `train_dataloader` plays, with the weights as they are at that moment. `steps` is how long the pole
stays up, of at most 500: about 22 when pushed at random, over 499 in the last three of ten epochs (200 updates, 17
seconds of one CPU core).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from trainkit import Module, Trainer, seed_everything

LONGEST = 500


class CartPoles:
    """Many carts at once, each with a pole on it; the physics of Barto, Sutton and Anderson (1983) as Gym has it.

    A state is (position in m, velocity, angle in rad, angular velocity); an action pushes left (0) or right (1).
    """

    def __init__(self, count: int) -> None:
        self.state = torch.rand(count, 4) * 0.1 - 0.05
        self.up = torch.ones(count, dtype=torch.bool)

    def step(self, actions: Tensor) -> None:
        """Push for 0.02 s, with 10 N; the cart weighs 1 kg, the pole 0.1 kg at 0.5 m from its hinge."""
        x, v, angle, spin = self.state.unbind(1)
        push = (20.0 * actions - 10.0 + 0.05 * spin**2 * angle.sin()) / 1.1
        sine, cosine = angle.sin(), angle.cos()
        turn = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        pull = push - 0.05 * turn * cosine / 1.1
        self.state = torch.stack([x + 0.02 * v, v + 0.02 * pull, angle + 0.02 * spin, spin + 0.02 * turn], dim=1)
        self.up &= (self.state[:, 0].abs() < 2.4) & (self.state[:, 2].abs() < math.radians(12))


class Games(IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """Endless rounds of `count` games, played by a policy as it is when a round is asked for."""

    def __init__(self, policy: nn.Module, count: int) -> None:
        self.policy, self.count = policy, count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        while True:
            yield self.play()

    @torch.no_grad()
    def play(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return states, actions and which of them count, each with the dimensions (time, game)."""
        poles, rounds = CartPoles(self.count), []
        while len(rounds) < LONGEST and poles.up.any():
            state, counts = poles.state, poles.up.clone()
            actions = torch.bernoulli(self.policy(state).squeeze(1).sigmoid())
            poles.step(actions)
            rounds.append((state, actions, counts))
        states, actions, counts = zip(*rounds, strict=True)
        return torch.stack(states), torch.stack(actions), torch.stack(counts)


class Balance(Module):
    """A policy that learns from whole games: what was done before the pole fell late becomes more likely.

    Williams, Simple statistical gradient-following algorithms for connectionist reinforcement learning, 1992.

    Args:
        games: played between two updates.
        discount: what a step is worth less for each step that it lies ahead.
    """

    def __init__(self, games: int = 16, discount: float = 0.99, lr: float = 0.01, width: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.policy = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor, Tensor]]:
        # no workers: they would play with a copy of the policy
        return DataLoader(Games(self.policy, self.hparams.games), batch_size=None)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        states, actions, counts = batch
        worth = torch.zeros_like(actions)  # of being in a state: the discounted steps still to come
        ahead = torch.zeros_like(actions[0])
        for time in reversed(range(len(worth))):
            worth[time] = ahead = counts[time] * (1 + self.hparams.discount * ahead)
        played = worth[counts]
        advantage = (played - played.mean()) / (played.std() + 1e-6)
        scores = self.policy(states[counts]).squeeze(1)
        losses = nn.functional.binary_cross_entropy_with_logits(scores, actions[counts], reduction="none")
        self.log("steps", counts.sum(0).float().mean(), prog_bar=True, on_epoch=True)
        return (losses * advantage).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.hparams.lr)


if __name__ == "__main__":
    seed_everything(42)
    trainer = Trainer(max_epochs=10, limit_train_batches=20, log_every_n_steps=5, default_root_dir="runs/cartpole")
    trainer.fit(Balance())
