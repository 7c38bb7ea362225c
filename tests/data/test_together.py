"""Several processes, each with data of its own or all with the same: none waits for another one's data."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

SOURCE = """
    import json, os, warnings
    import torch
    from torch.utils.data import DataLoader, IterableDataset, TensorDataset
    from trainkit import Module, Trainer

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    class Stream(IterableDataset):
        def __init__(self, size, noisy=False):
            self.size, self.noisy = size, noisy

        def __iter__(self):
            for number in range(self.size):
                yield torch.rand(()) if self.noisy else torch.tensor(float(number))

    class Sized:
        def __init__(self, size, says):
            self.size, self.says = size, says

        def __len__(self):
            return self.says

        def __iter__(self):
            return (torch.full((1,), float(number)) for number in range(self.size))

    class SizedStream(Sized, IterableDataset):
        def __iter__(self):
            return (torch.tensor(float(number)) for number in range(self.size))

    class Counting(Stream):
        position = 0

        def __iter__(self):
            while self.position < self.size:
                self.position += 1
                yield torch.tensor(float(self.position - 1))
            self.position = 0

        def state_dict(self):
            return {"position": self.position}

        def load_state_dict(self, state):
            self.position = state["position"]

    class Net(Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen, self.evaluated = [], []

        def training_step(self, batch, batch_idx):
            first = batch["a"] if isinstance(batch, dict) else batch[0] if isinstance(batch, list) else batch
            self.seen += first.flatten().tolist()
            return self.weight * first.float().mean()

        def validation_step(self, batch, batch_idx):
            self.evaluated += batch[0].flatten().tolist()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def trainer_of(**more):
        off = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        return Trainer(accelerator="cpu", devices=world, strategy="ddp", num_sanity_val_steps=0, **off, **more)

    def fit(train, val=None, ckpt_path=None, **more):
        torch.manual_seed(100 + rank)  # nobody has to seed alike
        trainer, net = trainer_of(**{"max_epochs": 1, **more}), Net()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                trainer.fit(net, train, val, ckpt_path=ckpt_path)
                error = ""
            except Exception as raised:
                error = str(raised)
        told = [str(one.message) for one in said if "rank" in str(one.message) or "yielded" in str(one.message)]
        return trainer, {"seen": net.seen, "val": net.evaluated, "told": told, "error": error,
                         "batches": str(trainer.num_training_batches), "steps": trainer.global_step}

    cases = {
        "stream": lambda: DataLoader(Stream(5 - 2 * rank), 1),
        "workers": lambda: DataLoader(Stream(3 + rank), 1, num_workers=1),
        "alike": lambda: DataLoader(Stream(4), 1),
        "none on rank 0": lambda: DataLoader(Stream(3 * rank), 1),
        "lengths": lambda: Sized(5 - 2 * rank, 5 - 2 * rank),
        "a length that is wrong": lambda: DataLoader(SizedStream(5 - 2 * rank, 5), 1),
        "alike, and wrong": lambda: DataLoader(SizedStream(3, 5), 1),
        "with a state": lambda: DataLoader(Counting(4 + rank), 1),
        "beside a longer one": lambda: {"a": DataLoader(Stream(2), 1), "b": DataLoader(Stream(5 - rank), 1)},
        "other kinds": lambda: [DataLoader(Stream(2), 1)] * (1 + rank),
        "other data": lambda: DataLoader(TensorDataset(torch.arange(8.0 + rank)), 2),
    }
    found = {name: fit(make())[1] for name, make in cases.items()}
    found["limited"] = fit(DataLoader(Stream(5 - rank), 1), limit_train_batches=4)[1]
    found["two epochs"] = fit(DataLoader(Stream(5 - 2 * rank), 1), max_epochs=2)[1]
    found["noise"] = fit(DataLoader(Stream(3, noisy=True), 1))[1]

    def loader(**more):
        return DataLoader(TensorDataset(torch.arange(16.0)), 2, shuffle=True, **more)

    found["shuffled"] = fit(loader(), DataLoader(TensorDataset(torch.arange(5.0)), 2), max_epochs=2)[1]
    found["generator"] = fit(loader(generator=torch.Generator().manual_seed(rank)))[1]
    found["few"] = fit(loader(), DataLoader(TensorDataset(torch.arange(1.0)), 2))[1]
    found["own"] = fit(loader(), use_distributed_sampler=False)[1]
    trainer, _ = fit(DataLoader(Counting(6 + rank), 1), max_steps=3)
    trainer.save_checkpoint("half.ckpt")
    trainer, found["rest"] = fit(DataLoader(Counting(6 + rank), 1), ckpt_path="half.ckpt")
    print(json.dumps(found))
"""


BROKEN = (
    SOURCE.split("    cases = {")[0]
    + """
    fitted = trainer_of(max_epochs=1)
    fitted.fit(Net(), Sized(5 - 2 * rank, 5))
"""
)


def test_a_loader_that_gives_less_than_its_length_ends_the_run_of_all(processes: Callable[..., Any]) -> None:
    both = processes(2, BROKEN, timeout=60, check=False)
    assert all(result.code != 0 for result in both)
    assert "yielded 3 batches in this process although its length is 5" in both[1].err


@pytest.fixture(scope="module")
def ranks(processes: Callable[..., Any], tmp_path_factory: Any) -> list[Any]:
    """What each of two processes saw of all that."""
    found = processes(2, SOURCE, timeout=100, folder=tmp_path_factory.mktemp("together"))
    return [json.loads(result.out) for result in found]


@pytest.mark.parametrize(
    ("name", "batches", "who"),
    [
        ("stream", 3, 1),
        ("workers", 3, 0),
        ("none on rank 0", 0, 0),
        ("a length that is wrong", 3, 1),
        ("with a state", 4, 0),
    ],
)
def test_streams_end_where_the_first_one_has_no_more_and_say_whose_it_is(
    name: str, batches: int, who: int, ranks: list[Any]
) -> None:
    for rank in ranks:
        assert rank[name]["error"] == ""
        assert rank[name]["seen"] == [float(number) for number in range(batches)]
        assert rank[name]["steps"] == batches
        (told,) = rank[name]["told"]
        assert told.startswith(f"train_dataloader gave {batches} batches on rank {who} and more on others")


def test_streams_that_end_together_are_not_told_of(ranks: list[Any]) -> None:
    for rank in ranks:
        for name, batches in (("alike", 4), ("limited", 4), ("alike, and wrong", 3)):
            assert rank[name]["seen"] == [float(number) for number in range(batches)]
        assert rank["alike"]["told"] == rank["limited"]["told"] == []
        (told,) = rank["alike, and wrong"]["told"]
        assert told.startswith("train_dataloader yielded 3 batches although its length is 5")
        assert rank["two epochs"]["seen"] == [0.0, 1.0, 2.0] * 2
        assert len(rank["two epochs"]["told"]) == 1
        assert rank["beside a longer one"]["seen"] == [0.0, 1.0] * 2
        assert rank["beside a longer one"]["steps"] == 4


def test_the_smallest_length_is_taken_with_a_word_on_whose_it_is(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank["lengths"]["batches"] == "3"
        assert rank["lengths"]["seen"] == [0.0, 1.0, 2.0]
        (told,) = rank["lengths"]["told"]
        assert told.startswith("train_dataloader has 3 batches on rank 1 and 5 on rank 0")


def test_processes_that_do_not_have_the_same_data_to_deal_out_are_told(ranks: list[Any]) -> None:
    for rank in ranks:
        assert (
            "rank 0 has train_dataloader (with data of its own), rank 1 has 2 loaders" in rank["other kinds"]["error"]
        )
        assert "8 samples on rank 0 and 9 on rank 1" in rank["other data"]["error"]


def test_one_order_is_dealt_out_though_each_process_has_another_seed(ranks: list[Any]) -> None:
    zero, one = ranks
    for name in ("shuffled", "generator"):
        for epoch in range(zero[name]["steps"] // 4):
            part = slice(8 * epoch, 8 * epoch + 8)
            assert sorted(zero[name]["seen"][part] + one[name]["seen"][part]) == [float(n) for n in range(16)]
        assert zero[name]["batches"] == "4"
    assert zero["shuffled"]["val"] == [0.0, 1.0, 4.0] * 2
    assert one["shuffled"]["val"] == [2.0, 3.0] * 2
    assert (zero["few"]["val"], one["few"]["val"]) == ([0.0], [])


def test_what_each_process_has_for_itself_is_its_own(ranks: list[Any]) -> None:
    zero, one = ranks
    assert not set(zero["noise"]["seen"]) & set(one["noise"]["seen"])
    assert zero["own"]["steps"] == 8
    assert sorted(one["own"]["seen"]) == [float(n) for n in range(16)]
    assert zero["rest"]["seen"] == one["rest"]["seen"] == [3.0, 4.0, 5.0]
