"""Trainer(channels_last=True): what user code sees, the same training and files; and other switches of torch."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Module, Trainer

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 2,
}
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat, self.deep = nn.Conv2d(3, 4, 3), nn.Conv3d(2, 4, 3)
        self.line = nn.Linear(4, 1)
        self.seen: list[bool] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        image, volume, target = batch["image"], batch["volume"], batch["target"]
        self.seen.append(
            image.is_contiguous(memory_format=LAST)
            and volume.is_contiguous(memory_format=LAST_3D)
            and self.flat.weight.is_contiguous(memory_format=LAST)
            and self.deep.weight.is_contiguous(memory_format=LAST_3D)
            and self.flat(image).is_contiguous(memory_format=LAST)
        )
        assert image.shape == (4, 3, 8, 8)
        out = self.line(self.flat(image).mean((2, 3)) + self.deep(volume).mean((2, 3, 4)))
        return nn.functional.mse_loss(out, target)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def collated(items: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    return dict(zip(("image", "volume", "target"), map(torch.stack, zip(*items, strict=True)), strict=True))


def loader() -> DataLoader[Any]:
    random = torch.Generator().manual_seed(1)
    shapes = (3, 8, 8), (2, 5, 5, 5), (1,)
    data = [torch.randn(12, *shape, generator=random) for shape in shapes]
    return DataLoader(TensorDataset(*data), 4, collate_fn=collated)


def trained(channels_last: bool, **settings: Any) -> tuple[Trainer, Net]:
    module = Net()
    trainer = Trainer(**{**QUIET, "channels_last": channels_last, **settings})
    trainer.fit(module, loader())
    return trainer, module


def test_images_volumes_and_weights_are_channels_last_in_a_step_and_training_is_the_same() -> None:
    (_, module), (_, plain) = trained(True), trained(False)
    assert all(module.seen)
    assert not any(plain.seen)
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_after_the_run_everything_lies_as_it_did() -> None:
    trainer, module = trained(True)
    states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    grads = [parameter.grad for parameter in module.parameters()]
    assert all(value.is_contiguous() for value in (*module.state_dict().values(), *states, *grads) if value is not None)


def layouts(path: Path) -> list[Any]:
    """Return shapes and strides of all tensors in a checkpoint."""
    with zipfile.ZipFile(path) as file:
        name = next(name for name in file.namelist() if name.endswith("trainkit.json"))
        found: list[Any] = []

        def walk(value: Any) -> None:
            if isinstance(value, dict):
                if "$tensor" in value:
                    found.append((value["$tensor"]["shape"], value["$tensor"]["stride"]))
                for inner in value.values():
                    walk(inner)
            elif isinstance(value, list):
                for inner in value:
                    walk(inner)

        walk(json.loads(file.read(name)))
    return found


class Saving(Net):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 2:
            self.trainer.save_checkpoint("inside.ckpt")


def test_a_checkpoint_lies_as_one_without_it_and_each_resumes_the_other(tmp_path: Path) -> None:
    files = []
    for channels_last in (True, False):
        torch.manual_seed(3)
        module = Saving()
        Trainer(**QUIET, channels_last=channels_last).fit(module, loader())
        files.append(Path("inside.ckpt").rename(tmp_path / f"{channels_last}.ckpt"))
    assert layouts(files[0]) == layouts(files[1]) != []
    ends = []
    for path in files:
        for channels_last in (True, False):
            module, same = Saving(), path.stem == str(channels_last)
            with nullcontext() if same else pytest.warns(UserWarning, match=r"bits +Trainer\(channels_last\)"):
                Trainer(**QUIET, channels_last=channels_last).fit(module, loader(), ckpt_path=path)
            ends.append(module)
    for module in ends[1:]:
        for one, other in zip(ends[0].parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def digest(module: nn.Module) -> str:
    numbers = b"".join(p.detach().contiguous().numpy().tobytes() for p in module.parameters())
    return hashlib.sha256(numbers).hexdigest()


def test_a_resumed_run_ends_as_the_one_that_went_through(tmp_path: Path) -> None:
    module = Saving()
    Trainer(**QUIET, channels_last=True).fit(module, loader())
    resumed = Saving()
    Trainer(**QUIET, channels_last=True).fit(resumed, loader(), ckpt_path="inside.ckpt")
    assert digest(module) == digest(resumed)


@pytest.mark.parametrize(
    "settings", [{"precision": "bf16-mixed"}, {"precision": "64-true"}, {"fused_optimizers": True}]
)
def test_it_goes_with_precisions_and_optimizers(settings: dict[str, Any]) -> None:
    module = trained(True, **settings)[1]
    assert all(module.seen)


def test_exports_and_other_stages_are_the_same() -> None:
    class Predicting(Net):
        def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.seen.append(batch["image"].is_contiguous(memory_format=LAST))
            return self.flat(batch["image"])

    module = Predicting()
    results = [Trainer(**QUIET, channels_last=order).predict(module, loader()) for order in (True, False)]
    assert module.seen == [True] * 3 + [False] * 3
    for one, other in zip(*map(list, results), strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(one, other)


def seen_in_run(read: Callable[[], Any], **settings: Any) -> Any:
    class Reading(Net):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            values.append(read())
            return super().training_step(batch, batch_idx)

    values: list[Any] = []
    Trainer(**{**QUIET, **settings}).fit(Reading(), loader())
    return values[-1]


@pytest.mark.parametrize("wanted", ["high", "medium", "highest"])
def test_matmul_precision_is_set_for_a_run_and_put_back(wanted: str) -> None:
    before = torch.get_float32_matmul_precision()
    assert seen_in_run(torch.get_float32_matmul_precision, matmul_precision=wanted) == wanted
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(TypeError):
        Trainer(**QUIET, matmul_precision=wanted).fit(Net(), 3)  # type: ignore[arg-type]
    assert torch.get_float32_matmul_precision() == before


def test_each_trainer_has_its_own_switches_in_its_runs() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    try:
        first = Trainer(**QUIET, deterministic="warn")
        Trainer(**QUIET, deterministic=False, benchmark=True)
        values: list[Any] = []

        class Reading(Net):
            def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
                values.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
                return super().training_step(batch, batch_idx)

        first.fit(Reading(), loader())
        assert set(values) == {(True, False)}
        assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == (False, True)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
