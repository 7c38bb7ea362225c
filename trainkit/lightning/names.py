"""Which of Lightning's modules has which names, and where trainkit has them; and the importer that makes it true."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from trainkit.errors import nearest

ROOT = "trainkit.lightning"

SURFACE = {
    "trainkit.callback": "Callback",
    "trainkit.datamodule": "LightningDataModule=DataModule",
    "trainkit.module": "LightningModule=Module",
    "trainkit.random": "seed_everything",
    "trainkit.trainer": "Trainer",
}
RANK_ZERO = {
    "trainkit.rank_zero": "LightningDeprecationWarning WarningCache rank_prefixed_message rank_zero_debug "
    "rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn"
}
WARNINGS = {"trainkit.lightning.helpers": "PossibleUserWarning disable_possible_user_warnings"}
MOVING = {"trainkit.moving": "move_data_to_device"}
ATTRIBUTE_DICT = {"trainkit.hparams": "AttributeDict"}
THROUGHPUT = {"trainkit.throughput": "Throughput measure_flops", "trainkit.flops": "get_available_flops"}
UTILITIES = {
    **RANK_ZERO,
    **MOVING,
    **ATTRIBUTE_DICT,
    **THROUGHPUT,
    "trainkit.lightning.helpers": "LightningEnum PossibleUserWarning disable_possible_user_warnings",
    "trainkit.data.workers": "suggested_max_num_workers",
}
EXCEPTIONS = {"trainkit.errors": "MisconfigurationException"}
ACCELERATORS = {
    "trainkit.accelerators": "Accelerator CPUAccelerator CUDAAccelerator MPSAccelerator find_usable_cuda_devices"
}
SUMMARY = {"trainkit.summary": "LayerSummary ModelSummary get_human_readable_count summarize"}
PRECISIONS = {"trainkit.precision": "Precision MixedPrecision HalfPrecision DoublePrecision"}
CHECKPOINT_IO = {"trainkit.checkpoint.io": "CheckpointIO TorchCheckpointIO=CheckpointIO"}
DEMOS = {"trainkit.lightning.demos": "*"}

MODULES: dict[str, str | dict[str, str]] = {
    "": {**SURFACE, "trainkit.lightning.checkpoints": "LightningCheckpointIO load_checkpoint"},
    "pytorch": {**SURFACE, **WARNINGS, "trainkit.lightning": "__version__"},
    "pytorch.accelerators": ACCELERATORS,
    "pytorch.accelerators.accelerator": ACCELERATORS,
    "pytorch.accelerators.cpu": ACCELERATORS,
    "pytorch.accelerators.cuda": ACCELERATORS,
    "pytorch.accelerators.mps": ACCELERATORS,
    "pytorch.callbacks": {"trainkit.callbacks": "*"},
    "pytorch.callbacks.batch_size_finder": "trainkit.callbacks.batch_size_finder",
    "pytorch.callbacks.callback": "trainkit.callback",
    "pytorch.callbacks.checkpoint": "trainkit.callbacks.checkpoint",
    "pytorch.callbacks.device_stats_monitor": "trainkit.callbacks.device_stats_monitor",
    "pytorch.callbacks.early_stopping": "trainkit.callbacks.early_stopping",
    "pytorch.callbacks.finetuning": "trainkit.callbacks.finetuning",
    "pytorch.callbacks.gradient_accumulation_scheduler": "trainkit.callbacks.gradient_accumulation_scheduler",
    "pytorch.callbacks.lambda_function": "trainkit.callbacks.lambda_function",
    "pytorch.callbacks.lr_finder": "trainkit.callbacks.lr_finder",
    "pytorch.callbacks.lr_monitor": "trainkit.callbacks.lr_monitor",
    "pytorch.callbacks.model_checkpoint": "trainkit.callbacks.checkpoint",
    "pytorch.callbacks.model_summary": {"trainkit.callbacks": "ModelSummary"},
    "pytorch.callbacks.on_exception_checkpoint": "trainkit.callbacks.on_exception_checkpoint",
    "pytorch.callbacks.prediction_writer": "trainkit.callbacks.prediction_writer",
    "pytorch.callbacks.progress": {"trainkit.callbacks": "ProgressBar RichProgressBar TQDMProgressBar"},
    "pytorch.callbacks.progress.progress_bar": "trainkit.callbacks.progress_bar",
    "pytorch.callbacks.progress.rich_progress": {"trainkit.callbacks": "RichProgressBar RichProgressBarTheme"},
    "pytorch.callbacks.progress.tqdm_progress": "trainkit.callbacks.tqdm_progress",
    "pytorch.callbacks.pruning": "trainkit.callbacks.pruning",
    "pytorch.callbacks.rich_model_summary": {"trainkit.callbacks": "RichModelSummary"},
    "pytorch.callbacks.spike": "trainkit.callbacks.spike",
    "pytorch.callbacks.stochastic_weight_avg": "trainkit.callbacks.stochastic_weight_avg",
    "pytorch.callbacks.throughput_monitor": "trainkit.callbacks.throughput_monitor",
    "pytorch.callbacks.timer": {"trainkit.callbacks": "Timer", "trainkit.lightning.helpers": "Interval"},
    "pytorch.callbacks.weight_averaging": "trainkit.callbacks.weight_averaging",
    "pytorch.cli": "trainkit.lightning.cli",
    "pytorch.core": {**SURFACE, "trainkit.update": "LightningOptimizer=StepOptimizer"},
    "pytorch.core.datamodule": SURFACE,
    "pytorch.core.hooks": {"trainkit.data_hooks": "DataHooks"},
    "pytorch.core.mixins": {"trainkit.hparams": "HyperparametersMixin=HyperParameters"},
    "pytorch.core.mixins.hparams_mixin": {"trainkit.hparams": "HyperparametersMixin=HyperParameters"},
    "pytorch.core.module": SURFACE,
    "pytorch.core.optimizer": {"trainkit.update": "LightningOptimizer=StepOptimizer"},
    "pytorch.core.saving": {
        "trainkit.checkpoint.hparams_files": "load_hparams_from_tags_csv load_hparams_from_yaml "
        "save_hparams_to_tags_csv save_hparams_to_yaml"
    },
    "pytorch.demos": DEMOS,
    "pytorch.demos.boring_classes": "trainkit.lightning.demos",
    "pytorch.loggers": {"trainkit.loggers": "*"},
    "pytorch.loggers.csv_logs": "trainkit.loggers.csv",
    "pytorch.loggers.logger": {
        "trainkit.loggers.base": "DummyExperiment=Silence DummyLogger Logger rank_zero_experiment"
    },
    "pytorch.loggers.mlflow": "trainkit.loggers.mlflow",
    "pytorch.loggers.tensorboard": "trainkit.loggers.tensorboard",
    "pytorch.loggers.wandb": "trainkit.loggers.wandb",
    "pytorch.loops": {
        "trainkit.loops": "_FitLoop=FitLoop _EvaluationLoop=EvaluationLoop _PredictionLoop=PredictionLoop"
    },
    "pytorch.overrides": {},
    "pytorch.overrides.distributed": {
        "trainkit.data.distributed": "UnrepeatedDistributedSampler UnrepeatedDistributedSamplerWrapper"
    },
    "pytorch.plugins": {**PRECISIONS, **CHECKPOINT_IO},
    "pytorch.plugins.io": {**CHECKPOINT_IO},
    "pytorch.plugins.precision": PRECISIONS,
    "pytorch.plugins.precision.amp": PRECISIONS,
    "pytorch.plugins.precision.double": PRECISIONS,
    "pytorch.plugins.precision.half": PRECISIONS,
    "pytorch.plugins.precision.precision": PRECISIONS,
    "pytorch.profilers": {"trainkit.profiler": "*"},
    "pytorch.profilers.advanced": "trainkit.profiler.advanced",
    "pytorch.profilers.base": {"trainkit.profiler": "PassThroughProfiler"},
    "pytorch.profilers.profiler": {"trainkit.profiler": "Profiler"},
    "pytorch.profilers.pytorch": "trainkit.profiler.pytorch",
    "pytorch.profilers.simple": "trainkit.profiler.simple",
    "pytorch.strategies": {"trainkit.strategies": "*"},
    "pytorch.strategies.fsdp": {"trainkit.strategies": "FSDPStrategy"},
    "pytorch.strategies.model_parallel": {"trainkit.strategies": "ModelParallelStrategy"},
    "pytorch.strategies.single_device": {"trainkit.strategies": "SingleDeviceStrategy"},
    "pytorch.strategies.strategy": {"trainkit.strategies": "Strategy"},
    "pytorch.trainer": SURFACE,
    "pytorch.trainer.states": "trainkit.stages",
    "pytorch.trainer.trainer": SURFACE,
    "pytorch.tuner": {"trainkit.tune": "Tuner"},
    "pytorch.tuner.lr_finder": {"trainkit.lr_range": "_LRFinder=LRFinder"},
    "pytorch.tuner.tuning": {"trainkit.tune": "Tuner"},
    "pytorch.utilities": {
        **UTILITIES,
        "trainkit.data.combined": "CombinedLoader",
        "trainkit.gradients": "grad_norm",
        "trainkit.lightning.helpers": "GradClipAlgorithmType LightningEnum PossibleUserWarning "
        "disable_possible_user_warnings is_picklable",
        "trainkit.shared_parameters": "find_shared_parameters set_shared_parameters",
    },
    "pytorch.utilities.combined_loader": {"trainkit.data.combined": "CombinedLoader"},
    "pytorch.utilities.data": {
        "trainkit.lightning.helpers": "extract_batch_size has_iterable_dataset has_len sized_len"
    },
    "pytorch.utilities.enums": {"trainkit.lightning.helpers": "GradClipAlgorithmType LightningEnum"},
    "pytorch.utilities.exceptions": {**EXCEPTIONS, "trainkit.signals": "SIGTERMException"},
    "pytorch.utilities.grads": {"trainkit.gradients": "grad_norm"},
    "pytorch.utilities.memory": {
        "trainkit.memory": "garbage_collection_cuda get_model_size_mb is_cuda_out_of_memory is_cudnn_snafu "
        "is_oom_error is_out_of_cpu_memory",
        "trainkit.moving": "recursive_detach",
    },
    "pytorch.utilities.model_helpers": {
        "trainkit.overrides": "is_overridden",
        "trainkit.lightning.helpers": "get_torchvision_model",
    },
    "pytorch.utilities.model_summary": SUMMARY,
    "pytorch.utilities.model_summary.model_summary": SUMMARY,
    "pytorch.utilities.parameter_tying": "trainkit.shared_parameters",
    "pytorch.utilities.parsing": {
        **ATTRIBUTE_DICT,
        "trainkit.attributes": "lightning_hasattr=has_attribute lightning_getattr=get_attribute "
        "lightning_setattr=set_attribute",
        "trainkit.lightning.helpers": "clean_namespace is_picklable",
    },
    "pytorch.utilities.rank_zero": RANK_ZERO,
    "pytorch.utilities.seed": {"trainkit.random": "isolate_rng=isolated_random"},
    "pytorch.utilities.types": "trainkit.lightning.types",
    "pytorch.utilities.warnings": WARNINGS,
    "fabric": {"trainkit.random": "seed_everything", **WARNINGS},
    "fabric.accelerators": ACCELERATORS,
    "fabric.accelerators.accelerator": ACCELERATORS,
    "fabric.accelerators.cpu": ACCELERATORS,
    "fabric.accelerators.cuda": ACCELERATORS,
    "fabric.accelerators.mps": ACCELERATORS,
    "fabric.loggers": {"trainkit.loggers": "CSVLogger Logger TensorBoardLogger"},
    "fabric.loggers.csv_logs": {"trainkit.loggers": "CSVLogger"},
    "fabric.loggers.logger": {"trainkit.loggers": "Logger rank_zero_experiment"},
    "fabric.loggers.tensorboard": {"trainkit.loggers": "TensorBoardLogger"},
    "fabric.plugins": {**PRECISIONS, **CHECKPOINT_IO},
    "fabric.plugins.io": CHECKPOINT_IO,
    "fabric.plugins.precision": PRECISIONS,
    "fabric.utilities": UTILITIES,
    "fabric.utilities.apply_func": MOVING,
    "fabric.utilities.data": {
        **ATTRIBUTE_DICT,
        "trainkit.data.workers": "suggested_max_num_workers",
        "trainkit.lightning.helpers": "has_iterable_dataset has_len sized_len",
    },
    "fabric.utilities.distributed": {"trainkit.data.distributed": "DistributedSamplerWrapper"},
    "fabric.utilities.enums": {"trainkit.lightning.helpers": "LightningEnum"},
    "fabric.utilities.exceptions": EXCEPTIONS,
    "fabric.utilities.rank_zero": RANK_ZERO,
    "fabric.utilities.seed": {
        "trainkit.random": "seed_everything",
        "trainkit.lightning.helpers": "pl_worker_init_function reset_seed",
    },
    "fabric.utilities.throughput": THROUGHPUT,
    "fabric.utilities.types": "trainkit.lightning.types",
    "fabric.utilities.warnings": WARNINGS,
}
"""Lightning's module -> trainkit's module that has the same names; or trainkit's modules -> their names.

`Theirs=Ours` is a name that differs here; `*` is everything public.
"""


def find(module: str, name: str) -> Any:
    """Return what a name means in one of Lightning's modules.

    Raises:
        AttributeError: trainkit has nothing of that name there.
    """
    path = f"{module}.{name}" if module else name
    table = MODULES[module]
    assert isinstance(table, dict), "a module that is trainkit's own has its names itself"
    for home, words in table.items():
        for word in words.split():
            theirs, _, ours = word.partition("=")
            if theirs == name or (word == "*" and name in _public(home)):
                return getattr(import_module(home), ours or name)
    if path in MODULES:
        return import_module(f"{ROOT}.{path}")
    raise AttributeError(f"trainkit has no {name!r} in {f'{ROOT}.{module}'.strip('.')}; {nearest(name, known(module))}")


def known(module: str) -> list[str]:
    """Return the names of one of Lightning's modules that there are here, its submodules' included."""
    found = {path[len(module) :].strip(".").partition(".")[0] for path in MODULES if path.startswith(module)}
    table = MODULES[module]
    assert isinstance(table, dict), "a module that is trainkit's own has its names itself"
    for home, words in table.items():
        for word in words.split():
            found.update(_public(home) if word == "*" else [word.partition("=")[0]])
    return sorted(found - {""})


def _public(home: str) -> Sequence[str]:
    module = import_module(home)
    return getattr(module, "__all__", None) or [name for name in dir(module) if not name.startswith("_")]


class Finder(MetaPathFinder, Loader):
    """Import the modules of the table."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        top, _, name = fullname.partition(f"{ROOT}.")
        if top or name not in MODULES:
            return None
        return ModuleSpec(fullname, self, is_package=any(other.startswith(f"{name}.") for other in MODULES))

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.removeprefix(f"{ROOT}.")
        target = MODULES[name]
        if isinstance(target, str):
            sys.modules[module.__name__] = import_module(target)
            return

        def get(attribute: str) -> Any:
            if attribute == "__all__":
                return [word for word in known(name) if f"{name}.{word}" not in MODULES]
            if attribute.startswith("__") and attribute != "__version__":
                raise AttributeError(attribute)
            value = find(name, attribute)
            setattr(module, attribute, value)
            return value

        vars(module).update(__getattr__=get, __dir__=lambda: known(name), __doc__=f"lightning.{name}, in trainkit.")
