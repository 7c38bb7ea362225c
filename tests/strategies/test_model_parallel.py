"""Tensor parallelism in real processes, alone and with FSDP: the weights are those that one process trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trainkit.errors import MisconfigurationException
from trainkit.strategies import ModelParallelStrategy

Spread = Callable[..., list[dict[str, Any]]]
CLOSE = 1e-6

LAID_OUT = """
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class LaidOut(Net):
    def __init__(self, shards=(), where="cpu", manual=False):
        Module.__init__(self)
        self.net, self.shards, self.where, self.automatic_optimization = None, shards, where, not manual

    def configure_model(self):
        if self.net is not None:
            return
        with torch.device(self.where):
            self.net = build()
        data_mesh, tensor_mesh = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
        if tensor_mesh.size() > 1:
            for block in self.net[:2]:
                parallelize_module(block, tensor_mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        for name in self.shards:
            fully_shard(self.get_submodule(name), mesh=data_mesh)

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


BLOCKS, ALL, ITSELF = ("net.0", "net.1"), ("net.0", "net.1", "net"), ("net.0", "net.1", "")
data_parallel, tensor_parallel = int(sys.argv[1]), int(sys.argv[2])
new = lambda: ModelParallelStrategy(data_parallel, tensor_parallel)
"""

TRAINED = """
clip = {"gradient_clip_val": 0.05}
samples = 25  # one is left at the end, for one part of the data
for shards in ((), BLOCKS, ALL, ITSELF) if data_parallel > 1 else ((),):
    for where in ("cpu", "meta"):
        module = fitted(new(), LaidOut(shards, where), samples, data_parallel, **clip)
        told[f"{shards} {where}"] = apart(module, by_hand(samples, clip=0.05))
told["accumulated"] = apart(
    fitted(new(), LaidOut(ALL if data_parallel > 1 else ()), samples, data_parallel, accumulate_grad_batches=2),
    by_hand(samples, accumulate=2),
)
told["by hand"] = apart(fitted(new(), LaidOut(manual=True), 24, data_parallel), by_hand(24))
told["stopped"] = [
    stopped(new(), LaidOut(shards), log_every_n_steps=4) for shards in ((), ALL)[: data_parallel]
]

seen = []


class See(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        seen.append([] if batch is None else batch[0][:, 0].tolist())


t = trainer(new(), callbacks=[See()], max_epochs=1)
module = LaidOut()
t.fit(module, data(13, data_parallel, shuffle=True), data(13, data_parallel))
part = t.strategy.shard
told["part"] = list(part)
told["seen"] = seen
told["mesh"] = list(module.device_mesh.shape), list(module.device_mesh.mesh_dim_names)
found, = t.validate(module, data(13, data_parallel), verbose=False)
told["sign"] = found["sign"]
"""


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)])
def test_two_processes_train_what_one_does(spread: Spread, sizes: tuple[int, int]) -> None:
    _agree(spread(2, LAID_OUT + TRAINED, *map(str, sizes)), *sizes)


def test_four_processes_in_a_mesh_of_two_by_two_train_what_one_does(spread: Spread) -> None:
    _agree(spread(4, LAID_OUT + TRAINED, "2", "2"), 2, 2)


def _agree(ranks: list[dict[str, Any]], data_parallel: int, tensor_parallel: int) -> None:
    seen = [rank.pop("seen") for rank in ranks]
    parts = [rank.pop("part") for rank in ranks]
    assert parts == [[rank // tensor_parallel, data_parallel] for rank in range(len(ranks))]
    for part in range(data_parallel):  # those that share a part of the data see the same samples
        same = seen[part * tensor_parallel : (part + 1) * tensor_parallel]
        assert all(one == same[0] for one in same)
    assert sum(len(batch) for rank in seen[::tensor_parallel] for batch in rank) == 13
    first = ranks[0]
    assert all(rank == first for rank in ranks)
    assert first.pop("mesh") == [[data_parallel, tensor_parallel], ["data_parallel", "tensor_parallel"]]
    assert first.pop("sign") > 0
    # a wish goes with gradients that all average in one message; else it is heard at the next log point
    assert first.pop("stopped") == [6 if (data_parallel, tensor_parallel) == (2, 1) else 8, 8][:data_parallel]
    assert {name: distance for name, distance in first.items() if distance > CLOSE} == {}
    assert len(first) == (4 if data_parallel == 1 else 10)


SAVED = """
from trainkit.callbacks import ModelCheckpoint

shards = ALL if data_parallel > 1 else ()
for together in (True, False):
    new = lambda: ModelParallelStrategy(data_parallel, tensor_parallel, save_distributed_checkpoint=together)
    keep = ModelCheckpoint(f"together={together}", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    seed_everything(4)
    whole = fitted(new(), LaidOut(shards), 48, data_parallel, callbacks=[keep], enable_checkpointing=True)
    part = LaidOut(shards)
    loaders = data(48, data_parallel), data(48, data_parallel)
    trainer(new()).fit(part, *loaders, ckpt_path=f"together={together}/step=6.ckpt")
    told[f"resumed {together}"] = apart(part, flat(whole))
    told[f"directory {together}"] = os.path.isdir(f"together={together}/step=6.ckpt")


def refused(strategy, module, **settings):
    try:
        trainer(strategy, **settings).fit(module, data(24), data(12))
    except Exception as error:
        return type(error).__name__, str(error)


told["sizes"] = refused(ModelParallelStrategy(3, 2), LaidOut())
told["model"] = refused(ModelParallelStrategy(data_parallel, tensor_parallel), Net())
"""


def test_a_run_goes_on_from_what_all_wrote_and_from_one_file(spread: Spread) -> None:
    first, second = spread(2, LAID_OUT + SAVED, "1", "2")
    assert first == second
    assert first["resumed True"] == first["resumed False"] == 0.0
    assert [first["directory True"], first["directory False"]] == [True, False]
    kind, said = first["sizes"]
    assert kind == "RuntimeError"
    assert "is 6, and there are 2 processes" in said
    kind, said = first["model"]
    assert kind == "TypeError"
    assert "configure_model" in said


def test_sizes_are_numbers_or_auto() -> None:
    with pytest.raises(MisconfigurationException, match="tensor_parallel_size must be 'auto' or a number above 0"):
        ModelParallelStrategy(tensor_parallel_size=0)
    assert ModelParallelStrategy().shard == (0, 1)
