"""TQDMProgressBar: a run as tqdm bars, one for training and one for what happens in between."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from functools import cache
from time import monotonic
from typing import TYPE_CHECKING, Any

from trainkit.callbacks.progress_bar import ProgressBar
from trainkit.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainkit import Module, Trainer

_KINDS = ("train", "val", "test", "predict")


@cache
def tqdm_class() -> Any:
    """Return tqdm's bar, with numbers that keep their width: what the bars of this module are made of.

    Raises:
        ModuleNotFoundError: tqdm is not installed.
    """
    try:
        if importlib.util.find_spec("ipywidgets") is not None:  # a notebook gets a widget
            from tqdm.auto import tqdm  # type: ignore[import-untyped]
        else:
            from tqdm import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "TQDMProgressBar needs tqdm, which is not installed: pip install tqdm. RichProgressBar needs nothing more."
        ) from error

    class Tqdm(tqdm):  # type: ignore[misc]
        @staticmethod
        def format_num(n: Any) -> str:
            text: str = n if isinstance(n, str) else tqdm.format_num(n)
            if isinstance(n, int) or "e" in text or len(text) >= 5 or not _is_finite(text):
                return text
            return (text if "." in text else f"{text}.").ljust(5, "0")

    return Tqdm


def __getattr__(name: str) -> Any:
    if name == "Tqdm":  # made when it is asked for: tqdm is optional
        return tqdm_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class TQDMProgressBar(ProgressBar):
    """Show a run as tqdm bars: one for training, and below it one for each validation.

    To change a bar, override the method that makes it; to change what is shown, `get_metrics`. Metrics are read from
    the device only when a bar is drawn: at most ten times a second on a terminal, every 30 seconds elsewhere.

    Args:
        refresh_rate: draw at multiples of this number of batches only; 0 shows nothing. The environment variable
            TQDM_MINITERS sets the least it can be.
        process_position: leave room for so many bars of yours above.
        leave: keep each epoch's bar.

    Raises:
        ModuleNotFoundError: tqdm is not installed.
        MisconfigurationException: `refresh_rate` or `process_position` is not a whole number of at least 0.

    Example:
        >>> class Mine(TQDMProgressBar):
        ...     def init_validation_tqdm(self):
        ...         bar = super().init_validation_tqdm()
        ...         bar.set_description("how good is it?")
        ...         return bar
    """

    monitors = True  # the epoch's last metrics are shown after everything that logs at its end

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__()
        tqdm_class()  # missing? then before anything runs
        for name, value in (("refresh_rate", refresh_rate), ("process_position", process_position)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise MisconfigurationException(
                    f"TQDMProgressBar({name}=...) must be a whole number, 0 or more. Received: {value!r}."
                )
        self._refresh_rate = _least_refresh_rate(refresh_rate)
        self._process_position = process_position
        self._leave = leave
        self._bars: dict[str, Any] = {}
        self._due = -math.inf  # when the next frame may be drawn, on the monotonic clock

    @property
    def refresh_rate(self) -> int:
        """Every how many batches the bars are drawn."""
        return self._refresh_rate

    @property
    def process_position(self) -> int:
        """How many bars there are above."""
        return self._process_position

    @property
    def is_enabled(self) -> bool:
        """Whether anything is shown."""
        return self._enabled and self._refresh_rate > 0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_bars": {}}  # bars hold the terminal

    # ---- the bars, as tqdm objects
    def _bar(self, kind: str) -> Any:
        if kind not in self._bars:
            raise TypeError(f"{type(self).__name__}.{kind}_progress_bar is not there yet: a run makes it.")
        return self._bars[kind]

    @property
    def train_progress_bar(self) -> Any:
        """The bar of the training."""
        return self._bar("train")

    @train_progress_bar.setter
    def train_progress_bar(self, bar: Any) -> None:
        self._bars["train"] = bar

    @property
    def val_progress_bar(self) -> Any:
        """The bar of the validation or sanity check."""
        return self._bar("val")

    @val_progress_bar.setter
    def val_progress_bar(self, bar: Any) -> None:
        self._bars["val"] = bar

    @property
    def test_progress_bar(self) -> Any:
        """The bar of the test."""
        return self._bar("test")

    @test_progress_bar.setter
    def test_progress_bar(self, bar: Any) -> None:
        self._bars["test"] = bar

    @property
    def predict_progress_bar(self) -> Any:
        """The bar of predict."""
        return self._bar("predict")

    @predict_progress_bar.setter
    def predict_progress_bar(self, bar: Any) -> None:
        self._bars["predict"] = bar

    # ---- to be overridden: how a bar is made
    def _made(self, description: str, *, leave: bool, below: int = 0, **options: Any) -> Any:
        return tqdm_class()(
            desc=description,
            position=2 * self._process_position + below,
            disable=self.is_disabled,
            leave=leave,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=self.BAR_FORMAT,
            **options,
        )

    def init_sanity_tqdm(self) -> Any:
        """Return the bar of the sanity check."""
        return self._made(self.sanity_check_description, leave=False)

    def init_train_tqdm(self) -> Any:
        """Return the bar of the training."""
        return self._made(self.train_description, leave=True, smoothing=0)

    def init_validation_tqdm(self) -> Any:
        """Return the bar of a validation."""
        alone = self.trainer.stage == "validate"  # else the bar of the training is above
        return self._made(self.validation_description, leave=alone, below=not alone)

    def init_test_tqdm(self) -> Any:
        """Return the bar of a test."""
        return self._made(self.test_description, leave=True)

    def init_predict_tqdm(self) -> Any:
        """Return the bar of predict."""
        return self._made(self.predict_description, leave=True, smoothing=0)

    # ---- training
    def on_sanity_check_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.val_progress_bar = self.init_sanity_tqdm()
        self.train_progress_bar = tqdm_class()(disable=True)  # there is one, whoever asks

    def on_sanity_check_end(self, trainer: Trainer, pl_module: Module) -> None:
        self.val_progress_bar.close()
        self.train_progress_bar.close()

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.train_progress_bar = self.init_train_tqdm()
        if trainer.progress.batch:  # resumed inside an epoch, which does not start again
            self._start_epoch(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._start_epoch(trainer)

    def _start_epoch(self, trainer: Trainer) -> None:
        if self._leave and self.train_progress_bar.n:  # the last epoch's bar stays
            self.train_progress_bar = self.init_train_tqdm()
        self._restart("train", self.total_train_batches, f"Epoch {trainer.current_epoch}", trainer.progress.batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        bar = self.train_progress_bar
        if self._draws(bar, batch_idx + 1):
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        bar = self.train_progress_bar
        if not bar.disable:
            bar.set_postfix(self.get_metrics(trainer, pl_module))
        if self._leave:
            bar.close()

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self.train_progress_bar.close()

    # ---- evaluations
    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.sanity_checking:
            self.val_progress_bar = self.init_validation_tqdm()

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.test_progress_bar = self.init_test_tqdm()

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.predict_progress_bar = self.init_predict_tqdm()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            name = self.sanity_check_description if trainer.sanity_checking else self.validation_description
            self._restart("val", self.total_val_batches_current_dataloader, f"{name} DataLoader {dataloader_idx}")

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            name = f"{self.test_description} DataLoader {dataloader_idx}"
            self._restart("test", self.total_test_batches_current_dataloader, name)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            name = f"{self.predict_description} DataLoader {dataloader_idx}"
            self._restart("predict", self.total_predict_batches_current_dataloader, name)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._draws(self.val_progress_bar, batch_idx + 1):
            self.val_progress_bar.refresh()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._draws(self.test_progress_bar, batch_idx + 1):
            self.test_progress_bar.refresh()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._draws(self.predict_progress_bar, batch_idx + 1):
            self.predict_progress_bar.refresh()

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        if "train" in self._bars and trainer.stage == "fit" and not self.train_progress_bar.disable:
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_test_end(self, trainer: Trainer, pl_module: Module) -> None:
        self.test_progress_bar.close()
        self.reset_dataloader_idx_tracker()

    def on_predict_end(self, trainer: Trainer, pl_module: Module) -> None:
        self.predict_progress_bar.close()
        self.reset_dataloader_idx_tracker()

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Give the terminal back, after an error too."""
        for bar in self._bars.values():
            bar.close()
        self.reset_dataloader_idx_tracker()

    # ---- drawing
    def _restart(self, kind: str, total: int | float, description: str, done: int = 0) -> None:
        bar = self._bar(kind)
        bar.total = None if math.isinf(total) else total
        bar.set_description(description, refresh=False)
        bar.reset()
        bar.initial = bar.n = done
        bar.refresh()

    def _draws(self, bar: Any, done: int) -> bool:
        """Move a bar on, and return whether a frame is due."""
        if not self.is_enabled or bar.disable or (done % self._refresh_rate and done != bar.total):
            return False
        bar.n = done
        now = monotonic()
        if now < self._due and done != bar.total:
            return False
        self._due = now + (0.1 if _is_live(bar) else 30.0)
        return True

    def print(self, *values: Any, sep: str = " ", end: str = "\n", **kwargs: Any) -> None:
        """Print above the bars."""
        shown = next((self._bars[kind] for kind in _KINDS if kind in self._bars and not self._bars[kind].disable), None)
        if shown is None or kwargs:
            super().print(*values, sep=sep, end=end, **kwargs)
        else:
            shown.write(sep.join(map(str, values)), end=end)


def _is_live(bar: Any) -> bool:
    """Whether what is drawn replaces what was there: on a terminal and in a notebook, not in a file."""
    return hasattr(bar, "container") or bool(getattr(bar.fp, "isatty", bool)())


def _least_refresh_rate(wanted: int) -> int:
    if os.environ.get("COLAB_GPU") and wanted == 1:
        return 20  # a notebook there stalls when it is drawn more often
    least = os.environ.get("TQDM_MINITERS", "")
    return max(int(least), wanted) if least.isdigit() else wanted


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
