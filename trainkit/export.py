"""Hand a module over to other programs: safetensors, ONNX, TorchScript, TensorRT.

`torch.export.export(module, (inputs,))` needs nothing from here: a Module is an nn.Module like any other, before and
after a run. Call `module.eval()` first.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from trainkit.errors import MisconfigurationException
from trainkit.hooks import is_overridden
from trainkit.hparams import HyperParameters
from trainkit.moving import move_data_to_device

if TYPE_CHECKING:
    from trainkit.module import Module

T = TypeVar("T", bound=type)


class Exports:
    """What a Module can be turned into."""

    def to_onnx(self: Any, file_path: Any = None, input_sample: Any = None, **options: Any) -> Any:
        """Write `forward` as an ONNX file, in evaluation mode.

        Args:
            file_path: where to; None writes nothing and returns the program.
            input_sample: a tensor, or a tuple of arguments of `forward` (default: `example_input_array`).
            options: for `torch.onnx.export`.

        Returns:
            the ONNXProgram; None with `dynamo=False`.

        Raises:
            ValueError: there are no inputs.
            ModuleNotFoundError: onnx or onnxscript is not installed.
        """
        for package in ["onnx", "onnxscript"] if options.get("dynamo", True) else ["onnx"]:
            _need(package, f"{type(self).__name__}.to_onnx")
        inputs = _inputs(self, input_sample, "to_onnx", "input_sample")
        with evaluating(self), torch.no_grad():
            return torch.onnx.export(self, inputs, file_path, **options)

    def to_safetensors(self: Any, file_path: str | os.PathLike[str]) -> None:
        """Write the weights, the module's `state_dict`, as a safetensors file, which other programs read.

        Tied weights are there once, all of them contiguous; `load_safetensors` restores them exactly.

        Args:
            file_path: the file; one of that name is replaced when all is written.

        Raises:
            CheckpointError: it could not be written; an earlier file of that name is intact.
            TypeError: there is something else than dense tensors in the `state_dict`.
        """
        from trainkit.checkpoint import weights

        weights.save(file_path, self.state_dict())

    def load_safetensors(self: Any, file_path: str | os.PathLike[str], strict: bool | None = None) -> None:
        """Load weights from a safetensors file, after comparing names, shapes and dtypes with the module's.

        Args:
            file_path: the file.
            strict: whether names and dtypes must match exactly (default: the module's `strict_loading`).

        Raises:
            CheckpointError: there is no such file, it is damaged, or its weights do not fit; nothing was changed.
        """
        from trainkit.checkpoint import weights

        weights.load_into(self, file_path, self.strict_loading if strict is None else strict)

    def to_torchscript(
        self: Any,
        file_path: str | os.PathLike[str] | None = None,
        method: str = "script",
        example_inputs: Any = None,
        **options: Any,
    ) -> torch.jit.ScriptModule:
        """Compile `forward` to TorchScript, in evaluation mode. PyTorch gives it up; this warns of it.

        Args:
            file_path: where to write it, if anywhere.
            method: "script" reads the code; "trace" runs it once with `example_inputs`.
            example_inputs: a tensor, or a tuple of arguments of `forward` (default: `example_input_array`).
            options: for `torch.jit.script` or `torch.jit.trace`.

        Raises:
            ValueError: `method` is neither, or there are no inputs to trace with.
        """
        if method not in ("script", "trace"):
            raise ValueError(f"method must be 'script' or 'trace'. Received: {method!r}.")
        warnings.warn(
            "PyTorch gives TorchScript up: use torch.export.export(module.eval(), inputs) or module.to_onnx(path).",
            DeprecationWarning,
            stacklevel=2,
        )
        with evaluating(self), without_run(self), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=FutureWarning)  # said above
            if method == "script":
                exported = torch.jit.script(self, **options)
            else:
                inputs = _inputs(self, example_inputs, "to_torchscript with method='trace'", "example_inputs")
                if options.get("check_inputs") is not None:
                    options["check_inputs"] = _transferred(self, options["check_inputs"])
                exported = torch.jit.trace(self, inputs, **options)  # type: ignore[no-untyped-call]
            if file_path is not None:
                with open(file_path, "wb") as file:
                    torch.jit.save(exported, file)
        return exported  # type: ignore[no-any-return]

    def to_tensorrt(
        self: Any,
        file_path: Any = None,
        input_sample: Any = None,
        ir: str = "default",
        output_format: str = "exported_program",
        retrace: bool = False,
        default_device: str | torch.device = "cuda",
        **options: Any,
    ) -> Any:
        """Compile `forward` with TensorRT, in evaluation mode.

        Args:
            file_path: where to write it, if anywhere.
            input_sample: a tensor, or a tuple of arguments of `forward` (default: `example_input_array`).
            ir: "default", "dynamo" or "ts".
            output_format: "exported_program", or "torchscript", which ir="ts" needs.
            retrace: trace the compiled module again when it is written.
            default_device: where to compile a module that is not on a CUDA device.
            options: for `torch_tensorrt.compile`.

        Raises:
            ModuleNotFoundError: torch_tensorrt is not installed.
            MisconfigurationException: there is no CUDA device.
            ValueError: there are no inputs, or `ir` and `output_format` do not go together.
        """
        _need("torch_tensorrt", f"{type(self).__name__}.to_tensorrt")
        before = self.device
        device = before if before.type == "cuda" else torch.device(default_device)
        if device.type != "cuda" or not torch.cuda.is_available():
            raise MisconfigurationException(
                f"TensorRT runs on CUDA devices only. The module is on {before}, default_device is {default_device!r}."
            )
        if ir == "ts" and output_format != "torchscript":
            raise ValueError(f"ir='ts' needs output_format='torchscript'. Received: {output_format!r}.")
        import torch_tensorrt  # type: ignore[import-not-found]

        self.to(device)
        try:
            inputs = _inputs(self, input_sample, "to_tensorrt", "input_sample")
            inputs = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
            with evaluating(self), torch.no_grad():
                compiled = torch_tensorrt.compile(module=self, ir=ir, inputs=inputs, **options)
        finally:
            self.to(before)
        if file_path is not None and ir == "ts":
            torch.jit.save(compiled, file_path)
        elif file_path is not None:
            torch_tensorrt.save(compiled, file_path, inputs=inputs, output_format=output_format, retrace=retrace)
        return compiled


def scriptable(cls: T) -> T:
    """Hide from torch.jit.script what it stumbles over in a class: annotations that are strings, and properties."""
    changed: Any = cls
    changed.__annotations__ = {}
    changed.__jit_unused_properties__ = [
        name for base in changed.__mro__ for name, member in vars(base).items() if isinstance(member, property)
    ]
    return cls


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and give each part its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def without_run(module: torch.nn.Module) -> Iterator[None]:
    """Hide the run of a module: TorchScript reads every attribute, would compile the run, and stumble without one."""
    parts = [vars(part) for part in module.modules() if isinstance(part, HyperParameters)]
    runs: list[dict[str, Any]] = [
        {name: part.pop(name) for name in ("_trainer", "_run_metrics") if name in part} for part in parts
    ]
    for part in parts:
        part["_trainer"] = SimpleNamespace()
    try:
        yield
    finally:
        for part, run in zip(parts, runs, strict=True):
            del part["_trainer"]
            part.update(run)


def _inputs(module: Module, given: Any, who: str, argument: str) -> Any:
    """Return inputs for `forward`, through the module's transfer hooks and on its device."""
    inputs = module.example_input_array if given is None else given
    if inputs is None:
        raise ValueError(f"{who} needs inputs for forward: give {argument}, or set self.example_input_array.")
    return _transferred(module, inputs)


def _transferred(module: Module, inputs: Any) -> Any:
    inputs = module.on_before_batch_transfer(inputs, 0)
    if is_overridden(module, "transfer_batch_to_device"):
        inputs = module.transfer_batch_to_device(inputs, module.device, 0)
    else:
        inputs = move_data_to_device(inputs, module.device)
    return module.on_after_batch_transfer(inputs, 0)


def _need(package: str, who: str) -> None:
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"{who} needs {package}: pip install {package.replace('_', '-')}.")
