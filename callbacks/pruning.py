"""ModelPruning: set the least important weights to zero as training goes on."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from trainkit import Callback, Module
from trainkit.errors import MisconfigurationException, nearest

if TYPE_CHECKING:
    from trainkit import Trainer

Pairs = Sequence[tuple[nn.Module, str]]
CLASSES: dict[str, type[prune.BasePruningMethod]] = {
    "l1_unstructured": prune.L1Unstructured,
    "ln_structured": prune.LnStructured,
    "random_structured": prune.RandomStructured,
    "random_unstructured": prune.RandomUnstructured,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "l1_unstructured": prune.l1_unstructured,
    "ln_structured": prune.ln_structured,
    "random_structured": prune.random_structured,
    "random_unstructured": prune.random_unstructured,
}


class ModelPruning(Callback):
    """Prune parameters at the end of every epoch, with `torch.nn.utils.prune`.

    A pruned parameter stays zero while the others are trained on. With the lottery ticket hypothesis (Frankle and
    Carbin, The Lottery Ticket Hypothesis, ICLR 2019) the others go back to what they were before training. The masks,
    and what lies under them, are in a checkpoint: a resumed run prunes on where it was.

    Override `filter_parameters_to_prune` to choose among the parameters.

    Args:
        pruning_fn: "l1_unstructured", "ln_structured", "random_structured", "random_unstructured", or a subclass of
            `torch.nn.utils.prune.BasePruningMethod`.
        parameters_to_prune: pairs of a submodule and a parameter's name; none: all with one of `parameter_names`.
        parameter_names: "weight", "bias" or both (default).
        use_global_unstructured: compare all these parameters with each other; False: each with itself only.
        amount: how much to prune each time, as a number (int), a share of what is left (float), or a function of the
            epoch.
        apply_pruning: whether to prune, or a function of the epoch.
        make_pruning_permanent: put the zeros into the weights in checkpoints and when training ends. False leaves
            `weight_orig` and `weight_mask` there.
        use_lottery_ticket_hypothesis: whether to go back to the first values, or a function of the epoch.
        resample_parameters: go back to new first values instead (`reset_parameters`).
        pruning_dim: the dimension along which the structured functions prune.
        pruning_norm: the norm that "ln_structured" compares.
        verbose: 1 prints how many weights are zero, 2 for each parameter.
        prune_on_train_epoch_end: False prunes at the end of validation instead.

    Raises:
        MisconfigurationException: arguments that can't work; when fit starts, parameters that the module does not have.
    """

    PARAMETER_NAMES: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __init__(
        self,
        pruning_fn: str | type[prune.BasePruningMethod],
        parameters_to_prune: Pairs = (),
        parameter_names: list[str] | None = None,
        use_global_unstructured: bool = True,
        amount: int | float | Callable[[int], int | float] = 0.5,
        apply_pruning: bool | Callable[[int], bool] = True,
        make_pruning_permanent: bool = True,
        use_lottery_ticket_hypothesis: bool | Callable[[int], bool] = True,
        resample_parameters: bool = False,
        pruning_dim: int | None = None,
        pruning_norm: int | None = None,
        verbose: int = 0,
        prune_on_train_epoch_end: bool = True,
    ) -> None:
        self._parameter_names = parameter_names or self.PARAMETER_NAMES
        for name in self._parameter_names:
            if name not in self.PARAMETER_NAMES:
                raise MisconfigurationException(
                    f'ModelPruning(parameter_names=...) may have "weight" and "bias". Received: {name!r}.'
                )
        if not isinstance(amount, (int, float)) and not callable(amount):
            raise MisconfigurationException(
                f"ModelPruning(amount=...) must be an int, a float or a function of the epoch. Received: {amount!r}."
            )
        if verbose not in (0, 1, 2):
            raise MisconfigurationException(f"ModelPruning(verbose=...) must be 0, 1 or 2. Received: {verbose!r}.")
        self._use_global_unstructured = use_global_unstructured
        self.pruning_fn = _pruning_fn(pruning_fn, use_global_unstructured, pruning_dim, pruning_norm)
        self._method_name = getattr(self.pruning_fn, "__name__", str(pruning_fn))
        self.amount = amount
        self._given = parameters_to_prune
        self._apply_pruning = apply_pruning
        self._make_pruning_permanent = make_pruning_permanent
        self._use_lottery_ticket_hypothesis = use_lottery_ticket_hypothesis
        self._resample_parameters = resample_parameters
        self._verbose = verbose
        self._prune_on_train_epoch_end = prune_on_train_epoch_end
        self._number = 0
        self._begin_run()

    def _begin_run(self) -> None:
        self._module: Module | None = None
        self._parameters_to_prune: Pairs = ()
        self._first: list[Tensor] = []  # the parameters before training, in that order
        self._fresh: dict[int, nn.Module] = {}  # modules to draw new first values in, by the id of the pruned one
        self._loaded: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy or a pickle is not part of the run, but it knows as much as a checkpoint does
        run: dict[str, Any] = {"_module": None, "_parameters_to_prune": (), "_first": [], "_fresh": {}}
        return {**self.__dict__, **run, "_loaded": self.state_dict()}

    # ---- which parameters
    def filter_parameters_to_prune(self, parameters_to_prune: Pairs = ()) -> Pairs:
        """Return those of the (submodule, name) pairs that are to be pruned: all, unless overridden."""
        return parameters_to_prune

    @staticmethod
    def sanitize_parameters_to_prune(
        pl_module: nn.Module, parameters_to_prune: Pairs = (), parameter_names: Sequence[str] = ()
    ) -> Pairs:
        """Return the given (submodule, name) pairs after a check; none given: all of the module's.

        Raises:
            MisconfigurationException: what is given is not a list of such pairs, or not in the module.
        """
        containers = (Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
        parts = [part for part in pl_module.modules() if not isinstance(part, containers)]
        names = parameter_names or ModelPruning.PARAMETER_NAMES
        if not parameters_to_prune:
            return [
                (part, name)
                for name in names
                for part in parts
                if isinstance(getattr(part, name, None), nn.Parameter) or f"{name}_orig" in part._parameters
            ]
        if not isinstance(parameters_to_prune, (list, tuple)) or not all(map(_is_pair, parameters_to_prune)):
            raise MisconfigurationException(
                'ModelPruning(parameters_to_prune=...) must be a list of pairs such as (model.layer, "weight"). '
                f"Received: {parameters_to_prune!r}."
            )
        for part, name in parameters_to_prune:
            if not any(part is own for own in parts) or not hasattr(part, name):
                raise MisconfigurationException(
                    f"ModelPruning(parameters_to_prune=...) names {name!r} of {part!r}, which is not in the module."
                )
        return parameters_to_prune

    # ---- hooks
    @property
    def state_key(self) -> str:
        """The class's name; a Trainer may have several of them."""
        return type(self).__qualname__ + (f"-{self._number}" if self._number else "")

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if trainer.checkpoint is not None and not any(name.endswith("_mask") for name, _ in pl_module.named_buffers()):
            weights = trainer.checkpoint["state_dict"]  # those of a pruned module have other names
            trainer.checkpoint["state_dict"] = unpruned(weights) if stage == "fit" else permanent(weights)
        if stage != "fit":
            return
        self._begin_run()
        self._module = pl_module
        pairs = self.sanitize_parameters_to_prune(pl_module, self._given, self._parameter_names)
        self._parameters_to_prune = self.filter_parameters_to_prune(pairs)
        if self._use_lottery_ticket_hypothesis:
            self._first = [getattr(part, name).detach().clone() for part, name in self._parameters_to_prune]
            if self._resample_parameters:
                self._fresh = {id(part): copy.deepcopy(part) for part, _ in self._parameters_to_prune}
        self._number = [other for other in trainer.callbacks if type(other) is type(self)].index(self)

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._loaded is not None:  # the optimizers have the parameters in the order of before any was pruned
            loaded, self._loaded = self._loaded, None
            self._restore(loaded)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._prune_on_train_epoch_end:
            self._prune(trainer.current_epoch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.stage == "fit" and not trainer.sanity_checking and not self._prune_on_train_epoch_end:
            self._prune(trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._make_pruning_permanent:
            self._loaded = self.state_dict()  # so that a checkpoint of the trained module can be trained on
            self.make_pruning_permanent(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Put the zeros into the weights, if that is wanted."""
        if self._make_pruning_permanent:
            checkpoint["state_dict"] = permanent(checkpoint["state_dict"])

    # ---- pruning
    def _prune(self, epoch: int) -> None:
        amount = _now(self.amount, epoch)
        if not _now(self._apply_pruning, epoch) or not amount:
            return
        self.apply_pruning(amount)
        if _now(self._use_lottery_ticket_hypothesis, epoch):
            self.apply_lottery_ticket_hypothesis()

    def apply_pruning(self, amount: int | float) -> None:
        """Prune so many of the parameters, or that share of them."""
        before = list(self._zeros()) if self._verbose else []
        if self._use_global_unstructured:
            takes = inspect.signature(self.pruning_fn).parameters
            settings = {"amount": amount} if "amount" in takes else {}
            prune.global_unstructured(self._parameters_to_prune, pruning_method=self.pruning_fn, **settings)
        else:
            for part, name in self._parameters_to_prune:
                self.pruning_fn(part, name=name, amount=amount)
        if self._verbose:
            self._report(before, list(self._zeros()))

    @torch.no_grad()
    def apply_lottery_ticket_hypothesis(self) -> None:
        """Give the parameters their first values back, or new ones with `resample_parameters`."""
        drawn = set()
        for first, (part, name) in zip(self._first, self._parameters_to_prune, strict=True):
            fresh = self._fresh.get(id(part))
            value = first
            if fresh is not None and callable(reset := getattr(fresh, "reset_parameters", None)):
                if id(part) not in drawn:
                    drawn.add(id(part))
                    reset()
                value = getattr(fresh, name)
            _original(part, name).copy_(value)

    def make_pruning_permanent(self, module: nn.Module) -> None:
        """Put the zeros into the weights and take the masks away."""
        for part in module.modules():
            for key, hook in list(part._forward_pre_hooks.items()):
                if isinstance(hook, prune.BasePruningMethod):
                    hook.remove(part)
                    del part._forward_pre_hooks[key]

    # ---- telling
    def _zeros(self) -> Iterator[tuple[int, int]]:
        for part, name in self._parameters_to_prune:
            mask = getattr(part, f"{name}_mask", None)
            yield (0, getattr(part, name).numel()) if mask is None else (int((mask == 0).sum()), mask.numel())

    def _report(self, before: list[tuple[int, int]], after: list[tuple[int, int]]) -> None:
        say = print if self._module is None else self._module.print
        size = sum(number for _, number in after)
        then, now = (sum(zeros for zeros, _ in each) for each in (before, after))
        say(f"ModelPruning: {self._method_name} {then}/{size} ({then / size:.2%}) -> {now}/{size} ({now / size:.2%})")
        if self._verbose == 2:
            names = self._names()
            for name, (then, size), (now, _) in zip(names, before, after, strict=True):
                say(f"  {name}: {then}/{size} ({then / size:.2%}) -> {now}/{size} ({now / size:.2%})")

    def _names(self) -> list[str]:
        """Return the parameters' full names."""
        assert self._module is not None
        prefixes = {id(part): f"{prefix}." if prefix else "" for prefix, part in self._module.named_modules()}
        return [prefixes[id(part)] + name for part, name in self._parameters_to_prune]

    # ---- resume
    def state_dict(self) -> dict[str, Any]:
        """Return the masks, the values under them, and the parameters before training, by the parameters' names."""
        if self._loaded is not None:
            return self._loaded
        state: dict[str, dict[str, Tensor]] = {"masks": {}, "hidden": {}, "first": {}}
        if self._module is None:
            return {}
        names = self._names()
        for full, (part, name) in zip(names, self._parameters_to_prune, strict=True):
            if f"{name}_mask" in part._buffers:
                kept = getattr(part, f"{name}_mask") != 0
                state["masks"][full], state["hidden"][full] = kept, _original(part, name).detach()[~kept]
        state["first"] = dict(zip(names, self._first, strict=False))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        names = self._names()
        missing = sorted(state["masks"].keys() - set(names))
        if missing:
            raise MisconfigurationException(
                f"the checkpoint has {', '.join(missing[:4])} pruned, which this ModelPruning does not prune. Give it "
                "the parameters of before."
            )
        for index, (full, (part, name)) in enumerate(zip(names, self._parameters_to_prune, strict=True)):
            parameter = _original(part, name)
            if full in state["first"] and self._first:
                self._first[index].copy_(state["first"][full])
            if full in state["masks"]:
                kept = state["masks"][full].to(parameter.device)
                parameter[~kept] = state["hidden"][full].to(parameter)
                prune.custom_from_mask(part, name, kept.to(parameter.dtype))  # type: ignore[no-untyped-call]


def unpruned(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a pruned module's state as that of a module without masks, with what lies under them."""
    state = copy.copy(state_dict)
    for mask in _masks(state):
        name = mask.removesuffix("_mask")
        del state[mask]
        state[name] = state.pop(f"{name}_orig")
    return state


def permanent(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a pruned module's state as that of a module with zeros in it."""
    state = copy.copy(state_dict)
    for mask in _masks(state):
        name = mask.removesuffix("_mask")
        original = state.pop(f"{name}_orig")
        state[name] = state.pop(mask).to(original.dtype) * original
    return state


def _masks(state_dict: dict[str, Any]) -> list[str]:
    return [key for key in state_dict if key.endswith("_mask") and key.removesuffix("_mask") + "_orig" in state_dict]


def _original(module: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter that may be pruned."""
    pruned: nn.Parameter | None = module._parameters.get(f"{name}_orig")
    parameter: nn.Parameter = getattr(module, name) if pruned is None else pruned
    return parameter


def _now(setting: Any, epoch: int) -> Any:
    return setting(epoch) if callable(setting) else setting


def _is_pair(given: Any) -> bool:
    if not isinstance(given, (list, tuple)) or len(given) != 2:
        return False
    return isinstance(given[0], nn.Module) and isinstance(given[1], str)


def _pruning_fn(given: Any, together: bool, dim: int | None, norm: int | None) -> Any:
    """Return what prunes: a class of torch's for all parameters together, else a function of one of them."""
    if inspect.isclass(given) and issubclass(given, prune.BasePruningMethod):
        if not together:
            raise MisconfigurationException(
                f"ModelPruning(pruning_fn={given.__name__}) needs use_global_unstructured=True; only the names "
                f"{', '.join(FUNCTIONS)} prune each parameter by itself."
            )
        return _unstructured(given)
    if not isinstance(given, str):
        hint = " Give the class, not an object of it." if isinstance(given, prune.BasePruningMethod) else ""
        raise MisconfigurationException(
            f"ModelPruning(pruning_fn=...) must be one of {', '.join(FUNCTIONS)}, or a subclass of BasePruningMethod. "
            f"Received: {given!r}.{hint}"
        )
    name = given.lower()
    if name not in FUNCTIONS:
        raise MisconfigurationException(f"ModelPruning has no pruning_fn {given!r}; {nearest(name, FUNCTIONS)}")
    settings: dict[str, Any] = {}
    if name.endswith("_structured"):
        settings["dim"] = dim
    if name == "ln_structured":
        settings["n"] = norm
    for argument, key in (("pruning_dim", "dim"), ("pruning_norm", "n")):
        if key in settings and settings[key] is None:
            raise MisconfigurationException(f"ModelPruning({given!r}) needs {argument}=...")
    if together:
        return _unstructured(CLASSES[name])
    return partial(FUNCTIONS[name], **settings) if settings else FUNCTIONS[name]


def _unstructured(method: type[prune.BasePruningMethod]) -> type[prune.BasePruningMethod]:
    kind = getattr(method, "PRUNING_TYPE", None)
    if kind != "unstructured":
        raise MisconfigurationException(
            f"ModelPruning(use_global_unstructured=True) can't use {method.__name__}, whose PRUNING_TYPE is {kind!r}. "
            "Set use_global_unstructured=False, or take an unstructured method."
        )
    return method
