"""ModelCheckpoint: save checkpoints while training, and keep the best and the last of them."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from trainkit import Callback
from trainkit.callbacks.monitor import Event, Watch, check_mode, looks_at_epoch_end
from trainkit.checkpoint import disk, naming, policy, saving, store
from trainkit.checkpoint.ledger import Decision, Files, Finder, Outcome, Written, described, free_path
from trainkit.checkpoint.lock import Ownership
from trainkit.checkpoint.outcome import elapsed, follow, outcome_of, seen
from trainkit.checkpoint.policy import Moment, Saved
from trainkit.checkpoint.snapshot import Snapshot
from trainkit.checkpoint.writing import newest_known, save, saves, tidy
from trainkit.duration import parse_duration
from trainkit.errors import CheckpointError, MisconfigurationException, nearest, warn
from trainkit.metrics import numbers

if TYPE_CHECKING:
    from trainkit import Module, Trainer


class Checkpoint(Callback):
    """Mark a callback that writes checkpoints: it comes behind all others. Derive your own from this."""

    monitors = True
    saves = True


class ModelCheckpoint(Checkpoint):
    """Save checkpoints while training, and keep the best and the last of them.

    What is saved is decided where the metrics are, and written at the next point where no gradient is pending, so that
    a run goes on from a checkpoint exactly. A metric of the validation is only used while it is new: with
    `every_n_train_steps`, the best k are decided after the next validation. A run that Ctrl-C or SIGTERM ends saves
    its whole state as `last.ckpt`, whatever is set here, unless `save_top_k=0` and `save_last` say that nothing is
    wanted.

    A file is whole under its name, or it is not there, and what it replaces goes when it is on the disk. Weights that
    are not finite rank behind all others: they never replace the last finite ones, neither `last.ckpt` nor the best,
    and without `monitor` both are kept until there are finite ones again. Several runs can save to one directory: names
    are never taken away, and each removes its own files only.

    Args:
        dirpath: where the files go; it is made if need be. An address such as "s3://bucket/run" is a place that fsspec
            knows (`pip install trainkit[remote]`). None: `checkpoints` in the run directory (`trainer.run_dir`).
        filename: a template such as "{epoch}-{val_loss:.2f}". Every metric, "epoch" and "step" can be in it; a metric
            that is not there becomes 0. A "/" makes directories. None: "{epoch}-{step}". A file that is there already
            is not overwritten: the new one ends in "-v1".
        monitor: the metric that says which are best, or "epoch" or "step"; None keeps the newest.
        verbose: print what is saved.
        save_last: True: also keep what was saved last as `last.ckpt`, best or not. It is a second name of the same
            file where that file is kept (a hard link), and needs no second write. "link": a symbolic link there.
        save_top_k: how many of the best to keep; -1 for all, 0 for none.
        save_on_exception: save when an exception ends the run, too. The updates before it are in it; that a run goes on
            exactly from there can't be promised.
        save_weights_only: leave out what only a resumed run needs.
        mode: "min" when a smaller metric is better, "max" when a larger one is. NaN is worse than anything.
        auto_insert_metric_name: put each metric's name before its value: "{val_loss:.2f}" becomes "val_loss=0.31". A
            "/" in the name becomes "_", so that it makes no directory.
        every_n_train_steps: save after every n-th update.
        train_time_interval: save after the first batch that ends so long after the last time: a timedelta,
            "DD:HH:MM:SS", or a dict of a timedelta's arguments.
        every_n_epochs: save in every n-th epoch. At most one of these three is used; by default every epoch.
        save_on_train_epoch_end: with `every_n_epochs`, True saves at the end of the training epoch, False after
            validation. None: after validation when there is more or less than one in each epoch.
        enable_version_counter: False overwrites a file that is there already.
        keep_last: keep this many of the newest as well, among the best or not.
        keep_every_n_steps: keep the first one at or after each multiple of so many updates as well, for good.
        asynchronous: write in another thread. Training stands still while the state is copied to host memory, which is
            used again each time; it waits if the save before is still under way. What a save leads to, removed files
            and loggers that hear of it, follows at the first save point after it is on the disk. The end of a run and
            a signal wait for it.
        on_save_error: what a save that fails leads to, on a full disk for example: "continue" warns each time, counts
            it in `failed_saves` and tries again at the next one; "stop" ends the run with the error.

    Attributes:
        best_model_path: the best file; without `monitor` the newest. "" before the first.
        best_model_score: its metric, a tensor.
        best_k_models: the files kept, with their metric.
        kth_best_model_path, kth_value: the worst of them, once there are k; always if all are kept.
        last_model_path: `last.ckpt`, "" before the first.
        current_score: the metric of what was saved last among the best.
        failed_saves: how many saves of this run failed.
        save_seconds: how long the last save took to be on the disk, None before the first.

    Raises:
        MisconfigurationException: arguments that can't work; when training begins, a directory that can't be written;
            during training, a metric that is not there after a validation. Without validation that is a warning.

    Example:
        >>> checkpoint = ModelCheckpoint(monitor="val_loss", filename="{epoch}-{val_loss:.2f}", save_top_k=3)
        >>> checkpoint.format_checkpoint_name({"epoch": 2, "val_loss": 0.1234})
        'epoch=2-val_loss=0.12.ckpt'
    """

    CHECKPOINT_JOIN_CHAR: ClassVar[str] = "-"
    CHECKPOINT_EQUALS_CHAR: ClassVar[str] = "="
    CHECKPOINT_NAME_LAST: str = "last"
    FILE_EXTENSION: ClassVar[str] = ".ckpt"
    STARTING_VERSION: ClassVar[int] = 1

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: Literal["min", "max"] = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | str | dict[str, int] | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
        *,
        keep_last: int = 0,
        keep_every_n_steps: int = 0,
        asynchronous: bool = False,
        on_save_error: Literal["continue", "stop"] = "continue",
    ) -> None:
        check_mode("ModelCheckpoint", mode)
        self._watch = None if monitor is None else Watch("ModelCheckpoint", monitor, mode, counters=True)
        self.monitor, self.mode = monitor, mode
        self.verbose = verbose
        if save_last not in (None, True, False, "link"):
            raise MisconfigurationException(
                f'ModelCheckpoint(save_last=...) must be True, False or "link". Received: {save_last!r}.'
            )
        self.save_last = save_last
        self.save_top_k = _whole("save_top_k", save_top_k, least=-1)
        if monitor is None and save_top_k not in (-1, 0, 1):
            raise MisconfigurationException(
                f"ModelCheckpoint(save_top_k={save_top_k}) needs monitor=..., the metric that says which are best. "
                "Without one, save_top_k can be 1 (the newest), -1 (all) or 0 (none)."
            )
        self.keep_last = _whole("keep_last", keep_last, least=0)
        self.keep_every_n_steps = _whole("keep_every_n_steps", keep_every_n_steps, least=0)
        self.asynchronous = asynchronous
        if on_save_error not in ("continue", "stop"):
            raise MisconfigurationException(
                f'ModelCheckpoint(on_save_error=...) must be "continue" or "stop". Received: {on_save_error!r}.'
            )
        self.on_save_error = on_save_error
        self.save_weights_only = save_weights_only
        self.auto_insert_metric_name = auto_insert_metric_name
        self.enable_version_counter = enable_version_counter
        self.save_on_exception = save_on_exception
        self.save_on_train_epoch_end = save_on_train_epoch_end
        self.filename = filename
        if filename is not None:
            naming.check_template(filename, "ModelCheckpoint(filename=...)")
        self._given_dirpath = None if dirpath is None else store.real(dirpath)
        self.dirpath: str | None = self._given_dirpath

        rhythms = {
            "every_n_train_steps": every_n_train_steps,
            "train_time_interval": train_time_interval,
            "every_n_epochs": every_n_epochs,
        }
        given = [name for name, value in rhythms.items() if value is not None and value != 0]
        if len(given) > 1:
            raise MisconfigurationException(
                f"ModelCheckpoint takes one of {', '.join(rhythms)}. Received: "
                f"{' and '.join(f'{name}={rhythms[name]!r}' for name in given)}. For two rhythms use two of them."
            )
        every_epoch = all(value is None for value in rhythms.values())
        self.every_n_train_steps = _whole("every_n_train_steps", every_n_train_steps or 0, least=0)
        self.every_n_epochs = _whole("every_n_epochs", 1 if every_epoch else every_n_epochs or 0, least=0)
        self.train_time_interval: timedelta | None = None
        if train_time_interval is not None:
            self.train_time_interval = parse_duration(train_time_interval, "ModelCheckpoint(train_time_interval=...)")
        self._resumed_from: str | None = None
        self._named: str | None = None  # the same, if it was named: somebody may want it again
        self._ownership: Ownership | None = None
        self.failed_saves = 0
        self.save_seconds: float | None = None
        self._forget()
        self._end_run()

    def _forget(self) -> None:
        """Set what is remembered about files to what it is before the first."""
        self.best_model_path = ""
        self.best_model_score: Tensor | None = None
        self.best_k_models: dict[str, Tensor] = {}
        self.kth_best_model_path = ""
        self.kth_value: Tensor = torch.tensor(math.inf if self.mode == "min" else -math.inf)
        self.last_model_path = ""
        self.current_score: Tensor | None = None
        self._files = Files()

    def _end_run(self) -> None:
        self._running = False
        self._when_batch: policy.When | None = None  # None: nothing to decide in a step
        self._when_later: policy.When = policy.never
        self._looked = self._missed = False  # for the metric
        self._waiting = False  # for a new value of it
        self._decision: Decision | None = None
        self._decided_step = -1
        self._clock = math.inf
        self._written: Written | None = None
        self._warned: set[str] = set()
        self._in_flight = False
        self._snapshot: Snapshot | None = None
        self._never_finite: frozenset[str] = frozenset()  # buffers that are made so, as the masks of attention are
        if self._ownership is not None:
            self._ownership.release()
        self._ownership = None

    def _begin_policies(self, trainer: Trainer) -> None:
        """Work out when to save, now that it is known when there is validation."""
        if self.every_n_train_steps:
            self._when_batch = policy.every_n_steps(self.every_n_train_steps)
        elif self.train_time_interval is not None:
            self._when_batch = policy.every_seconds(self.train_time_interval.total_seconds())
        at_epoch_end = looks_at_epoch_end(trainer, self.save_on_train_epoch_end)
        where = policy.after("epoch" if at_epoch_end else "validation")
        self._when_later = policy.all_of(where, policy.every_n_epochs(self.every_n_epochs))

    # ---- state
    @property
    def state_key(self) -> str:
        """Name the state by what is watched and when, so that one run can have several."""
        settings = {
            "monitor": self.monitor,
            "mode": self.mode,
            "every_n_train_steps": self.every_n_train_steps,
            "every_n_epochs": self.every_n_epochs,
            "train_time_interval": self.train_time_interval,
        }
        return f"{type(self).__qualname__}{settings}"

    def state_dict(self) -> dict[str, Any]:
        """Return what is known about the files. In a checkpoint that is being written, that one is among them."""
        names = ["current_score", "best_model_score", "best_model_path", "best_k_models"]
        names += ["kth_best_model_path", "kth_value", "last_model_path"]
        state: dict[str, Any] = {"monitor": self.monitor, "dirpath": self.dirpath, "waiting": self._waiting}
        state.update({name: getattr(self, name) for name in names}, fresh=bool(self._watch and self._watch.fresh))
        outcome = None
        if self._decision is not None:
            outcome = self._outcome(self._decision)
            state.update(outcome.attributes, pending=[path for path in (outcome.path, outcome.last) if path])
            state["last_model_path"] = outcome.last or self.last_model_path
        return {**state, **self._files.after(outcome).state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what is known about the files that are still there, if they are in this callback's directory.

        A directory that was moved as a whole counts as the same one. From another directory only `best_model_path` is
        taken, and from one that another run is using: the files there are that run's.
        """
        before = state_dict.get("dirpath")
        shared = self._ownership is not None and self._ownership.owner
        find = Finder(self.dirpath, before, self._resumed_from or "", () if shared else state_dict.get("pending", ()))
        self.best_model_path = find(state_dict["best_model_path"])
        if not find.same:
            warnings.warn(
                f"ModelCheckpoint saved to {before} before and saves to {self.dirpath} now: the files there stay, and "
                f"the best {self.save_top_k} are counted anew.",
                stacklevel=2,
            )
        if shared or not find.same:
            return
        self._waiting = state_dict.get("waiting", False)
        self.current_score = state_dict.get("current_score")
        scores = {find(path): torch.as_tensor(score) for path, score in state_dict["best_k_models"].items()}
        scores.pop("", None)
        if "kept" in state_dict:
            self._files.load(state_dict, find)
        else:  # Lightning's
            newest = [self.best_model_path] if self.monitor is None and self.best_model_path else []
            self._files.kept = [Saved(path, float(score)) for path, score in scores.items()] or [*map(Saved, newest)]
        if self._watch is not None:
            self._watch.fresh = state_dict.get("fresh", False)
            ranked = [one for one in self._files.kept if one.path in scores]
            self._set(described(ranked, scores, self.save_top_k, self.mode))
        self.last_model_path = find(state_dict["last_model_path"])
        resumed_last = os.path.basename(find.resumed_from).startswith(self.CHECKPOINT_NAME_LAST)
        if not self.last_model_path and find.beside and resumed_last:
            self.last_model_path = find.resumed_from
        self._files.last = self.last_model_path

    # ---- hooks
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Settle the directory, and prove that it can be written before anything is trained."""
        self._end_run()
        if self._watch is not None:
            self._watch.begin()
        self._resumed_from = trainer.resume_path
        self._named = trainer.resume_path if trainer.resumed_by_name else None
        if stage != "fit" or trainer.fast_dev_run:
            return
        directory = self._given_dirpath or store.real(os.path.join(trainer.run_dir, "checkpoints"))
        if directory != self.dirpath or (trainer.global_step == 0 and trainer.resume_path is None):
            self._forget()
        self.dirpath, self.failed_saves = directory, 0
        if trainer.is_global_zero:
            try:
                store.prepare(directory)
            except CheckpointError as error:
                raise MisconfigurationException(
                    f"checkpoints can't be saved: {error} Choose another directory with ModelCheckpoint(dirpath=...) "
                    "or Trainer(default_root_dir=...), or save none with Trainer(enable_checkpointing=False)."
                ) from error
            if not store.is_remote(directory):
                self._claim(directory)

    def _claim(self, directory: str) -> None:
        """Take the directory for this run; its owner tidies up after those that died."""
        self._ownership = Ownership(directory)
        if self._ownership.owner:
            warn(
                f"{directory} is in use by another run, {self._ownership.owner}. Both go on: names that are taken get "
                "a version, and nothing of the other run is removed. Give each run a directory of its own with "
                "ModelCheckpoint(dirpath=...)."
            )
        else:
            disk.sweep(directory)

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Start counting steps and time."""
        if trainer.fast_dev_run:
            return
        self._begin_policies(trainer)
        self._running = True
        self._clock = time.monotonic()
        self._decided_step = trainer.global_step
        buffers = {name for name, _ in pl_module.named_buffers()}
        self._never_finite = frozenset(buffers.intersection(saving.not_finite(saving.floating_state(pl_module))))
        tidy(self, trainer)  # what the process that wrote the checkpoint did not live to remove

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Decide, if it is decided by steps or by time."""
        if self._when_batch is None:
            return
        step = trainer.global_step
        if step == self._decided_step:  # no update since: inside an accumulation window
            return
        seconds = elapsed(self, trainer, time.monotonic() - self._clock)
        if self._when_batch(Moment("batch", trainer.current_epoch, step, seconds)):
            self._decided_step, self._clock = step, time.monotonic()
            self._decide(trainer, "batch")

    def on_sanity_check_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._watch is not None:
            self._watch.doubt(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Decide, if it is decided after validation, or if a decision waits for the metric."""
        if not self._running or trainer.sanity_checking:
            return
        if self._watch is not None:
            self._watch.after_validation(trainer)
        self._decide_if_due(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Decide, if it is decided at the end of the epoch, or if a decision waits for the metric."""
        if self._running:
            self._decide_if_due(trainer, "epoch")

    def on_save_point(self, trainer: Trainer, pl_module: Module) -> None:
        """Write what was decided; hear of what was written in the meantime."""
        if (self._decision is None and not self._in_flight and not trainer.interrupted) or not self._running:
            return
        if self._in_flight and (trainer.background.finished or self._decision is not None or trainer.interrupted):
            trainer.background.settle()
        try:
            if trainer.interrupted and self._saves_interrupted(trainer):
                self._decide_last(trainer)
            if self._decision is not None:
                save(self, self._decision, self.asynchronous and not trainer.interrupted)
        finally:
            self._decision = None

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Wait for what is being written; save `last` if nothing was saved before; say what went wrong."""
        if not self._running:
            return
        if self._in_flight:
            trainer.background.settle()
        follow(self, trainer.strategy.broadcast(seen(self)))  # what was written in the background, rank 0 knows
        if self.save_last and self._written is None and not self.failed_saves:
            self._decision = Decision(trainer, _epoch_of(trainer), numbers(trainer.callback_metrics), last=True)
        if self._decision is not None:
            save(self, self._decision)
            self._decision = None
        tidy(self, trainer)
        found = self.best_k_models or self.best_model_path or self._missed or self.failed_saves
        if self._looked and self.save_top_k and not found:
            unvalidated = trainer.enable_validation and self._watch is not None and not self._watch.validated
            why = "validation did not run" if unvalidated else "there was no new value when it looked"
            warnings.warn(f"ModelCheckpoint(monitor={self.monitor!r}) kept nothing: {why}.", stacklevel=2)
        if self.failed_saves:
            warn(f"ModelCheckpoint: {saves(self.failed_saves)} of this run failed. {newest_known(self)}")

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """Save what there is, if that is wanted."""
        if self._in_flight:
            try:
                trainer.background.settle()
            except Exception as error:
                exception.add_note(f"ModelCheckpoint: {error}")
        wanted = self.save_on_exception and self._running and not trainer.sanity_checking and trainer.world_size == 1
        if not wanted or not isinstance(exception, Exception) or isinstance(exception, CheckpointError):
            return
        here = (trainer.progress.epoch, trainer.progress.batch, trainer.progress.step)
        if self._written is not None and self._written.where == here:
            return
        # what was decided is not between windows: this has nothing to do with the best
        decision = Decision(trainer, _epoch_of(trainer), numbers(trainer.callback_metrics), last=bool(self.save_last))
        self._outcome(decision).path = self._free_path(decision, self.filename, self._claimed_by_others(trainer), set())
        self._decision = decision
        try:
            save(self, decision)
        except Exception as error:
            exception.add_note(f"save_on_exception: nothing was saved: {error}")
        finally:
            self._decision = None

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """End counting."""
        try:
            if self._in_flight:
                trainer.background.settle()
        finally:
            self._end_run()

    # ---- deciding
    def _decide_if_due(self, trainer: Trainer, event: Event) -> None:
        moment = Moment(event, trainer.current_epoch, trainer.global_step, time.monotonic() - self._clock)
        if self._waiting or self._when_later(moment):
            self._decide(trainer, event)

    def _decide(self, trainer: Trainer, event: Event) -> None:
        """Note that something is to be saved, with the metrics of this moment."""
        score, ranked, watch = None, self.save_top_k != 0, self._watch
        self._looked = True
        if ranked and watch is not None:
            ranked = watch.is_new(trainer, event)
            if ranked:
                score = watch.read(trainer)
            elif event != "batch" and not watch.may_come(trainer):
                if watch.validated:
                    raise MisconfigurationException(watch.missing(trainer, event))
                if not self._missed:  # a run without validation need not be in vain
                    warnings.warn(f"{watch.missing(trainer, event)} Nothing is kept without it.", stacklevel=2)
                    self._missed = True
            self._waiting = not ranked and (self._waiting or event == "batch")
        listed = bool(self.keep_last or self.keep_every_n_steps)
        if not ranked and (not (self.save_last or listed) or (self._waiting and event != "batch")):
            return
        if self._decision is not None and self._decision.ranked and not ranked:
            return  # inside an accumulation window: what was decided there is still to be written
        metrics = numbers(trainer.callback_metrics)
        self._decision = Decision(
            trainer, trainer.current_epoch, metrics, score, ranked, listed, last=bool(self.save_last)
        )

    def _decide_last(self, trainer: Trainer) -> Decision:
        """Note that `last` is to be written with all that a resumed run needs, whatever else is."""
        decision = self._decision or Decision(trainer, _epoch_of(trainer), numbers(trainer.callback_metrics))
        decision.last = decision.resumable = True
        decision.outcome = None
        self._decision = decision
        return decision

    def _saves_interrupted(self, trainer: Trainer) -> bool:
        """Whether this is the one callback that saves the state when a signal ends the run."""
        savers = (c for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and (c.save_top_k or c.save_last))
        return next(savers, None) is self

    # ---- working out what a decision leads to
    def _outcome(self, decision: Decision) -> Outcome:
        """Return the files and attributes that follow; the same ones however often it is asked.

        Another callback's checkpoint may be written first, and has this one's attributes in it.
        """
        if decision.outcome is None or decision.outcome.step != decision.trainer.global_step:
            decision.outcome = outcome_of(self, decision)
        return decision.outcome

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether a checkpoint with this metric would be kept among the best; None is no metric."""
        return current is not None and policy.plan(self._files.kept, Saved("", float(current)), self._best()).write

    def _best(self) -> policy.Keep:
        if self.save_top_k == -1:
            return policy.keep_all
        return (
            policy.keep_last(self.save_top_k) if self.monitor is None else policy.keep_best(self.save_top_k, self.mode)
        )

    def _also(self) -> policy.Keep:
        return policy.keep_any(policy.keep_last(self.keep_last), policy.keep_every_n_steps(self.keep_every_n_steps))

    def _set(self, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)

    def _claimed_by_others(self, trainer: Trainer) -> set[str]:
        """Return the files that the run's other callbacks keep or are about to write."""
        claimed: set[str] = set()
        for other in trainer.callbacks:
            if isinstance(other, ModelCheckpoint) and other is not self:
                claimed |= {other.best_model_path, other.last_model_path, *(one.path for one in other._files.kept)}
                outcome = other._decision.outcome if other._decision is not None else None
                if outcome is not None:
                    claimed |= {path for path in (outcome.path, outcome.last) if path is not None}
        return claimed

    def _free_path(self, decision: Decision, template: str | None, taken: set[str], replaceable: set[str]) -> str:
        trainer = decision.trainer
        metrics = {**decision.metrics, "epoch": decision.epoch, "step": trainer.global_step}

        def name(version: int | None) -> str:
            return self._path(metrics, template, version)

        def exists(path: str) -> bool:
            return self.file_exists(path, trainer)

        return free_path(name, exists, taken, replaceable, not self.enable_version_counter, self.STARTING_VERSION)

    # ---- names
    def file_exists(self, filepath: str | os.PathLike[str], trainer: Trainer) -> bool:
        """Whether a name is taken, so that the next version is tried."""
        return store.exists(filepath)

    def format_checkpoint_name(
        self,
        metrics: Mapping[str, Any],
        filename: str | None = None,
        ver: int | None = None,
        prefix: str | None = None,
    ) -> str:
        """Return the path a checkpoint with these metrics would get.

        Args:
            metrics: what the template may ask for, "epoch" and "step" included. What is missing becomes 0.
            filename: a template instead of this callback's own.
            ver: a version to put behind it.
            prefix: something to put before it.

        Raises:
            MisconfigurationException: the template can't be used.
        """
        join = self.CHECKPOINT_JOIN_CHAR
        template = filename or self.filename or f"{{epoch}}{join}{{step}}"
        name = naming.fill(template, metrics, self.auto_insert_metric_name, self.CHECKPOINT_EQUALS_CHAR)
        name = name if prefix is None else f"{prefix}{join}{name}"
        name += ("" if ver is None else f"{join}v{ver}") + self.FILE_EXTENSION
        return os.path.join(self.dirpath, name) if self.dirpath is not None else name

    def _path(self, metrics: Mapping[str, Any], template: str | None, version: int | None = None) -> str:
        for name in naming.names_in(template or self.filename or "") - set(metrics) - self._warned:
            self._warned.add(name)
            warnings.warn(
                f"ModelCheckpoint: the file name asks for {name!r}, which is not there ({nearest(name, metrics)}); 0 "
                "stands in for it.",
                stacklevel=2,
            )
        return self.format_checkpoint_name(metrics, template, version)

    def to_yaml(self, filepath: str | os.PathLike[str] | None = None) -> None:
        """Write the files kept and their metric as YAML.

        Args:
            filepath: where to; None: `best_k_models.yaml` beside them.
        """
        import yaml

        with open(filepath or os.path.join(self.dirpath or "", "best_k_models.yaml"), "w") as file:
            yaml.safe_dump({path: float(score) for path, score in self.best_k_models.items()}, file)


def _epoch_of(trainer: Trainer) -> int:
    """Return the epoch of the last finished batch."""
    progress = trainer.progress
    return progress.epoch - (progress.batch == 0 and progress.epoch > 0)


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise MisconfigurationException(
            f"ModelCheckpoint({name}=...) must be a whole number, {least} or more. Received: {value!r}."
        )
    return value
