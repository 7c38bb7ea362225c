"""Make a Module or DataModule again from a checkpoint: its hyperparameters, then its weights.

A file never chooses what code runs. The class is the one that `load_from_checkpoint` is called on, or a subclass of it
that the program has imported already; that goes for the classes inside a LightningCLI's hyperparameters too.
"""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Collection, Iterable, Mapping
from os import PathLike
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

import torch

from trainkit.checkpoint import code_names, format, store
from trainkit.checkpoint.hparams_files import load_hparams
from trainkit.checkpoint.restore import load_weights
from trainkit.errors import warn
from trainkit.hooks import is_overridden
from trainkit.hparams import AttributeDict, given_hyperparameters
from trainkit.redaction import hidden_in

if TYPE_CHECKING:
    from trainkit.datamodule import DataModule
    from trainkit.module import Module

Source = str | PathLike[str] | IO[bytes] | Mapping[str, Any]

INSTANTIATORS = {
    "trainkit.lightning.cli.instantiate_module",
    "lightning.pytorch.cli.instantiate_module",
    "pytorch_lightning.cli.instantiate_module",
}
"""What a file may say of how its hyperparameters were made. All of them mean `instantiate_module` below."""


def rebuild_module(
    cls: type[Module],
    source: Source,
    map_location: Any,
    hparams_file: str | PathLike[str] | None,
    strict: bool | None,
    overrides: dict[str, Any],
) -> Any:
    """Make a module again. See `Module.load_from_checkpoint`."""
    checkpoint, source = read(source), _described(source)
    checkpoint.setdefault("hyper_parameters", {})
    saved = _saved_hparams(checkpoint, "", hparams_file)
    module = _construct(cls, saved, checkpoint.get("hparams_name"), overrides, source)
    strict = _strictness(module, strict)
    if is_overridden(module, "configure_model"):
        module.configure_model()
    module.on_load_checkpoint(checkpoint)
    load_weights(module, checkpoint, source, strict)
    if not checkpoint["state_dict"]:
        warn(f"{source} has no weights: its 'state_dict' is empty.")
    elif not strict:
        _warn_of_differences(module, checkpoint["state_dict"], source)
    device = _device_of(map_location)
    return module if device is None else module.to(device)


def rebuild_datamodule(
    cls: type[DataModule], source: Source, hparams_file: str | PathLike[str] | None, overrides: dict[str, Any]
) -> Any:
    """Make a data module again. See `DataModule.load_from_checkpoint`."""
    checkpoint, source = read(source), _described(source)
    saved = _saved_hparams(checkpoint, "datamodule_", hparams_file)
    datamodule = _construct(cls, saved, checkpoint.get("datamodule_hparams_name"), overrides, source)
    state = checkpoint.get(type(datamodule).__qualname__)
    if state is not None:
        datamodule.load_state_dict(state)
    return datamodule


def read(source: Source) -> dict[str, Any]:
    """Return what a checkpoint holds, from its path, from an open file, or from what was read of one already.

    Raises:
        CheckpointError: it can't be read, or trainkit did not write it; nothing in it has been run.
    """
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, (str, PathLike)):
        return store.load(source)
    return format.read(cast(BinaryIO, source))


def _described(source: Source) -> Any:
    """Return what messages call a source."""
    return "the checkpoint" if isinstance(source, Mapping) else source


# ---------------------------------------------------------------------- hyperparameters
def _saved_hparams(
    checkpoint: Mapping[str, Any], prefix: str, hparams_file: str | PathLike[str] | None
) -> dict[str, Any]:
    if hparams_file is not None:
        return load_hparams(hparams_file)
    saved = checkpoint.get(f"{prefix}hyper_parameters") or {}
    if not saved and not prefix:  # as Lightning before 1.0 called them
        saved = checkpoint.get("module_arguments") or checkpoint.get("hparams") or {}
    saved = dict(vars(saved) if isinstance(saved, Namespace) else saved)
    for name in checkpoint.get("hparams_namespaces", ()) if not prefix else ():
        if isinstance(saved.get(name), dict):
            saved[name] = Namespace(**saved[name])
    return saved


# ---------------------------------------------------------------------- making the object
def _construct(cls: type, saved: dict[str, Any], name: str | None, overrides: dict[str, Any], source: object) -> Any:
    """Call a class with its saved arguments, those given now in their place."""
    secrets = [key for key in hidden_in(saved) if key.partition(".")[0] not in overrides]
    saved = {key: value for key, value in saved.items() if key not in secrets or (name and name != "kwargs")}
    if secrets:
        warn(
            f"{source} does not have {', '.join(map(repr, secrets))}: files get '***' in the place of what looks like "
            f"a secret. Give it again: load_from_checkpoint(path, {secrets[0].partition('.')[0]}=...)."
        )
    instantiator = saved.pop("_instantiator", None)
    if instantiator is not None:
        if instantiator not in INSTANTIATORS:
            raise ValueError(
                f"{source} wants to be made by {instantiator!r}, and a file may not choose the code that is run. "
                f"Make the object yourself: {cls.__name__}(...), then load_state_dict."
            )
        return instantiate_module(cls, {**saved, **overrides, "_instantiator": instantiator}, trusted=overrides)
    saved.pop("_class_path", None)
    parameters = dict(list(inspect.signature(cls.__init__).parameters.items())[1:])  # type: ignore[misc]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments = {**saved, **overrides}
    if name and name != "kwargs" and name in parameters:  # one argument held them all
        arguments = {name: AttributeDict(arguments), **overrides}
    if not takes_any:
        unknown = [key for key in overrides if key not in parameters and key not in saved]
        if unknown and not (name in parameters and name != "kwargs"):
            warn(
                f"load_from_checkpoint: {cls.__name__} has no argument {', '.join(map(repr, unknown))}, which is left "
                f"out; it has: {', '.join(parameters) or 'none'}."
            )
        arguments = {key: value for key, value in arguments.items() if key in parameters}
    missing = [
        key
        for key, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and key not in arguments
    ]
    if missing:
        raise TypeError(
            f"{cls.__name__} needs {', '.join(map(repr, missing))}, which {source} does not have. Give them to "
            "load_from_checkpoint, or call self.save_hyperparameters() in __init__ before training."
        )
    first = [key for key, p in parameters.items() if p.kind is p.POSITIONAL_ONLY and key in arguments]
    return cls(*(arguments.pop(key) for key in first), **arguments)


def instantiate_module(class_type: type, config: dict[str, Any], trusted: Collection[str] = ()) -> Any:
    """Make an object of the arguments a LightningCLI had for it, those inside that are objects included.

    Args:
        class_type: its class, or a base class of it.
        config: the arguments; "_class_path" names the class, if it is a subclass.
        trusted: names of arguments that the program gave, and no file.

    Raises:
        ValueError: a class named in it has not been imported by the program, or is not a subclass; or something in it
            would choose code, see `code_names`.
    """
    import jsonargparse

    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    cls = imported_subclass(config["_class_path"], class_type) if "_class_path" in config else class_type
    code_names.check(cls, arguments, but=trusted)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    spec: dict[str, Any] = arguments
    if "_class_path" in config:
        parser.add_subclass_arguments(class_type, "module", fail_untyped=False)
        spec = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "dict_kwargs": arguments}
    else:
        parser.add_class_arguments(class_type, "module", fail_untyped=False)
    with given_hyperparameters(cls, config):  # what they were the first time: values, where `__init__` gets objects
        return parser.instantiate(parser.parse_object({"module": spec})).module


def imported_subclass(class_path: Any, base: type) -> type:
    """Return the class that a path means, if the program has imported it and it is `base` or a subclass of it.

    Raises:
        ValueError: it has not been imported, or it is something else.
    """
    found = code_names.imported(class_path)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f"the checkpoint names the class {class_path!r}, which is not a subclass of {base.__name__}: "
            "call load_from_checkpoint on the class that was saved."
        )
    return found


# ---------------------------------------------------------------------- weights
def _strictness(module: Module, given: bool | None) -> bool:
    own: bool = module.strict_loading
    if given is None:
        return own
    if given != own and _says_strictness(module):
        raise ValueError(
            f"load_from_checkpoint(strict={given}), but {type(module).__name__}.strict_loading is {own}. "
            "Leave one of the two out."
        )
    return given


def _says_strictness(module: Module) -> bool:
    """Whether the module's class, or it itself, has a `strict_loading` of its own."""
    places: Iterable[Mapping[str, Any]] = (vars(module), *(vars(cls) for cls in type(module).__mro__))
    return any("strict_loading" in place and place.get("__module__") != "trainkit.module" for place in places)


def _warn_of_differences(module: Module, saved: Mapping[str, Any], source: object) -> None:
    own = module.state_dict()
    for what, keys in (
        ("the module has, the checkpoint has not", [key for key in own if key not in saved]),
        ("the checkpoint has, the module has not", [key for key in saved if key not in own]),
    ):
        if keys:
            warn(f"{source} was loaded with strict=False; {what}: {', '.join(keys)}.")


def _device_of(map_location: Any) -> torch.device | None:
    """Return where the module goes; None leaves it on the cpu, where every checkpoint is read to."""
    if isinstance(map_location, Mapping):
        targets = {str(target) for target in map_location.values()}
        map_location = targets.pop() if len(targets) == 1 else None
    return None if map_location is None or callable(map_location) else torch.device(map_location)
