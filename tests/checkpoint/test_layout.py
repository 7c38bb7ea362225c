"""Spread tensors: gathered for a file and cut from it again, in real processes with torch's own `fully_shard`."""

from __future__ import annotations

import textwrap
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainkit.checkpoint import layout

Processes = Callable[..., list[Any]]

PREAMBLE = """
import copy, itertools, os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from trainkit.checkpoint import layout, store

torch.set_num_threads(1)
dist.init_process_group("gloo")
RANK, WORLD = dist.get_rank(), dist.get_world_size()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1))


def sharded(module, **options):
    for part in module:
        if isinstance(part, nn.Linear):
            fully_shard(part, **options)
    fully_shard(module, **options)
    return module


def step(module, optimizer, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 5, generator=g)  # the same on all ranks: the mean of the gradients is each of them
    optimizer.zero_grad()
    module(x).square().mean().backward()
    optimizer.step()
"""


def test_one_file_goes_on_under_fully_shard_and_comes_back(processes: Processes) -> None:
    processes(
        2,
        PREAMBLE
        + textwrap.dedent("""
        def optimizer_of(module):
            return torch.optim.AdamW(module.parameters(), lr=0.01)

        alone = net()
        plain = optimizer_of(alone)
        for seed in range(3):
            step(alone, plain, seed)
        if RANK == 0:
            store.save("one.ckpt", {"state_dict": alone.state_dict(), "optimizer_states": [plain.state_dict()]})
        dist.barrier()

        module = sharded(net())
        optimizer = optimizer_of(module)
        state = store.load("one.ckpt")
        module.load_state_dict(layout.as_held(state["state_dict"], module.state_dict()))
        (kept,) = layout.as_stepped(state["optimizer_states"], [optimizer])
        optimizer.load_state_dict(kept)
        steps = [values["step"] for values in optimizer.state.values()]
        assert len({one.data_ptr() for one in steps}) == len(steps) == 8  # each counts for itself
        assert all(type(one) is torch.Tensor for one in steps)
        assert all(isinstance(v["exp_avg"], DTensor) for v in optimizer.state.values())

        for seed in range(3, 6):
            step(alone, plain, seed)
            step(module, optimizer, seed)
        assert all(one.item() == 6 for one in steps)
        full = layout.whole({"w": module.state_dict(), "o": [optimizer.state_dict()]}, on_rank_zero=False)
        for name, value in alone.state_dict().items():
            assert torch.allclose(full["w"][name], value, atol=1e-6), name
        for index, values in plain.state_dict()["state"].items():
            for name, value in values.items():
                assert torch.allclose(full["o"][0]["state"][index][name], value, atol=1e-6), (index, name)

        # back: what rank 0 wrote goes on in one process; the others have shapes, and no numbers
        here = layout.whole({"w": module.state_dict(), "o": [optimizer.state_dict()]})
        assert list(here["w"]) == list(alone.state_dict()) and here["w"]._metadata == alone.state_dict()._metadata
        for name, value in alone.state_dict().items():
            assert here["w"][name].shape == value.shape and here["w"][name].dtype == value.dtype
            assert RANK == 0 or "num" in name or "running" in name or here["w"][name].untyped_storage().nbytes() == 4
        if RANK == 0:
            again = net()
            again.load_state_dict(here["w"])
            optimizer = optimizer_of(again)
            optimizer.load_state_dict(here["o"][0])
            for seed in range(6, 8):
                step(again, optimizer, seed)
                step(alone, plain, seed)
            for name, value in alone.state_dict().items():
                assert torch.allclose(again.state_dict()[name], value, atol=1e-6), name
        dist.barrier()
        """),
    )


def test_each_process_takes_its_part_whatever_the_mesh_and_the_sizes(processes: Processes) -> None:
    processes(
        4,
        PREAMBLE
        + textwrap.dedent("""
        # one dimension and two, even and uneven, more processes than rows
        flat, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        shapes = [(8, 4), (5, 3), (3, 7), (1, 2), (2,), (4, 1, 3)]
        places = [Replicate(), Shard(0), Shard(1)]
        tried = 0
        for shape in shapes:
            full = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
            for mesh in (flat, grid):
                for placements in itertools.product(places, repeat=mesh.ndim):
                    if any(p.is_shard() and p.dim >= len(shape) for p in placements):
                        continue
                    like = distribute_tensor(torch.zeros(shape), mesh, placements)
                    cut = layout.placed(full, like)
                    expected = distribute_tensor(full, mesh, placements)
                    assert torch.equal(cut.to_local(), expected.to_local()), (shape, placements)
                    assert cut.placements == like.placements and cut.shape == full.shape
                    assert cut.to_local().untyped_storage().nbytes() == cut.to_local().numel() * 4  # not a view
                    tried += 1
        assert tried > 40

        # fully_shard after tensor parallelism divides one dimension twice, the inner one first
        class Two(nn.Module):
            def __init__(self, wide):
                super().__init__()
                self.a, self.b = nn.Linear(6, wide), nn.Linear(wide, 6)

            def forward(self, x):
                return self.b(self.a(x))

        for wide in (8, 4, 12):
            torch.manual_seed(0)
            plain = Two(wide)
            module = copy.deepcopy(plain)
            parallelize_module(module, grid["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
            fully_shard(module, mesh=grid["dp"])
            assert any(type(p).__name__ == "_StridedShard" for p in module.a.weight.placements)
            for (name, parameter), whole in zip(module.named_parameters(), plain.parameters()):
                cut = layout.placed(whole, parameter)
                assert torch.equal(cut.to_local(), parameter.to_local()), name
                assert torch.equal(layout.whole({"p": parameter}, on_rank_zero=False)["p"], whole), name
        """),
    )


def test_what_is_not_spread_stays_what_it_is() -> None:
    state = OrderedDict(a=torch.ones(2))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    tree: dict[str, Any] = {"state_dict": state, "n": 1, "parts": [torch.zeros(1), (2, "x")]}
    made = layout.whole(tree)
    assert made["state_dict"]["a"] is state["a"]
    assert made["parts"][0] is tree["parts"][0]
    assert made["state_dict"]._metadata == {"": {"version": 1}}
    assert (made["n"], made["parts"][1]) == (1, (2, "x"))
    assert layout.placed(state["a"], torch.zeros(2)) is state["a"]
    assert layout.as_held(tree, {"a": torch.zeros(2)}) is tree
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), momentum=0.9)
    saved = optimizer.state_dict()
    assert layout.as_stepped([saved], [optimizer]) == [saved]
