"""Copies to a CUDA device on a stream of their own, from pinned memory where that is free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, default_collate

from trainkit import Module, Trainer
from trainkit.data.loader import Loader
from trainkit.data.prefetch import SideStream, plain_tensors
from trainkit.data.stacking import collate_of
from trainkit.data.transfer import transfer_of
from trainkit.data.whole import gather_of
from trainkit.strategies import Strategy

T = torch.ones(2)


@dataclass
class Held:
    x: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (T, 1),
        ([T, {"a": (T, 3, "b", None)}], 2),
        (["a", 3], 0),
        ([T, pack_sequence([T])], 3),
        ([T, Held(T)], None),
        (T.to_sparse(), None),
        ([T, type("Listed", (list,), {})([T])], None),
    ],
    ids=range(7),
)
def test_the_tensors_of_plain_containers_are_found_and_others_are_not_trusted(batch: Any, found: int | None) -> None:
    tensors = plain_tensors(batch)
    assert (None if tensors is None else len(tensors)) == found


# ---------------------------------------------------------------- with a device
CUDA = torch.device("cuda", 0)


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        return torch.full((64, 64), float(index)), index


@pytest.mark.gpu
def test_each_batch_arrives_whole_though_the_device_is_busy() -> None:
    transfer = transfer_of(Strategy(CUDA), Module(), None)
    assert type(transfer) is SideStream
    work = torch.rand(2000, 2000, device=CUDA)
    sums = []
    for number in range(200):
        work = (work @ work).clamp(0, 1)
        batch = [torch.full((256, 256), float(number)).pin_memory(), {"y": torch.full((7,), number)}]
        x, named = transfer(batch, 0)
        sums.append((x.mean(), named["y"].sum()))
        del x, named, batch  # the memory of all three is free for what comes
    assert [int(a) for a, _ in sums] == list(range(200))
    assert [int(b) for _, b in sums] == [7 * number for number in range(200)]


@pytest.mark.gpu
def test_a_copy_overlaps_with_what_the_device_computes_and_holds_up_nobody() -> None:
    transfer: Any = transfer_of(Strategy(CUDA), Module(), None)
    work, batch = torch.rand(4000, 4000, device=CUDA), torch.ones(2**24).pin_memory()
    transfer(batch, 0)
    torch.cuda.synchronize()
    begun, copied, done = (torch.cuda.Event(enable_timing=True) for _ in range(3))  # type: ignore[no-untyped-call]
    begun.record()  # type: ignore[no-untyped-call]
    for _ in range(50):
        work = work @ work
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = transfer(batch, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    copied.record(transfer.stream)
    done.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    assert begun.elapsed_time(copied) < begun.elapsed_time(done) / 2
    assert float(moved.sum()) == 2**24


@pytest.mark.gpu
def test_batches_are_gathered_and_stacked_into_pinned_memory_and_are_what_they_were() -> None:
    x, y = torch.rand(64, 3, 4), torch.arange(64)
    for data in (TensorDataset(x, y), Subset(TensorDataset(x, y), range(64)), x):
        gather, plain = gather_of(data, default_collate, pinned=True), gather_of(data, default_collate)
        assert gather is not None
        assert plain is not None
        indices = torch.tensor([3, 1, 63])
        batch, expected = gather(indices), plain(indices)
        for one, other in zip(plain_tensors(batch) or (), plain_tensors(expected) or (), strict=True):
            assert one.is_pinned()
            assert torch.equal(one, other)
            assert (one.stride(), one.dtype) == (other.stride(), other.dtype)
    assert gather_of(ConcatDataset([x, x]), default_collate, pinned=True) is not None
    collate = collate_of(default_collate, pinned=True)
    batch = collate([(x[0], 1), (x[1], 2)])
    assert batch[0].is_pinned()
    assert torch.equal(batch[0], x[:2])
    assert batch[1].tolist() == [1, 2]
    assert collate([(x[0],), (x[1].double(),)])[0].dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_for_a_device_gives_pinned_batches_and_one_for_the_host_does_not(workers: int) -> None:
    source = DataLoader(Pairs(), 8, num_workers=workers)
    for pinned in (True, False):
        loader = Loader(source, name="data", argument="limit", seed=1, pinned=pinned)
        assert {batch[0].is_pinned() for _, batch, _ in loader.epoch(0)} == {pinned}
        loader.close()
    assert source.pin_memory is False


class Sums(Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(64, 1)
        self.seen: list[str] = []
        self.sums: list[Any] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append(f"before on {batch[0].device.type}")
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append(f"after on {batch[0].device.type}")
        return [batch[0] * 2, batch[1]]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.sums.append(batch[0][:, 0, 0].sum())
        return self.line(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_the_hooks_are_called_in_order_around_the_copy(workers: int) -> None:
    module = Sums()
    trainer = Trainer(
        accelerator="gpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Pairs(), 8, num_workers=workers))
    assert module.seen == ["before on cpu", "after on cuda"] * 16
    expected = [2.0 * sum(range(8 * batch, 8 * batch + 8)) for batch in range(8)]
    assert [float(value) for value in module.sums] == expected * 2
