"""`self.log`, as a Module and a Callback have it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from trainkit.metrics import Metrics


class Logs:
    """Whoever can log: `log` hands a value to the metrics of the run that this object is a part of."""

    _run_metrics: Metrics | None = None  # that run's, from set-up to tear-down

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
        """Log one value under a name. docs/logging.md says in which hooks, and where the value shows up.

        The options are checked in a name's first call from a hook; its later calls must have the same ones. A metric
        called "step" sets the x value of the row it is logged in: `self.log("step", float(self.current_epoch))`.

        Args:
            name: the name; with both on_step and on_epoch it forks into `name_step` and `name_epoch`.
            value: a number, a tensor of one element, or a metric object such as torchmetrics', which must be an
                attribute of the module. A tensor is not read here, so nothing waits for the device.
            prog_bar: show it on the progress bar.
            logger: hand it to the loggers (default: yes).
            on_step: log this very value (default: in the hooks of training batches).
            on_epoch: log the epoch's reduction (default: everywhere else).
            reduce_fx: how an epoch's values become one: "mean" (weighted by batch_size), "sum", "min" or "max". A
                metric object computes its value itself, and is reset when the epoch is over.
            enable_graph: let the value of a metric object keep its graph; other values never keep theirs.
            sync_dist: of several processes, let a value by step be what all of them come to, too: at log points, from
                which it stays until the next one. What an epoch comes to is of all processes in any case.
            sync_dist_group: kept for Lightning's signature; it is always all of them.
            add_dataloader_idx: with several evaluation loaders, append `/dataloader_idx_N` to the name.
            batch_size: the weight in the mean (default: the first dimension of the batch's first tensor).
            metric_attribute: the name of the attribute that holds the metric object (default: it is looked for).
            rank_zero_only: of several processes, only the first logs it, and the value is its own.

        Raises:
            MisconfigurationException: called where nothing can be logged, with options that can't work there or with
                other options than before, with a metric object that is not the module's, or a batch has no tensor to
                take the batch_size from.
            ValueError: none of the values that can be logged.
            TypeError: the name is not a string.
        """
        metrics = self._run_metrics
        if metrics is None:
            _outside_of_a_run(name, value)
            return
        metrics.log(
            name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
            add_dataloader_idx, batch_size, metric_attribute, rank_zero_only,
        )  # fmt: skip  # positionally: this is on the step's path

    def log_dict(
        self,
        dictionary: Mapping[str, Any],
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
        rank_zero_only: bool = False,
    ) -> None:
        """Log several values at once, with the options of `log`.

        Args:
            dictionary: values by name, as `log` takes them, or a torchmetrics.MetricCollection.
        """
        # a MetricCollection: under its prefix, without copying its states
        options = {"keep_base": False, "copy_state": False} if hasattr(dictionary, "compute") else {}
        for name, value in dictionary.items(**options):
            self.log(
                name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
                add_dataloader_idx, batch_size, None, rank_zero_only,
            )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_run_metrics", None)  # a copy or a pickle is not a part of the run
        return state


def _outside_of_a_run(name: str, value: Any) -> None:
    """Warn, so that a step can be tried without a Trainer; what could never be logged is refused all the same."""
    from trainkit.metrics import check_value

    check_value(name, value)
    warnings.warn(f"self.log({name!r}, ...) does nothing: this object is not attached to a Trainer.", stacklevel=3)
