"""Whose loaders a run uses, wrapped and limited, and when that makes validation due."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Generator, Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from trainkit.data.combined import Combination, CombinedLoader, Mode, flattened, refilled
from trainkit.data.indexed import Indexed, has_workers
from trainkit.data.loader import Batches, Loader
from trainkit.data.samplers import in_sequence, is_shuffled
from trainkit.data.together import agree
from trainkit.data.workers import Crew
from trainkit.errors import MisconfigurationException, warn
from trainkit.hooks import is_overridden
from trainkit.profiler.actions import recorded
from trainkit.random import derived_seed
from trainkit.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from trainkit.datamodule import DataModule
    from trainkit.module import Module
    from trainkit.trainer import Trainer

STEP = {"val": "validation_step", "test": "test_step", "predict": "predict_step"}


class Sources:
    """The data of one run.

    Args:
        trainer: whose settings limit it.
        given: the loaders that the call brought, by kind: "train", "val", "test", "predict".
        seed: what the loaders' own seeds are derived from, by kind and place: whichever is asked for first.
        earlier: those of the Trainer's last run, whose numbers of batches stay until there are new ones.
    """

    def __init__(
        self, trainer: Trainer, given: Mapping[str, Any], seed: int = 0, earlier: Sources | None = None
    ) -> None:
        self.trainer = trainer
        self.given = given
        self.seed = seed
        self.loaders: dict[str, list[Batches]] = {}
        """What a loop goes through, one after the other, by kind."""
        self.objects: dict[str, Any] = {}
        """The loaders in the structure that the user gave them, by kind."""
        self.val_every: int | None = None
        """Validate every n batches; None: at the end of an epoch."""
        self._earlier = {} if earlier is None else {kind: earlier.num_batches(kind) for kind in STEP}
        self._open: dict[int, Generator[tuple[int, Any, bool]]] = {}  # by loader
        self._mustered: dict[int, Indexed] = {}  # whose workers have been started before their loader was, by its id
        self._asked: dict[str, float] = {}  # the epoch in which loaders of a kind were asked for
        self._resumed = False  # whether the state of a checkpoint is loaded
        self._stood: list[dict[str, int] | None] = []  # where the run stood that this one goes on

    @property
    def train(self) -> Batches:
        """The training loader, or several as one."""
        return self.loaders["train"][0]

    def defined(self, kind: str) -> bool:
        """Whether there will be batches of "val", "test" or "predict": loaders, a step, and a limit above 0."""
        trainer = self.trainer
        limit = trainer.overfit_batches if kind == "val" and trainer.overfit_batches else None
        limit = getattr(trainer, f"limit_{kind}_batches") if limit is None else limit
        module = trainer.model
        if limit == 0 or module is None or not is_overridden(module, STEP[kind]):
            return False
        return self.has_loader(kind) and self.loaders.get(kind) != []  # asked for, and there was none

    def has_loader(self, kind: str) -> bool:
        """Whether a loader was given, or there is a method that makes one."""
        return self.given.get(kind) is not None or is_overridden(self._owner, f"{kind}_dataloader")

    @property
    def _owner(self) -> Module | DataModule | None:
        """Whose methods bring what the call did not: the data module's, and only without one the module's."""
        trainer = self.trainer
        return trainer.datamodule if trainer.datamodule is not None else trainer.model

    def num_batches(self, kind: str) -> list[int | float]:
        """Return the number of batches of each loader of a kind, as it is or as it was in the last run that had any."""
        if kind not in self.loaders:
            return self._earlier.get(kind, [])
        return [part.num_batches for loader in self.loaders.get(kind, []) for part in loader.parts]

    # ------------------------------------------------------------------ training
    def load_train(self) -> None:
        """Ask for the training loader, wrap it, and work out when to validate."""
        trainer = self.trainer
        if not self.has_loader("train"):
            raise MisconfigurationException(
                "fit needs training data: fit(model, train_dataloaders=...), a DataModule with train_dataloader, or "
                f"{type(trainer.module).__name__}.train_dataloader."
            )
        self._asked["train"] = trainer.current_epoch
        if self._limit("train")[0] == 0:  # nobody is asked for what nobody reads
            self.loaders["train"] = [Batches("train_dataloader")]
            return
        loaders = self._wrapped("train", self._object("train"), "max_size_cycle")
        if len(loaders) != 1:
            raise MisconfigurationException(
                "train_dataloader is a CombinedLoader with mode='sequential', which only evaluations can go through. "
                "Use 'max_size_cycle', 'max_size' or 'min_size'; or join the data sets "
                "(torch.utils.data.ConcatDataset)."
            )
        self.loaders["train"] = self._watched("train", loaders)
        self.train.must_yield = trainer.max_epochs == -1
        batches = self.train.num_batches
        self.val_every = self._validation_interval(batches)
        updates = batches / trainer.accumulate_grad_batches
        if trainer.loggers and not trainer.fast_dev_run and trainer.log_every_n_steps > updates > 0:
            warn(
                f"log_every_n_steps={trainer.log_every_n_steps} is more than the {math.ceil(updates)} updates of an "
                "epoch; a smaller one logs training metrics in every epoch."
            )

    def _validation_interval(self, batches: int | float) -> int | None:
        """Turn val_check_interval into a number of batches; None means at the epoch's end, or by the clock."""
        interval = self.trainer.val_check_interval
        if isinstance(interval, timedelta) or (isinstance(interval, float) and interval == 1.0):
            return None
        if isinstance(interval, int):
            never = self.trainer.check_val_every_n_epoch is not None and interval > batches > 0
            if never and self._limit("val")[0] > 0:
                raise MisconfigurationException(
                    f"val_check_interval={interval} is more than the {batches} training batches of an epoch, so "
                    "validation would never run. Make it smaller, or set check_val_every_n_epoch=None to count "
                    "batches across epochs."
                )
            return interval
        if batches == math.inf:
            raise MisconfigurationException(
                f"val_check_interval={interval} is a fraction, but train_dataloader has no length. Give a whole number."
            )
        return max(1, int(batches * interval))

    # ------------------------------------------------------------------ workers that start early
    def muster(self) -> None:
        """Start the workers of the loaders that fit was given and is sure to need, while the model is set up."""
        trainer, limits = self.trainer, {"train": self._limit("train")[0]}
        if trainer.num_sanity_val_steps and trainer.checkpoint is None and self.defined("val"):
            limits["val"] = self._limit("val")[0]
        if trainer.overfit_batches:  # which puts samplers of its own into the loaders
            return
        if 0 in (trainer.max_epochs, trainer.max_steps):
            return
        if trainer.strategy.device.type == "cuda":  # a thread that pins memory asks which device is the current one
            torch.cuda.set_device(trainer.strategy.device)
        for kind, limit in limits.items():
            source = self.given.get(kind)
            leaves = flattened(source.iterables if isinstance(source, CombinedLoader) else source)
            for leaf, name in zip(leaves, _names(kind, len(leaves)), strict=True):
                if limit and self._keeps(kind, leaves) and has_workers(leaf):
                    mustered = self._mustered[id(leaf)] = Indexed(
                        leaf, name, 0, Crew(leaf, name), keep=True, pinned=self._pins()
                    )
                    mustered.muster()

    def prepare(self) -> None:
        """Let the workers load what training begins with."""
        progress = self.trainer.progress
        if not self.trainer.done and not self._due("train"):
            self.train.prepare(progress.epoch, progress.batch)

    def _pins(self) -> bool:
        """Whether batches go on to a CUDA device."""
        return self.trainer.strategy.device.type == "cuda"

    def _keeps(self, kind: str, leaves: list[Any]) -> bool:
        """Whether workers are kept from epoch to epoch: in fit, and not those of many validation loaders at once."""
        return self.trainer.fitting and (kind == "train" or len(leaves) == 1)

    # ------------------------------------------------------------------ evaluations
    def load_evaluation(self, kind: str) -> None:
        """Ask for the loaders of "val", "test" or "predict" and wrap them; in fit they may be missing."""
        trainer, limit = self.trainer, self._limit(kind)[0]
        optional = trainer.stage == "fit"
        n = trainer.check_val_every_n_epoch
        early = optional and n is not None and (trainer.current_epoch + 1) % n > 0  # this epoch does not validate
        self._asked[kind] = -math.inf if early else trainer.current_epoch
        self.loaders[kind] = []
        if optional and (limit == 0 or not is_overridden(trainer.module, STEP[kind])):
            if limit != 0 and self.has_loader(kind):
                warn(f"there are validation loaders but no {STEP[kind]}: validation is left out.")
            self.loaders[kind] = []
            return
        source = self._object(kind) if self.has_loader(kind) and limit != 0 else None
        if not self.has_loader(kind) or (limit != 0 and _is_nothing(source)):
            if optional:
                return
            raise MisconfigurationException(
                f"{trainer.stage} needs data: {trainer.stage}(model, dataloaders=...), or a {kind}_dataloader of the "
                "DataModule or the module."
            )
        if limit == 0:  # nobody is asked for what nobody reads
            return
        loaders = self._wrapped(kind, source, "sequential")
        if kind == "predict" and isinstance(loaders[0], Combination):
            raise MisconfigurationException(
                f"predict_dataloader is a CombinedLoader with mode={loaders[0].mode!r}; predict goes through loaders "
                "one after the other. Use mode='sequential'."
            )
        self.loaders[kind] = self._watched(kind, loaders)

    def validation(self) -> list[Batches]:
        """Return the validation loaders, asked for again if that is due."""
        if self._due("val"):
            self._close("val")
            self.load_evaluation("val")
        return self.loaders["val"]

    # ------------------------------------------------------------------ whose, and how many of them
    def _object(self, kind: str) -> Any:
        """Return the loaders of one kind, from whoever brings them."""
        source = self.given.get(kind)
        if source is not None:
            return source
        owner = "LightningModule" if self._owner is self.trainer.module else "LightningDataModule"
        progress = self.trainer.progress
        epoch = progress.epoch
        progress.epoch = self._epoch_of(kind)
        try:
            return recorded(self.trainer, owner, self._owner, f"{kind}_dataloader")()
        finally:
            progress.epoch = epoch

    def _epoch_of(self, kind: str) -> int:
        """Return the epoch in which loaders are asked for; a resumed run asks as the one that it goes on did.

        A method that looks at `trainer.current_epoch` then gives the same data again.
        """
        trainer = self.trainer
        resuming = trainer.fitting and not self._resumed and trainer.checkpoint is not None
        asked = (trainer.checkpoint or {}).get("loader", {}).get("asked", {}).get(kind) if resuming else None
        return trainer.progress.epoch if asked is None else int(max(asked, 0))

    def _limit(self, kind: str) -> tuple[float, str]:
        """Return how many batches of a kind are wanted, and the argument of the Trainer that says so."""
        trainer = self.trainer
        if kind in ("train", "val") and trainer.overfit_batches:
            return trainer.overfit_batches, "overfit_batches"
        limit: float = getattr(trainer, f"limit_{kind}_batches")
        return limit, f"limit_{kind}_batches"

    def _wrapped(self, kind: str, source: Any, mode: Mode) -> list[Batches]:
        """Wrap and limit what the user gave; `mode` is for loaders that come without one."""
        trainer, name = self.trainer, f"{kind}_dataloader"
        if isinstance(source, CombinedLoader):
            source, mode = source.iterables, source.mode
        leaves = flattened(source)
        prepared = self._prepared(kind, leaves)
        if any(new is not leaf for new, leaf in zip(prepared, leaves, strict=True)):
            source, leaves = refilled(source, prepared), prepared
        self.objects[kind] = source
        combined = mode != "sequential" and leaves[0] is not source
        limit, argument = self._limit(kind)
        kept = self._kept(kind)
        owners = (trainer.model, trainer.datamodule)
        may_be_empty = any(getattr(o, "allow_zero_length_dataloader_with_multiple_devices", False) for o in owners)
        loaders = [
            Loader(
                leaf,
                limit=limit,
                name=leaf_name,
                argument=argument,
                may_be_empty=may_be_empty,
                seed=derived_seed(self.seed, kind, index),
                keep=self._keeps(kind, leaves),
                mustered=self._mustered.pop(id(leaf), None),
                pinned=self._pins(),
                shard=trainer.strategy.shard,
                deal=trainer.use_distributed_sampler,
                even=kind == "train" or combined,
                kept=kept[index] if index < len(kept) and (combined or trainer.keep_batch == "all") else None,
            )
            for index, (leaf, leaf_name) in enumerate(zip(leaves, _names(kind, len(leaves)), strict=True))
        ]
        made: list[Batches] = [Combination(loaders, source, mode, name)] if combined else list(loaders)
        if trainer.strategy.world_size > 1:
            self.seed = agree(trainer.strategy, self.seed, loaders, made, kind == "train")
        for one in made:
            if isinstance(one, Combination):
                one.even = kind == "train"
        return made

    def _kept(self, kind: str) -> list[dict[str, int] | None]:
        """Return the sizes that batches had in the run that this one goes on, where they are to stay."""
        trainer = self.trainer
        if kind != "train" or not trainer.fitting:
            return []
        if not self._resumed and trainer.checkpoint is not None:
            loader = trainer.checkpoint.get("loader")
            self._stood = loader.get("position", []) if isinstance(loader, dict) else []
        return self._stood

    def _prepared(self, kind: str, leaves: list[Any]) -> list[Any]:
        """Return the loaders with the samplers that the Trainer's settings put into them."""
        trainer, name = self.trainer, f"{kind}_dataloader"
        if trainer.overfit_batches and trainer.stage == "fit":
            ordered = [in_sequence(leaf) for leaf in leaves]
            if any(new is not leaf for new, leaf in zip(ordered, leaves, strict=True)):
                warn(
                    f"overfit_batches={trainer.overfit_batches} takes the same batches in each epoch, so the shuffling "
                    f"of {name} is turned off."
                )
            leaves = ordered
        if kind != "train" and any(is_shuffled(leaf) for leaf in leaves):
            warn(
                f"{name} shuffles its samples, so what a batch is made of differs from epoch to epoch. Evaluations are "
                "usually in order: shuffle=False."
            )
        return leaves

    def _watched(self, kind: str, loaders: list[Batches]) -> list[Batches]:
        """Let a profiler see how long batches are waited for."""
        if self.trainer.actions is not None:
            for loader in loaders:
                loader.fetching = partial(self.trainer.actions.fetching, kind)
        return loaders

    # ------------------------------------------------------------------ loaders that are asked for again
    def reload_if_due(self) -> None:
        """Ask for new training loaders when n epochs have passed (`reload_dataloaders_every_n_epochs`)."""
        if self._due("train"):
            self._close("train")
            before = self.train.parts
            self.load_train()
            for new, old in zip(self.train.parts, before, strict=False):
                new.continue_order(old)  # the order of an epoch stays a function of the run's seed

    def _due(self, kind: str) -> bool:
        every = self.trainer.reload_dataloaders_every_n_epochs
        return every > 0 and self.trainer.current_epoch - self._asked[kind] >= every

    # ------------------------------------------------------------------ resume
    def state_dict(self) -> dict[str, Any]:
        """Return where the training data are, what every order is drawn from, and when loaders were asked for."""
        seeds = [part.seed for loader in self.loaders.get("val", []) for part in loader.parts]
        progress = self.trainer.progress
        return {
            "seed": self.seed,
            "train": self.train.state_dict(),
            "val": seeds,
            "asked": dict(self._asked),
            "position": [part.standing(progress.epoch, progress.batch) for part in self.train.parts],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._resumed = True
        self.train.load_state_dict(state.get("train", state))
        self._go_on(state.get("position", []))
        self.seed = state.get("seed", self.seed) if "train" in state else self.seed
        parts = [part for loader in self.loaders.get("val", []) for part in loader.parts]
        for part, seed in zip(parts, state.get("val", []), strict=False):
            part.reseed(seed)
        self._asked = dict(state.get("asked", dict.fromkeys(self._asked, self.trainer.current_epoch)))

    def _go_on(self, stood: list[dict[str, int] | None]) -> None:
        """Go on at the sample where another number of processes was, and say what a batch is now."""
        parts, progress = self.train.parts, self.trainer.progress
        changed = [
            (part, saved)
            for part, saved in zip(parts, stood, strict=False)
            if saved is not None and part.indexed is not None and saved["parts"] != part.indexed.slices.parts
        ]
        if len(parts) == 1 and stood and stood[0] is not None:
            every = self.trainer.accumulate_grad_batches
            progress.batch = parts[0].go_on(progress.epoch, progress.batch, stood[0], every)
        for part, saved in changed:
            size, parts_now = part.indexed.slices.size, part.indexed.slices.parts  # type: ignore[union-attr]
            rank_zero_info(
                f"{part.name}: {parts_now} process{'es go' if parts_now > 1 else ' goes'} on where {saved['parts']} "
                f"{'were' if saved['parts'] > 1 else 'was'}, at sample {saved['samples']} of epoch {progress.epoch}. A "
                f"batch has {size} samples in all, {size / parts_now:g} for each process; it had {saved['size']}, "
                f"{saved['size'] / saved['parts']:g} for each."
            )

    def epoch(self, loader: Batches, epoch: int, start: int = 0) -> Iterator[tuple[int, Any, bool]]:
        """Yield (index, batch, is_last) from batch `start` of a loader's epoch on; `close` ends it."""
        batches = self._open[id(loader)] = loader.epoch(epoch, start)
        return batches

    def close(self) -> None:
        """Stop the workers, those of an epoch that an error has ended in its middle and those that loaders kept."""
        while self._open:
            self._open.popitem()[1].close()
        while self._mustered:
            self._mustered.popitem()[1].dismiss()
        for kind in self.loaders:
            self._close(kind)

    def _close(self, kind: str) -> None:
        for loader in self.loaders[kind]:
            loader.close()


def _names(kind: str, count: int) -> list[str]:
    """Return how messages call the loaders of a kind."""
    name = f"{kind}_dataloader"
    return [name] if count == 1 else [f"{name} {index}" for index in range(count)]


def _is_nothing(source: Any) -> bool:
    return source is None or (type(source) in (list, tuple, dict) and not source)


def check_dataloader_idx(module: Module, stage: str, several: bool) -> None:
    """Refuse methods that can't be told which of several loaders a batch is from, or that wait for it in vain.

    Raises:
        RuntimeError: it names the method.
        TypeError: one wants more than it is given.
    """
    kind = "val" if stage == "validation" else stage
    for name in (f"{stage}_step", f"on_{stage}_batch_start", f"on_{stage}_batch_end"):
        if not is_overridden(module, name):
            continue
        parameters = inspect.signature(getattr(module, name)).parameters
        index = parameters.get("dataloader_idx")
        takes_all = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values())
        where = f"{type(module).__name__}.{name}"
        if several and index is None and not takes_all and "dataloader_iter" not in parameters:
            raise RuntimeError(
                f"there are several {kind}_dataloaders, so {where} needs an argument dataloader_idx. It takes "
                f"({', '.join(parameters)}). Add dataloader_idx=0."
            )
        if not several and index is not None and index.default is index.empty:
            raise RuntimeError(
                f"{where} wants a dataloader_idx, but there is one {kind}_dataloader and none is passed. Give it a "
                "default: dataloader_idx=0."
            )
        by_place = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        needed = [parameter.name for parameter in by_place if parameter.default is parameter.empty]
        passed = ("outputs", "batch", "batch_idx")[not name.endswith("_end") :]
        if not several and not takes_all and len(needed) > len(passed):
            raise TypeError(
                f"{where} wants ({', '.join(needed)}), but with one {kind}_dataloader it is called with "
                f"({', '.join(passed)}). Give {needed[-1]} a default; the index of a loader is called dataloader_idx."
            )


class Clock:
    """When the last validation was, for a val_check_interval in time."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin to count from now."""
        self._since = time.monotonic()

    def passed(self, interval: timedelta) -> bool:
        """Whether the interval is over."""
        return time.monotonic() - self._since >= interval.total_seconds()
