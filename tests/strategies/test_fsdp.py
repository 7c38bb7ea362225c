"""FSDP in real processes: what they train with pieces of the parameters is what one process trains with all of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

from trainkit import Trainer
from trainkit.errors import MisconfigurationException
from trainkit.strategies import FSDPStrategy

Spread = Callable[..., list[dict[str, Any]]]
CLOSE = 1e-6

WAYS = """
from functools import partial
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy

alone = by_hand()


def wrapped(module):
    return [name for name, part in module.named_modules() if isinstance(part, FSDPModule)]


for name, settings in {
    "whole": {},
    "by class": {"auto_wrap_policy": {Block}},
    "by function": {"auto_wrap_policy": lambda part: isinstance(part, nn.Linear)},
    "by torch's policy": {"auto_wrap_policy": ModuleWrapPolicy({Block})},
    "by size": {"auto_wrap_policy": partial(size_based_auto_wrap_policy, min_num_params=200)},
    "keeps parameters": {"auto_wrap_policy": {Block}, "sharding_strategy": "SHARD_GRAD_OP"},
    "replicas": {"auto_wrap_policy": {Block}, "sharding_strategy": "NO_SHARD"},
    "mesh": {"auto_wrap_policy": {Block}, "sharding_strategy": "HYBRID_SHARD", "device_mesh": (2, 1)},
}.items():
    module = fitted(FSDPStrategy(**settings))
    told[name] = apart(module, alone), wrapped(module), type(module.net[2].weight).__name__, type(module).__name__


class Own(Net):
    def __init__(self, wraps, where="cpu"):
        Module.__init__(self)
        self.net, self.wraps, self.where = None, wraps, where

    def configure_model(self):
        if self.net is None:
            with torch.device(self.where):
                self.net = build()
            for name in self.wraps:
                fully_shard(self.get_submodule(name), mesh=self.device_mesh)


for wraps in (["net.0", "net.1"], ["net.0", "net"], ["net.0", ""]):
    for where in ("cpu", "meta"):
        told[f"own {wraps} {where}"] = apart(fitted(FSDPStrategy(), Own(wraps, where)), alone)

t = trainer(FSDPStrategy(auto_wrap_policy={Block}))
with t.init_module(empty_init=True):
    module = Net()
told["was on"] = module.net[0].up.weight.device.type
torch.manual_seed(1)
t.fit(module, data(30), data(30))
told["meta"] = apart(module, alone)

Block.ran = 0
fitted(FSDPStrategy(auto_wrap_policy={Block}), max_epochs=1, num_sanity_val_steps=0, limit_val_batches=0)
ran, Block.ran = Block.ran, 0
module = Net()
names = list(module.state_dict())
again = FSDPStrategy(auto_wrap_policy={Block}, activation_checkpointing_policy={Block})
fitted(again, module, max_epochs=1, num_sanity_val_steps=0, limit_val_batches=0)
told["computed again"] = Block.ran / ran, list(module.state_dict()) == names
told["checkpointed"] = apart(module, by_hand(epochs=1))
"""


def test_however_it_is_spread_two_processes_train_what_one_does(spread: Spread) -> None:
    first, second = spread(2, WAYS)
    assert first == second
    blocks = ["net.0", "net.1"]
    for name, parts in {
        "whole": [],
        "by class": blocks,
        "by function": ["net.0.up", "net.0.down", "net.1.up", "net.1.down", "net.2"],
        "by torch's policy": blocks,
        "by size": blocks,
        "keeps parameters": blocks,
        "replicas": blocks,
        "mesh": blocks,
    }.items():
        distance, *others = first.pop(name)
        assert distance < CLOSE, name
        assert others == [parts, "DTensor", "Net"]
    assert first.pop("was on") == "meta"
    assert first.pop("computed again") == [2.0, True]
    assert {name: distance for name, distance in first.items() if distance > CLOSE} == {}
    assert len(first) == 8


STEPS = """
by_block = lambda: FSDPStrategy(auto_wrap_policy={Block})
told["accumulated"] = apart(fitted(by_block(), accumulate_grad_batches=2), by_hand(accumulate=2))
told["clipped"] = apart(fitted(by_block(), gradient_clip_val=0.05), by_hand(clip=0.05))
told["one sample"] = apart(fitted(by_block(), samples=1), by_hand(1))
told["one sample of all left"] = apart(fitted(by_block(), samples=25, accumulate_grad_batches=2), by_hand(25, 2))


class Parts(Net):
    def loss(self, batch):  # forward of none of the parts that hold these is called
        x = batch[0]
        for part in self.net:
            x = part(x)
        return nn.functional.mse_loss(x, batch[1])

    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(batch), "view": self.net[2].weight[0]}


told["parts"] = apart(fitted(by_block(), Parts()), by_hand())


class Frozen(Net):
    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch > 0)


told["frozen"] = apart(fitted(by_block(), Frozen()), by_hand(freeze=lambda net, e: net[0].requires_grad_(e > 0)))


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


told["manual"] = apart(fitted(FSDPStrategy(), Manual(), samples=24), by_hand(24, times=2))


class Called(Net):
    def forward(self, x):
        return self.net(x)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def on_train_epoch_end(self):
        with torch.no_grad():
            self.answer = self(torch.ones(1, 8)).item()


module = fitted(by_block(), Called())
told["called in a hook"] = apart(module, by_hand())
alone = build()
told["answers"] = [module.answer, module(torch.ones(1, 8)).item()]

# evaluations of every length: nothing is padded, repeated or dropped
module = fitted(by_block(), limit_train_batches=0)
for samples in (1, 3, 13, 31):
    t = trainer(by_block())
    found, = t.validate(module, data(samples), verbose=False)
    x, y = tensors(samples)
    with torch.no_grad():
        right = ((alone(x) > 0) == (y > 0)).double().mean().item()
    told[f"evaluated {samples}"] = abs(found["sign"] - right)
told["predicted"] = sum(len(one) for one in t.predict(Called(), data(31)))
"""


def test_steps_of_every_kind_do_what_they_do_in_one_process(spread: Spread) -> None:
    first, second = spread(2, STEPS)
    assert first.pop("predicted") + second.pop("predicted") == 31
    assert first == second
    in_hook, afterwards = first.pop("answers")
    assert in_hook == afterwards
    assert {name: distance for name, distance in first.items() if distance > CLOSE} == {}
    assert len(first) == 12


DECISIONS = """
told["stopped at"] = stopped(FSDPStrategy(auto_wrap_policy={Block}), Net())


class Bad(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float('inf') if RANK == 1 and batch_idx == 1 else loss


t = trainer("fsdp", nan_policy="skip", max_epochs=1)
module = Bad()
t.fit(module, data(36), data(12))
told["skipped"] = t.skipped_updates, bool(flat(module).isfinite().all())


class Scales(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        told.setdefault("scales", []).append(trainer.scaler.get_scale())


for strategy in ("fsdp", "ddp"):
    module = Bad()
    t = trainer(strategy, precision="16-mixed", callbacks=[Scales()], max_epochs=1)
    t.fit(module, data(36), data(12))
    told[strategy] = bool(flat(module).isfinite().all()), str(module.dtype)

from trainkit.callbacks import EMAWeightAveraging, ModelCheckpoint
from trainkit.gradients import grad_norm


class Norms(Net):
    norms = []

    def on_before_optimizer_step(self, optimizer):
        self.norms.append([float(grad_norm(self, kind)[f"grad_{float(kind)}_norm_total"]) for kind in (1, 2, "inf")])


averaged = []
for strategy in (FSDPStrategy(auto_wrap_policy={Block}), "ddp"):
    averaged.append(fitted(strategy, Norms(), callbacks=[EMAWeightAveraging(decay=0.5)], max_epochs=1))
told["averaged"] = apart(averaged[0], flat(averaged[1]))
half = len(Norms.norms) // 2
told["norms"] = max(
    abs(a / b - 1) for one, other in zip(Norms.norms[:half], Norms.norms[half:]) for a, b in zip(one, other)
)


class Dtypes(Net):
    def training_step(self, batch, batch_idx):
        told["inside"] = str(self.net[0].up.weight.dtype)
        return super().training_step(batch, batch_idx)


module = fitted(FSDPStrategy(), Dtypes(), precision="bf16-mixed")
told["mixed"] = apart(module, by_hand()), str(module.dtype)

for kind in ("full", "sharded"):
    new = lambda: FSDPStrategy(auto_wrap_policy={Block}, state_dict_type=kind)
    keep = ModelCheckpoint(kind, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    seed_everything(4)
    whole = fitted(new(), samples=48, callbacks=[keep], enable_checkpointing=True)
    for strategy in (new(), "ddp"):
        part = Net()
        trainer(strategy).fit(part, data(48), data(48), ckpt_path=f"{kind}/step=6.ckpt")
        told[f"{kind} {strategy if strategy == 'ddp' else 'fsdp'}"] = apart(part, flat(whole))
told["is a directory"] = [os.path.isdir(f"{kind}/step=6.ckpt") for kind in ("full", "sharded")]
"""


def test_what_is_decided_is_decided_on_all_processes(spread: Spread) -> None:
    first, second = spread(2, DECISIONS)
    assert first == second
    assert first["stopped at"] == 6  # the wish went with the gradients of the next update
    assert first["skipped"] == [1, True]
    assert first["fsdp"] == first["ddp"] == [True, "torch.float32"]
    assert first["inside"] == "torch.bfloat16"
    assert first["mixed"][0] < 1e-2
    assert first["mixed"][1] == "torch.float32"
    assert first["averaged"] < CLOSE
    assert first["norms"] < CLOSE
    assert first["full fsdp"] == first["sharded fsdp"] == 0.0
    assert max(first["full ddp"], first["sharded ddp"]) < CLOSE
    assert first["is a directory"] == [False, True]
    scales = first["scales"]
    assert scales[1] < scales[0] or scales[0] < 2**16  # an overflow of one process lowers it on all


def test_arguments_that_cannot_work_are_refused_where_they_are_given() -> None:
    with pytest.raises(ValueError, match="sharding_strategy must be one of"):
        FSDPStrategy(sharding_strategy="SOME_SHARD")
    with pytest.raises(ValueError, match="state_dict_type must be"):
        FSDPStrategy(state_dict_type="both")
    with pytest.raises(RuntimeError, match="device_mesh"):
        FSDPStrategy(sharding_strategy="HYBRID_SHARD")
    with pytest.raises(ValueError, match="say the same"):
        FSDPStrategy(activation_checkpointing=nn.Linear, activation_checkpointing_policy={nn.Linear})
    with pytest.raises(MisconfigurationException, match="auto_wrap_policy must be a set of module classes"):
        FSDPStrategy(auto_wrap_policy={"Linear"})  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="channels_last"):
        Trainer(strategy="fsdp", channels_last=True, accelerator="cpu", devices=1, logger=False)
    assert FSDPStrategy(timeout=timedelta(seconds=5)).timeout.total_seconds() == 5


REFUSED = """
def refused(strategy, module, **settings):
    try:
        trainer(strategy, **settings).fit(module, data(24), data(12))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


told["mesh"] = refused(FSDPStrategy(device_mesh=(3, 1)), Net())
told["offload"] = refused("fsdp_cpu_offload", Net())
told["batchnorm"] = refused("fsdp", Net(), sync_batchnorm=True)


class Whole(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


told["optimizer"] = refused("fsdp", Whole())


class Unset(Net):
    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            self.scale = nn.Parameter(torch.ones(8))


told["meta"] = refused("fsdp", Unset())


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.scale = nn.Parameter(torch.ones(8))


told["own"] = refused("fsdp", Manual())
"""


def test_what_cannot_be_spread_is_an_error_that_says_why(spread: Spread) -> None:
    first, second = spread(2, REFUSED)
    assert first == second
    for name, said in {
        "mesh": "product is the number of processes, 2",
        "offload": "device is the cpu",
        "batchnorm": "sync_batchnorm=True",
        "optimizer": "LBFGS needs whole parameters",
        "meta": "reset_parameters",
        "own": "scale",
    }.items():
        assert said in first[name]


@pytest.mark.gpu
def test_parameters_wait_on_the_host_while_an_accelerator_computes() -> None:
    from trainkit.lightning.demos import BoringModel

    strategy = FSDPStrategy(cpu_offload=True)
    module = BoringModel()
    Trainer(strategy=strategy, accelerator="gpu", devices=1, max_steps=2, logger=False).fit(module)
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    assert torch.cuda.is_available()


OWN = """
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from trainkit.strategies import ParallelStrategy
from trainkit.strategies.sharded import ShardedStrategy


class MeanAtTheEnd(ParallelStrategy):
    averages_by_hand = True

    def wrap_training(self, module, step, wishes=None):
        self.parameters = list(module.parameters())
        return step

    def sync_by_hand(self):
        for parameter in self.parameters:
            if parameter.grad is None:  # there was no sample
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world_size


class TwoHalves(ShardedStrategy):
    def make_mesh(self):
        return init_device_mesh("cpu", (self.world_size,))

    def setup(self, module):
        fully_shard(module.net, mesh=self.device_mesh)
        self.mine = [module.net]

    @property
    def roots(self):
        return self.mine


for kind in (MeanAtTheEnd, TwoHalves):
    told[kind.__name__] = apart(fitted(kind(), samples=25), by_hand(25))
    told["stopped " + kind.__name__] = stopped(kind(), Net(), log_every_n_steps=4)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):  # more batches on one process than on the other
        return iter([tensors(4) for _ in range(2 + 3 * RANK)])


t = trainer(FSDPStrategy(auto_wrap_policy={Block}))
seen = []


class Seen(Net):
    def validation_step(self, batch, batch_idx):
        seen.append(len(batch[0]))
        super().validation_step(batch, batch_idx)


found, = t.validate(Seen(), DataLoader(Stream(), batch_size=None), verbose=False)
alone, (x, y) = build(), tensors(4)
told["streams"] = abs(found["val"] - nn.functional.mse_loss(alone(x), y).item()), len(seen)
"""


def test_strategies_of_a_users_own_plug_in_and_uneven_streams_are_evaluated_to_their_ends(spread: Spread) -> None:
    first, second = spread(2, OWN)
    assert first == second
    assert first["MeanAtTheEnd"] < CLOSE
    assert first["TwoHalves"] < CLOSE
    assert first["stopped MeanAtTheEnd"] == first["stopped TwoHalves"] == 8  # at a log point
    distance, steps = first["streams"]
    assert distance < CLOSE
    assert steps == 5  # both took part in each
