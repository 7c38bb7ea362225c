"""WeightAveraging: keep an average of the weights while training, evaluate with it, and end with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from trainkit import Callback
from trainkit.errors import MisconfigurationException, nearest, warn

if TYPE_CHECKING:
    from trainkit import Module, Trainer

Blend = Callable[[list[Tensor], list[Tensor], Tensor], Any]


class WeightAveraging(Callback):
    """Keep an average of the weights, validate with it, and leave it in the module when training ends.

    By default that is the mean of the weights after every update (Izmailov et al., Averaging Weights Leads to Wider
    Optima and Better Generalization, UAI 2018). Override `should_update` to average less often. Until the first weights
    are taken there is no average, and the module is used as it is.

    A checkpoint has the average in `state_dict`, where everything that only reads weights finds it, the weights that
    are being trained in `current_model_state`, and how many were averaged in `averaging_state`. A run resumed from it
    ends as if it had not been stopped.

    Args:
        device: where the average is kept; None: where the module is.
        use_buffers: average the buffers too; False copies the module's.
        kwargs: `avg_fn` or `multi_avg_fn`, see `torch.optim.swa_utils.AveragedModel`.

    Raises:
        TypeError: `kwargs` has another name.
        MisconfigurationException: both functions are given; during training, the module's parameters changed.

    Example:
        >>> class LastEpochs(WeightAveraging):
        ...     def should_update(self, step_idx=None, epoch_idx=None):
        ...         return epoch_idx is not None and epoch_idx >= 80
    """

    def __init__(self, device: torch.device | str | int | None = None, use_buffers: bool = True, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in ("avg_fn", "multi_avg_fn"):
                raise TypeError(
                    f"{type(self).__name__} takes no argument {name!r}; {nearest(name, ['avg_fn', 'multi_avg_fn'])}"
                )
        if kwargs.get("avg_fn") is not None and kwargs.get("multi_avg_fn") is not None:
            raise MisconfigurationException(f"{type(self).__name__} takes avg_fn or multi_avg_fn, not both.")
        self._device = torch.device(device) if isinstance(device, str) else device
        self._use_buffers = use_buffers
        self._kwargs = kwargs
        self._latest_update_step = 0
        self._latest_update_epoch = -1
        self._end_run()

    def _end_run(self) -> None:
        self._module: Module | None = None
        self._average_model: AveragedModel | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []  # average and current of everything that is averaged
        self._copied: list[tuple[Tensor, Tensor]] = []  # and of the buffers that are not
        self._blends: list[tuple[list[Tensor], list[Tensor]]] = []  # the pairs, together by device and dtype
        self._updates = 0  # what n_averaged says, known without asking the device
        self._swapped = False  # the module has the average, and the other way round
        self._trained: dict[str, Any] | None = None  # the weights that were trained, once the module has the average
        self._restored: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)  # a copy or a pickle is not part of the run
        state.update(_module=None, _average_model=None, _pairs=[], _copied=[], _blends=[], _updates=0)
        state.update(_swapped=False, _trained=None, _restored=None)
        return state

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether to take the weights into the average now.

        Args:
            step_idx: the index of the update that was just made, from 0; None at the end of an epoch.
            epoch_idx: the index of the epoch that ends, from 0; None after an update.
        """
        return step_idx is not None

    # ---- a run begins
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage != "fit" and pl_module is self._module and not trainer.ckpt_path:
            return  # what fit left behind can still be saved
        self._end_run()
        if stage == "fit":
            self._module = pl_module
            self._latest_update_step, self._latest_update_epoch = trainer.global_step, trainer.current_epoch - 1

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Give the module the weights that were being trained; it has been given the average."""
        if "current_model_state" in checkpoint and "averaging_state" in checkpoint:
            self._restored = {name: checkpoint[name] for name in ("state_dict", "averaging_state")}
            pl_module.load_state_dict(checkpoint["current_model_state"], strict=pl_module.strict_loading)
        else:
            warn(f"the checkpoint has no average of weights: {type(self).__name__} begins with its weights.")

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        device = pl_module.device if self._device is None else self._device
        average = AveragedModel(pl_module, torch.device(device), use_buffers=self._use_buffers, **self._kwargs)
        average.requires_grad_(False)
        if self._restored is not None:
            average.module.load_state_dict(self._restored["state_dict"], strict=pl_module.strict_loading)
            average.load_state_dict(self._restored["averaging_state"], strict=False)
            self._restored = None
        self._average_model = average
        self._updates = int(average.n_averaged)
        self._match(pl_module)

    def _match(self, module: nn.Module) -> None:
        """Find each average's current value, by name."""
        assert self._average_model is not None
        average = self._average_model.module
        parameters = _matched(dict(average.named_parameters()), dict(module.named_parameters()))
        buffers = _matched(dict(average.named_buffers()), dict(module.named_buffers()))
        self._pairs = [*parameters, *buffers] if self._use_buffers else parameters
        self._copied = [] if self._use_buffers else buffers
        together: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for kept, current in self._pairs:
            averages, currents = together.setdefault((kept.device, kept.dtype), ([], []))
            averages.append(kept)
            currents.append(current)
        self._blends = list(together.values())

    # ---- averaging
    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._match(pl_module)  # another callback may have exchanged parameters between epochs

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            self._update()
            self._latest_update_step = step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        epoch = trainer.current_epoch
        if epoch > self._latest_update_epoch and self.should_update(epoch_idx=epoch):
            self._update()
            self._latest_update_epoch = epoch

    @torch.no_grad()
    def _update(self) -> None:
        """Take the module's weights into the average: what `AveragedModel.update_parameters` does, without reading
        `n_averaged` from the device."""
        average = self._average_model
        assert average is not None
        if self._updates == 0:
            _copy(self._pairs)
        elif average.avg_fn is not None:
            for kept, current in self._pairs:
                count = average.n_averaged.to(kept.device)
                kept.copy_(average.avg_fn(kept, current.to(kept.device), count))
        else:
            blend: Blend = average.multi_avg_fn or partial(mean, self._updates)
            for averages, currents in self._blends:
                device = averages[0].device
                blend(averages, [current.to(device) for current in currents], average.n_averaged.to(device))
        _copy(self._copied)
        average.n_averaged += 1
        self._updates += 1

    # ---- using it
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.stage == "fit":
            self._swap_models(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._swapped:
            self._swap_models(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        if self._swapped:
            self._swap_models(pl_module)

    @torch.no_grad()
    def _swap_models(self, module: Module) -> None:
        """Exchange the module's weights and their average; there is none before the first update."""
        if self._updates == 0:
            return
        for kept, current in chain(self._pairs, self._copied):
            before = kept.clone()
            kept.copy_(current)
            current.copy_(before)
        self._swapped = not self._swapped

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._updates:
            self._copy_average_to_current(pl_module)

    @torch.no_grad()
    def _copy_average_to_current(self, module: Module) -> None:
        self._trained = {
            name: value.to("cpu", copy=True) if isinstance(value, Tensor) else value
            for name, value in module.state_dict().items()
        }
        _copy((current, kept) for kept, current in chain(self._pairs, self._copied))

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if self._average_model is not None:
            self._average_model.cpu()  # as the module
        self._pairs, self._copied, self._blends = [], [], []

    # ---- checkpoints
    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._latest_update_step, "latest_update_epoch": self._latest_update_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._latest_update_step = state_dict["latest_update_step"]
        self._latest_update_epoch = state_dict.get("latest_update_epoch", -1)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Put the average in the place of the weights."""
        average = self._average_model
        if average is None or pl_module is not self._module:
            return
        kept, current = average.module.state_dict(), checkpoint["state_dict"]
        if self._updates == 0:
            kept = current
        elif self._trained is not None:
            kept, current = current, self._trained
        elif self._swapped:
            kept, current = current, kept
        checkpoint["state_dict"] = kept
        if "optimizer_states" not in checkpoint:  # weights only
            return
        checkpoint["current_model_state"] = current
        checkpoint["averaging_state"] = {
            name: value for name, value in average.state_dict().items() if not name.startswith("module.")
        }


class EMAWeightAveraging(WeightAveraging):
    """Keep an exponential moving average of the weights: `decay * average + (1 - decay) * weights` after an update.

    Everything else is as in `WeightAveraging`.

    Args:
        device: where the average is kept; None: where the module is.
        use_buffers: average the buffers too; False copies the module's.
        decay: the share of the average that stays, from 0 to 1.
        update_every_n_steps: take every n-th update into it; 0 for none.
        update_starting_at_step: the first update to count, by its index from 0.
        update_starting_at_epoch: from this epoch on, counted from 0, update at the end of each epoch as well.

    Raises:
        ValueError: `decay` is not from 0 to 1.
        TypeError: an averaging function is given; it is this class's own.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"EMAWeightAveraging(decay=...) must be from 0 to 1. Received: {decay!r}.")
        if kwargs:
            raise TypeError(
                f"EMAWeightAveraging takes no argument {', '.join(map(repr, kwargs))}. For another average use "
                "WeightAveraging(avg_fn=...)."
            )
        super().__init__(device, use_buffers, multi_avg_fn=partial(exponential, decay))
        self.decay = decay
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        every, first_step, first_epoch = (
            self.update_every_n_steps,
            self.update_starting_at_step or 0,
            self.update_starting_at_epoch,
        )
        if step_idx is not None and step_idx >= first_step and every > 0 and step_idx % every == 0:
            return True
        return epoch_idx is not None and first_epoch is not None and epoch_idx >= first_epoch


# The functions below round as torch's get_swa_avg_fn and get_ema_avg_fn do, element by element, in few kernels.
def mean(count: int, averages: list[Tensor], currents: list[Tensor], _: Tensor) -> None:
    """Take the currents into the mean of `count` earlier values."""
    if _fractional(averages[0]):
        steps = torch._foreach_sub(currents, averages)
        torch._foreach_div_(steps, count + 1)
        torch._foreach_add_(averages, steps)
        return
    for average, current in zip(averages, currents, strict=True):
        average.copy_(average + (current - average) / (count + 1))


def exponential(decay: float, averages: list[Tensor], currents: list[Tensor], _: Tensor) -> None:
    """Move the averages towards the currents, by 1 - decay of the way."""
    if _fractional(averages[0]):
        shares = torch._foreach_mul(currents, 1 - decay)
        torch._foreach_mul_(averages, decay)
        torch._foreach_add_(averages, shares)
        return
    for average, current in zip(averages, currents, strict=True):
        average.copy_(decay * average + (1 - decay) * current)


def _fractional(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _copy(pairs: Any) -> None:
    for target, source in pairs:
        target.copy_(source)


def _matched(averages: dict[str, Tensor], currents: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    if averages.keys() != currents.keys():
        changed = sorted(averages.keys() ^ currents.keys())
        raise MisconfigurationException(
            "the module's parameters are not those that are averaged: something has added, removed or renamed "
            f"{', '.join(changed[:4])} since training began."
        )
    return [(average, currents[name]) for name, average in averages.items()]
