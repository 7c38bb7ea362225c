"""LightningCLI: a command line for a Trainer and your classes, in your own script."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import jsonargparse
import yaml
from torch.optim import Optimizer

import trainkit
import trainkit.callbacks
import trainkit.loggers
import trainkit.profiler.advanced
import trainkit.profiler.pytorch
import trainkit.profiler.simple  # a config may name these classes by their short names
from trainkit import Callback, DataModule, Module, Trainer, seed_everything
from trainkit.checkpoint import code_names, store
from trainkit.checkpoint.rebuild import imported_subclass
from trainkit.checkpoint.rebuild import instantiate_module as instantiate_module
from trainkit.errors import MisconfigurationException, warn
from trainkit.hooks import is_overridden
from trainkit.hparams import given_hyperparameters
from trainkit.lightning.parser import ArgsType as ArgsType
from trainkit.lightning.parser import LightningArgumentParser as LightningArgumentParser
from trainkit.lightning.parser import LRSchedulerCallable as LRSchedulerCallable
from trainkit.lightning.parser import LRSchedulerType as LRSchedulerType
from trainkit.lightning.parser import LRSchedulerTypeTuple as LRSchedulerTypeTuple
from trainkit.lightning.parser import LRSchedulerTypeUnion as LRSchedulerTypeUnion
from trainkit.lightning.parser import OptimizerCallable as OptimizerCallable
from trainkit.lightning.parser import ReduceLROnPlateau as ReduceLROnPlateau
from trainkit.lightning.parser import class_from_function, class_spec, module_type
from trainkit.lightning.stand_in import renamed, standing_in
from trainkit.redaction import HIDDEN, is_secret, redacted, without_hidden


class SaveConfigCallback(Callback):
    """Write the config of a run into its directory when it begins.

    Args:
        parser: what the config was parsed with.
        config: the config.
        config_filename: the file's name.
        overwrite: whether a file of that name may be there already.
        multifile: whether a config that came in several files is written in several.
        save_to_log_dir: False writes nothing, for a subclass that saves it elsewhere in `save_config`.

    Raises:
        RuntimeError: when the run begins: the file is there and `overwrite` is False.
        ValueError: `save_to_log_dir=False` without a `save_config`: nothing would be saved.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: jsonargparse.Namespace,
        config_filename: str = "config.yaml",
        overwrite: bool = False,
        multifile: bool = False,
        save_to_log_dir: bool = True,
    ) -> None:
        if not save_to_log_dir and type(self).save_config is SaveConfigCallback.save_config:
            raise ValueError(
                f"save_to_log_dir=False saves nothing: {type(self).__name__} has no save_config(trainer, pl_module, "
                "stage) of its own. Write one, or use save_config_callback=None."
            )
        self.parser = parser
        self.config = config
        self.config_filename = config_filename
        self.overwrite = overwrite
        self.multifile = multifile
        self.save_to_log_dir = save_to_log_dir
        self.already_saved = False

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if self.already_saved:
            return
        if trainer.is_global_zero:
            if self.save_to_log_dir:
                self._write(str(trainer.log_dir))
            self.save_config(trainer, pl_module, stage)
        self.already_saved = True

    def save_config(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Save the config somewhere else too. Called once, in the process that writes."""

    def _write(self, folder: str) -> None:
        path = os.path.join(folder, self.config_filename)
        if os.path.isfile(path) and not self.overwrite:
            raise RuntimeError(
                f"{path} is there already, from an earlier run. Remove it, write it over with "
                "save_config_kwargs={'overwrite': True}, or save no config with save_config_callback=None."
            )
        os.makedirs(folder, exist_ok=True)
        secrets: list[str] = []
        config = without_secrets(self.config, secrets)
        if secrets:
            names = ", ".join(map(repr, secrets))
            warn(f"the config's {names} looks like a secret: it is '***' in {path}.")
        options = {"overwrite": self.overwrite, "multifile": self.multifile, "skip_validation": bool(secrets)}
        self.parser.save(config, path, skip_unset=False, **options)


def without_secrets(config: jsonargparse.Namespace, found: list[str]) -> jsonargparse.Namespace:
    """Return a copy of a config with "***" in the place of what looks like a secret; `found` gets the names."""
    copy = config.clone()
    for key, value in list(copy.items(branches=True)):
        if is_secret(key, value):
            found.append(key)
            copy[key] = HIDDEN
        elif isinstance(value, (dict, list, tuple)):
            copy[key] = redacted(value, found, key)
    return copy


class LightningCLI:
    """Parse config files and options, make the Trainer and your classes, and run a subcommand.

    Args:
        model_class: a Module class, or a function that returns a module. None: the config names it (`--model Mine`).
        datamodule_class: the same for data; None: the config may name one.
        save_config_callback: the callback that saves the config; None for no saving.
        save_config_kwargs: its arguments, but for parser and config.
        trainer_class: the Trainer class, or a function that returns a Trainer.
        trainer_defaults: other defaults of the Trainer's arguments. Callbacks in it are in every run and can't be
            changed by a config.
        seed_everything_default: what `--seed_everything` is when nobody says: a seed, True for one of its own, False.
        parser_kwargs: arguments of the parser, or a dict of them for each subcommand.
        parser_class: the parser's class.
        subclass_mode_model: whether the config may name a subclass of `model_class`.
        subclass_mode_data: the same for `datamodule_class`.
        args: what to parse in place of the command line: a list as a shell would give it, or a dict of the config.
        run: False makes everything and runs nothing; there are no subcommands then.
        auto_configure_optimizers: whether a config's `optimizer` and `lr_scheduler` become the module's
            `configure_optimizers`.
        load_from_checkpoint_support: whether `save_hyperparameters` keeps the config's values in place of the objects
            made from them, so that `load_from_checkpoint` can make them again.

    Example:
        >>> def main():
        ...     LightningCLI(MyModule, MyDataModule, trainer_defaults={"max_epochs": 5})
    """

    def __init__(
        self,
        model_class: type[Module] | Callable[..., Module] | None = None,
        datamodule_class: type[DataModule] | Callable[..., DataModule] | None = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigCallback,
        save_config_kwargs: dict[str, Any] | None = None,
        trainer_class: type[Trainer] | Callable[..., Trainer] = Trainer,
        trainer_defaults: dict[str, Any] | None = None,
        seed_everything_default: bool | int = True,
        parser_kwargs: dict[str, Any] | dict[str, dict[str, Any]] | None = None,
        parser_class: type[LightningArgumentParser] = LightningArgumentParser,
        subclass_mode_model: bool = False,
        subclass_mode_data: bool = False,
        args: ArgsType = None,
        run: bool = True,
        auto_configure_optimizers: bool = True,
        load_from_checkpoint_support: bool = True,
    ) -> None:
        self.model_class = model_class
        self.datamodule_class = datamodule_class
        self.save_config_callback = save_config_callback
        self.save_config_kwargs = save_config_kwargs or {}
        self.trainer_class = trainer_class
        self.trainer_defaults = trainer_defaults or {}
        self.seed_everything_default = seed_everything_default
        self.parser_kwargs = parser_kwargs or {}
        self.parser_class = parser_class
        self.subclass_mode_model = model_class is None or subclass_mode_model
        self.subclass_mode_data = datamodule_class is None or subclass_mode_data
        self.auto_configure_optimizers = auto_configure_optimizers
        self.load_from_checkpoint_support = load_from_checkpoint_support

        names = self.subcommands().keys()
        main_kwargs = {key: value for key, value in self.parser_kwargs.items() if key not in names}
        each_kwargs = {key: value for key, value in self.parser_kwargs.items() if key in names}
        self.setup_parser(run, main_kwargs, each_kwargs)
        with standing_in():
            self.parse_arguments(self.parser, args)
            self._take_hparams_of_checkpoint()
        renamed(self.config)
        self.subcommand: str | None = self.config["subcommand"] if run else None
        self._seed()
        self.before_instantiate_classes()
        self.instantiate_classes()
        self.after_instantiate_classes()
        if self.subcommand is not None:
            self._run_subcommand(self.subcommand)

    # ---------------------------------------------------------------- the parser
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the Trainer's methods that are subcommands, each with the arguments that the CLI gives itself."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
            "predict": {"model", "dataloaders", "datamodule"},
        }

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a new parser, which takes config files."""
        kwargs.setdefault("dump_header", [f"trainkit=={trainkit.__version__}"])
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c", "--config", action="config", help="Path to a configuration file in YAML or JSON format."
        )
        return parser

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Make the parser, with its subcommands or with the arguments alone."""
        self.parser = self.init_parser(**main_kwargs)
        self._parsers: dict[str, LightningArgumentParser] = {}
        self._method_arguments: dict[str, list[str]] = {}
        if not add_subcommands:
            self._add_arguments(self.parser)
            return
        cls = self._trainer_type()
        group = self.parser.add_subcommands()
        for name, given in self.subcommands().items():
            first_line = (inspect.getdoc(getattr(cls, name)) or "").partition("\n")[0]
            parser = self.init_parser(**{"description": first_line, **subparser_kwargs.get(name, {})})
            self._add_arguments(parser)
            self._method_arguments[name] = list(parser.add_method_arguments(cls, name, skip=set(given)))
            self._parsers[name] = parser
            group.add_subcommand(name, parser, help=first_line)

    def _trainer_type(self) -> type[Any]:
        cls = self.trainer_class
        return cls if isinstance(cls, type) else class_from_function(cls)

    def _add_arguments(self, parser: LightningArgumentParser) -> None:
        self.add_default_arguments_to_parser(parser)
        self.add_core_arguments_to_parser(parser)
        self.add_arguments_to_parser(parser)
        if self.auto_configure_optimizers:
            if not parser.optimizers:
                parser.add_optimizer_args()
            if not parser.lr_schedulers:
                parser.add_lr_scheduler_args()
        self.link_optimizers_and_lr_schedulers(parser)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to no class: `--seed_everything`."""
        parser.add_argument(
            "--seed_everything",
            type=bool | int,
            default=self.seed_everything_default,
            help="A seed for everything random, true for one of its own, false for none.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of the Trainer, the model and the data."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults(
            {f"trainer.{key}": value for key, value in self.trainer_defaults.items() if key != "callbacks"}
        )
        parser.add_lightning_class_args(self.model_class or Module, "model", subclass_mode=self.subclass_mode_model)
        parser.add_lightning_class_args(
            self.datamodule_class or DataModule,
            "data",
            subclass_mode=self.subclass_mode_data,
            required=self.datamodule_class is not None,  # the module may have loaders of its own
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Override it to add arguments of your own, or to link some: `parser.link_arguments("data.n", "model.n")`."""

    @staticmethod
    def link_optimizers_and_lr_schedulers(parser: LightningArgumentParser) -> None:
        """Link the optimizers and lr schedulers that were added with a `link_to`."""
        parser.link_slots()

    # ---------------------------------------------------------------- parsing
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line, or what was given in its place, into `self.config`."""
        if args is not None and len(sys.argv) > 1:
            warn(
                f"LightningCLI got args={args!r} and a command line {sys.argv[1:]}, which it does not read then. "
                "Leave one of the two out."
            )
        if isinstance(args, (dict, jsonargparse.Namespace)):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(args)

    def _take_hparams_of_checkpoint(self) -> None:
        """Make the model as the checkpoint of `--ckpt_path` knows it: its hyperparameters win over the config's."""
        subcommand = self.config.get("subcommand")
        path = self.config[subcommand].get("ckpt_path") if subcommand else None
        if not path or not os.path.isfile(path):
            return
        hparams = dict(without_hidden(store.load(path).get("hyper_parameters") or {}))
        hparams.pop("_instantiator", None)
        if not hparams:
            return
        if "_class_path" in hparams:
            class_path = hparams.pop("_class_path")
            cls = imported_subclass(class_path, module_type(self.model_class or Module))
            code_names.check(cls, hparams)
            hparams = {"class_path": class_path, "dict_kwargs": hparams}
        else:
            code_names.check(self.model_class or Module, hparams)
        try:
            self.config = self.parser.parse_object({subcommand: {"model": hparams}}, self.config)
        except SystemExit:
            sys.stderr.write(f"The hyperparameters in {path} are not arguments of this model.\n")
            raise

    def _seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if seed is False or seed is None:
            return
        chosen = seed_everything(workers=True) if seed is True else seed_everything(seed, workers=True)
        self._own(self.config)["seed_everything"] = chosen

    def _own(self, config: Any) -> Any:
        """Return the part of a config that belongs to the subcommand; all of it when there is none."""
        return config[self.subcommand] if self.subcommand is not None else config

    def _get(self, config: Any, key: str, default: Any = None) -> Any:
        return self._own(config).get(key, default)

    def _parser(self, subcommand: str | None) -> LightningArgumentParser:
        return self.parser if subcommand is None else self._parsers[subcommand]

    # ---------------------------------------------------------------- making the objects
    def before_instantiate_classes(self) -> None:
        """Override it to do something before anything is made."""

    def instantiate_classes(self) -> None:
        """Make the data, the model and the Trainer; `self.config_init` is the config with the objects in it."""
        makers = []
        if self.load_from_checkpoint_support:
            for key, given, subclasses in (
                ("model", self.model_class or Module, self.subclass_mode_model),
                ("data", self.datamodule_class or DataModule, self.subclass_mode_data),
            ):
                makers.append((self._maker(key), module_type(given), subclasses))
        self.config_init = self.parser.instantiate(self.config, instantiators=makers)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self._give_optimizers(self.subcommand)
        self.trainer = self.instantiate_trainer()

    def after_instantiate_classes(self) -> None:
        """Override it to do something when everything is made."""

    def _maker(self, key: str) -> Callable[..., Any]:
        """Return what makes the model or the data, so that `save_hyperparameters` keeps what the config says of it."""
        config: dict[str, Any] = {}

        def make(cls: type[Any], *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
            if not config:  # dumped once, when the links are applied
                with warnings.catch_warnings():  # a tuple that comes back as a list is one again for its argument
                    warnings.simplefilter("ignore", UserWarning)
                    text = self.parser.dump(
                        self.config, skip_link_targets=False, skip_unset=False, skip_validation=True, format="yaml"
                    )
                config.update(self._own(yaml.safe_load(text)))
            given = dict(config.get(key) or {})
            if "class_path" in given:
                given = {
                    "_class_path": given["class_path"],
                    **(given.get("init_args") or {}),
                    **(given.get("dict_kwargs") or {}),
                }
            for target, value in applied_instantiation_links.items():
                root, _, rest = target.partition(".")
                if root == key and rest:
                    _set_nested(given, rest.removeprefix("init_args.").split("."), value)
            given["_instantiator"] = f"{__name__}.{instantiate_module.__name__}"
            with given_hyperparameters(cls, given):
                return cls(*args, **kwargs)

        return make

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the Trainer of the config.

        Args:
            kwargs: arguments that win over the config's.
        """
        forced = [self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys]
        settings = {**(self._get(self.config_init, "trainer") or {}), **kwargs}
        if "callbacks" not in settings:
            warn(
                f"{getattr(self.trainer_class, '__qualname__', self.trainer_class)} has no argument 'callbacks', so "
                "the CLI's callbacks are left out."
            )
            return self.trainer_class(**settings)
        always = self.trainer_defaults.get("callbacks", [])
        callbacks = [*_listed(settings["callbacks"]), *forced, *_listed(always)]
        if self.save_config_callback and not settings.get("fast_dev_run"):
            callbacks.append(
                self.save_config_callback(
                    self._parser(self.subcommand), self._own(self.config), **self.save_config_kwargs
                )
            )
        return self.trainer_class(**{**settings, "callbacks": callbacks})

    @staticmethod
    def configure_optimizers(
        lightning_module: Module, optimizer: Optimizer, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        """Return what the module's `configure_optimizers` returns; override it for another form.

        Args:
            lightning_module: the model.
            optimizer: the config's optimizer.
            lr_scheduler: the config's lr scheduler, if it has one.
        """
        if lr_scheduler is None:
            return optimizer
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": lr_scheduler, "monitor": lr_scheduler.monitor},
            }
        return [optimizer], [lr_scheduler]

    def _give_optimizers(self, subcommand: str | None) -> None:
        """Put the config's optimizer and lr scheduler into the module's `configure_optimizers`."""
        if not self.auto_configure_optimizers:
            return
        parser = self._parser(subcommand)
        optimizers, schedulers = parser.automatic(parser.optimizers), parser.automatic(parser.lr_schedulers)
        if not optimizers:
            return
        if len(optimizers) > 1 or len(schedulers) > 1:
            raise MisconfigurationException(
                "the CLI can put one optimizer and one lr scheduler into configure_optimizers. Received: "
                f"{', '.join(optimizers + schedulers)}. Give them a link_to, and write configure_optimizers."
            )
        optimizer_spec = self._spec(parser.optimizers, optimizers[0])
        if not optimizer_spec:
            return
        scheduler_spec = self._spec(parser.lr_schedulers, schedulers[0]) if schedulers else None
        if is_overridden(self.model, "configure_optimizers"):
            warn(
                f"{type(self.model).__name__}.configure_optimizers is not called: the config's optimizer wins. "
                "Remove one of the two."
            )
        optimizer = instantiate_class(self.model.parameters(), optimizer_spec)
        scheduler = instantiate_class(optimizer, scheduler_spec) if scheduler_spec else None
        method = functools.partial(self.configure_optimizers, optimizer=optimizer, lr_scheduler=scheduler)
        functools.update_wrapper(method, self.configure_optimizers)
        self.model.configure_optimizers = MethodType(method, self.model)

    def _spec(self, slots: dict[str, Any], key: str) -> Any:
        given = self._get(self.config_init, key)
        cls = slots[key][0]
        return given if isinstance(cls, tuple) else class_spec(cls, given)

    # ---------------------------------------------------------------- running
    def _run_subcommand(self, subcommand: str) -> None:
        """Call `before_NAME`, NAME (the CLI's own method, else the Trainer's) and `after_NAME`."""
        run = getattr(self, subcommand, None) or getattr(self.trainer, subcommand)
        before, after = (getattr(self, f"{when}_{subcommand}", None) for when in ("before", "after"))
        if callable(before):
            before()
        settings = self._own(self.config_init)
        arguments = {name: settings[name] for name in self._method_arguments[subcommand] if name in settings}
        arguments["model"] = self.model
        if self.datamodule is not None:
            arguments["datamodule"] = self.datamodule
        run(**arguments)
        if callable(after):
            after()


def instantiate_class(args: Any, init: dict[str, Any]) -> Any:
    """Make an object of a class that a config names.

    Args:
        args: what comes before the config's arguments: one value, or a tuple of them.
        init: "class_path" and "init_args".
    """
    module, _, name = init["class_path"].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    return cls(*(args if isinstance(args, tuple) else (args,)), **(init.get("init_args") or {}))


def _listed(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _set_nested(target: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        target = target.setdefault(key, {})
    target[keys[-1]] = value
