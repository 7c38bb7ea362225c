"""How a run's calls become a profiler's actions, under Lightning's names. Without a profiler there is none of this.

[Callback]<key>.<hook>            a callback's hook
[LightningModule]<class>.<hook>   a hook, a step or another method of the module
[LightningDataModule]<class>.<hook>
[Strategy]<class>.training_step   the step with what precision and strategy add; and backward, batch_to_device, ...
[_TrainingEpochLoop].train_dataloader_next, [_EvaluationLoop].val_next, ...   waiting for a batch
run_training_epoch, run_training_batch, save_checkpoint
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from trainkit.profiler.base import PassThroughProfiler, Profiler

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from trainkit.trainer import Trainer

Call = Callable[..., Any]

SPANS = {
    "on_train_epoch_start": ("on_train_epoch_end", "run_training_epoch"),
    "on_train_batch_start": ("on_train_batch_end", "run_training_batch"),
}
"""After which hook a longer action begins, before which it ends, and its name."""
NEXT = {
    "train": "[_TrainingEpochLoop].train_dataloader_next",
    "val": "[_EvaluationLoop].val_next",
    "test": "[_EvaluationLoop].test_next",
    "predict": "[_PredictionLoop].predict_next",
}


def actions_of(profiler: Profiler) -> Actions | None:
    """Return what puts a run's calls under a profiler's eyes; None when it is off."""
    return None if type(profiler) is PassThroughProfiler else Actions(profiler)


class Actions:
    """Put the calls of one run under a profiler's eyes.

    Args:
        profiler: it is told of each.
    """

    def __init__(self, profiler: Profiler) -> None:
        self.profiler = profiler
        self._open: list[str] = []
        self._handles: list[Any] = []

    def wrap(self, name: str, call: Call) -> Call:
        """Return a call that is recorded as the action `name`."""
        profiler = self.profiler

        def recorded(*args: Any, **kwargs: Any) -> Any:
            with profiler.profile(name):
                return call(*args, **kwargs)

        return recorded

    def span(self, hook: str, call: Call) -> Call:
        """Return a hook's call that also begins or ends the longer action at this place."""
        if hook in SPANS:
            _, name = SPANS[hook]

            def then_begin(*args: Any) -> Any:
                answer = call(*args)
                if answer != -1:  # -1: on_train_batch_start skips the rest of the epoch
                    self._end(name, _nothing)  # who searches a setting leaves a loop in the middle, and begins another
                    self._open.append(name)
                    self.profiler.start(name)
                return answer

            return then_begin
        for end, name in SPANS.values():
            if hook == end:
                return partial(self._end, name, call)
        return call

    def _end(self, name: str, call: Call, *args: Any) -> Any:
        """End a longer action, unless it never began: a run may be resumed inside an epoch."""
        if name in self._open:
            self._open.remove(name)
            self.profiler.stop(name)
        return call(*args)

    def fetching(self, kind: str, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches, and record how long each was waited for."""
        while True:
            with self.profiler.profile(NEXT[kind]):
                batch = next(batches, batches)
            if batch is batches:
                return
            yield batch

    def watch(self, optimizers: Iterable[Optimizer], *names: str) -> None:
        """Record every optimizer's own `step` as these actions, the first around the second and so on."""

        def begin(*_: Any) -> None:
            for name in names:
                self._open.append(name)
                self.profiler.start(name)

        def end(*_: Any) -> None:
            for name in reversed(names):
                self._end(name, _nothing)

        for optimizer in optimizers:
            self._handles += [optimizer.register_step_pre_hook(begin), optimizer.register_step_post_hook(end)]

    def close(self) -> None:
        """End what an error left open, and let go of the optimizers."""
        while self._open:
            self.profiler.stop(self._open.pop())
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def recorded(trainer: Trainer, kind: str, owner: Any, name: str) -> Call:
    """Return an object's method, as an action `[kind]Class.name` if the run has a profiler."""
    call: Call = getattr(owner, name)
    return call if trainer.actions is None else trainer.actions.wrap(f"[{kind}]{type(owner).__name__}.{name}", call)


def _nothing() -> None:
    """Do nothing."""
