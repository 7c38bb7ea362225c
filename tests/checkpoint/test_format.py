"""What goes into a checkpoint's bytes, comes out of them, and is refused."""

from __future__ import annotations

import enum
import io
import math
import os
import re
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Module, Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.checkpoint import format, plain
from trainkit.errors import CheckpointError

numbers = st.floats() | st.sampled_from([math.nan, -math.nan, math.inf, -math.inf, -0.0])
plain_keys = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
keys = plain_keys | st.text(max_size=5) | st.binary(max_size=3)
plain_leaves = (
    keys
    | st.integers(-(1 << 5000), 1 << 5000)
    | numbers
    | st.builds(complex, numbers, numbers)
    | st.text(st.characters(exclude_categories=()))  # lone surrogates, too
    | st.binary().map(bytearray)
    | st.sampled_from([torch.Size([2, 3]), torch.float8_e4m3fn, torch.device("cuda", 3), "$tensor", "$"])
)
plain_states = st.recursive(
    plain_leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.sets(keys, max_size=4)
        | st.frozensets(keys, max_size=4)
        | st.dictionaries(keys | st.tuples(keys, keys) | st.sampled_from(["$tuple", "$"]), inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.tuples(keys), inner, max_size=4).map(OrderedDict)
        | st.dictionaries(st.text(max_size=5), st.integers(), max_size=4).map(Counter)
    ),
    max_leaves=12,
)
DTYPES = list(plain.DTYPES.values())
tensors = st.builds(
    lambda dtype, bytes_, rows, stride, offset, transposed: _tensor(dtype, bytes_, rows, stride, offset, transposed),
    st.sampled_from(DTYPES),
    st.binary(min_size=16 * 30, max_size=16 * 30),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 4),
    st.booleans(),
)
arrays = st.builds(
    lambda dtype, shape, step: np.arange(math.prod(shape)).astype(dtype).reshape(shape).T[::step],
    st.sampled_from(sorted(plain.NUMPY_DTYPES)),
    st.tuples(st.integers(0, 3), st.integers(1, 3)),
    st.sampled_from([1, 2, -1]),
)
scalars = st.builds(
    lambda dtype, data: np.frombuffer(data, dtype)[0],
    st.sampled_from(sorted(set(plain.NUMPY_DTYPES) - {"bool"})),
    st.binary(min_size=16, max_size=16),
)


def _tensor(dtype: torch.dtype, data: bytes, rows: int, stride: int, offset: int, transposed: bool) -> torch.Tensor:
    raw = torch.frombuffer(bytearray(b & 1 for b in data) if dtype == torch.bool else bytearray(data), dtype=dtype)
    tensor = raw.as_strided((rows, 4), (stride, 2), offset)
    return tensor.t() if transposed else tensor


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes a tensor shows, of the dtypes that torch can't compare, too."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    storage = tensor.untyped_storage().tolist()
    if tensor.numel() == 0:
        return b""
    size, found = tensor.dtype.itemsize, []
    for index in np.ndindex(*whole.shape):
        start = (tensor.storage_offset() + sum(i * s for i, s in zip(index, tensor.stride(), strict=True))) * size
        found.append(bytes(byte & 255 for byte in storage[start : start + size]))
    return b"".join(found)


def written(path: Path, state: dict[str, Any]) -> Path:
    with open(path, "wb") as file:
        format.write(file, state)
    return path


def same(left: Any, right: Any) -> bool:
    """Equal to the last bit, of the same types all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        shape = (left.dtype, left.shape, left.stride(), left.is_conj(), left.is_neg())
        return shape == (right.dtype, right.shape, right.stride(), right.is_conj(), right.is_neg()) and (
            bits(left) == bits(right)
        )
    if isinstance(left, np.ndarray | np.generic):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right)
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    if isinstance(left, dict):
        pairs = zip(left.items(), right.items(), strict=True)
        return len(left) == len(right) and all(same(k, m) and same(a, b) for (k, a), (m, b) in pairs)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@given(value=tensors | arrays | scalars)
def test_tensors_and_numpys_arrays_come_back_to_the_bit(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = written(tmp_path_factory.mktemp("tensors") / "x.ckpt", {"value": [value, value]})
    found, again = format.read(path)["value"]
    assert same(found, value)
    if isinstance(value, np.ndarray):
        assert found is again
    elif isinstance(value, torch.Tensor):
        assert found.untyped_storage().data_ptr() == again.untyped_storage().data_ptr()
    elsewhere = torch.load(path, weights_only=True, mmap=True)["value"][0]
    if isinstance(value, torch.Tensor):
        assert same(elsewhere, value)
    elif isinstance(value, np.ndarray):
        assert same(elsewhere.numpy(), value)


@given(state=plain_states)
def test_plain_values_come_back_as_they_were(state: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = written(tmp_path_factory.mktemp("plain") / "x.ckpt", {"state": state})
    assert same(format.read(path), {"state": state})
    torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6).reshape(2, 3).T,
        torch.zeros(0, 3),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.tensor([math.nan, -math.inf]).nan_to_num(),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.zeros(0, 3, dtype=torch.bool)[:, 3:],
        torch.ones(1).expand(20, 20),
        torch.Size([2, 3]),
        torch.float16,
        torch.device("cpu"),
        Counter({30: 1, 80: 1}),
        b"",
        bytearray(),
    ],
    ids=str,
)
def test_what_torch_has_comes_back_as_it_was(value: Any, tmp_path: Path) -> None:
    assert same(format.read(written(tmp_path / "x.ckpt", {"v": value}))["v"], value)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
def test_sparse_tensors_come_back_as_they_were(layout: str, tmp_path: Path) -> None:
    dense = torch.eye(6) + torch.eye(6).roll(1, 0)
    sizes = {"bsr": ((2, 2),), "bsc": ((2, 2),)}.get(layout, ())
    sparse = getattr(dense, "to_sparse" if layout == "coo" else f"to_sparse_{layout}")(*sizes)
    path = written(tmp_path / "x.ckpt", {"s": sparse, "twice": sparse})
    for found in (format.read(path)["s"], torch.load(path, weights_only=True)["s"]):
        assert (found.layout, found.dtype, found.shape) == (sparse.layout, sparse.dtype, sparse.shape)
        assert torch.equal(found.to_dense(), dense)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_sparse_tensor_keeps_what_is_there_twice(tmp_path: Path) -> None:
    doubled = torch.sparse_coo_tensor([[1, 1]], [2.0, 3.0], (4,))
    for made in (doubled, doubled.coalesce()):
        found = format.read(written(tmp_path / "x.ckpt", {"s": made}))["s"]
        assert found.is_coalesced() == made.is_coalesced()
        assert torch.equal(found._values(), made._values())
        assert torch.equal(found._indices(), made._indices())


def test_two_dtypes_of_one_memory_are_still_one_memory(tmp_path: Path) -> None:
    weight = torch.arange(4.0)
    path = written(tmp_path / "x.ckpt", {"w": weight, "bits": weight.view(torch.int32)})
    state = format.read(path)
    state["w"][0] = 1.0
    assert state["bits"][0] == 0x3F800000
    assert torch.equal(torch.load(path, weights_only=True)["bits"], weight.view(torch.int32))


def test_tensors_that_share_memory_still_do(tmp_path: Path) -> None:
    weight = torch.arange(4.0)
    state = format.read(written(tmp_path / "x.ckpt", {"tied": weight, "head": weight, "part": weight[1:3]}))
    state["tied"][1] = 7.0
    assert state["head"][1] == 7.0
    assert state["part"][0] == 7.0


def test_a_state_dict_keeps_its_versions_and_a_parameter_becomes_a_tensor(tmp_path: Path) -> None:
    module = torch.nn.BatchNorm1d(2)
    state = format.read(written(tmp_path / "x.ckpt", {"state_dict": module.state_dict(), "p": module.weight}))
    assert state["state_dict"]._metadata == module.state_dict()._metadata
    assert type(state["p"]) is torch.Tensor
    assert not state["p"].requires_grad


@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.NAdam, torch.optim.RMSprop]
)
def test_optimizer_states_can_be_saved(optimizer: Any, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    made = optimizer(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    made.step()
    state = format.read(written(tmp_path / "x.ckpt", {"optimizer": made.state_dict()}))
    assert same(state["optimizer"], made.state_dict())


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 5]),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.2),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.CosineAnnealingLR(o, 5)], [2]
        ),
    ],
)
def test_scheduler_states_can_be_saved(scheduler: Any, tmp_path: Path) -> None:
    made = scheduler(torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1))
    assert same(format.read(written(tmp_path / "x.ckpt", {"s": made.state_dict()}))["s"], made.state_dict())


class Colour(enum.IntEnum):
    RED = 1


class Fancy(torch.Tensor):
    pass


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"callbacks": {"Mine": {"history": [1, np.array([None])]}}},
            "callbacks/Mine/history[1] is a numpy.ndarray with ",
        ),
        ({"n": np.zeros(2, ">f4")}, "in another byte order, >f4. Save it.astype('float32')."),
        ({"n": np.longdouble(1)}, "n is a numpy.longdouble with dtype float128"),
        ({"n": np.ma.zeros(2)}, "n is a numpy.ma.MaskedArray; "),
        ({"n": np.zeros(2).view(np.recarray)}, "n is a numpy.rec"),
        ({"a": ({"b": {1, Path("x")}},)}, "a[0]/b{} is a pathlib"),
        ({"a": {3: defaultdict(list)}}, "a[3] is a collections.defaultdict; .* Save dict(it)."),
        ({"p": Path("x")}, "Save str(it)."),
        ({"p": Pair(1, 2)}, "Save tuple(it)"),
        ({"p": Colour.RED}, "Save int(it)."),
        ({"m": torch.nn.Linear(1, 1)}, "m is a torch.nn.modules.linear.Linear; .* Save its state_dict()."),
        ({"b": memoryview(b"")}, "b is a memoryview; .* Save bytes(it)"),
        ({"f": math.sqrt}, "Code can't be saved"),
        ({"d": np.datetime64("2020-01-01")}, "d is a numpy.datetime64"),
        ({"t": torch.zeros(1).as_subclass(Fancy)}, "only its own code can read"),
        ({"t": torch.zeros(2, device="meta")}, "t is a tensor on the meta device"),
        ({torch.zeros(1): 1}, "is a tensor used as a key"),
        ({(1, np.zeros(1).tobytes): 1}, "is a builtin_function_or_method"),
    ],
)
def test_anything_else_is_refused_by_its_path(state: dict[Any, Any], message: str) -> None:
    pattern = ".*".join(map(re.escape, message.split(".*")))
    with pytest.raises(TypeError, match=pattern):
        format.check_plain(state)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested tensors")
def test_a_tensor_of_a_kind_that_is_on_its_way_out_is_refused() -> None:
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"q is a quantized tensor. Save its int_repr"):
        format.check_plain({"q": quantized})
    with pytest.raises(TypeError, match=r"n is a nested tensor. Save its parts"):
        format.check_plain({"n": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])})


def test_a_path_begins_where_the_caller_says() -> None:
    with pytest.raises(TypeError, match=r"^callbacks/Mine/x is an object; "):
        format.check_plain({"x": object()}, "callbacks/Mine")


def test_a_list_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.extend([endless, endless])
    with pytest.raises(TypeError, match="or holds itself"):
        format.check_plain({"endless": endless})


def test_a_plain_torch_load_reads_a_checkpoint_and_so_does_a_memory_mapped_one(tmp_path: Path) -> None:
    path = written(tmp_path / "x.ckpt", {"state_dict": {"w": torch.arange(5.0)}, "epoch": 1})
    for state in (
        torch.load(path, weights_only=True),
        torch.load(path, weights_only=True, mmap=True),
        format.read(path),
    ):
        assert torch.equal(state["state_dict"]["w"], torch.arange(5.0))


def test_it_is_the_file_that_torch_save_writes_and_one_record_more(tmp_path: Path) -> None:
    weight = torch.rand(3, 4)
    weights = OrderedDict(w=weight, tied=weight.detach(), t=weight.t(), half=weight.bfloat16())
    state = {"state_dict": weights, "epoch": 3, "loss": 1.5}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    theirs, ours = buffer.getvalue(), written(tmp_path / "x.ckpt", state).read_bytes()
    own = theirs.index(b"archive/.data/serialization_id") + 30  # where torch tells files apart
    assert theirs[:own] == ours[:own]
    with zipfile.ZipFile(buffer) as one, zipfile.ZipFile(tmp_path / "x.ckpt") as other:
        assert other.testzip() is None
        assert other.namelist() == [*one.namelist(), "archive/trainkit.json"]


def test_every_tensor_begins_at_a_multiple_of_64_bytes(tmp_path: Path) -> None:
    state = {"t": [torch.full((n,), 7, dtype=torch.uint8) for n in (1, 63, 64, 65, 200)]}
    content = written(tmp_path / "x.ckpt", state).read_bytes()
    found = format.head(tmp_path / "x.ckpt").state["t"]
    for tensor in state["t"]:
        assert content.index(tensor.numpy().tobytes() + b"PK\x07\x08") % 64 == 0
    assert [info.shape for info in found] == [(1,), (63,), (64,), (65,), (200,)]


def test_the_head_says_what_is_in_a_file_and_reads_no_tensor(tmp_path: Path) -> None:
    path = written(tmp_path / "x.ckpt", {"global_step": 3, "state_dict": {"w": torch.full((1000,), 2.0)}})
    content = path.read_bytes()
    path.write_bytes(content.replace(torch.full((9,), 2.0).numpy().tobytes(), bytes(36), 1))  # damage it
    head = format.head(path)
    assert (head.state["global_step"], head.finite, head.writer["torch"]) == (3, True, torch.__version__)
    assert (head.state["state_dict"]["w"].shape, head.state["state_dict"]["w"].dtype) == ((1000,), torch.float32)
    with pytest.raises(CheckpointError, match=r"the record data/0 \(state_dict/w\) was changed"):
        format.verify(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_file_says_that_its_weights_are_not_finite(value: float, tmp_path: Path) -> None:
    assert not format.head(written(tmp_path / "x.ckpt", {"state_dict": {"w": torch.tensor(value)}})).finite


def test_an_open_file_is_read_and_stays_open(tmp_path: Path) -> None:
    path = written(tmp_path / "x.ckpt", {"w": torch.arange(3)})
    with open(path, "rb") as file:
        for source in (file, io.BytesIO(path.read_bytes())):
            assert torch.equal(format.read(source)["w"], torch.arange(3))
            assert not source.closed
    with pytest.raises(TypeError, match="from a path or an open binary file that can seek"):
        format.read(io.StringIO())  # type: ignore[arg-type]


def test_a_sink_that_takes_a_few_bytes_at_a_time_gets_them_all(tmp_path: Path) -> None:
    class Slow(io.BytesIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data)[:100])

    file = Slow()
    format.write(file, {"w": torch.arange(300)})
    assert torch.equal(format.read(file)["w"], torch.arange(300))


def test_saving_and_loading_need_no_second_copy(tmp_path: Path, checkout: Path) -> None:
    program = """
import resource, torch
from trainkit.checkpoint import format
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
format.read(format.write(open("small.ckpt", "wb", 0), {"w": torch.ones(3)}) or "small.ckpt")  # all is imported now
state = {"w": [torch.ones(1 << 20) for _ in range(32)]}
before = peak()
with open("x.ckpt", "wb") as file:
    format.write(file, state)
saved = peak() - before
del state
found = format.read("x.ckpt")
assert found["w"][31][-1] == 1
print(saved, peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=True,
    )
    saved, loaded = map(float, done.stdout.split())
    assert saved < 16  # MB, of a state with 128
    assert loaded < 24


def test_a_list_of_numbers_that_should_be_a_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Save long lists of numbers as tensors"):
        written(tmp_path / "x.ckpt", {"history": [0] * 2_600_000})


FORBIDDEN = [
    *("pickle.Unpickler", "pickle._Unpickler", "pickle.load", "pickle.loads"),
    *("_pickle.Unpickler", "_pickle.load", "_pickle.loads"),
    *("torch.load", "torch.serialization.load", "torch.serialization._load", "torch.serialization._legacy_load"),
    *("torch._weights_only_unpickler.Unpickler", "torch._weights_only_unpickler.load"),
    *("builtins.eval", "builtins.exec", "builtins.compile"),
]


def test_nothing_is_unpickled_evaluated_or_loaded_by_torch_from_save_to_resume(tmp_path: Path) -> None:
    def fit(**more: Any) -> tuple[Trainer, Small]:
        best = ModelCheckpoint(
            tmp_path / "run", "{step}", monitor="loss", save_top_k=-1, save_last=True, every_n_train_steps=2
        )
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer, module = Trainer(max_epochs=2, accelerator="cpu", callbacks=[best], **quiet), Small()
        trainer.fit(module, **more)
        return trainer, module

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a load path called this")

    whole, uninterrupted = fit()  # everything is imported by now
    weights = {name: weight.clone() for name, weight in uninterrupted.state_dict().items()}
    whole.test(uninterrupted, ckpt_path="best", verbose=False)
    early = next(path for path in (tmp_path / "run").glob("*.ckpt") if format.head(path).state["global_step"] == 2)
    assert Small.load_from_checkpoint(early).hparams.width == 3
    with pytest.MonkeyPatch.context() as patch:
        for name in FORBIDDEN:
            patch.setattr(name, forbidden)
        for path in (early, "last"):
            resumed, module = fit(ckpt_path=path)
            ended = all(map(torch.equal, module.state_dict().values(), weights.values()))
            assert (ended, resumed.global_step) == (True, 8)
        for path in ("best", "last", early):
            resumed.test(module, ckpt_path=path, verbose=False)
            resumed.validate(module, ckpt_path=path, verbose=False)
            resumed.predict(module, ckpt_path=path)
        with open(early, "rb") as file:
            assert [Small.load_from_checkpoint(source).hparams.width for source in (early, file)] == [3, 3]


class Small(Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Dropout(), torch.nn.Linear(width, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.layer(batch[0])

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.arange(32.0).reshape(16, 2)), batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.arange(8.0).reshape(4, 2)), batch_size=4)

    test_dataloader = predict_dataloader = val_dataloader
