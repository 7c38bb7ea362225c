"""SpikeDetection: end a run whose loss jumps, and note which batches to leave out next time."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from trainkit import Callback
from trainkit.callbacks.monitor import check_mode

if TYPE_CHECKING:
    from trainkit import Module, Trainer


class TrainingSpikeException(RuntimeError):
    """Tell in which batch the loss jumped.

    Args:
        batch_idx: the batch's index in its epoch.
    """

    def __init__(self, batch_idx: int, *args: Any) -> None:
        super().__init__(f"Training spike detected in batch {batch_idx}", *args)
        self.batch_idx = batch_idx


class SpikeDetection(Callback):
    """Raise TrainingSpikeException when the loss jumps, and write the batches to leave out to a file.

    A loss is a spike when it is worse than the one before, and away from the mean of the last `window` losses by at
    least `atol` and by at least `rtol` times that mean. The batch of the spike is written to the file, and the one
    before it, whose update may be what spoiled the weights. Losses that are not finite never count in the mean.

    This reads the loss after every batch, so that an accelerator is waited for, and several processes ask each other.

    Args:
        mode: "min" when a smaller loss is better, "max" when a larger one is.
        window: over how many losses the mean is taken, at least 1.
        warmup: batches at the start of each epoch that are not looked at.
        atol: how far from the mean is a spike; None: any distance.
        rtol: how far, as a multiple of the mean; None: any distance.
        exclude_batches_path: a ".json" file, or a directory for `skip_batches.json`; None: the Trainer's
            `default_root_dir`. It holds the list `bad_batches`.
        finite_only: a loss that is not finite is a spike.

    Attributes:
        bad_batches: the indices of the batches to leave out.
        last_val: the last loss that was no spike.

    Raises:
        MisconfigurationException, ValueError: `mode` or `window` can't work.
        TrainingSpikeException: during training.

    Example:
        >>> detection = SpikeDetection(window=20, warmup=5)  # Trainer(callbacks=[detection])
    """

    def __init__(
        self,
        mode: Literal["min", "max"] = "min",
        window: int = 10,
        warmup: int = 1,
        atol: float | None = None,
        rtol: float | None = 2.0,
        exclude_batches_path: str | os.PathLike[str] | None = None,
        finite_only: bool = True,
    ) -> None:
        check_mode("SpikeDetection", mode)
        if window < 1:
            raise ValueError(f"SpikeDetection(window=...) must be 1 or more. Received: {window!r}.")
        self.mode = mode
        self.warmup = warmup
        self.atol = atol
        self.rtol = rtol
        self.exclude_batches_path = exclude_batches_path
        self.finite_only = finite_only
        self.bad_batches: list[int] = []
        self.last_val = 0.0
        self._window: deque[float] = deque(maxlen=window)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the loss.

        Raises:
            TrainingSpikeException: it jumped, in this process or another one.
            TypeError: what the step gave is neither a tensor nor a mapping.
        """
        if not isinstance(outputs, (Tensor, Mapping)):
            raise TypeError(
                f"SpikeDetection needs a loss: a tensor, or a mapping with 'loss'. Received: {type(outputs).__name__}."
            )
        loss = outputs if isinstance(outputs, Tensor) else outputs.get("loss")
        value = self.last_val if loss is None else float(loss)  # None: the module skipped this batch
        spike = loss is not None and batch_idx >= self.warmup and self._is_spike(value)
        if trainer.strategy.reduce_boolean_decision(spike, all=False):
            self.bad_batches += [index for index in (batch_idx - 1, batch_idx) if index >= 0]
            if trainer.is_global_zero:
                self._write(trainer.default_root_dir)
            raise TrainingSpikeException(batch_idx)
        if loss is not None and math.isfinite(value):
            self._window.append(value)
            self.last_val = value

    def _is_spike(self, value: float) -> bool:
        if self.finite_only and not math.isfinite(value):
            return True
        if value <= self.last_val if self.mode == "min" else value >= self.last_val:
            return False
        # before the first loss the mean is NaN, from which nothing is far
        mean = math.fsum(self._window) / len(self._window) if self._window else math.nan
        distance = abs(value - mean)
        return (self.atol is None or distance >= abs(self.atol)) and (
            self.rtol is None or distance >= abs(self.rtol * mean)
        )

    def _write(self, root: str) -> None:
        path = os.fspath(root if self.exclude_batches_path is None else self.exclude_batches_path)
        self.exclude_batches_path = path if path.endswith(".json") else os.path.join(path, "skip_batches.json")
        os.makedirs(os.path.dirname(self.exclude_batches_path) or ".", exist_ok=True)
        with open(self.exclude_batches_path, "w") as file:
            json.dump(self.bad_batches, file, indent=4)

    # ---- state
    def state_dict(self) -> dict[str, Any]:
        """Return the losses of the window, and the settings they were judged by."""
        path = self.exclude_batches_path
        return {
            "last_val": self.last_val,
            "mode": self.mode,
            "warmup": self.warmup,
            "atol": self.atol,
            "rtol": self.rtol,
            "bad_batches": list(self.bad_batches),
            "bad_batches_path": None if path is None else os.fspath(path),
            "running": list(self._window),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the losses, and with the settings, that `state_dict` returned."""
        self.last_val = state_dict["last_val"]
        self.mode = state_dict["mode"]
        self.warmup = state_dict["warmup"]
        self.atol, self.rtol = state_dict["atol"], state_dict["rtol"]
        self.bad_batches = list(state_dict["bad_batches"])
        self.exclude_batches_path = state_dict["bad_batches_path"]
        self._window.clear()
        self._window.extend(state_dict["running"])
