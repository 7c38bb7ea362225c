"""BaseFinetuning, BackboneFinetuning: train a part of the module first, and the rest of it later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from trainkit import Callback
from trainkit.errors import MisconfigurationException, warn

if TYPE_CHECKING:
    from trainkit import Module, Trainer

Modules = nn.Module | Iterable[Any]
"""A module, or modules in lists of any depth."""


class BaseFinetuning(Callback):
    """Freeze parameters before training, and give them to the optimizer later. Derive your own from this.

    Override `freeze_before_training`, which is called before the optimizers are made, and `finetune_function`, which
    is called for each optimizer when an epoch begins. The module's optimizer must leave frozen parameters out.

    Which parameters are frozen and the parameter groups of every optimizer are in a checkpoint, so that a resumed run
    goes on with them.

    Example:
        >>> class UnfreezeEncoder(BaseFinetuning):
        ...     def freeze_before_training(self, pl_module):
        ...         self.freeze(pl_module.encoder)
        ...     def finetune_function(self, pl_module, epoch, optimizer):
        ...         if epoch == 5:
        ...             self.unfreeze_and_add_param_group(pl_module.encoder, optimizer)
    """

    def __init__(self) -> None:
        self._begin_run()

    def _begin_run(self) -> None:
        self._module: Module | None = None
        self._optimizers: list[Optimizer] = []
        self._loaded: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy or a pickle is not part of the run, but it knows as much as a checkpoint does
        return {**self.__dict__, "_module": None, "_optimizers": [], "_loaded": self._state()}

    # ---- what a subclass says
    def freeze_before_training(self, pl_module: Module) -> None:
        """Freeze what is not to be trained yet."""
        raise NotImplementedError(f"{type(self).__name__} has no freeze_before_training(self, pl_module).")

    def finetune_function(self, pl_module: Module, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze what is to be trained from this epoch on, and give it to the optimizer."""
        raise NotImplementedError(f"{type(self).__name__} has no finetune_function(self, pl_module, epoch, optimizer).")

    # ---- what it can use
    @staticmethod
    def flatten_modules(modules: Modules) -> list[nn.Module]:
        """Return the modules in these that have no children, or parameters of their own."""
        if not isinstance(modules, nn.Module):
            return [found for part in modules for found in BaseFinetuning.flatten_modules(part)]
        return [part for part in modules.modules() if next(part.children(), None) is None or part._parameters]

    @staticmethod
    def filter_params(modules: Modules, train_bn: bool = True, requires_grad: bool = True) -> Iterator[Parameter]:
        """Yield the parameters that do, or do not, require a gradient; `train_bn=False` leaves batch norm out."""
        for part in BaseFinetuning.flatten_modules(modules):
            if train_bn or not isinstance(part, _BatchNorm):
                yield from (p for p in part.parameters(recurse=False) if p.requires_grad == requires_grad)

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        """Let the parameters require a gradient, and batch norm track its statistics."""
        for part in BaseFinetuning.flatten_modules(modules):
            _set_trainable(part, True)

    @staticmethod
    def freeze_module(module: nn.Module) -> None:
        """Freeze one module's own parameters, without its children's."""
        _set_trainable(module, False)

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Freeze the parameters; `train_bn` leaves batch norm trainable."""
        for part in BaseFinetuning.flatten_modules(modules):
            _set_trainable(part, train_bn and isinstance(part, _BatchNorm))

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[Parameter]) -> list[Parameter]:
        """Return the parameters that the optimizer does not have yet, and warn if there are others."""
        given = list(params)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        new = [parameter for parameter in given if id(parameter) not in known]
        if len(new) < len(given):
            warn(
                f"{len(given) - len(new)} of the parameters to be added are in {type(optimizer).__name__} already and "
                "are left out. Make it without what is frozen: "
                f"{type(optimizer).__name__}([p for p in self.parameters() if p.requires_grad], ...)."
            )
        return new

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Unfreeze modules and give their parameters to the optimizer, as a group of their own.

        Args:
            modules: what to unfreeze.
            optimizer: what is to train it.
            lr: the group's learning rate; None: the first group's, divided by `initial_denom_lr`.
            initial_denom_lr: the divisor.
            train_bn: add batch norm's parameters, too.
        """
        norms = [part for part in BaseFinetuning.flatten_modules(modules) if isinstance(part, _BatchNorm)]
        learning = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        learning &= {id(p) for p in BaseFinetuning.filter_params(norms)}  # batch norm that was never frozen
        BaseFinetuning.make_trainable(modules)
        rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else float(lr)
        unfrozen = (p for p in BaseFinetuning.filter_params(modules, train_bn=train_bn) if id(p) not in learning)
        new = BaseFinetuning.filter_on_optimizer(optimizer, unfrozen)
        if new:
            optimizer.add_param_group({"params": new, "lr": rate})

    # ---- hooks
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage == "fit":
            self._begin_run()
            self.freeze_before_training(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._module, self._optimizers = pl_module, trainer.optimizers
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            self._restore(pl_module, loaded)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        for optimizer in trainer.optimizers:
            self.finetune_function(pl_module, trainer.current_epoch, optimizer)

    # ---- resume
    def state_dict(self) -> dict[str, Any]:
        return self._state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)

    def _state(self) -> dict[str, Any]:
        """Return who is trained, by name: what `requires_grad` says, and the groups of every optimizer."""
        if self._loaded is not None or self._module is None:
            return self._loaded or {"internal_optimizer_metadata": {}}
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        groups = {}
        for index, optimizer in enumerate(self._optimizers):
            if all(id(p) in names for group in optimizer.param_groups for p in group["params"]):  # else: not ours
                groups[index] = [
                    {**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups
                ]
        return {
            "internal_optimizer_metadata": groups,
            "frozen": [name for name, parameter in self._module.named_parameters() if not parameter.requires_grad],
            "not_tracking": [name for name, part in _batch_norms(self._module) if not part.track_running_stats],
        }

    def _restore(self, module: Module, state: dict[str, Any]) -> None:
        named = dict(module.named_parameters())
        if "frozen" in state:  # Lightning's checkpoints do not say
            for name, parameter in named.items():
                parameter.requires_grad = name not in state["frozen"]
            for name, part in _batch_norms(module):
                part.track_running_stats = name not in state["not_tracking"]
        for index, groups in state["internal_optimizer_metadata"].items():
            missing = sorted({name for group in groups for name in group["params"]} - named.keys())
            if missing or index >= len(self._optimizers):
                raise MisconfigurationException(
                    f"the checkpoint's {type(self).__name__} gave optimizer {index} parameters that are not there now: "
                    f"{', '.join(missing[:4]) or 'the optimizer itself'}."
                )
            self._optimizers[index].param_groups = [
                {**group, "params": [named[name] for name in group["params"]]} for group in groups
            ]


def _set_trainable(module: nn.Module, trainable: bool) -> None:
    if isinstance(module, _BatchNorm):
        module.track_running_stats = trainable
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad = trainable


def _batch_norms(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    return ((name, part) for name, part in module.named_modules() if isinstance(part, _BatchNorm))


def double(epoch: int) -> float:
    """Return 2: by what `BackboneFinetuning` multiplies the backbone's learning rate."""
    return 2.0


class BackboneFinetuning(BaseFinetuning):
    """Train the rest of the module first, then `module.backbone` with it, at a learning rate that grows to the rest's.

    Args:
        unfreeze_backbone_at_epoch: the epoch, counted from 0, that trains the backbone first.
        lambda_func: by what the backbone's learning rate is multiplied, from the next epoch's number.
        backbone_initial_ratio_lr: the backbone's first learning rate, as a share of the first group's.
        backbone_initial_lr: that rate itself, instead.
        should_align: do not let it grow beyond the first group's.
        initial_denom_lr: kept for Lightning's signature; the two above decide.
        train_bn: train the backbone's batch norm when it is unfrozen.
        verbose: print both learning rates in every epoch.
        rounding: to so many digits.

    Raises:
        MisconfigurationException: when fit starts, the module has no `backbone`.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = double,
        backbone_initial_ratio_lr: float = 0.1,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        super().__init__()
        self.unfreeze_backbone_at_epoch = unfreeze_backbone_at_epoch
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr = backbone_initial_lr
        self.should_align = should_align
        self.initial_denom_lr = initial_denom_lr
        self.train_bn = train_bn
        self.verbose = verbose
        self.rounding = rounding
        self.previous_backbone_lr: float | None = None

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage == "fit":
            self.previous_backbone_lr = None
        super().setup(trainer, pl_module, stage)

    def freeze_before_training(self, pl_module: Module) -> None:
        self.freeze(_backbone(pl_module))

    def finetune_function(self, pl_module: Module, epoch: int, optimizer: Optimizer) -> None:
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        current = optimizer.param_groups[0]["lr"]
        if epoch == self.unfreeze_backbone_at_epoch:
            rate = self.backbone_initial_lr
            if rate is None:
                rate = current * self.backbone_initial_ratio_lr
            self.unfreeze_and_add_param_group(
                _backbone(pl_module), optimizer, rate, self.initial_denom_lr, self.train_bn
            )
        elif self.previous_backbone_lr is None:  # a run that was not unfrozen begins behind that epoch
            return
        else:
            rate = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            if self.should_align and rate > current:
                rate = current
            optimizer.param_groups[-1]["lr"] = rate
        self.previous_backbone_lr = rate
        if self.verbose:
            rounded = round(float(current), self.rounding), round(float(rate), self.rounding)
            pl_module.print("BackboneFinetuning: learning rate {}, the backbone's {}".format(*rounded))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self.previous_backbone_lr = state.pop("previous_backbone_lr")
        super().load_state_dict(state)


def _backbone(module: Module) -> nn.Module:
    backbone = getattr(module, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise MisconfigurationException(
            f"BackboneFinetuning freezes module.backbone, and {type(module).__name__} has no such torch.nn.Module."
        )
    return backbone
