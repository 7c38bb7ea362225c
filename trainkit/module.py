"""Module: the model, its steps and its optimizers; an nn.Module with the names a Trainer calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import IO, TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from trainkit.data_hooks import DataHooks
from trainkit.errors import MisconfigurationException
from trainkit.export import Exports, scriptable
from trainkit.hparams import HyperParameters, class_only
from trainkit.log import Logs
from trainkit.moving import tensors_on_device
from trainkit.pieces import copy_parts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from trainkit.loggers import Logger
    from trainkit.metrics import Metrics
    from trainkit.trainer import Trainer
    from trainkit.update import StepOptimizer


@scriptable
class Module(DataHooks, Logs, HyperParameters, Exports, nn.Module):
    """What is trained. Write `training_step` and `configure_optimizers`; override anything else you need.

    Example:
        >>> class Line(Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.line = nn.Linear(1, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         return nn.functional.mse_loss(self.line(x), y)
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    """

    example_input_array: Any = None
    """A batch of inputs to `forward`, for summaries and exports."""

    fabric: None = None
    """Always None: there is no Fabric here. Lightning code asks for it to see which of the two runs it."""

    device_mesh: DeviceMesh | Any = None
    """How the run's processes are arranged, for `configure_model`, where a strategy spreads parameters; else None."""

    CHECKPOINT_HYPER_PARAMS_KEY: ClassVar[str] = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME: ClassVar[str] = "hparams_name"
    """Where in a checkpoint the hyperparameters are, and the name of the argument that takes them all."""

    strict_loading: bool = True
    """Whether a checkpoint must have exactly this module's parameters and buffers."""

    automatic_optimization: bool = True
    """Whether the loop runs backward and steps the optimizers; False: `training_step` does."""

    # ---------------------------------------------------------------- the steps
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch: a tensor, a dict with "loss", or None to skip the batch.

        Called with (batch, batch_idx).
        """
        raise MisconfigurationException(f"{type(self).__name__} has no training_step.")

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch; log what should be known. Called with (batch, batch_idx, dataloader_idx)."""

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch of the test set. Called with (batch, batch_idx, dataloader_idx)."""

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the predictions for a batch: `self(batch)` if not overridden."""
        if getattr(self.forward, "__func__", None) is nn.Module.forward:
            raise MisconfigurationException(
                f"{type(self).__name__} has neither predict_step nor forward, so it can't predict. Write "
                "predict_step(self, batch, batch_idx)."
            )
        return self(args[0] if args else kwargs["batch"])

    def configure_optimizers(self) -> Any:
        """Return an optimizer, several, or a dict with "optimizer" and "lr_scheduler"."""
        raise MisconfigurationException(
            f"{type(self).__name__} has no configure_optimizers, so nothing would be learned. For example: "
            "def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), lr=1e-3). "
            "Return None to train without an optimizer."
        )

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, above the progress bar if there is one."""
        trainer = self.__dict__.get("_trainer")
        if trainer is None:
            print(*args, **kwargs)
        elif trainer.compiler is not None and torch.compiler.is_compiling():  # printed when the step is over
            self._run_metrics.print(*args, **kwargs)  # type: ignore[union-attr]
        else:
            trainer.print(*args, **kwargs)

    # ---------------------------------------------------------------- the run it is in
    @property
    def trainer(self) -> Trainer:
        """The trainer of the run.

        Raises:
            RuntimeError: there is no run yet.
        """
        trainer: Trainer | None = self.__dict__.get("_trainer")
        if trainer is None:
            raise RuntimeError(f"{type(self).__name__} is not attached to a Trainer: call trainer.fit(module) first.")
        return trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        for part in self.modules():
            if isinstance(part, Module):
                part.__dict__["_trainer"] = trainer

    def attach(self, trainer: Trainer, metrics: Metrics) -> None:
        """Get to know the run: its trainer and where `log` files its values; modules inside this one do too."""
        for part in self.modules():
            if isinstance(part, Module):
                part.__dict__["_trainer"], part.__dict__["_run_metrics"] = trainer, metrics

    @property
    def current_epoch(self) -> int:
        """The epoch that is running, from 0; 0 without a trainer."""
        trainer = self.__dict__.get("_trainer")
        return trainer.current_epoch if trainer is not None else 0

    @property
    def global_step(self) -> int:
        """How many optimizer updates are done; 0 without a trainer."""
        trainer = self.__dict__.get("_trainer")
        return trainer.global_step if trainer is not None else 0

    @property
    def logger(self) -> Logger | None:
        """The first logger of the run, or None."""
        trainer = self.__dict__.get("_trainer")
        return trainer.logger if trainer is not None else None

    @property
    def loggers(self) -> list[Logger]:
        """The loggers of the run."""
        trainer = self.__dict__.get("_trainer")
        return trainer.loggers if trainer is not None else []

    @property
    def global_rank(self) -> int:
        """The number of this process among all of the run, from 0; 0 without a trainer."""
        trainer = self.__dict__.get("_trainer")
        return trainer.global_rank if trainer is not None else 0

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine, from 0; 0 without a trainer."""
        trainer = self.__dict__.get("_trainer")
        return trainer.local_rank if trainer is not None else 0

    @property
    def on_gpu(self) -> bool:
        """Whether the parameters are on a cuda device."""
        return self.device.type == "cuda"

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((t.device for source in (self.parameters(), self.buffers()) for t in source), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the floating-point parameters."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Return the run's optimizer, or the list of them; for manual optimization.

        Args:
            use_pl_optimizer: wrapped, so that `step` goes through the precision and is counted; False: as they are.
        """
        found: list[Any] = self.trainer.step_optimizers if use_pl_optimizer else self.trainer.optimizers
        return found[0] if len(found) == 1 else found

    def lr_schedulers(self) -> Any:
        """Return the run's lr scheduler, the list of them, or None."""
        found = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return None if not found else found[0] if len(found) == 1 else found

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass in the run's precision; for manual optimization.

        Of several processes each counts by the samples that it has of the batch.
        """
        trainer = self.trainer
        if self.automatic_optimization:
            raise MisconfigurationException(
                "self.manual_backward(loss) is for manual optimization: set self.automatic_optimization = False in "
                "__init__, or leave the call out and return the loss."
            )
        if trainer.agreement is not None:
            loss = trainer.agreement.weigh(loss)
        trainer.hooks.on_before_backward(loss)
        if trainer.agreement is not None:
            trainer.strategy.prepare_backward(loss)
        trainer.update.backward(loss, *args, **kwargs)
        trainer.hooks.on_after_backward()

    def toggle_optimizer(self, optimizer: Optimizer | StepOptimizer) -> None:
        """Turn gradients off for the parameters of all other optimizers, until `untoggle_optimizer`.

        What an alternating scheme (a GAN's) does before it computes the loss of one of its parts, so that backward does
        not compute gradients that nobody uses. Parameters that do not require gradients stay so.

        Args:
            optimizer: whose parameters keep their gradients, as `self.optimizers()` or `configure_optimizers` gave it.
        """
        before: dict[Tensor, bool] = self.__dict__.setdefault("_toggled", {})
        own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for other in self.trainer.optimizers:
            for group in other.param_groups:
                for parameter in group["params"]:
                    before.setdefault(parameter, parameter.requires_grad)
                    parameter.requires_grad = parameter in own and before[parameter]

    def untoggle_optimizer(self, optimizer: Optimizer | StepOptimizer) -> None:
        """Give every parameter back whether it requires gradients, as it was before `toggle_optimizer`."""
        for parameter, requires_grad in self.__dict__.pop("_toggled", {}).items():
            parameter.requires_grad = requires_grad

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer | StepOptimizer) -> Iterator[None]:
        """Toggle an optimizer for a block."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Return the tensors of all processes, stacked in a new first dimension; with one process, the tensors.

        All processes have to call it, with tensors of the same shapes.

        Args:
            data: a tensor, a number (which becomes a tensor), or a nested structure of them.
            group: which processes (default: all).
            sync_grads: let gradients flow back to the process that each tensor came from.
        """
        return self.trainer.strategy.all_gather(tensors_on_device(data, self.device), group, sync_grads)

    def freeze(self) -> Self:
        """Turn gradients off for all parameters and go to evaluation mode."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        return self.eval()

    def unfreeze(self) -> Self:
        """Turn gradients on for all parameters and go to training mode."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        return self.train()

    @class_only
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | PathLike[str] | IO[bytes] | Mapping[str, Any],
        map_location: Any = None,
        hparams_file: str | PathLike[str] | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make the module again from a checkpoint: its saved hyperparameters, then its weights.

        Args:
            checkpoint_path: the file, an open one, or what one holds. A file that Lightning wrote has to be converted
                (`trainkit convert`), or read by name: `trainkit.lightning.load_checkpoint(path)`.
            map_location: a device for the weights (default: the cpu).
            hparams_file: a YAML or CSV file with hyperparameters, in place of the checkpoint's.
            strict: whether parameters must match exactly (default: the module's `strict_loading`).
            weights_only: kept for Lightning's signature; nothing in a file is ever executed.
            kwargs: arguments of `__init__` that override the saved ones.

        Raises:
            CheckpointError: no such file, not a checkpoint, or weights that do not fit; the message names them.
            TypeError: `__init__` needs an argument that was not saved and not given; or it was called on an object.
            ValueError: `strict` contradicts the module; or the file asks for code that the program has not imported.
        """
        from trainkit.checkpoint.rebuild import rebuild_module

        rebuilt: Self = rebuild_module(cls, checkpoint_path, map_location, hparams_file, strict, kwargs)
        return rebuilt

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = memo[id(self)] = type(self).__new__(type(self))
        copy_parts(self, memo)
        made.__setstate__(  # type: ignore[no-untyped-call]
            copy.deepcopy(self.__getstate__(), memo)
        )
        return made

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_trainer", None)  # a copy or a pickle of a module is not part of the run
        state.pop("_run_metrics", None)
        state.pop("device_mesh", None)
        if state.pop("_fsdp_root", None) is not None:
            state.pop("forward", None)
        return state

    # ---------------------------------------------------------------- override points of the update
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the loss's gradients to the parameters'; `loss` is scaled already when the precision is float16."""
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear an optimizer's gradients, on the first batch of an accumulation window."""
        optimizer.zero_grad()

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: StepOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Update the weights; override it to warm a learning rate up, to step rarely, or to do something in between.

        Args:
            epoch: the epoch that is running.
            batch_idx: the batch's index in it.
            optimizer: its `step` goes through precision, hooks and clipping.
            optimizer_closure: returns the loss. The first call returns the one that training_step has computed, whose
                gradients are there; each later one computes zero_grad, forward and backward again. Hand it to `step`.
        """
        optimizer.step(closure=optimizer_closure)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip an optimizer's gradients, when they are complete and unscaled. Called with the Trainer's settings."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip an optimizer's gradients now; for manual optimization and `configure_gradient_clipping`.

        Args:
            optimizer: whose gradients; with float16 they are unscaled first.
            gradient_clip_val: the limit (default: the Trainer's). 0 clips nothing.
            gradient_clip_algorithm: "norm" (their common 2-norm) or "value" (each element). Default: the Trainer's,
                else "norm".

        Raises:
            MisconfigurationException: another value than the Trainer's, or no such algorithm.
            TypeError: a limit that is no number.
        """
        trainer = self.trainer
        limit = checked_clip("gradient_clip_val", gradient_clip_val, trainer.gradient_clip_val)
        algorithm = checked_clip("gradient_clip_algorithm", gradient_clip_algorithm, trainer.gradient_clip_algorithm)
        if not limit:
            return
        inner = getattr(optimizer, "optimizer", optimizer)
        trainer.precision_plugin.unscale(inner)
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        trainer.strategy.clip_gradients(parameters, limit, algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Move an lr scheduler; `metric` is None unless it watches one."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def configure_model(self) -> None:
        """Make parts of the module here that are too large to make twice: on the device, in the run's precision.

        Called in every stage and by `load_from_checkpoint`, perhaps more than once: make nothing that is there already.
        """

    def configure_callbacks(self) -> Any:
        """Return a callback or a list of them for this run; they replace the Trainer's of the same type."""
        return []

    # ---------------------------------------------------------------- hooks, in firing order (see callback.py)
    def setup(self, stage: str) -> None:
        """Called when a run begins; `stage` is "fit", "validate", "test" or "predict"."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called with a checkpoint's whole contents before its weights are loaded; change it here."""

    def on_fit_start(self) -> None:
        """Called when the module is on its device and has its optimizers."""

    def on_train_start(self) -> None:
        """Called before the first epoch of this run."""

    def on_train_epoch_start(self) -> None:
        """Called before the first batch of an epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Called with the batch on its device; returning -1 skips the rest of the epoch."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Called before an optimizer's gradients are cleared."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Called before the backward pass; `loss` is divided by the accumulation already."""

    def on_after_backward(self) -> None:
        """Called after the backward pass; float16 gradients are still scaled."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Called when the window's gradients are complete and unscaled, before they are clipped."""

    def on_train_batch_end(self, outputs: dict[str, Any], batch: Any, batch_idx: int) -> None:
        """Called after the update; `outputs` has the "loss" and what else the step returned."""

    def on_train_epoch_end(self) -> None:
        """Called after an epoch's last batch and its validation, when the epoch's metrics are there."""

    def on_train_end(self) -> None:
        """Called after the last epoch."""

    def on_fit_end(self) -> None:
        """Called when fit is done and the module is back where it was."""

    def on_validation_model_zero_grad(self) -> None:
        """Called before a validation inside fit, when no gradient is pending: clears them all."""
        self.zero_grad()

    def on_validation_model_eval(self) -> None:
        """Called when a validation begins: puts the module into evaluation mode."""
        self.eval()

    def on_validation_model_train(self) -> None:
        """Called when a validation ends. Override it to decide on modes; as it is, each part gets its own mode back."""
        self.train()

    def on_validation_start(self) -> None:
        """Called when the module is in evaluation mode."""

    def on_validation_epoch_start(self) -> None:
        """Called before the first validation batch."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before `validation_step`."""

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called with what `validation_step` returned."""

    def on_validation_epoch_end(self) -> None:
        """Called after the last validation batch; the last place to log."""

    def on_validation_end(self) -> None:
        """Called when the validation's metrics are in `trainer.callback_metrics`."""

    def on_test_model_eval(self) -> None:
        """Called when a test begins: puts the module into evaluation mode."""
        self.eval()

    def on_test_model_train(self) -> None:
        """Called when a test ends. Override it to decide on modes; as it is, each part gets its own mode back."""
        self.train()

    def on_test_start(self) -> None:
        """Called when the module is in evaluation mode."""

    def on_test_epoch_start(self) -> None:
        """Called before the first test batch."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before `test_step`."""

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called with what `test_step` returned."""

    def on_test_epoch_end(self) -> None:
        """Called after the last test batch; the last place to log."""

    def on_test_end(self) -> None:
        """Called when the test's metrics are in `trainer.callback_metrics`."""

    def on_predict_model_eval(self) -> None:
        """Called when a predict begins: puts the module into evaluation mode."""
        self.eval()

    def on_predict_model_train(self) -> None:
        """Called when a predict ends. Override it to decide on modes; as it is, each part gets its own mode back."""
        self.train()

    def on_predict_start(self) -> None:
        """Called when the module is in evaluation mode."""

    def on_predict_epoch_start(self) -> None:
        """Called before the first batch to predict."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before `predict_step`."""

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called with what `predict_step` returned."""

    def on_predict_epoch_end(self) -> None:
        """Called after the last batch to predict."""

    def on_predict_end(self) -> None:
        """Called when all predictions are there."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called with a checkpoint's contents before it is written; add keys of your own here."""

    def teardown(self, stage: str) -> None:
        """Called when a run ends, after an error too."""


def checked_clip(argument: str, given: Any, of_trainer: Any) -> Any:
    """Return how to clip, as given or else as the Trainer says; both can't say different things."""
    if given is None:
        return of_trainer
    if of_trainer is not None and of_trainer != given:
        raise MisconfigurationException(
            f"clip_gradients({argument}={given!r}), but Trainer({argument}={of_trainer!r}). Give the same, or only one."
        )
    if argument == "gradient_clip_algorithm" and str(given).lower() not in ("norm", "value"):
        raise MisconfigurationException(f"{argument} must be 'norm' or 'value'. Received: {given!r}.")
    if argument == "gradient_clip_val" and (isinstance(given, bool) or not isinstance(given, (int, float))):
        raise TypeError(f"{argument} must be a number. Received: {given!r}.")
    return given
