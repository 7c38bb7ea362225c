"""Accelerator: a kind of device, as an object; `trainer.accelerator` says which one a run uses."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from trainkit.errors import MisconfigurationException


class Accelerator:
    """A kind of device. Derive from it to bring one that torch knows and trainkit does not."""

    kind: ClassVar[str] = ""
    """What torch.device calls it."""

    @classmethod
    def name(cls) -> str:
        """What `Trainer(accelerator=...)` calls it."""
        return cls.kind

    @classmethod
    def is_available(cls) -> bool:
        """Whether this machine has one."""
        return cls.auto_device_count() > 0

    @classmethod
    def auto_device_count(cls) -> int:
        """How many of them this machine has."""
        raise NotImplementedError(f"{cls.__name__}.auto_device_count")

    @classmethod
    def parse_devices(cls, devices: Any) -> Any:
        """Return what `Trainer(devices=...)` means for this kind: a number, or a list of indices."""
        return cls.auto_device_count() if devices in ("auto", -1, "-1") else devices

    @classmethod
    def get_parallel_devices(cls, devices: Any) -> list[torch.device]:
        """Return the devices that `parse_devices` gave."""
        indices = range(int(devices)) if isinstance(devices, (int, str)) else devices
        return [torch.device(cls.kind, int(index)) for index in indices]

    def setup_device(self, device: torch.device) -> None:
        """Prepare the device of this process."""

    def setup(self, trainer: Any) -> None:
        """Prepare for a run."""

    def get_device_stats(self, device: torch.device | str) -> dict[str, Any]:
        """Return numbers about a device's memory and use, by name."""
        return {}

    def teardown(self) -> None:
        """Clean up after a run."""


class CPUAccelerator(Accelerator):
    """The host."""

    kind = "cpu"

    @classmethod
    def auto_device_count(cls) -> int:
        return 1

    @classmethod
    def parse_devices(cls, devices: Any) -> int:
        number = int(devices) if isinstance(devices, str) and devices.strip().isdigit() else devices
        if devices == "auto":
            return 1
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise TypeError(f"devices must be a number of at least 1 on the cpu. Received: {devices!r}.")
        return number

    @classmethod
    def get_parallel_devices(cls, devices: Any) -> list[torch.device]:
        return [torch.device("cpu")] * int(devices)

    def get_device_stats(self, device: torch.device | str) -> dict[str, Any]:
        """Return the use of the host's processor, memory and swap, in percent.

        Raises:
            ModuleNotFoundError: psutil is not installed.
        """
        try:
            import psutil  # type: ignore[import-untyped, unused-ignore]
        except ModuleNotFoundError:
            raise ModuleNotFoundError("statistics of the cpu need psutil: pip install psutil") from None
        return {
            "cpu_percent": float(psutil.cpu_percent()),
            "cpu_vm_percent": float(psutil.virtual_memory().percent),
            "cpu_swap_percent": float(psutil.swap_memory().percent),
        }


class CUDAAccelerator(Accelerator):
    """NVIDIA's devices, and AMD's through ROCm."""

    kind = "cuda"

    @classmethod
    def auto_device_count(cls) -> int:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def get_device_stats(self, device: torch.device | str) -> dict[str, Any]:
        """Return torch's statistics of the device's memory."""
        return dict(torch.cuda.memory_stats(device))


class MPSAccelerator(Accelerator):
    """Apple's."""

    kind = "mps"

    @classmethod
    def auto_device_count(cls) -> int:
        return int(torch.backends.mps.is_available())

    def get_device_stats(self, device: torch.device | str) -> dict[str, Any]:
        """Return how much memory is in use, in bytes."""
        return {
            "M1_vm_allocated": float(torch.mps.current_allocated_memory()),
            "M1_vm_driver_allocated": float(torch.mps.driver_allocated_memory()),
        }


KINDS: dict[str, type[Accelerator]] = {cls.kind: cls for cls in (CPUAccelerator, CUDAAccelerator, MPSAccelerator)}


def find_usable_cuda_devices(num_devices: int = -1) -> list[int]:
    """Return the indices of cuda devices that work, tried in order.

    Args:
        num_devices: how many are wanted; -1 for all that work, 0 for none.

    Raises:
        ValueError: there are fewer devices than that.
        RuntimeError: fewer than that work.
    """
    if num_devices == 0:
        return []
    there = CUDAAccelerator.auto_device_count()
    if there == 0 or num_devices > there:
        raise ValueError(f"find_usable_cuda_devices({num_devices}): this machine has {there} cuda devices.")
    usable = []
    for index in range(there):
        try:
            torch.tensor(0.0, device=torch.device("cuda", index))
        except RuntimeError:  # another process has it for itself
            continue
        usable.append(index)
        if len(usable) == num_devices:
            break
    if len(usable) < num_devices:
        raise RuntimeError(f"find_usable_cuda_devices({num_devices}): only {usable} can be used right now.")
    return usable


def of_device(device: torch.device) -> Accelerator:
    """Return the accelerator that a device belongs to."""
    if device.type not in KINDS:
        raise MisconfigurationException(f"trainkit does not know the device {device}; give an Accelerator object.")
    return KINDS[device.type]()
