"""The jsonargparse parser of a command: the only place that says which keys there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jsonargparse
import yaml
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainkit import DataModule, Module, Trainer
from trainkit.config.document import meaning
from trainkit.config.problems import ConfigError, Place, Problem

SCHEDULE_KEYS = ("interval", "frequency", "monitor")
"""What may stand beside the class_path of an lr_scheduler: when it moves and what it watches."""

LEFT_OUT = {"optimizer": {"params"}, "lr_scheduler": {"optimizer"}}
"""Arguments that a slot's class is given by trainkit, not by the config."""

DATA_ARGUMENTS = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
"""Arguments of the Trainer's methods that `model` and `data` stand for."""


def make_parser(command: str) -> jsonargparse.ArgumentParser:
    """Return the parser of one command: fit, validate, test or predict."""
    import trainkit.callbacks
    import trainkit.loggers  # noqa: F401  their classes get short names by being imported

    jsonargparse.set_loader("trainkit", _load, (yaml.YAMLError,))
    parser = jsonargparse.ArgumentParser(
        prog=f"trainkit {command}",
        parser_mode="trainkit",
        exit_on_error=False,
        allow_abbrev=False,
        add_help=False,
        print_config=None,
        default_env=False,
    )
    parser.add_argument("-c", "--config", action="config")
    parser.add_argument("--seed_everything", type=bool | int, default=True)
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True)
    parser.add_subclass_arguments(Module, "model", fail_untyped=False, required=False)
    parser.add_subclass_arguments(DataModule, "data", fail_untyped=False, required=False)
    for key, base in (("optimizer", Optimizer), ("lr_scheduler", LRScheduler)):
        parser.add_subclass_arguments(
            base, key, skip=LEFT_OUT[key], fail_untyped=False, required=False, instantiate=False
        )
    parser.add_argument("--lr_scheduler_interval", type=Literal["epoch", "step"] | None)
    parser.add_argument("--lr_scheduler_frequency", type=int | None)
    parser.add_argument("--lr_scheduler_monitor", type=str | None)
    if command == "predict":
        parser.add_argument("--output", type=str | None)
    parser.add_method_arguments(Trainer, command, skip=DATA_ARGUMENTS, fail_untyped=False)
    return parser


TORCHS = {"ReduceLROnPlateau": "torch.optim.lr_scheduler.ReduceLROnPlateau"}
"""Short names that mean torch's class here; a program that has imported LightningCLI knows another of the same name."""


def parse(parser: jsonargparse.ArgumentParser, files: Sequence[str], options: Sequence[tuple[str, str]]) -> Any:
    """Return the config of some files, merged in order, and of the options, which win.

    Raises:
        jsonargparse.ArgumentError: something in them is wrong; `explain` says what and where.
    """
    arguments = [f"--config={file}" for file in files]
    for name, value in options:
        root, _, rest = name.partition(".")
        if root == "lr_scheduler" and rest in SCHEDULE_KEYS:
            name = f"{root}_{rest}"
        if name in ("lr_scheduler", "lr_scheduler.class_path"):
            value = TORCHS.get(value, value)
        if rest.endswith("init_args") and meaning(value) is None:  # no arguments
            continue
        arguments.append(f"--{name}={value}")
    return parser.parse_args(arguments)


def resolved(parser: jsonargparse.ArgumentParser, config: Any) -> dict[str, Any]:
    """Return a config as a file has it: every argument with the value it came to."""
    text = parser.dump(config, format="yaml", skip_unset=False, skip_validation=True)
    return unlifted({key: value for key, value in yaml.safe_load(text).items() if value is not None})


def printed(parser: jsonargparse.ArgumentParser, config: Any, flags: str) -> dict[str, Any]:
    """Return a config as `--print_config` shows it.

    Args:
        flags: what stands behind `--print_config=`: "skip_default", "skip_null", both with a comma, or nothing.

    Raises:
        ConfigError: another flag.
    """
    wanted = set(filter(None, flags.split(",")))
    unknown = wanted - {"skip_default", "skip_null", "skip_unset"}
    if unknown:
        place = Place(f"command line: --print_config={flags}")
        raise ConfigError(Problem(f"no flag {min(unknown)!r}", place, hint="known: skip_default, skip_null"))
    text = parser.dump(
        config,
        format="yaml",
        skip_unset=bool(wanted & {"skip_null", "skip_unset"}),
        skip_default="skip_default" in wanted,
        skip_validation=True,
    )
    plain: dict[str, Any] = yaml.safe_load(text) or {}
    return unlifted(plain)


def unlifted(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a config whose schedule keys stand in its `lr_scheduler` again."""
    kept = {key: value for key, value in plain.items() if not key.startswith("lr_scheduler_")}
    beside = {key: plain[f"lr_scheduler_{key}"] for key in SCHEDULE_KEYS if f"lr_scheduler_{key}" in plain}
    if isinstance(kept.get("lr_scheduler"), dict):
        kept["lr_scheduler"] = {**kept["lr_scheduler"], **{k: v for k, v in beside.items() if v is not None}}
    return kept


def dump(plain: dict[str, Any]) -> str:
    """Return a config as the text of a file."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that would be read back as something else: 12e4 is a number to jsonargparse, not to YAML."""

    def string(self, value: str) -> yaml.Node:
        quoted = meaning(value) != value
        return self.represent_scalar("tag:yaml.org,2002:str", value, style="'" if quoted else None)


_Dumper.add_representer(str, _Dumper.string)


def _load(text: str) -> Any:
    """Load YAML as jsonargparse does, and put right what it takes differently than a config here means it.

    An lr_scheduler's own keys are lifted to the top level, and sections that are empty are left out.
    """
    loaded = _without_empty_sections(jsonargparse.get_loader("yaml")(text))
    scheduler = loaded.get("lr_scheduler") if isinstance(loaded, dict) else None
    if isinstance(scheduler, str):
        return {**loaded, "lr_scheduler": TORCHS.get(scheduler, scheduler)}
    if not isinstance(scheduler, dict):
        return loaded
    if isinstance(name := scheduler.get("class_path"), str):
        scheduler = {**scheduler, "class_path": TORCHS.get(name, name)}
    lifted = {f"lr_scheduler_{key}": scheduler[key] for key in SCHEDULE_KEYS if key in scheduler}
    return {**loaded, "lr_scheduler": {k: v for k, v in scheduler.items() if k not in SCHEDULE_KEYS}, **lifted}


def _without_empty_sections(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_empty_sections(item) for item in value]
    if not isinstance(value, dict):
        return value
    empty = {"init_args"} if "class_path" in value else {"trainer"} if {"model", "data"} & set(value) else set()
    return {key: _without_empty_sections(item) for key, item in value.items() if item is not None or key not in empty}
