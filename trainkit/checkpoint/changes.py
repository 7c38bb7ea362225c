"""What a run is made of, written into its checkpoints, and how a run that goes on from one differs from it.

A checkpoint fits any run whose weights have the same names and shapes. That does not make the run the same: twice the
batch size, a longer data set or another dropout go unnoticed for weeks. So a checkpoint says what its run was made of,
and whoever resumes it hears what changed, and what that means:

    order    other samples come, or in another order: refused, unless `ckpt_strict=False`
    result   the numbers will not be those of a run that went on: a warning
    bits     the same up to rounding: other kernels, or sums in another order; a warning
    kept     the checkpoint's value goes on, whatever the new one is: a warning
    maybe    a hyperparameter: it depends on what the module does with it; a warning
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from trainkit.data.samplers import length_of, sampler_of
from trainkit.errors import CheckpointError, warn
from trainkit.hparams import plain_hparams
from trainkit.pieces import class_of
from trainkit.redaction import HIDDEN

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

TRAINER = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "reload_dataloaders_every_n_epochs",
    "deterministic",
)
"""The Trainer's arguments that change what a run computes. Limits in epochs, steps or time only say when it ends."""
WAYS = ("compile", "fused_optimizers", "matmul_precision", "channels_last")
"""The Trainer's arguments that change how it is computed, and so the last bits."""

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_NOTHING = "none"


class Change(NamedTuple):
    """One difference between the run that wrote a checkpoint and the one that goes on from it."""

    severity: str
    what: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"  {self.severity:<7} {self.what}: {self.before} -> {self.now}"


def made_of(trainer: Trainer) -> dict[str, Any]:
    """Return what a run is made of when its first batch is about to come, as plain values."""
    arguments = {name: _plain(_setting(trainer, name)) for name in TRAINER}
    return {
        "seed": trainer.seed,
        "machine": {
            "torch": str(torch.__version__),
            "device": trainer.device.type,
            "threads": torch.get_num_threads(),
        },
        "trainer": arguments,
        "ways": {name: _plain(_setting(trainer, name)) for name in WAYS},
        "model": _parts(trainer.module),
        "optimizers": [_optimizer(optimizer, trainer.module) for optimizer in trainer.optimizers],
        "schedulers": [type(config.scheduler).__qualname__ for config in trainer.lr_scheduler_configs],
    }


def data_of(trainer: Trainer) -> list[dict[str, Any]]:
    """Return what the training data are like now, a dict for each loader; what nobody can know is left out."""
    return [_loader(part.source) for part in trainer.sources.train.parts]


def check(trainer: Trainer, checkpoint: Mapping[str, Any], path: object, strict: bool) -> None:
    """Compare a run with what its checkpoint says of the one that wrote it.

    Args:
        trainer: the run that is about to go on, with its loaders and optimizers.
        checkpoint: what it goes on from. One that says nothing, a converted one for example, is taken as it is.
        path: its name in messages.
        strict: refuse a run that would see other samples, or see them in another order.

    Raises:
        CheckpointError: such a run; the message lists every difference.
    """
    before = checkpoint.get("made_of")
    if before is None:
        return
    data = _as_of_all(trainer, checkpoint, before.get("data", []))
    found = list(differences({**before, "data": data}, {**trainer.made_of, "data": data_of(trainer)}))
    if _dealt_anew(trainer, checkpoint):
        found = [change for change in found if not change.what.endswith("threads")]
    found += _hparams(checkpoint.get(trainer.module.CHECKPOINT_HYPER_PARAMS_KEY), trainer)
    if not found:
        return
    listed = "\n".join(map(str, found))
    message = f"{path} was written by a run that was set up differently:\n{listed}\n"
    if strict and any(change.severity == "order" for change in found):
        raise CheckpointError(
            f"{message}The run would not see the samples that it would have seen (severity: order). Set it up as it "
            "was, or go on all the same with ckpt_strict=False."
        )
    severities = {change.severity for change in found}
    meanings = [meaning for severity, meaning in MEANINGS.items() if severity in severities]
    warn(message + " ".join(meanings))


def _dealt_anew(trainer: Trainer, checkpoint: Mapping[str, Any]) -> bool:
    """Whether another number of processes deals out the same samples."""
    loader = checkpoint.get("loader")
    stood = loader.get("position", []) if isinstance(loader, dict) else []
    return bool(stood) and all(one is not None and one["parts"] != trainer.strategy.shard[1] for one in stood)


MEANINGS = {
    "order": "order: other samples come, or in another order; in this epoch some may come twice and some never.",
    "result": "result: the run goes on differently from there.",
    "bits": "bits: equal up to rounding only, the kernels or the order of their sums differ.",
    "kept": "kept: the checkpoint's value goes on.",
    "maybe": "maybe: it depends on what the module does with it.",
}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """Yield how two runs differ in what they are made of, the worst first."""
    yield from _data(before.get("data"), now["data"])
    yield from _changed("result", before.get("trainer"), now["trainer"], "Trainer({})".format)
    yield from _changed("result", before.get("model"), now["model"], lambda name: f"model{name and '.' + name}")
    yield from _optimizers(before.get("optimizers"), now["optimizers"])
    yield from _lists("result", "lr schedulers", before.get("schedulers"), now["schedulers"])
    yield from _changed("bits", before.get("ways"), now["ways"], "Trainer({})".format)
    yield from _changed("bits", before.get("machine"), now["machine"], str)
    if None not in (before.get("seed"), now["seed"]) and before["seed"] != now["seed"]:
        yield Change("kept", "seed", str(before["seed"]), str(now["seed"]))


def _data(before: list[dict[str, Any]] | None, now: list[dict[str, Any]]) -> Iterator[Change]:
    if before is None:
        return
    if len(before) != len(now):
        yield Change("order", "training loaders", str(len(before)), str(len(now)))
        return
    for index, (old, new) in enumerate(zip(before, now, strict=True)):
        name = "train_dataloader" if len(now) == 1 else f"train_dataloader {index}"
        both = old.keys() & new.keys()
        for key in [key for key in new if key in both and old[key] != new[key]]:
            yield Change("order", f"{name}, {key}", str(old[key]), str(new[key]))


def _optimizers(before: list[dict[str, Any]] | None, now: list[dict[str, Any]]) -> Iterator[Change]:
    for index, (old, new) in enumerate(zip(before or (), now, strict=False)):
        name = new["class"] if len(now) == 1 else f"{new['class']} {index}"
        if old["class"] != new["class"]:
            yield Change("result", "optimizer", old["class"], new["class"])
            continue
        yield from _changed("kept", old["defaults"], new["defaults"], f"{name}({{}})".format)


def _hparams(before: Mapping[str, Any] | None, trainer: Trainer) -> list[Change]:
    if not isinstance(before, Mapping):
        return []
    now = plain_hparams(trainer.module.hparams)
    secret = [key for key in before if before[key] == HIDDEN]
    old, new = ({k: str(_plain(v)) for k, v in some.items() if k not in secret} for some in (before, now))
    return list(_changed("maybe", old, new, "hyperparameter {}".format))


def _changed(severity: str, before: Mapping[str, Any] | None, now: Mapping[str, Any], name: Any) -> Iterator[Change]:
    """Yield the keys with another value; a mapping that an older file does not have is not compared."""
    if before is None:
        return
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = before.get(key, _NOTHING), now.get(key, _NOTHING)
        if old != new:
            yield Change(severity, name(key), _shown(old), _shown(new))


def _lists(severity: str, what: str, before: list[str] | None, now: list[str]) -> Iterator[Change]:
    if before is not None and before != now:
        yield Change(severity, what, ", ".join(before) or _NOTHING, ", ".join(now) or _NOTHING)


# ---------------------------------------------------------------------- what the parts are made of
def _setting(trainer: Trainer, name: str) -> Any:
    return trainer.precision if name == "precision" else getattr(trainer, name)


def _parts(module: nn.Module) -> dict[str, str]:
    """Return every part of a model by its name, as it prints itself: dropout has no weights that could tell."""
    described = {}
    for name, part in module.named_modules():
        try:
            extra = part.extra_repr() if name else ""
        except Exception:  # a user's own, which may want what is not there yet
            extra = ""
        described[name] = _ADDRESS.sub("", f"{class_of(part).__name__}({extra})")
    return described


def _as_of_all(trainer: Trainer, checkpoint: Mapping[str, Any], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the data were like, with the batch size of now where a batch of all processes is as large as it was.

    With another number of processes some divide their DataLoader's, and that is no other order.
    """
    loader, parts = checkpoint.get("loader"), trainer.sources.train.parts
    stood = loader.get("position", []) if isinstance(loader, dict) else []
    if len(stood) != len(parts) or len(before) != len(parts):
        return before
    now, progress = data_of(trainer), trainer.progress
    found = []
    for old, own, saved, part in zip(before, now, stood, parts, strict=True):
        stands = part.standing(progress.epoch, 0)
        if saved and stands and saved["parts"] != stands["parts"] and saved["size"] == stands["size"]:
            old = {**old, "batch size": own.get("batch size")}
        found.append(old)
    return found


def _optimizer(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        "class": type(optimizer).__qualname__,
        "defaults": {key: _plain(value) for key, value in optimizer.defaults.items()},
        "groups": [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups],
    }


def check_groups(trainer: Trainer, checkpoint: Mapping[str, Any], path: object) -> None:
    """Refuse optimizers whose groups have other parameters: torch compares their numbers only.

    Raises:
        CheckpointError: it names the first parameter that is in another place.
    """
    before = (checkpoint.get("made_of") or {}).get("optimizers", [])
    for optimizer, old in zip(trainer.made_of["optimizers"], before, strict=False):
        for index, (saved, own) in enumerate(zip(old["groups"], optimizer["groups"], strict=False)):
            if saved == own:
                continue
            if sorted(saved) != sorted(own):
                continue  # renamed, by pruning for example; their shapes were compared
            place = next(n for n, pair in enumerate(zip(saved, own, strict=True)) if pair[0] != pair[1])
            raise CheckpointError(
                f"{path} does not fit this run: parameter {place} of group {index} of {optimizer['class']} was "
                f"{saved[place]}, and is {own[place]} now. Give configure_optimizers the parameters in the order they "
                "had."
            )


def _loader(source: Any) -> dict[str, Any]:
    """Return what decides which samples a loader gives, and in which order."""
    if not isinstance(source, DataLoader):
        length = length_of(source)
        return {} if length == math.inf else {"batches": length}
    data: dict[str, Any] = {}
    if not isinstance(source.dataset, IterableDataset):
        length = length_of(source.dataset)
        if length != math.inf:
            data["samples"] = length
        data["order"] = type(sampler_of(source)).__qualname__
    batches = source.batch_sampler
    if type(batches) is BatchSampler:
        data |= {"batch size": batches.batch_size, "drop_last": batches.drop_last}
    elif batches is None:
        data |= {"batch size": source.batch_size}
    return data


def _plain(value: Any) -> Any:
    """Return a setting so that it can be written and compared."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    return _ADDRESS.sub("", str(value))


def _shown(value: Any, most: int = 60) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= most else text[: most - 3] + "..."
