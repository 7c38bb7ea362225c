"""PyTorchProfiler: which operators an action ran, on the host and on the device, with traces to look at."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.profiler import EventList, emit_nvtx, record_function
from torch.profiler import ProfilerAction, ProfilerActivity, tensorboard_trace_handler
from torch.utils.hooks import RemovableHandle

from trainkit.errors import MisconfigurationException, warn
from trainkit.profiler.base import Profiler

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

Schedule = Callable[[int], ProfilerAction]
STEPS = ("training_step", "validation_step", "test_step", "predict_step")
OLDER = {"enabled", "use_cpu", "use_cuda", "use_kineto", "export_to_flame_graph", "metric"}
"""Options that torch's own profiler does not take, or not any more."""


class PyTorchProfiler(Profiler):
    """Report the operators of a few steps, and write a trace of them, with torch.profiler.

    In a run, steps are recorded by a schedule, for training, validation, test and predict each by itself: one step is
    left out, one warms the profiler up, three are recorded. With fewer than five steps, or outside of a run,
    everything is. `schedule=None` always records everything, which may take much memory.

    Args:
        dirpath: the directory of report and traces; None takes the run's `trainer.log_dir`.
        filename: the report's file is `<stage>-<filename>.txt`; None logs the report.
        group_by_input_shapes: a row of the report for each shape of inputs; needs record_shapes=True.
        emit_nvtx: mark actions and operators for NVIDIA's tools (nsys) instead; there is no report then.
        export_to_chrome: write `<stage>-<filename>-<action>.<time>.pt.trace.json`, which chrome://tracing, Perfetto
            and TensorBoard's profiler plugin open.
        row_limit: rows of the report; -1 for all.
        sort_by_key: what the report is sorted by, one of AVAILABLE_SORT_KEYS; None takes the total time.
        record_module_names: mark in the trace which submodule an operator ran in.
        table_kwargs: further options of torch's `EventList.table`.
        profiler_kwargs: options of `torch.profiler.profile`: activities, schedule, on_trace_ready, record_shapes,
            profile_memory, with_stack, with_flops and so on; with export_to_flame_graph=True and with_stack=True,
            stacks are written as `<stage>-<filename>-<action>.stack` by `metric` ("self_cpu_time_total").

    Raises:
        MisconfigurationException: an unknown sort_by_key; a schedule that is none.
        KeyError: table_kwargs has an option that a table does not have, or that has an argument of its own here.

    Example:
        >>> profiler = PyTorchProfiler(filename="operators", record_shapes=True, profile_memory=True)
    """

    STEP_FUNCTIONS = frozenset(STEPS)
    AVAILABLE_SORT_KEYS = frozenset({
        "count", "cpu_time", "cpu_time_total", "cuda_time", "cuda_time_total", "cpu_memory_usage", "cuda_memory_usage",
        "self_cpu_memory_usage", "self_cuda_memory_usage",
    })  # fmt: skip

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        group_by_input_shapes: bool = False,
        emit_nvtx: bool = False,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: str | None = None,
        record_module_names: bool = True,
        table_kwargs: dict[str, Any] | None = None,
        **profiler_kwargs: Any,
    ) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        known = set(inspect.signature(torch.profiler.profile).parameters)
        if unknown := profiler_kwargs.keys() - known - OLDER:
            warn(f"PyTorchProfiler: torch.profiler.profile has no option {sorted(unknown)}; known are {sorted(known)}.")
        activities = profiler_kwargs.get("activities") or default_activities()
        device = "cuda" if ProfilerActivity.CUDA in activities else "cpu"
        self.group_by_input_shapes = group_by_input_shapes and bool(profiler_kwargs.get("record_shapes"))
        self.emit_nvtx = emit_nvtx
        self.export_to_chrome = export_to_chrome
        self.row_limit = row_limit
        self.sort_by_key = sort_by_key or f"{device}_time_total"
        self.record_module_names = record_module_names
        self.table_kwargs = check_table_options(table_kwargs or {})
        self.enabled = bool(profiler_kwargs.get("enabled", True))
        self.flame_graph = bool(profiler_kwargs.get("export_to_flame_graph"))
        self.metric: str = profiler_kwargs.get("metric", "self_cpu_time_total")
        self.schedule = check_schedule(profiler_kwargs.get("schedule", default_schedule))
        self.on_trace_ready: Callable[[Any], Any] | None = profiler_kwargs.get("on_trace_ready")
        self.options = {name: value for name, value in profiler_kwargs.items() if name in known - OLDER}
        self.options["activities"] = activities
        if "acc_events" in known:
            self.options.setdefault("acc_events", True)  # the report is on all windows, not on the last one
        if self.sort_by_key not in self.AVAILABLE_SORT_KEYS:
            raise MisconfigurationException(
                f"sort_by_key must be one of {sorted(self.AVAILABLE_SORT_KEYS)}. Received: {sort_by_key!r}."
            )
        self.profiler: Any = None
        """Torch's profiler, while something is being profiled."""
        self.function_events: EventList | None = None
        """The operators that were recorded; of the last run after its end."""
        self._labels: RegisterRecordFunction | None = None
        self._open: dict[str, record_function] = {}  # actions under way, the innermost last
        self._window = Window(self.schedule)

    # ---- actions
    def start(self, action_name: str) -> None:
        """Mark the beginning of an action."""
        if not self.enabled or action_name in self._open:
            return
        kind = kind_of(action_name)
        trainer = None if self._lightning_module is None else self._lightning_module.trainer
        if self.profiler is None and (self.schedule is None or trainer is None or kind or self.emit_nvtx):
            self._begin(kind, trainer)
        elif kind and not self.emit_nvtx and self._step_of() is None and self._window.about_to(kind, trainer):
            self.profiler.step()
        if self.profiler is not None:
            self._open[action_name] = record_function(f"[pl][profile]{action_name}")
            self._open[action_name].__enter__()  # type: ignore[no-untyped-call]

    def stop(self, action_name: str) -> None:
        """Mark the end of an action; after a step, go on with the schedule."""
        marker = self._open.pop(action_name, None)
        if marker is None:
            return
        marker.__exit__(None, None, None)
        kind = kind_of(action_name)
        if kind and not self.emit_nvtx and self._step_of() is None:  # a step in its strategy's step is one step
            if self._window.action in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE):
                self.profiler.add_metadata("Framework", "trainkit")
            self._window.done(kind, action_name)
            self.profiler.step()

    def _step_of(self) -> str | None:
        """Return the step that is under way."""
        return next((action for action in self._open if kind_of(action)), None)

    def _begin(self, kind: str | None, trainer: Trainer | None) -> None:
        """Turn torch's profiler on."""
        self.function_events = None
        module = self._lightning_module
        if module is not None and self.record_module_names:
            self._labels = RegisterRecordFunction(module)
            self._labels.__enter__()
        if self.emit_nvtx:
            self.profiler = NVTX()
        else:
            self._window = Window(self.schedule if trainer is not None else None)
            if kind:
                self._window.about_to(kind, trainer)
            self.profiler = torch.profiler.profile(
                **{**self.options, "schedule": self._window, "on_trace_ready": self._keep}
            )
        self.profiler.__enter__()

    # ---- what was recorded
    def _keep(self, profiler: torch.profiler.profile) -> None:
        """Take the events of a window that has ended, and write its trace."""
        self.function_events = profiler.events()  # type: ignore[no-untyped-call]
        if self.on_trace_ready is not None:
            self.on_trace_ready(profiler)
        elif self.dirpath is not None:
            action = self._window.last_action
            if self.export_to_chrome:
                tensorboard_trace_handler(str(self.dirpath), self._prepare_filename(action, extension=""))(profiler)
            if self.flame_graph:
                path = os.path.join(self.dirpath, self._prepare_filename(action, extension=".stack"))
                profiler.export_stacks(path, metric=self.metric)
        elif self._lightning_module is not None and (self.export_to_chrome or self.flame_graph):
            warn("PyTorchProfiler has no directory for its trace: give dirpath, or the Trainer a logger.")

    def _end(self) -> None:
        """Turn torch's profiler off."""
        for action in reversed(list(self._open)):
            self._open.pop(action).__exit__(None, None, None)
        if self._labels is not None:
            self._labels.__exit__()
            self._labels = None
        if self.profiler is not None:
            profiler, self.profiler = self.profiler, None
            profiler.__exit__(None, None, None)

    def summary(self) -> str:
        """Return a table of operators. It ends what is being profiled."""
        self._end()
        if not self.function_events:
            return ""
        shapes = self.group_by_input_shapes
        data = self.function_events.key_averages(group_by_input_shapes=shapes)  # type: ignore[no-untyped-call]
        table = data.table(sort_by=self.sort_by_key, row_limit=self.row_limit, **self.table_kwargs)
        return self._stats_to_str({"records": table})

    def teardown(self, stage: str | None) -> None:
        """Turn torch's profiler off."""
        self._end()

    def __getstate__(self) -> dict[str, Any]:
        nothing: dict[str, Any] = {"profiler": None, "function_events": None, "_labels": None, "_open": {}}
        return {**self.__dict__, **nothing, "_window": Window(self.schedule)}


class Window:
    """Say whether a step is recorded, and which kind of step the window that is open now belongs to.

    Every kind of step has a schedule of its own; while one of them warms up or records, the others leave it alone.

    Args:
        schedule: as torch's profiler takes it; None records everything.
    """

    def __init__(self, schedule: Schedule | None) -> None:
        self.schedule = schedule
        self.schedules: dict[str, Schedule] = {}
        self.counts: dict[str, int] = {}
        self.owner: str | None = None
        self.action = ProfilerAction.RECORD if schedule is None else ProfilerAction.NONE
        self.last_action: str | None = None

    def __call__(self, step: int) -> ProfilerAction:
        return self.action

    def about_to(self, kind: str, trainer: Trainer | None) -> bool:
        """Get ready for a step; return whether torch's profiler has to hear of it."""
        if self.schedule is None or self.owner is not None or trainer is None or trainer.sanity_checking:
            return False
        if kind not in self.schedules:
            self.schedules[kind], self.counts[kind] = self._for_run(kind, trainer), 0
        before = self.action
        self._ask(kind)
        return self.action is not before

    def done(self, kind: str, action_name: str) -> None:
        """Count a step, and work out what happens to the next one of its kind."""
        if self.owner in (None, kind):
            self.last_action = action_name
        if kind in self.counts and self.owner in (None, kind):
            self.counts[kind] += 1
            self._ask(kind)

    def _ask(self, kind: str) -> None:
        self.action = self.schedules[kind](self.counts[kind])
        self.owner = None if self.action is ProfilerAction.NONE else kind

    def _for_run(self, kind: str, trainer: Trainer) -> Schedule:
        """Return the schedule of one kind of step; what is too short for the default one is recorded as a whole."""
        assert self.schedule is not None
        steps = num_steps(kind, trainer)
        if self.schedule is not default_schedule or steps >= 5:
            return self.schedule
        warn(f"PyTorchProfiler: {kind} runs {steps} times only, so all are recorded, without any warming up.")
        most = 5 if kind == "training_step" else int(steps)  # to the run's end; to that of the first evaluation
        return partial(whole, most)


class RegisterRecordFunction:
    """Mark in a trace which submodule is running, inside a `with` block.

    Args:
        model: whose submodules.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> with torch.profiler.profile() as profiler, RegisterRecordFunction(model):
        ...     _ = model(torch.ones(1, 2))
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for name, part in self._model.named_modules():
            if name:
                label = f"[pl][module]{type(part).__module__}.{type(part).__name__}: {name}"
                running: list[record_function] = []
                self._handles += [
                    part.register_forward_pre_hook(partial(self._begin, label, running)),
                    part.register_forward_hook(partial(self._finish, running), always_call=True),
                ]

    def _begin(self, label: str, running: list[record_function], *_: Any) -> None:
        running.append(record_function(label))
        running[-1].__enter__()  # type: ignore[no-untyped-call]

    def _finish(self, running: list[record_function], *_: Any) -> None:
        if running:
            running.pop().__exit__(None, None, None)

    def __exit__(self, *error: Any) -> None:
        while self._handles:
            self._handles.pop().remove()


class NVTX:
    """Ranges for NVIDIA's tools, in the place of torch's profiler."""

    def __init__(self) -> None:
        self.parts: list[Any] = [torch.cuda.profiler.profile(), emit_nvtx()]  # type: ignore[no-untyped-call]

    def __enter__(self) -> NVTX:
        for part in self.parts:
            part.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for part in reversed(self.parts):
            part.__exit__(None, None, None)


def kind_of(action_name: str) -> str | None:
    """Return which kind of step an action is; None for all others."""
    return next((kind for kind in STEPS if action_name.endswith(kind)), None)


def num_steps(kind: str, trainer: Trainer) -> float:
    """Return how many steps of a kind a run will have."""
    if kind == "training_step":
        return trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
    counts = {
        "validation_step": trainer.num_val_batches,
        "test_step": trainer.num_test_batches,
        "predict_step": trainer.num_predict_batches,
    }[kind]
    return sum(counts)


def default_activities() -> list[ProfilerActivity]:
    """Return what is watched: the host, and the GPU if there is one."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def default_schedule(step: int) -> ProfilerAction:
    """Leave one step out, warm up for one, record three."""
    actions = (ProfilerAction.NONE, ProfilerAction.WARMUP, ProfilerAction.RECORD, ProfilerAction.RECORD)
    return (*actions, ProfilerAction.RECORD_AND_SAVE)[step] if step < 5 else ProfilerAction.NONE


def whole(most: int, step: int) -> ProfilerAction:
    """Record `most` steps from the first one on."""
    if step >= most:
        return ProfilerAction.NONE
    return ProfilerAction.RECORD if step < most - 1 else ProfilerAction.RECORD_AND_SAVE


def check_schedule(given: Any) -> Schedule | None:
    """Return the schedule, None for none.

    Raises:
        MisconfigurationException: it is not a function from a step's number to a ProfilerAction.
    """
    if given is None:
        return None
    if not callable(given):
        raise MisconfigurationException(
            f"schedule must be a function, such as torch.profiler.schedule(...). Received: {given!r}."
        )
    if not isinstance(action := given(0), ProfilerAction):
        raise MisconfigurationException(f"schedule must return a torch.profiler.ProfilerAction. Received: {action!r}.")
    schedule: Schedule = given
    return schedule


def check_table_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return options for a report's table.

    Raises:
        KeyError: there is no such option, or it has an argument of its own.
    """
    known = set(inspect.signature(EventList.table).parameters) - {"self", "sort_by", "row_limit"}
    for name in given:
        if name in ("sort_by", "row_limit"):
            raise KeyError(f"table_kwargs: {name} is an argument of the profiler: {name.replace('by', 'by_key')}=...")
        if name not in known:
            raise KeyError(f"table_kwargs: a table has no option {name!r}; known are {sorted(known)}.")
    return given
