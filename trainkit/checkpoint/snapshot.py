"""A copy of a state that training can't change any more, in host memory that is used again for the next copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_Key = tuple[int, bool]
"""Bytes, and whether a device can write them by itself."""


class Snapshot:
    """Copies of states, each in the same memory as the one before.

    A storage is copied once, however many tensors look at it: tied weights and views stay what they are. Numbers and
    strings are shared, the dicts and lists around them are new. From a cuda device the copy runs while training goes
    on: what training enqueues comes after it.

    Attributes:
        copied: bytes copied for the last state.
    """

    def __init__(self) -> None:
        self.copied = 0
        self._free: dict[_Key, list[Tensor]] = {}
        self._used: dict[_Key, list[Tensor]] = {}
        self._copies: dict[tuple[str, int, int], Tensor] = {}
        self._events: list[torch.cuda.Event] = []

    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of a state; the copy that was taken before is overwritten.

        Args:
            state: tensors and plain values, as `format.check_plain` returns them.
        """
        self._free, self._used = self._used, {}  # memory that was of no use for two states is given back
        self.copied, self._copies, self._events = 0, {}, []
        with torch.no_grad():
            copy: dict[str, Any] = self._copied(state)
        for device in {torch.device(device) for device, _, _ in self._copies if device.startswith("cuda")}:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)
        self._copies = {}
        return copy

    def wait(self) -> None:
        """Wait until the copy is complete; before it is read, in whatever thread."""
        for event in self._events:
            event.synchronize()

    def _copied(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            items = type(value)()
            for key, item in value.items():
                items[key] = self._copied(item)
            if (metadata := getattr(value, "_metadata", None)) is not None:  # of a module's state_dict
                items._metadata = metadata  # type: ignore[attr-defined]
            return items
        if type(value) is list or type(value) is tuple:
            return type(value)(map(self._copied, value))
        if isinstance(value, bytearray) or hasattr(value, "__array__"):  # training can change them in place
            return value.copy()
        return value

    def _tensor(self, value: Tensor) -> Tensor:
        if value.layout != torch.strided or value.is_conj() or value.is_neg() or value.is_quantized:
            self.copied += value.numel() * value.element_size()
            return value.detach().to("cpu", copy=True)
        buffer = self._storage(value)
        host = torch.empty(0, dtype=value.dtype)
        host.set_(buffer.untyped_storage(), value.storage_offset(), value.size(), value.stride())
        return host

    def _storage(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        size, device = storage.nbytes(), value.device
        place = (str(device), storage.data_ptr(), size)
        if size and place in self._copies:
            return self._copies[place]
        key = (size, device.type == "cuda")
        free = self._free.get(key)
        buffer = free.pop(0) if free else torch.empty(size, dtype=torch.uint8, pin_memory=key[1])
        self._used.setdefault(key, []).append(buffer)
        source = torch.empty(0, dtype=torch.uint8, device=device)
        source.set_(storage, 0, (size,), (1,))
        buffer.copy_(source, non_blocking=True)
        self._copies[place] = buffer
        self.copied += size
        return buffer
