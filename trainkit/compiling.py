"""`Trainer(compile=...)`: the module's steps through torch.compile. Imported only by a Trainer that was asked for it.

Compiler    compiles the steps of one Trainer's runs, counts recompiles and says why they happen
Recorder    what `self.log` and `self.print` reach inside a compiled step: they become outputs of its graph
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainkit.errors import MisconfigurationException, warn
from trainkit.module import Module
from trainkit.tree import map_tensors
from trainkit.update import StepOptimizer

if TYPE_CHECKING:
    from trainkit.metrics import Metrics
    from trainkit.trainer import Trainer

Step = Callable[..., Any]

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes in which torch replays what it compiled as CUDA graphs: outputs lie in memory that the next step overwrites."""

TOOLS = {
    "InvalidCxxCompiler": "a C++ compiler: install g++ or clang++ (for example: apt install g++), or let the "
    "environment variable CXX name one",
    "CppCompileError": "a C++ compiler that works, and python's headers (for example: apt install g++ python3-dev)",
    "TritonMissing": "triton: pip install triton",
}
"""What is missing, by the name of the error that torch raises for it."""

UNTRACED: dict[type, tuple[str, ...]] = {
    Module: ("manual_backward", "toggle_optimizer", "untoggle_optimizer"),
    StepOptimizer: ("step", "zero_grad"),
}
"""What a step of manual optimization calls, and no graph can hold."""


class Recorder:
    """Stand in for the run's metrics while a step is traced.

    `log` depends on where the run is and on what was logged before, which no graph should be specialised for. In a
    traced step it only notes its arguments, which makes the values outputs of the graph; they are logged when the step
    is over. Code that is not traced, a hook for example, logs as ever.

    Args:
        metrics: where values go.
        trainer: what prints.
    """

    def __init__(self, metrics: Metrics, trainer: Trainer) -> None:
        self.metrics, self.trainer = metrics, trainer
        self.calls: list[tuple[Any, ...]] = []
        self.noting = False
        """Whether a CUDA graph is captured, which needs the same."""

    def log(self, name: str, value: Any, *options: Any) -> None:
        """Note one value, or log it."""
        if self.noting or torch.compiler.is_compiling():
            if isinstance(value, Tensor):
                value = value.detach()  # else its graph would be differentiated, too, for a gradient of zeros
            self.calls.append((None, name, value, *options))
        else:
            self.flush()
            self.metrics.log(name, value, *options)

    def print(self, *values: Any, **options: Any) -> None:
        """Note what to print, or print it."""
        if self.noting or torch.compiler.is_compiling():
            values = tuple([value.detach() if isinstance(value, Tensor) else value for value in values])
            self.calls.append((options, *values))
        else:
            self.flush()
            self.trainer.print(*values, **options)

    def flush(self) -> None:
        """Log and print what was noted, in that order."""
        calls, self.calls = self.calls, []
        for options, *values in calls:
            if options is None:
                self.metrics.log(*values)
            else:
                self.trainer.print(*values, **options)


class Compiler:
    """Compile the steps of a Trainer's runs.

    Args:
        given: `Trainer(compile=...)`: True, a mode, "auto" or a dict of torch.compile's arguments.
        device: what the steps run on.

    Raises:
        MisconfigurationException: a backend that torch does not know.
    """

    def __init__(self, given: bool | str | dict[str, Any], device: torch.device) -> None:
        self.falls_back = given == "auto"
        self.options: dict[str, Any] = {}
        if isinstance(given, dict):
            self.options = dict(given)
        elif isinstance(given, str) and given != "auto":
            self.options = {"mode": given}
        asked = self.options.get("mode") in CUDA_GRAPH_MODES or (self.options.get("options") or {}).get(
            "triton.cudagraphs"
        )
        self.overwrites = bool(asked) and device.type == "cuda"
        """Whether what a step returns lies where the next one writes."""
        self.recompiles = 0
        """How often a step was compiled again, for another shape or another value that its graph depends on."""
        self._module: Module | None = None
        self._compiled: dict[str, Step] = {}
        self._recorder: Recorder | None = None
        self._ended = False  # a compilation, since it was last looked
        self._last: Any = None  # what torch noted of the last compilation that was told of
        self._before: bool | None = None
        _check_backend(self.options.get("backend"))
        keep_torch_out()

    def compiled(self, trainer: Trainer, name: str) -> Step:
        """Return a step of the module, compiled when it is first called; the same one in every run of this module."""
        module, method = trainer.module, getattr(trainer.module, name)
        self._begin(trainer)
        if self._module is not module:
            self._module, self._compiled = module, {}
        if name not in self._compiled:
            self._compiled[name] = self._made(name, method)
        return self._watched(trainer, name, method)

    def _begin(self, trainer: Trainer) -> None:
        """Get to know a run."""
        if self._recorder is None:
            self._recorder = Recorder(trainer.metrics, trainer)
            trainer.module.attach(trainer, self._recorder)  # type: ignore[arg-type]
        if self._before is None:
            from torch._dynamo import callback, config

            # A counter of the run, global_step for example, is one more input and not a constant of the graph.
            self._before = config.allow_unspec_int_on_nn_module
            config.allow_unspec_int_on_nn_module = True
            callback.callback_handler.register_end_callback(self._note)
            self._last = next(_compilations(), None)

    def close(self) -> None:
        """Give torch its settings back, at the end of a run."""
        if self._before is not None:
            from torch._dynamo import callback, config

            config.allow_unspec_int_on_nn_module, self._before = self._before, None
            callback.callback_handler.remove_end_callback(self._note)
        self._recorder = None

    def _made(self, name: str, method: Step) -> Step:
        try:
            compiled: Step = torch.compile(own_code(method), **self.options)
        except RuntimeError as error:  # torch can't do it here at all
            if not self.falls_back:
                raise
            self._tell_of_fall(name, error)
            return method
        return compiled

    def _watched(self, trainer: Trainer, name: str, method: Step) -> Step:
        """Return the step as it is called: what it logs is logged after it, and recompiles are told of."""
        from torch._dynamo.exc import TorchDynamoException

        compiled, recorder, overwrites = self._compiled[name], self._recorder, self.overwrites
        assert recorder is not None
        noted = trainer.module.__dict__
        training = method.__name__ == "training_step"
        keeps_gradients = training and (
            trainer.accumulate_grad_batches > 1 or not trainer.module.automatic_optimization
        )

        @functools.wraps(method)
        def step(*arguments: Any, **keywords: Any) -> Any:
            nonlocal compiled
            if noted["_run_metrics"] is not recorder:  # who measures with a step lets it log elsewhere meanwhile
                recorder.metrics = noted["_run_metrics"]
                trainer.module.attach(trainer, recorder)  # type: ignore[arg-type]
            if overwrites:
                if keeps_gradients:
                    own_gradients(trainer.module)
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            try:
                output = compiled(*arguments, **keywords)
            except TorchDynamoException as error:
                recorder.calls.clear()
                if not self.falls_back:
                    raise explained(error) from error
                self._tell_of_fall(name, error)
                compiled = self._compiled[name] = method
                return method(*arguments, **keywords)
            if overwrites:
                output = map_tensors(lambda value: value.clone() if isinstance(value, Tensor) else value, output)
            if recorder.calls:
                recorder.flush()
            if self._ended:
                self._tell()
            return output

        return step

    def _note(self, _: Any) -> None:
        self._ended = True

    def _tell(self) -> None:
        """Count what was compiled again since this was last asked, and warn with the reasons."""
        self._ended = False
        fresh = []
        for compilation in _compilations():
            if compilation is self._last:
                break
            fresh.append(compilation)
        if fresh:
            self._last = fresh[0]
        for compilation in reversed(fresh):
            reason = compilation.recompile_reason
            if reason is None:
                continue
            self.recompiles += 1
            warn(f"compile: {what_happened(compilation, self.recompiles)}: {reason_of(reason)}. {advice_for(reason)}")

    def _tell_of_fall(self, name: str, error: BaseException) -> None:
        tool = lacks(error)
        what = f"this machine lacks {tool}." if tool else said(error)
        warn(f'compile="auto": {name} runs as it is, because torch could not compile it: {what}')


def keep_torch_out() -> None:
    """Let torch trace up to an update of manual optimization and on after it, but not into it."""
    for owner, names in UNTRACED.items():
        for name in names:
            method = getattr(owner, name)
            if not hasattr(method, "_torchdynamo_disable"):
                setattr(owner, name, torch.compiler.disable(method))  # type: ignore[no-untyped-call]


def own_code(step: Step) -> Step:
    """Return the same method with a code object of its own.

    torch keeps what it compiled with a function's code, and gives up after eight variants: those of another run, of
    another module of the class, must not count.
    """
    function = getattr(step, "__func__", step)
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return step
    code = function.__code__.replace()
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__, own.__qualname__ = function.__kwdefaults__, function.__qualname__
    own.__dict__.update(function.__dict__)
    return MethodType(own, step.__self__) if isinstance(step, MethodType) else own


def own_gradients(module: Module) -> None:
    """Move gradients that wait for the window's next batch out of the memory which that batch writes to."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


def _compilations() -> Iterator[Any]:
    """Yield what torch noted of its compilations, newest first."""
    from torch._dynamo.utils import get_compilation_metrics

    yield from reversed(get_compilation_metrics())


def what_happened(compilation: Any, count: int) -> str:
    """Say what a recompile was."""
    if compilation.fail_type is not None:
        return (
            "a step was compiled for as many cases as torch allows (torch._dynamo.config.recompile_limit); where none "
            "of them fits it runs uncompiled from now on"
        )
    return f"{compilation.co_name} was compiled again (recompile {count}), which costs seconds"


def reason_of(reason: str) -> str:
    """Return torch's reason in one line: the condition that failed, and the line of code which needs it."""
    line = next((line for line in reason.splitlines() if line.strip()), "").split("(HINT:")[0].split("(_dynamo/")[0]
    case, found, condition = line.partition(": ")
    line = condition if found and case.strip().replace("/", "").isdigit() else line  # "0/1: " is a number of torch's
    condition, _, place = (part.strip() for part in line.partition("#"))
    said = condition if " mismatch" in condition else f"{condition} is no longer so"
    return f"{said} ({place})" if place else said


def advice_for(reason: str) -> str:
    """Say what helps against a recompile."""
    if "size" in reason or "shape" in reason or "stride" in reason:
        return "Batches differ in shape: give the loader drop_last=True, pad them, or use compile={'dynamic': True}."
    return "A number that changes from step to step is cheap as a tensor, and expensive where the step branches on it."


def said(error: BaseException) -> str:
    """Return what an error says, without what torch wraps around it."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {line}"


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what is behind it."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        behind = waiting.pop(0)
        if behind is not None and id(behind) not in seen:
            seen.add(id(behind))
            yield behind
            waiting += [getattr(behind, "inner_exception", None), behind.__cause__, behind.__context__]


def lacks(error: BaseException) -> str | None:
    """Return what the machine lacks for compiling, None when that is not the reason."""
    for behind in chain(error):
        for name, tool in TOOLS.items():
            if type(behind).__name__ == name or name in str(behind).splitlines()[:1]:
                return tool
    return None


def explained(error: BaseException) -> BaseException:
    """Return what to raise: the error, with what to do about it."""
    tool = lacks(error)
    if tool is not None:
        return MisconfigurationException(
            f"compile: this machine lacks {tool}. Or use compile='auto', which goes on without compiling where it "
            "can't, or compile=False."
        )
    error.add_note(
        "compile: 'auto' goes on without compiling where it can't, False shows whether the step itself is wrong."
    )
    return error


def _check_backend(backend: Any) -> None:
    if isinstance(backend, str):
        from torch._dynamo import list_backends

        if backend not in list_backends(exclude_tags=()):
            raise MisconfigurationException(
                f"compile={{'backend': {backend!r}}}: torch knows {', '.join(map(repr, list_backends()))}, or give a "
                "function."
            )
