"""WandbLogger: hand everything to Weights & Biases."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from trainkit.errors import MisconfigurationException, warn
from trainkit.loggers.artifacts import Uploads
from trainkit.loggers.base import Logger, as_mapping, check_metrics, plain, rank_zero_experiment, require
from trainkit.rank_zero import rank_zero_only

if TYPE_CHECKING:
    from torch import nn


class WandbLogger(Logger):
    """Log to Weights & Biases (`pip install wandb`): metrics, hyper-parameters, tables, media and checkpoints.

    The run is begun when it is first needed, and stays open after a fit, for the next one; `wandb.finish()` closes it.
    Its charts have the x axis "trainer/global_step".

    Args:
        name: what the run is called; None lets wandb choose.
        save_dir: where wandb puts its files; made if it is not there.
        version: the run's id; that of an earlier run goes on with it.
        offline: write to `save_dir` only; `wandb sync` uploads it later.
        dir: another name for `save_dir`, which goes first.
        id: another name for `version`, which goes first.
        anonymous: kept for Lightning's signature; handed on when it is given.
        project: the project the run belongs to; by default $WANDB_PROJECT, else "lightning_logs".
        log_model: upload checkpoints. True: at the end of a fit, or as they come with `save_top_k=-1`; "all": as they
            come.
        experiment: a run of your own, from `wandb.init`.
        prefix: put before every metric's name, with a dash between.
        checkpoint_name: what the uploaded checkpoints are called; by default "model-<id>".
        add_file_policy: "mutable" copies a checkpoint before it is uploaded; "immutable" trusts that it stays.
        kwargs: for `wandb.init`: entity, group, tags, ...

    Raises:
        ModuleNotFoundError: wandb is not installed.
        MisconfigurationException: `log_model` with `offline`, which can't upload.

    Example:
        >>> from trainkit import Trainer
        >>> trainer = Trainer(logger=WandbLogger(project="digits", offline=True))  # doctest: +SKIP
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        name: str | None = None,
        save_dir: str | os.PathLike[str] | None = ".",
        version: str | None = None,
        offline: bool = False,
        dir: str | os.PathLike[str] | None = None,
        id: str | None = None,
        anonymous: bool | None = None,
        project: str | None = None,
        log_model: Literal["all"] | bool = False,
        experiment: Any = None,
        prefix: str = "",
        checkpoint_name: str | None = None,
        add_file_policy: Literal["mutable", "immutable"] = "mutable",
        **kwargs: Any,
    ) -> None:
        require("wandb", "WandbLogger")
        if offline and log_model:
            raise MisconfigurationException(
                f"WandbLogger(log_model={log_model!r}, offline=True) can't work: checkpoints are uploaded, for which a "
                "run must be online. Leave one of the two out."
            )
        where = save_dir if save_dir is not None else dir
        self._init: dict[str, Any] = {
            "name": name,
            "project": project or os.environ.get("WANDB_PROJECT", "lightning_logs"),
            "dir": None if where is None else os.fspath(where),
            "id": version or id,
            "resume": "allow",
            **({"mode": "offline"} if offline else {}),
            **({"anonymous": "allow"} if anonymous else {}),
            **kwargs,
        }
        self._id: str | None = self._init["id"]
        self._experiment = experiment
        self._prefix = f"{prefix}{self.LOGGER_JOIN_CHAR}" if prefix else ""
        self._uploads = Uploads(log_model)
        self._checkpoint_name = checkpoint_name
        self.add_file_policy = add_file_policy

    @property
    def name(self) -> str | None:
        """The project. The run's own name is `experiment.name`."""
        return self._init["project"]  # type: ignore[no-any-return]

    @property
    def version(self) -> str | None:
        """The run's id; None before the run is begun, unless one was given."""
        return self._id if self._experiment is None else self._experiment.id

    @property
    def save_dir(self) -> str | None:
        """Where wandb puts its files."""
        return self._init["dir"]  # type: ignore[no-any-return]

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `wandb` run, for everything else wandb can do; begun when it is first asked for."""
        if self._experiment is None:
            import wandb

            if wandb.run is None:
                if self.save_dir is not None:
                    os.makedirs(self.save_dir, exist_ok=True)  # else wandb takes a temporary directory
                self._experiment = wandb.init(**self._init)
                self._define_axis(self._experiment)
            else:
                self._experiment = wandb.run
                if wandb.run.id != self._id:
                    warn(
                        f"a wandb run is open already ({wandb.run.id}), and WandbLogger goes on with it. Call "
                        "wandb.finish() before to begin a new one."
                    )
            self._id = self._init["id"] = self._experiment.id
        return self._experiment

    def _define_axis(self, run: Any) -> None:
        if self._init.get("sync_tensorboard"):
            run.define_metric("*", step_metric="global_step")
        else:
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record values, which may be anything that wandb can log, at x value `step`."""
        check_metrics(metrics)
        row = {self._prefix + name: value for name, value in metrics.items()}
        if step is not None and not self._init.get("sync_tensorboard"):
            row["trainer/global_step"] = step
        if row:
            self.experiment.log(row)

    @rank_zero_only
    def log_hyperparams(
        self, params: Mapping[str, Any] | Namespace | None = None, metrics: Mapping[str, float] | float | None = None
    ) -> None:
        """Record what the run was made with in its config; what wandb can't store becomes a string."""
        self.experiment.config.update(plain(as_mapping(params)), allow_val_change=True)

    def watch(
        self, model: nn.Module, log: str | None = "gradients", log_freq: int = 100, log_graph: bool = True
    ) -> None:
        """Record histograms of gradients, "parameters" or "all" every `log_freq` batches; see `wandb.watch`."""
        self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph)

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[Any] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Record a table, of anything that wandb can show in a cell: `columns` and rows (`data`), or a `dataframe`."""
        import wandb

        self.log_metrics({key: wandb.Table(columns=columns, data=data, dataframe=dataframe)}, step)

    @rank_zero_only
    def log_text(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[str]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Record text as a table; arguments as for `log_table`."""
        self.log_table(key, columns, data, dataframe, step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: list[Any]) -> None:
        """Record images: tensors, arrays, PIL images or paths. Keywords (`caption`) are lists, one value an image."""
        self._log_media("Image", key, "images", images, step, kwargs)

    @rank_zero_only
    def log_audio(self, key: str, audios: list[Any], step: int | None = None, **kwargs: list[Any]) -> None:
        """Record sounds: arrays or paths. Keywords (`sample_rate`, `caption`) are lists, one value a sound."""
        self._log_media("Audio", key, "audios", audios, step, kwargs)

    @rank_zero_only
    def log_video(self, key: str, videos: list[Any], step: int | None = None, **kwargs: list[Any]) -> None:
        """Record videos: arrays or paths. Keywords (`fps`, `format`, `caption`) are lists, one value a video."""
        self._log_media("Video", key, "videos", videos, step, kwargs)

    def _log_media(
        self, kind: str, key: str, argument: str, items: Any, step: int | None, options: dict[str, list[Any]]
    ) -> None:
        if not isinstance(items, list):
            raise TypeError(f"{argument} must be a list. Received: {type(items).__name__}. Put one alone in brackets.")
        for name, values in options.items():
            if len(values) != len(items):
                raise ValueError(f"{name} must have one value for each of the {len(items)} {argument}, not {values!r}.")
        import wandb

        make = getattr(wandb, kind)
        each = [{name: values[index] for name, values in options.items()} for index in range(len(items))]
        self.log_metrics({key: [make(item, **given) for item, given in zip(items, each, strict=True)]}, step)

    def use_artifact(self, artifact: str, artifact_type: str | None = None) -> Any:
        """Record that the run uses an artifact, and return it."""
        return self.experiment.use_artifact(artifact, type=artifact_type)

    @staticmethod
    @rank_zero_only
    def download_artifact(
        artifact: str,
        save_dir: str | os.PathLike[str] | None = None,
        artifact_type: str | None = None,
        use_artifact: bool | None = True,
    ) -> str:
        """Download an artifact and return its directory.

        Args:
            artifact: its path, as "entity/project/name:alias".
            save_dir: where to; by default wandb's own place for artifacts.
            artifact_type: its type, "model" for checkpoints.
            use_artifact: record that the open run uses it.
        """
        import wandb

        if wandb.run is not None and use_artifact:
            found = wandb.run.use_artifact(artifact)
        else:
            found = wandb.Api().artifact(artifact, type=artifact_type)
        return found.download(root=None if save_dir is None else os.fspath(save_dir))

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Upload what a checkpoint callback has saved, if `log_model` says so."""
        self._upload(self._uploads.after_save(checkpoint_callback))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Upload the checkpoints of a run that went well; the run stays open."""
        if status == "success" and self._experiment is not None:
            self._upload(self._uploads.at_end())

    def _upload(self, artifacts: list[Any]) -> None:
        for found in artifacts:
            import wandb

            self._checkpoint_name = self._checkpoint_name or f"model-{self.experiment.id}"
            artifact = wandb.Artifact(name=self._checkpoint_name, type="model", metadata=found.metadata)
            artifact.add_file(found.path, name="model.ckpt", policy=self.add_file_policy)
            self.experiment.log_artifact(artifact, aliases=found.aliases)
            self._uploads.uploaded[found.path] = found.time

    def __getstate__(self) -> dict[str, Any]:
        # A copy goes on with the same run: in this process with the open one, in another by its id.
        return self.__dict__ | {"_experiment": None, "_id": self.version, "_init": {**self._init, "id": self.version}}
