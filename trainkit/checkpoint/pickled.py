"""data.pkl, the part of a checkpoint that torch.load reads; trainkit only writes it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import UntypedStorage


def data_pkl(state: Any, name_of: Callable[[UntypedStorage], str]) -> bytes:
    """Return a state as torch.save pickles it, with its tensors' storages in other records.

    Args:
        state: tensors and plain values.
        name_of: the record a storage is in, as "data/0".
    """
    buffer = io.BytesIO()
    _Pickler(buffer, name_of).dump(state)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, name_of: Callable[[UntypedStorage], str]) -> None:
        super().__init__(file, protocol=2)  # the one that torch.load(weights_only=True) reads
        self.name_of = name_of

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, UntypedStorage):
            storage, kind, size = value, UntypedStorage, value.nbytes()
        elif type(value).__name__ == "TypedStorage":
            storage, kind, size = value._untyped_storage, getattr(torch, value._pickle_storage_type()), value._size()
        else:
            return None
        key = self.name_of(storage).removeprefix("data/")
        return "storage", kind, key, torch.serialization.location_tag(storage), size
