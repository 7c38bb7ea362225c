"""Weights go to safetensors, where other programs read them, and come back exactly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from trainkit import Module
from trainkit.checkpoint import plain, weights
from trainkit.errors import CheckpointError


class Tied(Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.turned = nn.Parameter(torch.rand(4, width).t())


def test_a_module_goes_out_and_comes_back(tmp_path: Path) -> None:
    module, other = Tied(), Tied()
    module.to_safetensors(tmp_path / "x.safetensors")
    other.load_safetensors(tmp_path / "x.safetensors")
    assert all(map(torch.equal, module.state_dict().values(), other.state_dict().values()))
    assert other.head.weight is other.embedding.weight
    read = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert set(read) == set(module.state_dict()) - {"head.weight"}
    assert torch.equal(read["turned"], module.turned)


def test_tied_turned_and_unusual_weights_are_restored_exactly(tmp_path: Path) -> None:
    weight = torch.rand(3, 4)
    given: dict[str, torch.Tensor] = {
        "w": weight,
        "tied": weight,
        "turned": weight.t(),
        "row": weight[1],
        "conj": torch.tensor([1 + 2j]).conj(),
        "empty": torch.zeros(0, 3),
        "one": torch.tensor(1.5),
        "wide": torch.ones(1).expand(3),
    }
    weights.save(tmp_path / "x.safetensors", given)
    found = weights.load(tmp_path / "x.safetensors")
    assert set(found) == set(given)
    for name, tensor in given.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)
    assert found["tied"].data_ptr() == found["w"].data_ptr()
    assert found["turned"].stride() == weight.t().stride()


@pytest.mark.parametrize("dtype", plain.DTYPES.values(), ids=str)
def test_every_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    data = bytes(range(2)) * 16 if dtype == torch.bool else bytes(range(100, 132))
    tensor = torch.frombuffer(bytearray(data), dtype=dtype)
    weights.save(tmp_path / "x.safetensors", {"w": tensor})
    found = weights.load(tmp_path / "x.safetensors")["w"]
    assert found.dtype == dtype
    assert bytes(found.untyped_storage().tolist()) == data


def test_a_module_that_does_not_fit_is_left_as_it_was(tmp_path: Path) -> None:
    Tied(width=4).to_safetensors(tmp_path / "x.safetensors")
    module = Tied()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"the shapes differ: .*embedding.weight \(module \(5, 3\)"):
        module.load_safetensors(tmp_path / "x.safetensors")
    Tied().double().to_safetensors(tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match=r"the dtypes differ: .*turned \(module torch.float32, file torch.float64"
    ):
        module.load_safetensors(tmp_path / "x.safetensors")
    weights.save(tmp_path / "x.safetensors", {"turned": before["turned"]})
    with pytest.raises(CheckpointError, match=r"the module has, the checkpoint has not: embedding\.weight"):
        module.load_safetensors(tmp_path / "x.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.load_safetensors(tmp_path / "x.safetensors", strict=False)


def test_what_is_no_dense_tensor_is_refused_by_name(tmp_path: Path) -> None:
    for value, reason in (({"a": 1}, "a dict"), (torch.eye(2).to_sparse(), "a tensor of torch.sparse_coo")):
        with pytest.raises(TypeError, match=f"extra is {reason}; a safetensors file holds dense tensors only"):
            weights.save(tmp_path / "x.safetensors", {"extra": value})
    with pytest.raises(CheckpointError, match="'__metadata__' can't be the name of a tensor"):
        weights.save(tmp_path / "x.safetensors", {"__metadata__": torch.zeros(1)})
    assert not os.listdir(tmp_path)


def made(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, "its header can't be read"),
        (b"\xff\xfe{}", "its header can't be read"),
        ([1], "its header is a list"),
        ({"../x": ENTRY}, "'../x' can't be the name of a tensor"),
        ({"/etc/x": ENTRY}, "'/etc/x' can't be the name of a tensor"),
        ({"a\x00b": ENTRY}, "can't be the name of a tensor"),
        ({"n" * 2000: ENTRY}, "can't be the name of a tensor"),
        ({"w": {**ENTRY, "shape": [2]}}, "is damaged"),
        ({"w": {**ENTRY, "data_offsets": [0, 400]}}, "is damaged"),
        ({"w": {**ENTRY, "dtype": "os.system"}}, "is damaged"),
        ({"w": ENTRY, "__metadata__": {"trainkit": "{"}}, "its metadata does not fit its tensors"),
        ({"w": ENTRY, "__metadata__": {"trainkit": '{"tied": {"a": "b"}}'}}, "its metadata does not fit"),
        ({"w": ENTRY, "__metadata__": {"trainkit": '{"stride": {"w": [7, 7]}}'}}, "its metadata does not fit"),
        ({"w": ENTRY, "__metadata__": {"trainkit": '{"raw": {"w": {"dtype": "os", "shape": []}}}'}}, "does not fit"),
        ({"w": ENTRY, "__metadata__": {"trainkit": "[1]"}}, "its metadata does not fit"),
    ],
)
def test_a_file_made_to_do_harm_is_refused(header: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        weights.load(made(tmp_path / "x.safetensors", header, b"\0" * 4))


def test_a_header_as_large_as_it_says_is_not_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="is not a safetensors file, or is cut off"):
        weights.load(made(tmp_path / "x.safetensors", {}, length=1 << 62))
    monkeypatch.setattr(weights, "MAX_HEADER", 10)
    with pytest.raises(CheckpointError, match=r"its header has .* bytes, more than 10"):
        weights.load(made(tmp_path / "x.safetensors", {"w": ENTRY}, b"\0" * 4))
    with pytest.raises(CheckpointError, match="could not be read"):
        weights.load(tmp_path / "nothing.safetensors")
