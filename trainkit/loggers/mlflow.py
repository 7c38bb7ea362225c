"""MLFlowLogger: hand everything to MLflow."""

from __future__ import annotations

import os
import re
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from trainkit.errors import warn
from trainkit.loggers.artifacts import Uploads
from trainkit.loggers.base import (
    Logger,
    as_mapping,
    check_metrics,
    local_path,
    number,
    plain,
    rank_zero_experiment,
    require,
)
from trainkit.rank_zero import current_rank, rank_zero_only

STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
"""What MLflow calls the ends of a run."""
MOST_PARAMS = 100
"""How many parameters MLflow takes in one call."""
LONGEST_PARAM = 500
"""How many characters of a parameter's value are kept; servers before MLflow 1.28 took 250."""

OWN_ADDRESSES: set[str] = set()
"""What MLFlowLogger chose by itself: mlflow puts it into the environment, where it is not the user's wish."""


class MLFlowLogger(Logger):
    """Log to MLflow (`pip install mlflow`, or `mlflow-skinny`): metrics, hyper-parameters and checkpoints.

    The experiment and the run are made when they are first needed. Without an address everything lies in `save_dir`:
    in MLflow's files, or in a database there, `mlflow.db`, when MLflow refuses files. It does so since version 3.13,
    unless MLFLOW_ALLOW_FILE_STORE is "true". See it with `mlflow ui --backend-store-uri sqlite:///mlruns/mlflow.db`.

    Args:
        experiment_name: the experiment; made if there is none of that name.
        run_name: what the run is called; None lets MLflow choose.
        tracking_uri: the address of a server, a database or a folder; by default $MLFLOW_TRACKING_URI, else `save_dir`.
        tags: the run's tags.
        save_dir: where the runs lie if there is no `tracking_uri`.
        log_model: upload checkpoints. True: at the end of a fit, or as they come with `save_top_k=-1`; "all": as they
            come.
        prefix: put before every metric's name, with a dash between.
        artifact_location: where a new experiment's artifacts go; by default the server's choice.
        run_id: go on with this run.
        synchronous: wait for the server in each call (True), or let MLflow send in a thread (False).

    Raises:
        ModuleNotFoundError: mlflow is not installed.
        mlflow.exceptions.MlflowException: the server can't be reached, or refuses; when the run begins.

    Example:
        >>> from trainkit import Trainer
        >>> trainer = Trainer(logger=MLFlowLogger("digits", tracking_uri="sqlite:///runs.db"))  # doctest: +SKIP
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        experiment_name: str = "lightning_logs",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: dict[str, Any] | None = None,
        save_dir: str | os.PathLike[str] | None = "./mlruns",
        log_model: Literal["all"] | bool = False,
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
        synchronous: bool | None = None,
    ) -> None:
        require("mlflow", "MLFlowLogger")
        self._experiment_name = experiment_name
        self._experiment_id: str | None = None
        self._run_name = run_name
        self._run_id = run_id
        environment = os.environ.get("MLFLOW_TRACKING_URI")
        self._tracking_uri = tracking_uri or (environment if environment not in OWN_ADDRESSES else None) or None
        self._save_dir = "./mlruns" if save_dir is None else os.fspath(save_dir)
        self.tags = tags
        self._uploads = Uploads(log_model)
        self._prefix = f"{prefix}{self.LOGGER_JOIN_CHAR}" if prefix else ""
        self._artifact_location = artifact_location
        self._batch_options = {} if synchronous is None else {"synchronous": synchronous}
        self._last_step: int | None = None
        self._client: Any = None

    @property
    def save_dir(self) -> str | None:
        """The folder the runs lie in; None if they lie on a server or in a database of yours."""
        if self._tracking_uri is None:
            return self._save_dir
        if not self._tracking_uri.startswith("file:"):
            return None
        return local_path(self._tracking_uri) if "://" in self._tracking_uri else self._tracking_uri[len("file:") :]

    @property
    def name(self) -> str | None:
        """The experiment's id."""
        return self.experiment_id

    @property
    def version(self) -> str | None:
        """The run's id."""
        return self.run_id

    @property
    def experiment_id(self) -> str | None:
        """The experiment's id; asking for it makes the experiment."""
        _ = self.experiment
        return self._experiment_id

    @property
    def run_id(self) -> str | None:
        """The run's id; asking for it begins the run."""
        _ = self.experiment
        return self._run_id

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `MlflowClient`, for everything else MLflow can do; the run is begun when it is first asked for."""
        if self._client is None:
            client, location = self._connect()
            if self._run_id is not None:
                self._experiment_id = client.get_run(self._run_id).info.experiment_id
            else:
                self._experiment_id = self._find_experiment(client, location)
                self._run_id = self._begin_run(client)
            self._client = client
        return self._client

    def _connect(self) -> tuple[Any, str | None]:
        """Return the client, and where a new experiment's artifacts go."""
        import mlflow
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        uri, location = self._tracking_uri, self._artifact_location
        if uri is None:
            folder = Path(self._save_dir).resolve()
            uri = f"file:{self._save_dir}"
            try:
                client = MlflowClient(uri)
                client.search_experiments(max_results=1)
            except MlflowException:  # this version keeps runs in databases only
                folder.mkdir(parents=True, exist_ok=True)
                uri = f"sqlite:///{folder / 'mlflow.db'}"
                try:
                    client = MlflowClient(uri)
                    client.search_experiments(max_results=1)
                except (MlflowException, ImportError, KeyError) as error:  # mlflow-skinny has no database
                    raise RuntimeError(
                        f"MLFlowLogger can't keep its runs in {uri}: {error}. Install what a database needs (pip "
                        "install sqlalchemy alembic), or let it write files: MLFLOW_ALLOW_FILE_STORE=true."
                    ) from error
                location = location or (folder / "artifacts" / self._experiment_name).as_uri()
            OWN_ADDRESSES.add(uri)
        else:
            client = MlflowClient(uri)
            OWN_ADDRESSES.discard(uri)
        mlflow.set_tracking_uri(uri)  # for the user's own calls of mlflow
        return client, location

    def _find_experiment(self, client: Any, location: str | None) -> str:
        found = client.get_experiment_by_name(self._experiment_name)
        if found is not None and found.lifecycle_stage != "deleted":
            return found.experiment_id  # type: ignore[no-any-return]
        return client.create_experiment(self._experiment_name, artifact_location=location)  # type: ignore[no-any-return]

    def _begin_run(self, client: Any) -> str:
        from mlflow.tracking.context.registry import resolve_tags
        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

        tags = dict(self.tags or {})
        if self._run_name is not None:
            if tags.get(MLFLOW_RUN_NAME, self._run_name) != self._run_name:
                warn(f"MLFlowLogger: run_name={self._run_name!r} takes the place of the tag {MLFLOW_RUN_NAME}.")
            tags[MLFLOW_RUN_NAME] = self._run_name
        self.tags = tags or self.tags
        run = client.create_run(experiment_id=self._experiment_id, tags=resolve_tags(self.tags))
        return run.info.run_id  # type: ignore[no-any-return]

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record values at x value `step`, by default one more than the last. Texts are left out, with a warning."""
        check_metrics(metrics)
        if step is None:
            step = 0 if self._last_step is None else self._last_step + 1
        self._last_step = step
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entities = []
        for name, value in metrics.items():
            if isinstance(value, str):
                warn(f"MLFlowLogger: the metric {name!r} is the text {value!r:.80}, and is left out.")
                continue
            entities.append(Metric(self._known(self._prefix + name), number(name, value), now, step))
        if entities:
            self.experiment.log_batch(run_id=self.run_id, metrics=entities, **self._batch_options)

    def _known(self, name: str) -> str:
        """Return a metric's name with the characters that MLflow takes."""
        known = re.sub("[^a-zA-Z0-9_/. -]+", "", name)
        if known != name:
            warn(f"MLFlowLogger: the metric {name!r} becomes {known!r}; MLflow takes letters, digits and _ / . - only.")
        return known

    @rank_zero_only
    def log_hyperparams(
        self, params: Mapping[str, Any] | Namespace | None = None, metrics: Mapping[str, float] | float | None = None
    ) -> None:
        """Record what the run was made with: nested values as `outer/inner`, of a long text the first 500 characters.

        MLflow never changes a parameter. What has another value already keeps it, with a warning.
        """
        from mlflow.entities import Param

        values = {name: str(value)[:LONGEST_PARAM] for name, value in nested(plain(as_mapping(params))).items()}
        if not values:
            return
        there = self.experiment.get_run(self.run_id).data.params
        changed = [name for name in values if there.get(name, values[name]) != values[name]]
        if changed:
            warn(f"MLFlowLogger: run {self.run_id} keeps its parameters {', '.join(changed)}; they can't be changed.")
        entities = [Param(name, value) for name, value in values.items() if name not in there]
        for start in range(0, len(entities), MOST_PARAMS):
            batch = entities[start : start + MOST_PARAMS]
            self.experiment.log_batch(run_id=self.run_id, params=batch, **self._batch_options)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Upload what a checkpoint callback has saved, if `log_model` says so."""
        self._upload(self._uploads.after_save(checkpoint_callback))

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Upload the checkpoints, and say how the run ended. It can be gone on with."""
        if self._client is None:
            return
        self._upload(self._uploads.at_end())
        self._client.set_terminated(self._run_id, STATUS.get(status, status))

    def _upload(self, artifacts: list[Any]) -> None:
        for found in artifacts:
            import yaml

            folder = Path(found.path).stem
            self.experiment.log_artifact(self.run_id, found.path, folder)
            with tempfile.TemporaryDirectory() as temporary:
                Path(temporary, "metadata.yaml").write_text(yaml.safe_dump(plain(found.metadata)))
                Path(temporary, "aliases.txt").write_text(str(found.aliases))
                self.experiment.log_artifacts(self.run_id, temporary, folder)
            self._uploads.uploaded[found.path] = found.time

    def __getstate__(self) -> dict[str, Any]:
        if current_rank() == 0:
            _ = self.experiment  # a copy goes on with the same run, by its id
        return self.__dict__ | {"_client": None}


def nested(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return plain hyper-parameters on one level, as `outer/inner`; of a list of mappings, as `outer/0/inner`."""
    values: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            values.update(nested(value, f"{prefix}{name}/"))
        else:
            values[prefix + name] = value
    return values
