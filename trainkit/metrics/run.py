"""All names of a run: what `log` files, and what loggers, callbacks and the progress bar read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from trainkit.errors import MisconfigurationException, warn
from trainkit.metrics.batch_size import BatchSize
from trainkit.metrics.exchange import Entry, Exchange, of_others
from trainkit.metrics.metric import Kind, Metric, as_number, is_metric_object, not_a_scalar, numbers
from trainkit.metrics.objects import (
    ObjectMetric,
    attribute_of,
    copied,
    load_metric_states,
    metric_states,
    object_at,
)
from trainkit.metrics.options import Given, check_hook, resolve
from trainkit.metrics.shared import OwnObject, SharedMetric, SharedObject

if TYPE_CHECKING:
    from trainkit.strategies.base import Strategy

RUN_START = "on_train_start"
NOTES = ("seen", "_logged", "seen_by_loggers", "seen_on_bar", "_evaluated")
Key = tuple[str, str, int | None]


class Row(NamedTuple):
    """One value of a table, under the two names it has."""

    metric: Metric
    bare: str
    """Without `_step` or `_epoch`, for callbacks."""
    called: str
    value: Any


class Table:
    """The metrics of one loop: training, or one evaluation."""

    def __init__(self, stage: str, num_dataloaders: int = 1, steps: bool = False) -> None:
        self.stage = stage  # "train", "validation" or "test"
        self.num_dataloaders = num_dataloaders
        self.loader: int | None = None  # None: there is one only, or none in particular
        self.steps = steps  # whether step values show; else the epoch's reductions do
        self.metrics: dict[Key, Metric] = {}
        self.logs_steps = False  # whether any value goes to the loggers step by step

    def rows(self) -> Iterator[Row]:
        """Yield what shows now, of the loader that is running."""
        kind: Kind = "step" if self.steps else "epoch"
        for metric in self.metrics.values():
            if metric.logged and metric.loader == self.loader:
                value = metric.value(kind)
                if value is not None:
                    yield Row(metric, metric.name + metric.suffix, metric.called(kind), value)

    def for_loggers(self) -> dict[str, Any]:
        """Return what shows now and goes to the loggers."""
        return {row.called: row.value for row in self.rows() if row.metric.logger}

    def reset(self) -> None:
        """Forget the values, keep the options; metric objects are reset with them."""
        for metric in self.metrics.values():
            metric.reset()
        self.reset_objects()

    def reset_objects(self) -> None:
        """Reset the metric objects: their user's next epoch begins."""
        for metric in self.metrics.values():
            if isinstance(metric, ObjectMetric):
                metric.metric.reset()


class Metrics:
    """All that a run has logged. The loop says where it is; `log` files the value; readers ask for numbers.

    Args:
        module: where metric objects are attributes.
        has_logger: whether anybody writes down what is logged.
        strategy: the run's; of several processes, it brings together what they logged.
    """

    exchange: Exchange | None = None
    """How the values of several processes become one; None: there is one process."""

    def __init__(
        self, module: nn.Module | None = None, has_logger: bool = True, strategy: Strategy | None = None
    ) -> None:
        self.module, self.has_logger = module, has_logger
        if strategy is not None and strategy.world_size > 1:
            self.exchange = Exchange(strategy)
        self.hook: str = "setup"
        self.x = 0  # the x value of what is logged now: accumulation windows that were over before this batch
        self.train = Table("train")
        self.table = self.train
        self.batch: Any = None
        # Values that stay until they are replaced: what tables showed last.
        self.seen: dict[str, Tensor] = {}
        self._logged: set[str] = set()  # the names in it that came from `log`
        self.seen_by_loggers: dict[str, Tensor] = {}
        self.seen_on_bar: dict[str, Any] = {}
        self._evaluated: dict[int, int] = {}  # batches of each loader, in all evaluations of the run
        self._results: list[dict[str, Any]] = []
        self._objects: dict[str, Any] | None = None  # the states of the metric objects when the run ended
        self._batch_size = BatchSize()

    # ------------------------------------------------------------------ writing
    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | Tensor | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """File one value under the hook the run is in. See `Logs.log`."""
        table = self.table
        loader = table.loader
        given = (
            prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
            add_dataloader_idx, metric_attribute, rank_zero_only, loader,
        )  # fmt: skip
        metric = table.metrics.get((self.hook, name, loader if add_dataloader_idx else None))
        if metric is None or metric.given != given:
            metric = self._configured(metric, name, value, given)
        if not isinstance(value, (Tensor, int, float)) or metric.takes_objects:
            value = metric.accept(value, self.module)
        weight: Any = 1
        if metric.weighted:
            weight = batch_size
            if weight is None:
                weight = self._batch_size.of(self.batch) if self.batch is not None else 1
        try:
            metric.update(value, weight)
        except RuntimeError as error:
            if isinstance(value, Tensor) and value.numel() != 1:
                raise not_a_scalar(name, value) from error
            raise

    def _configured(self, metric: Metric | None, name: str, value: Any, given: tuple[Any, ...]) -> Metric:
        """Check a name's first call in this hook and remember its options; refuse other ones later."""
        *options, loader = given
        hook, table, asked = self.hook, self.table, Given(*options)
        check_value(name, value)
        check_hook(name, hook)
        if self.exchange is None:
            asked = asked._replace(sync_dist=False)  # one process has no other to differ from
        resolved = resolve(name, hook, asked)
        if metric is not None and metric.options is not None:
            if metric.loader != loader:
                raise MisconfigurationException(
                    f"self.log({name!r}, ..., add_dataloader_idx=False) is called for two loaders: the names must "
                    "differ."
                )
            if metric.options != resolved:
                raise MisconfigurationException(
                    f"self.log({name!r}, ...) was called twice in {hook} with different options. "
                    "Give both calls the same ones, or log under two names."
                )
            metric.given = given  # the same, said differently
            return metric
        if asked.logger and not self.has_logger:
            warn(
                f"self.log({name!r}, ..., logger=True): this Trainer has no logger, so nothing is written down. Leave "
                "logger out, or give it one: Trainer(logger=...)."
            )
        if metric is None:
            key = (hook, name, loader if asked.add_dataloader_idx else None)
            suffix = f"/dataloader_idx_{loader}" if loader is not None and asked.add_dataloader_idx else ""
            if is_metric_object(value):
                where = attribute_of(self.module, name, value, asked.metric_attribute)
                metric = self._kinds(resolved.rank_zero_only)[1](name, hook, suffix, loader, value, where)
            else:
                metric = self._kinds(resolved.rank_zero_only)[0](name, hook, suffix, loader)
            table.metrics[key] = metric
        metric.configure(resolved)  # a restored one has its running values already
        if metric.weighted and not metric.on_epoch:  # a mean over processes, of batches that may have no size
            metric.weighted = self._batch_has_size()
        metric.given = given
        table.logs_steps = table.logs_steps or (metric.on_step and metric.logger)
        return metric

    def _kinds(self, alone: bool) -> tuple[type[Metric], type[ObjectMetric]]:
        """Return the classes of what is logged: of one process, of all of them, of one of several."""
        if self.exchange is None:
            return Metric, ObjectMetric
        return (Metric, OwnObject) if alone else (SharedMetric, SharedObject)

    def _batch_has_size(self) -> bool:
        try:
            return self.batch is not None and bool(self._batch_size.of(self.batch))
        except MisconfigurationException:
            return False

    def publish(self, values: dict[str, Any]) -> None:
        """Put values among the callback metrics, where they stay until they are replaced."""
        self.seen.update({name: as_tensor(value) for name, value in values.items()})
        self._logged -= values.keys()

    @property
    def published(self) -> set[str]:
        """The callback metrics that somebody put there past `log`."""
        self._keep()
        return self.seen.keys() - self._logged

    def note_row(self, values: dict[str, Any]) -> None:
        """Put a row's values among the logged metrics: whoever writes one past `log` wants them there, too."""
        self.seen_by_loggers.update({name: as_tensor(value) for name, value in values.items()})

    # ------------------------------------------------------------------ several processes
    def agree(self, where: str, empty: bool = False) -> None:
        """Let what was logged by epoch be what all processes came to, when all of them call this.

        Args:
            where: the point in the run, for messages.
            empty: this process was given no batch.
        """
        if self.exchange is None:
            return
        table = self.table
        shown = [
            metric
            for metric in table.metrics.values()
            if isinstance(metric, (SharedMetric, SharedObject))
            and metric.logged
            and metric.on_epoch
            and metric.loader == table.loader
        ]
        agreed = self.exchange.on_epoch(where, shown, empty, self._of_others)
        if len(agreed) > len(shown):  # in the order of all
            theirs = {(one.hook, one.name, one.loader if one.suffix else None): one for one in agreed}
            table.metrics = {key: one for key, one in table.metrics.items() if key not in theirs} | theirs

    def agree_on_steps(self, now: bool = False) -> None:
        """Let what was logged by step with sync_dist=True be what all processes came to.

        Args:
            now: even if nobody has logged anything of the kind lately.
        """
        if self.exchange is not None:
            shown = [
                metric
                for metric in self.train.metrics.values()
                if isinstance(metric, SharedMetric) and metric.logged and metric.synced
            ]
            self.exchange.on_step(shown, self.x, now)

    def catch_up(self) -> None:
        """Let what was logged until now be what all processes came to, before something is decided by it.

        To be called by all processes. The values of an evaluation are agreed on when it is over.
        """
        if self.table is self.train:
            if self.train.steps:
                self.agree_on_steps(now=True)
            else:
                self.agree("the end of the epoch")

    def _of_others(self, entry: Entry) -> Any:
        """Return a name that other processes have logged, and this one was given no batch to log it for."""
        metric: Any = self.table.metrics.get((entry.hook, entry.name, entry.loader if entry.suffix else None))
        if metric is None:
            metric = of_others(entry, object_at(self.module, entry.attribute) if entry.attribute else None)
        metric.logged = True
        return metric

    # ------------------------------------------------------------------ the run moves on
    def start_batches(self, hook: str) -> None:
        """From here on step values show."""
        self.hook, self.train.steps = hook, True

    def end_batches(self, empty: bool = False) -> None:
        """From here on the epoch's reductions show.

        Args:
            empty: other processes had all samples of the epoch.
        """
        if self.batch is not None:  # else: a validation came after the last batch, and its values are newer
            self._keep()
        self.train.steps, self.batch = False, None
        self.agree("the end of the epoch's batches", empty)

    def end_epoch(self, whole: bool) -> dict[str, Any]:
        """Return the epoch's reductions for the loggers, and begin to collect for the next epoch.

        An epoch that a limit ended early keeps its running values, for a run that goes on inside it.
        """
        self.agree("the end of the epoch")
        self._keep()
        values = self.train.for_loggers()
        if whole:
            self.train.reset()
        return values

    def row(self) -> dict[str, Any]:
        """Return what goes to the loggers at a log point."""
        return self.table.for_loggers()

    def begin(self, stage: str, num_dataloaders: int = 1) -> Table:
        """Enter an evaluation: what is logged from here goes to a table of its own."""
        self._keep()
        self.table = Table(stage, num_dataloaders, steps=self.train.steps)
        self._results = []
        return self.table

    def begin_loader(self, index: int, hook: str) -> int:
        """Enter a loader of an evaluation; return how many batches of it earlier evaluations of this run had."""
        self.hook, self.table.steps = hook, True
        self.table.loader = index if self.table.num_dataloaders > 1 else None
        return self._evaluated.get(index, 0)

    def end_loader(self, index: int, batches: int) -> None:
        """Leave it after so many batches: its reductions show, and are its result."""
        self._evaluated[index] = self._evaluated.get(index, 0) + batches
        self._keep()
        self.batch, self.table.steps = None, False
        self.agree(f"the end of the {self.table.stage}'s loader {index}", empty=batches == 0)
        self._keep()
        self._results.append(self.table.for_loggers())

    def end_loaders(self) -> None:
        """From here on nothing belongs to a loader in particular."""
        self.table.loader, self.table.steps = None, False

    def end_evaluation(self) -> tuple[list[dict[str, float]], dict[str, Any]]:
        """Return a dict for each loader, and all values together."""
        self.agree(f"the end of the {self.table.stage}")
        self._keep()
        common = self.table.for_loggers()
        together = {name: value for result in reversed(self._results) for name, value in result.items()}
        results = [numbers({**result, **common}) for result in self._results]
        return results, {**together, **common}

    def leave_evaluation(self, hook: str) -> None:
        """What is logged from here on is training's again."""
        self.table.reset()
        self.table, self.hook, self.batch = self.train, hook, None

    def forget(self) -> None:
        """Forget everything, as around a sanity check."""
        self.seen, self.seen_by_loggers, self.seen_on_bar, self._logged = {}, {}, {}, set()
        self._evaluated.clear()
        self.table.reset()
        self.train = self.table = Table("train")
        self.hook = "on_sanity_check_end"

    def noted(self) -> dict[str, Any]:
        """Return what was seen so far, for `go_back`."""
        return {name: getattr(self, name).copy() for name in NOTES}

    def go_back(self, noted: dict[str, Any]) -> None:
        """Forget what was seen since: an evaluation that was cut short."""
        for name, value in noted.items():
            setattr(self, name, value)

    def finish(self) -> None:
        """End the run: what was seen last stays, on the host, and so does an epoch that is not over."""
        self._objects = copied(metric_states(self.module))
        if self.table is not self.train:
            self.table.reset()
        if any(
            metric.logged for metric in self.train.metrics.values()
        ):  # else: their epoch is over, and they are reset
            self.train.reset_objects()
        self.table = self.train
        self.hook, self.batch = "outside", None
        for seen in (self.seen, self.seen_by_loggers, self.seen_on_bar):
            seen.update({name: value.cpu() for name, value in seen.items() if isinstance(value, Tensor)})

    # ------------------------------------------------------------------ reading
    def _keep(self) -> None:
        """Take over what the running loop's table shows now. Nothing is read from a device."""
        table = self.table
        for metric, bare, called, value in table.rows():
            kept = as_tensor(value)
            if metric.logger:
                self.seen_by_loggers[called] = kept
            if metric.prog_bar:
                self.seen_on_bar[called] = kept
            if table is self.train or not table.steps:
                self.seen[bare] = self.seen[called] = kept
                self._logged |= {bare, called}

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """Everything a callback may watch, newest values, as 0-dimensional tensors."""
        self._keep()
        return self.seen

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """Everything that loggers get, newest values, as 0-dimensional tensors."""
        self._keep()
        return self.seen_by_loggers

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """What was logged with prog_bar=True, as numbers. Reading it waits for the device."""
        self._keep()
        return numbers(self.seen_on_bar)

    # ------------------------------------------------------------------ resume
    def state_dict(self) -> dict[str, Any]:
        """Return the running values of the epoch in progress and what was seen last.

        Of several processes, each has its own: see `resumed.share_of`.
        """
        return {
            "train": [
                copied(metric.state_dict())  # without graphs
                for metric in self.train.metrics.values()
                if metric.logged and metric.hook != RUN_START  # logged again when the run is resumed
            ],
            "seen": copied(self.seen),
            "published": sorted(self.published),
            "seen_by_loggers": copied(self.seen_by_loggers),
            "seen_on_bar": copied(self.seen_on_bar),
            "evaluated": [list(pair) for pair in self._evaluated.items()],
            "steps": self.train.steps,
            "objects": metric_states(self.module) if self._objects is None else self._objects,
            **({} if self.exchange is None else {"part": self.exchange.part}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.seen = dict(state["seen"])
        self._logged = self.seen.keys() - set(state.get("published", ()))
        self.seen_by_loggers = dict(state["seen_by_loggers"])
        self.seen_on_bar = dict(state["seen_on_bar"])
        self._evaluated = {int(index): int(batches) for index, batches in state["evaluated"]}
        self.train.steps = bool(state["steps"])
        load_metric_states(self.module, state["objects"])
        for saved in state["train"]:
            name, hook, suffix, loader = (saved[part] for part in ("name", "hook", "suffix", "loader"))
            alone = saved.get("alone", False)
            if "attribute" in saved:
                found = object_at(self.module, saved["attribute"])
                if found is None:  # the module has no such metric any more
                    continue
                metric: Metric = self._kinds(alone)[1](name, hook, suffix, loader, found, saved["attribute"])
            else:
                metric = self._kinds(alone)[0](name, hook, suffix, loader)
            for part in (*metric.SAVED, *metric.RUNNING):
                if part in saved:  # else: it was saved by one process, and several have more to say
                    setattr(metric, part, copied(saved[part]))  # they change in place
            self.train.metrics[hook, name, None] = metric


class NoMetrics(Metrics):
    """A barebones run's: `log` warns once and does nothing."""

    def __init__(self, module: nn.Module | None = None, has_logger: bool = True, strategy: Any = None) -> None:
        super().__init__(module, has_logger)  # there is nothing that processes would agree on

    _warned = False

    def log(self, name: str, value: Any, *_: Any, **__: Any) -> None:
        """Pass over a value."""
        if not self._warned:
            self._warned = True
            warn("self.log does nothing in a Trainer(barebones=True), which measures the loop alone.")


def check_value(name: object, value: Any) -> None:
    """Refuse what can never be logged.

    Raises:
        ValueError: the value is none of those that can.
        TypeError: the name is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"self.log takes a name first, a string. Received: {name!r}.")
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise not_a_scalar(name, value)
        if value.is_complex():
            raise ValueError(
                f"self.log({name!r}, ...) takes a real number. Received: {value.dtype}. Log .abs() or .real."
            )
    elif not is_metric_object(value):
        as_number(name, value)


def as_tensor(value: Any) -> Tensor:
    """Return a copy of a value as a 0-dimensional tensor, of numbers in the default dtype."""
    return value.clone() if isinstance(value, Tensor) else torch.tensor(float(value))
