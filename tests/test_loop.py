"""The loops against hand-written ones, their hooks in order, and what a step costs in calls and reads."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import trainkit
from trainkit import Callback, Module, Trainer
from trainkit.errors import MisconfigurationException
from trainkit.hooks import ARGUMENTS

BARE = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "fused_optimizers": False,  # the last bits of a plain loop
}


def bare_trainer(**settings: Any) -> Trainer:
    return Trainer(**{**BARE, "max_epochs": 1, **settings})


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


class Net(Module):
    """A small network with dropout, so that random state matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def batches(count: int = 8, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 3, generator=random), torch.randn(size, 1, generator=random)) for _ in range(count)]


class InMemory:
    """Batches that lie in memory."""

    def __init__(self, *items: Any, claims: int | None = None) -> None:
        self.items, self.claims = items, len(items) if claims is None else claims

    def __len__(self) -> int:
        return self.claims

    def __iter__(self) -> Any:
        return iter(self.items)


# ---------------------------------------------------------------- the same as by hand
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize(("clip", "algorithm"), [(None, None), (0.1, "norm"), (0.01, "value")])
@pytest.mark.parametrize("fused", [True, False])
def test_fit_is_the_hand_written_loop_bit_for_bit(
    accumulate: int, clip: float | None, algorithm: str | None, fused: bool
) -> None:
    data = batches()
    module = Net()
    torch.manual_seed(5)
    trainer = bare_trainer(
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        gradient_clip_algorithm=algorithm,
        fused_optimizers=fused,
    )
    trainer.fit(module, InMemory(*data))

    by_hand = Net()
    optimizer = by_hand.configure_optimizers()
    optimizer.param_groups[0]["fused"] = fused
    torch.manual_seed(5)
    steps = 0
    for _ in range(2):
        for index, (x, y) in enumerate(data):
            if index % accumulate == 0:
                optimizer.zero_grad()
            loss = nn.functional.mse_loss(by_hand(x), y)
            (loss / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(data):
                if algorithm == "norm":
                    nn.utils.clip_grad_norm_(by_hand.parameters(), clip)
                elif algorithm == "value":
                    nn.utils.clip_grad_value_(by_hand.parameters(), clip)
                optimizer.step()
                steps += 1
    assert torch.equal(weights(module), weights(by_hand))
    assert trainer.global_step == steps
    assert trainer.current_epoch == 2


def test_two_optimizers_both_step_on_the_loss_and_count_once() -> None:
    class TwoOptimizers(Net):
        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(self.net[0].parameters(), lr=0.1),
                torch.optim.Adam(self.net[3].parameters(), lr=0.01),
            ]

    module, by_hand = TwoOptimizers(), TwoOptimizers()
    torch.manual_seed(5)
    trainer = bare_trainer()
    trainer.fit(module, InMemory(*batches()))
    torch.manual_seed(5)
    optimizers = by_hand.configure_optimizers()
    for x, y in batches():
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.mse_loss(by_hand(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(weights(module), weights(by_hand))
    assert trainer.global_step == 8


def test_a_step_that_returns_none_is_skipped() -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    module, by_hand = Skips(), Net()
    torch.manual_seed(5)
    trainer = bare_trainer()
    with pytest.warns(UserWarning, match="a batch is skipped: training_step returned None"):
        trainer.fit(module, InMemory(*batches()))
    torch.manual_seed(5)
    optimizer = by_hand.configure_optimizers()
    for x, y in batches()[::2]:
        optimizer.zero_grad()
        nn.functional.mse_loss(by_hand(x), y).backward()
        optimizer.step()
    assert torch.equal(weights(module), weights(by_hand))
    assert trainer.global_step == 4


def test_a_batch_that_is_none_is_skipped() -> None:
    told: list[bool] = []

    class Told(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            told.append(bool(outputs))

    trainer = bare_trainer()
    with pytest.warns(UserWarning, match="or its loader yielded None"):
        trainer.fit(Told(), InMemory(*[None if index % 2 else batch for index, batch in enumerate(batches())]))
    assert trainer.global_step == 4
    assert told == [True, False] * 4


def test_manual_optimization_counts_a_batch_once_however_many_optimizers_step() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            x, y = batch
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(nn.functional.mse_loss(self(x), y))
            first.step()
            second.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[3])]

    module = Manual()
    before = weights(module)
    trainer = bare_trainer()
    trainer.fit(module, InMemory(*batches()))
    assert trainer.global_step == 8
    assert not torch.equal(before, weights(module))


# ---------------------------------------------------------------- hooks in order
def tracing(kind: type, trace: list[str], who: str) -> type:
    """Return a subclass of a Module or Callback class that notes every hook it answers."""
    skipped = {"on_save_checkpoint", "on_save_point"}

    def noting(name: str) -> Any:
        def hook(self: Any, *arguments: Any) -> Any:
            trace.append(f"{who}.{name}")
            return getattr(kind, name)(self, *arguments)

        return hook

    names = [name for name in ARGUMENTS if hasattr(kind, name) and name not in skipped]
    return type(f"Traced{kind.__name__}", (kind,), {name: noting(name) for name in names})


def test_fit_fires_its_hooks_in_the_written_order() -> None:
    trace: list[str] = []

    class Noting(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            trace.append("training_step")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            trace.append("validation_step")

        def configure_optimizers(self) -> Any:
            trace.append("configure_optimizers")
            return super().configure_optimizers()

    module = tracing(Noting, trace, "pl")()
    callback = tracing(Callback, trace, "cb")()
    trainer = bare_trainer(callbacks=[callback], accumulate_grad_batches=2, num_sanity_val_steps=1)
    trainer.fit(module, InMemory(*batches(3)), InMemory(*batches(1)))

    def both(name: str) -> list[str]:
        return [f"cb.{name}", f"pl.{name}"]

    validation = [
        *both("on_validation_start"),
        *both("on_validation_epoch_start"),
        *both("on_validation_batch_start"),
        "validation_step",
        *both("on_validation_batch_end"),
        *both("on_validation_epoch_end"),
        *both("on_validation_end"),
    ]
    forward_backward = ["training_step", *both("on_before_backward"), *both("on_after_backward")]
    assert trace == [
        *both("setup"),
        "configure_optimizers",
        *both("on_fit_start"),
        "cb.on_sanity_check_start",
        *validation,
        "cb.on_sanity_check_end",
        *both("on_train_start"),
        *both("on_train_epoch_start"),
        *both("on_train_batch_start"),
        *both("on_before_zero_grad"),
        *forward_backward,
        *both("on_train_batch_end"),
        *both("on_train_batch_start"),
        *forward_backward,
        *both("on_before_optimizer_step"),
        *both("on_train_batch_end"),
        *both("on_train_batch_start"),
        *both("on_before_zero_grad"),
        *forward_backward,
        *both("on_before_optimizer_step"),
        *both("on_train_batch_end"),
        *validation,
        *both("on_train_epoch_end"),
        *both("on_train_end"),
        *both("on_fit_end"),
        *both("teardown"),
    ]


@pytest.mark.parametrize(
    ("call", "stage", "event"),
    [("validate", "validate", "validation"), ("test", "test", "test"), ("predict", "predict", "predict")],
)
def test_the_evaluations_fire_their_hooks_in_the_written_order(call: str, stage: str, event: str) -> None:
    trace: list[str] = []
    step = f"{event}_step"
    module = tracing(type("Noting", (Net,), {step: lambda self, batch: trace.append("step") or 0}), trace, "pl")()
    trainer = bare_trainer(callbacks=[tracing(Callback, trace, "cb")()])
    extra = {} if call == "predict" else {"verbose": False}
    getattr(trainer, call)(module, InMemory(*batches(1)), **extra)
    hooks = ["setup", *(f"on_{event}_{name}" for name in ("start", "epoch_start", "batch_start"))]
    after = [*(f"on_{event}_{name}" for name in ("batch_end", "epoch_end", "end")), "teardown"]
    assert trace == [
        *(f"{who}.{name}" for name in hooks for who in ("cb", "pl")),
        "step",
        *(f"{who}.{name}" for name in after for who in ("cb", "pl")),
    ]


def test_counters_have_moved_before_anybody_hears_of_a_finished_batch() -> None:
    seen = []

    class Counts(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append((trainer.progress.epoch, trainer.progress.batch, trainer.global_step))

    bare_trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=Counts()).fit(Net(), InMemory(*batches(3)))
    assert seen == [(0, 1, 0), (0, 2, 1), (0, 3, 2), (1, 1, 2), (1, 2, 3), (1, 3, 4)]


def test_save_points_come_between_windows_and_after_epochs() -> None:
    seen = []

    class Points(Callback):
        def on_save_point(self, trainer: Trainer, module: Module) -> None:
            seen.append((trainer.progress.epoch, trainer.progress.batch, trainer.global_step))

    bare_trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=Points()).fit(Net(), InMemory(*batches(5)))
    assert seen == [(0, 2, 1), (0, 4, 2), (1, 0, 3), (1, 2, 4), (1, 4, 5), (2, 0, 6)]


def test_minus_one_from_on_train_batch_start_skips_the_rest_of_the_epoch() -> None:
    class Impatient(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    trainer = bare_trainer(max_epochs=3)
    trainer.fit(Impatient(), InMemory(*batches(8)))
    assert (trainer.global_step, trainer.current_epoch) == (6, 3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3)  # a skipped rest is an epoch, too


# ---------------------------------------------------------------- when to validate, when to stop
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [8, 16]),
        ({"val_check_interval": 0.5}, [4, 8, 12, 16]),
        ({"val_check_interval": 3}, [3, 6, 11, 14]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 6, 9, 12, 15]),
        ({"check_val_every_n_epoch": 2}, [16]),
        ({"limit_val_batches": 0}, []),
        ({"val_check_interval": "00:00:00:00"}, list(range(1, 17))),
    ],
)
def test_validation_runs_when_it_is_due(settings: dict[str, Any], expected: list[int]) -> None:
    seen = []

    class Validates(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def on_validation_start(self) -> None:
            seen.append(self.trainer.progress.total_batch)

    trainer = bare_trainer(max_epochs=2, num_sanity_val_steps=0, **settings)
    trainer.fit(Validates(), InMemory(*batches(8)), InMemory(*batches(1)))
    assert seen == expected


def test_validation_runs_when_the_loader_yields_less_than_it_claims() -> None:
    seen = []

    class Validates(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(self.global_step)

    trainer = bare_trainer(max_epochs=2, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match=r"yielded 6 batches although its length is 10"):
        trainer.fit(Validates(), InMemory(*batches(6), claims=10), InMemory(*batches(1)))
    assert seen == [6, 12]


def test_a_step_limit_inside_an_epoch_ends_it_with_its_hooks() -> None:
    seen = []

    class Ends(Net):
        def on_train_epoch_end(self) -> None:
            seen.append(self.global_step)

    trainer = bare_trainer(max_epochs=-1, max_steps=11)
    trainer.fit(Ends(), InMemory(*batches(8)))
    assert trainer.global_step == 11
    assert seen == [8, 11]
    assert (trainer.progress.epoch, trainer.progress.batch) == (1, 3)


@pytest.mark.parametrize(("minimum", "steps"), [({}, 3), ({"min_steps": 5}, 8), ({"min_epochs": 2}, 16)])
def test_should_stop_is_honoured_after_the_minimum(minimum: dict[str, int], steps: int) -> None:
    class Stops(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step >= 3:
                self.trainer.should_stop = True

    trainer = bare_trainer(max_epochs=5, **minimum)
    trainer.fit(Stops(), InMemory(*batches(8)))
    assert trainer.global_step == steps


def test_no_epochs_and_no_batches_run_nothing() -> None:
    for settings in ({"max_epochs": 0}, {"limit_train_batches": 0}, {"max_steps": 0}):
        trainer = bare_trainer(**settings)
        trainer.fit(Net(), InMemory(*batches(8)))
        assert trainer.global_step == 0


# ---------------------------------------------------------------- evaluation and prediction
def test_evaluation_runs_without_gradients_in_evaluation_mode_and_gives_each_part_its_mode_back() -> None:
    seen = []

    class Looks(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net[1].eval()  # a part that the user keeps in evaluation mode

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append((self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    module = Looks()
    with pytest.warns(UserWarning, match="evaluation mode at the start"):
        bare_trainer().fit(module, InMemory(*batches(2)), InMemory(*batches(1)))
    bare_trainer().validate(module, InMemory(*batches(1)), verbose=False)
    bare_trainer(inference_mode=False).validate(module, InMemory(*batches(1)), verbose=False)
    assert seen == [(False, False, False)] * 2 + [(False, False, True), (False, False, False)]
    assert module.training
    assert not module.net[1].training


def test_several_loaders_give_a_result_each() -> None:
    class Two(Net):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            self.log("index", float(dataloader_idx))
            self.log("rows", batch[0].shape[0], add_dataloader_idx=True)

    results = bare_trainer().test(Two(), [InMemory(*batches(2)), InMemory(*batches(1, size=6))], verbose=False)
    assert results == [
        {"index/dataloader_idx_0": 0.0, "rows/dataloader_idx_0": 4.0},
        {"index/dataloader_idx_1": 1.0, "rows/dataloader_idx_1": 6.0},
    ]


def test_several_loaders_need_a_step_that_takes_their_index() -> None:
    class One(Net):
        def test_step(self, batch: Any, batch_idx: int) -> None: ...

    with pytest.raises(
        RuntimeError, match=r"One.test_step needs an argument dataloader_idx. It takes \(batch, batch_idx\)"
    ):
        bare_trainer().test(One(), [InMemory(*batches(1)), InMemory(*batches(1))], verbose=False)


def test_predict_returns_what_the_step_gave() -> None:
    x = torch.arange(12.0).reshape(4, 3)
    module = Net()
    loader = DataLoader(x, 2)  # type: ignore[arg-type]
    predictions = bare_trainer().predict(module, loader)
    module.eval()
    assert [p.shape for p in predictions] == [(2, 1), (2, 1)]
    assert torch.allclose(torch.cat(predictions), module(x))
    assert bare_trainer().predict(module, loader, return_predictions=False) is None
    assert len(bare_trainer().predict(module, [loader, loader])) == 2


# ---------------------------------------------------------------- what a step costs
class Tiny(Module):
    def __init__(self, record: list[Any] | None = None) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)
        self.record = record

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.record is not None:
            self.record.append([frame.function for frame in inspect.stack(0)])
        return self.line(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


FRAMEWORK = (str(Path(trainkit.__file__).parent), str(Path(trainkit.__file__).parent.parent / "callbacks"))


def framework_calls(steps: int, module: Module, in_a_list: bool = False, **settings: Any) -> Counter[str]:
    """Count the Python calls in framework files during a fit of so many steps."""
    calls: Counter[str] = Counter()

    def count(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(FRAMEWORK):
            calls[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1

    trainer = Trainer(accelerator="cpu", max_epochs=1, log_every_n_steps=10**6, enable_model_summary=False, **settings)
    made = batches(1) * steps
    loader = DataLoader(made, batch_size=None) if in_a_list else InMemory(*made)  # a list draws no random numbers
    sys.setprofile(count)
    try:
        trainer.fit(module, loader)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.filterwarnings("ignore:log_every_n_steps")
@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}, 20),
        ({"enable_progress_bar": True, "enable_checkpointing": True, "logger": True}, 25),
    ],
)
def test_a_step_makes_few_calls_in_framework_files(settings: dict[str, Any], most: int) -> None:
    few, many = framework_calls(50, Tiny(), **settings), framework_calls(250, Tiny(), **settings)
    per_step = {name: (many[name] - few[name]) / 200 for name in many if many[name] - few[name] >= 200}
    assert sum(per_step.values()) <= most, per_step


@pytest.mark.filterwarnings("ignore:log_every_n_steps")
def test_a_step_on_batches_in_a_list_makes_few_calls_in_framework_files() -> None:
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    made = [framework_calls(steps, Tiny(), in_a_list=True, **settings) for steps in (200, 400)]
    assert (sum(made[1].values()) - sum(made[0].values())) / 200 <= 21


def test_two_frames_lie_between_the_call_of_fit_and_the_training_step() -> None:
    record: list[list[str]] = []
    bare_trainer(limit_train_batches=1).fit(Tiny(record), InMemory(*batches(2)))
    stack = record[0]
    assert stack[:3] == ["training_step", "fit", "fit"]
    assert stack[3] == "test_two_frames_lie_between_the_call_of_fit_and_the_training_step"


class Reads(TorchDispatchMode):
    """Count what reads a tensor's value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name() in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"):
            self.reads.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("every", [5, 10])
def test_nothing_is_read_between_log_points(every: int, tmp_path: Path) -> None:
    class Logs(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, prog_bar=True)
            self.log("both", loss * 2, on_step=True, on_epoch=True)
            return loss

    class Between(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append((trainer.global_step, len(mode.reads)))

    seen: list[tuple[int, int]] = []
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, log_every_n_steps=every, callbacks=Between(), enable_model_summary=False
    )
    with Reads() as mode:
        trainer.fit(Logs(), InMemory(*batches(20)))
    steps = {after: reads - before for (_, before), (after, reads) in itertools.pairwise(seen)}
    # a log point comes after on_train_batch_end, so its reads show at the next step
    assert all(reads == 0 for step, reads in steps.items() if (step - 1) % every), steps


# ---------------------------------------------------------------- bad input, before the first step
def test_a_module_without_training_step_is_refused() -> None:
    class Nothing(Module):
        def configure_optimizers(self) -> None: ...

    with pytest.raises(MisconfigurationException, match="Nothing has no training_step"):
        bare_trainer().fit(Nothing(), InMemory(*batches(1)))


def test_detect_anomaly_names_the_operation_that_made_a_nan() -> None:
    class Breaks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (super().training_step(batch, batch_idx) * 0).sqrt() * 0

    with (
        pytest.raises(RuntimeError, match="'SqrtBackward0' returned nan"),
        pytest.warns(UserWarning, match="Anomaly|Error detected"),
    ):
        bare_trainer(detect_anomaly=True).fit(Breaks(), InMemory(*batches(1)))
    assert not torch.is_anomaly_enabled()


def test_a_module_without_optimizer_is_refused() -> None:
    class Nothing(Module):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

    with pytest.raises(MisconfigurationException, match=r"no configure_optimizers.*torch.optim.AdamW"):
        bare_trainer().fit(Nothing(), InMemory(*batches(1)))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: loss.detach(), "does not require grad"),
        (lambda loss: loss.item(), "must return the loss as a tensor"),
        (lambda loss: {"los": loss}, r"a dict with \['los'\]"),
        (lambda loss: (loss, 1), "must return the loss as a tensor"),
        (lambda loss: torch.stack([loss, loss]), r"must return one number as the loss. Received: shape \(2,\)"),
    ],
)
def test_a_loss_that_teaches_nothing_is_refused_before_the_first_step(returned: Any, message: str) -> None:
    class Wrong(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return returned(super().training_step(batch, batch_idx))

    trainer = bare_trainer()
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(Wrong(), InMemory(*batches(2)))
    assert trainer.global_step == 0


def test_a_schedule_may_span_the_whole_run() -> None:
    totals = []

    class Spans(Net):
        def configure_optimizers(self) -> Any:
            totals.append(self.trainer.estimated_stepping_batches)
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=totals[-1])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    trainer = bare_trainer(max_epochs=3, accumulate_grad_batches=3)
    trainer.fit(Spans(), InMemory(*batches(8)))
    bare_trainer(max_epochs=3, max_steps=5).fit(Spans(), InMemory(*batches(8)))
    assert totals == [9, 5]
    assert trainer.global_step == 9


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="train_dataloader is empty"):
        bare_trainer().fit(Net(), InMemory())
    with pytest.warns(UserWarning, match="train_dataloader yielded no batch"):
        bare_trainer().fit(Net(), (batch for batch in ()))
    module = type("Validates", (Net,), {"validation_step": lambda self, batch: None})()
    with pytest.raises(MisconfigurationException, match="val_dataloader is empty"):
        bare_trainer().fit(module, InMemory(*batches(1)), InMemory())


def test_missing_data_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="fit needs training data"):
        bare_trainer().fit(Net())
    with pytest.raises(MisconfigurationException, match="predict needs data"):
        bare_trainer().predict(Net())


def test_a_batch_on_another_device_is_refused() -> None:
    class Moves(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [tensor.to("meta") for tensor in batch]

    with pytest.raises(MisconfigurationException, match=r"batch\[0\] is on meta, the module on cpu"):
        bare_trainer().fit(Moves(), InMemory(*batches(1)))


def test_what_is_no_loader_is_refused() -> None:
    with pytest.raises(TypeError, match=r"train_dataloader must be an iterable of batches. Received: int"):
        bare_trainer().fit(Net(), 3)


def test_the_batch_transfer_hooks_change_the_batch(TinyModule: type[Module]) -> None:
    seen = []

    class Moves(TinyModule):  # type: ignore[misc, valid-type]
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [part + 1 for part in batch]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            seen.append(float(batch[0][0, 0]))
            return batch

    data = TensorDataset(torch.zeros(4, 3), torch.zeros(4, 1))
    bare_trainer().fit(Moves(), DataLoader(data, 4))
    assert seen == [1.0]
