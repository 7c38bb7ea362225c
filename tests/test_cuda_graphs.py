"""Trainer(compile="graph"): equal to eager, on a cuda device; and everything but the capture itself without one.

`Again` stands in for the device: it runs what was captured again, into the tensors that the capture returned.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.capturing import signature_of
from trainkit.cuda_graphs import Graphs
from trainkit.errors import MisconfigurationException

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 3,
}


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [leaf for part in tree for leaf in leaves(part)] if isinstance(tree, (list, tuple)) else []


class Again:
    """Capture a function as a graph does: nothing has happened after it, and a replay does everything again."""

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.optimizers: list[torch.optim.Optimizer] = []
        self.captures = self.replays = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        assert self.module is not None
        tensors = [*self.module.parameters(), *self.module.buffers()]
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        states = [v for o in self.optimizers for s in o.state.values() for v in s.values() if isinstance(v, Tensor)]
        kept = [(tensor, tensor.detach().clone()) for tensor in (*tensors, *grads, *states)]
        draws = torch.get_rng_state()
        self.captures += 1
        returned = function()
        torch.set_rng_state(draws)
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
        options = [[dict(group) for group in o.param_groups] for o in self.optimizers]

        def replay() -> None:
            self.replays += 1
            recorder = self.module.__dict__["_run_metrics"]
            now = [[dict(group) for group in o.param_groups] for o in self.optimizers]
            self._use(options)
            recorder.noting, calls = True, recorder.calls
            recorder.calls = []
            fresh = function()
            recorder.noting, recorder.calls = False, calls
            self._use(now)
            with torch.no_grad():
                for place, value in zip(leaves(returned), leaves(fresh), strict=True):
                    if place is not value:
                        place.copy_(value)

        return returned, replay

    def _use(self, options: list[list[dict[str, Any]]]) -> None:
        for optimizer, groups in zip(self.optimizers, options, strict=True):
            for group, own in zip(optimizer.param_groups, groups, strict=True):
                group.update(own)


class Net(Module):
    def __init__(self, optimizer: str = "adam", schedule: bool = True, dropout: float = 0.25) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 1)
        )
        self.unused = nn.Linear(2, 2)
        self.optimizer, self.schedule = optimizer, schedule

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        out = self.layers(x)
        loss = nn.functional.mse_loss(out, y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(x))
        self.log_dict({"twice": 2 * loss, "largest": out.max()}, on_step=False, on_epoch=True)
        return {"loss": loss, "out": out}

    def configure_optimizers(self) -> Any:
        makers: dict[str, Any] = {
            "adam": lambda p: torch.optim.Adam(p, lr=0.02),
            "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, amsgrad=True),
            "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
            "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
            "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
        }
        optimizer = makers[self.optimizer](self.parameters())
        if not self.schedule:
            return optimizer
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Seen(Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.outputs: list[Tensor] = []
        self.hooks: list[str] = []

    def on_before_backward(self, trainer: Trainer, pl_module: Module, loss: Tensor) -> None:
        self.hooks.append("before_backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Module, optimizer: Any) -> None:
        self.hooks.append("before_step")
        norm = torch.stack([p.grad.norm() for p in pl_module.parameters() if p.grad is not None]).norm()
        pl_module.log("norm", norm)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.outputs.append(outputs["out"])  # not copied: it must stay what it is


def loader(samples: int = 40, device: str = "cpu") -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(samples, width, generator=generator) for width in (8, 1)]
    return DataLoader(TensorDataset(*data), 4, shuffle=True)


class OnAgain(Graphs):
    """Graphs on the stand-in."""

    def attach(self, trainer: Trainer) -> None:
        assert isinstance(self.record, Again)
        self.record.module, self.record.optimizers = trainer.module, trainer.optimizers
        for optimizer in trainer.optimizers:
            for state in optimizer.state.values():
                assert state is not None
        super().attach(trainer)


def trained(module: Module, graph: bool, data: Any = None, cuda: bool = False, **settings: Any) -> tuple[Trainer, Any]:
    """Train a module; return the trainer, and what captured its steps."""
    torch.manual_seed(5)
    ckpt_path = settings.pop("ckpt_path", None)
    if cuda:
        trainer = Trainer(**{**QUIET, "accelerator": "gpu", "compile": "graph" if graph else None, **settings})
    else:
        trainer = Trainer(**{**QUIET, "accelerator": "cpu", "fused_optimizers": True, **settings})
        trainer.graphs = OnAgain(Again()) if graph else None
    trainer.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return trainer, trainer.graphs.record if trainer.graphs is not None else None


def compare(one: Any, other: Any) -> None:
    """The learning rate of a captured update is a float32 of the device."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


CASES: list[dict[str, Any]] = [
    {},
    {"optimizer": "adamw"},
    {"optimizer": "sgd"},
    {"optimizer": "momentum", "gradient_clip_val": 0.1},
    {"optimizer": "rmsprop"},
    {"accumulate_grad_batches": 3},
    {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    {"precision": "bf16-mixed"},
    {"precision": "16-mixed"},
    {"samples": 42},
    {"samples": 42, "accumulate_grad_batches": 2},
]


def check_equal_to_eager(case: dict[str, Any], cuda: bool) -> Any:
    settings = dict(case)
    name, samples = settings.pop("optimizer", "adam"), settings.pop("samples", 40)
    seen, modules, trainers, record = [Seen(), Seen()], [Net(name), Net(name)], [], None
    for graph, module, callback in zip((False, True), modules, seen, strict=True):
        trainer, found = trained(module, graph, loader(samples), cuda, callbacks=[callback], **settings)
        trainers.append(trainer)
        record = found or record
    compare(dict(modules[1].state_dict()), dict(modules[0].state_dict()))
    compare(seen[1].rows, seen[0].rows)
    compare(seen[1].outputs, seen[0].outputs)
    assert seen[1].hooks == seen[0].hooks
    states = [trainer.optimizers[0].state_dict() for trainer in trainers]
    compare(states[1], states[0])
    assert trainers[1].global_step == trainers[0].global_step
    return record


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replays_are_the_eager_run(case: dict[str, Any]) -> None:
    record = check_equal_to_eager(case, cuda=False)
    steps = 30 if case.get("samples", 40) == 40 else 33
    assert record.captures <= 4
    assert record.replays >= steps - 3 - (4 if case.get("samples") else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_graphs_on_a_device_are_the_eager_run(case: dict[str, Any]) -> None:
    check_equal_to_eager(case, cuda=True)


@pytest.mark.gpu
def test_dropout_goes_on_in_the_eager_runs_stream() -> None:
    states = []
    for graph in (False, True):
        trained(Net(dropout=0.5), graph, cuda=True)
        states.append(torch.cuda.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.gpu
def test_a_captured_step_on_a_device_waits_for_nothing() -> None:
    class Warning(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
            torch.cuda.set_sync_debug_mode("error" if trainer.global_step > 6 else "default")

        def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
            torch.cuda.set_sync_debug_mode("default")

    try:
        trained(Net(), True, cuda=True, callbacks=[Warning()], max_epochs=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cuda", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_a_resumed_run_captures_again_and_ends_as_the_one_that_went_through(tmp_path: Path, cuda: bool) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=10, save_top_k=-1)
    whole, resumed = Net(), Net()
    trained(whole, True, cuda=cuda, enable_checkpointing=True, callbacks=[keep])
    _, record = trained(resumed, True, cuda=cuda, ckpt_path=tmp_path / "step=10.ckpt")
    compare(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert cuda or record.replays > 0
    state = torch.load(tmp_path / "step=30.ckpt", weights_only=True)["optimizer_states"][0]
    assert isinstance(state["param_groups"][0]["lr"], float)
    assert not state["param_groups"][0]["capturable"]


def test_a_part_that_is_unfrozen_is_captured_anew() -> None:
    class Thawing(Net):
        def on_train_epoch_start(self) -> None:
            self.layers[0].requires_grad_(self.trainer.current_epoch > 0)

    modules = [Thawing("momentum"), Thawing("momentum")]
    trained(modules[0], False)
    _, record = trained(modules[1], True)
    compare(dict(modules[1].state_dict()), dict(modules[0].state_dict()))
    assert record.captures == 4  # step and update, twice


def test_an_option_that_a_schedule_moves_is_followed() -> None:
    class Cycling(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=31)  # and the momentum
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    modules = [Cycling(), Cycling()]
    trained(modules[0], False)
    trained(modules[1], True)
    compare(dict(modules[1].state_dict()), dict(modules[0].state_dict()))


class Reading(Net):
    """Does in its step what no graph repeats."""

    def __init__(self, does: Callable[[Any, Tensor, int], Any]) -> None:
        super().__init__()
        self.does, self.count, self.losses = does, 0, []  # type: ignore[var-annotated]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = self.layers(batch[0]).pow(2).mean()
        self.does(self, loss, batch_idx)
        return loss


def count(module: Any, loss: Tensor, batch_idx: int) -> None:
    module.count += 1


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (lambda module, loss, batch_idx: module.current_epoch, r"reads trainer\.current_epoch"),
        (lambda module, loss, batch_idx: module.global_step, r"reads trainer\.global_step"),
        (lambda module, loss, batch_idx: module.trainer.callback_metrics, r"reads trainer\.callback_metrics"),
        (lambda module, loss, batch_idx: module.optimizers(), r"reads trainer\.step_optimizers"),
        (lambda module, loss, batch_idx: batch_idx % 2, "computes with batch_idx"),
        (lambda module, loss, batch_idx: batch_idx == 0, "computes with batch_idx"),
        (lambda module, loss, batch_idx: f"{batch_idx}", "computes with batch_idx"),
        (lambda module, loss, batch_idx: module.log("rate", 0.1), "logs 'rate', which is no tensor"),
        (count, r"changes self\.count"),
        (lambda module, loss, batch_idx: module.losses.append(loss.detach()), r"changes self\.losses"),
        (lambda module, loss, batch_idx: random.random(), "draws random numbers from python"),
    ],
)
def test_what_would_stay_as_it_was_in_one_step_is_refused_by_name(does: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trained(Reading(does), True)


def test_a_metric_object_in_a_captured_step_is_refused_by_name() -> None:
    import torchmetrics

    class Measuring(Net):
        def __init__(self) -> None:
            super().__init__()
            self.error = torchmetrics.MeanSquaredError()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            out = self.layers(batch[0])
            self.error(out, batch[1])
            return nn.functional.mse_loss(out, batch[1])

    with pytest.raises(MisconfigurationException, match=r"changes self\.error\..* metric object"):
        trained(Measuring(), True)


@pytest.mark.gpu
def test_a_step_that_waits_for_the_device_is_refused_with_what_to_do() -> None:
    with pytest.raises(MisconfigurationException, match=r"could not be captured.*\.item\(\)"):
        trained(Reading(lambda module, loss, batch_idx: loss.item()), True, cuda=True)


class ByHand(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class OwnBackward(Net):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


class OwnStep(Net):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None: ...


class Closing(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (ByHand, {}, "automatic_optimization=False"),
        (OwnBackward, {}, "OwnBackward overrides backward"),
        (OwnStep, {}, "OwnStep overrides optimizer_step"),
        (Closing, {}, "LBFGS computes the loss again"),
        (Net, {"nan_policy": "raise"}, "nan_policy='raise'"),
        (Net, {"nan_policy": "skip"}, "nan_policy='skip'"),
        (Net, {"detect_anomaly": True}, "detect_anomaly"),
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_run_that_no_graph_can_repeat_is_refused_before_it_begins(
    make: Callable[[], Module], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(MisconfigurationException, match=f"compile='graph' can't be used here: .*{message}"):
        trained(make(), True, **settings)


def test_without_a_cuda_device_a_graph_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="needs a cuda device"):
        Trainer(accelerator="cpu", compile="graph")


def test_batches_with_changing_values_run_uncaptured_after_one_warning() -> None:
    class Named(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layers(batch["x"]).pow(2).mean()

    batches: Any = DataLoader([{"x": torch.randn(4, 8), "name": object()} for _ in range(6)], batch_size=None)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"batch\['name'\] is a object") as told:
        _, record = trained(Named(), True, data=batches)
    assert len(told) == 1
    assert record.captures == 0


def test_batches_share_a_graph_when_structure_shapes_and_values_are_equal() -> None:
    x, y = torch.zeros(4, 8), torch.zeros(4, 1)
    base, tensors, unfit = signature_of({"x": x, "more": [y, 3, None]})
    assert unfit is None
    assert [id(tensor) for tensor in tensors] == [id(x), id(y)]
    equal = {"x": torch.ones(4, 8), "more": [torch.ones(4, 1), 3, None]}
    assert signature_of(equal)[0] == base
    for change in (
        {"x": torch.zeros(3, 8)},
        {"x": torch.zeros(4, 8, dtype=torch.float64)},
        {"x": torch.zeros(8, 4).t()},
        {"more": [y, 4, None]},
        {"more": (y, 3, None)},
        {"other": 1},
    ):
        assert signature_of({**copy.copy(equal), **change})[0] != base
    assert signature_of([x, x])[0] != signature_of([x, x.clone()])[0]
    assert signature_of([x.to_sparse()])[2] == "batch[0] is not a dense tensor"


def test_switched_off_nothing_of_it_is_there() -> None:
    trainer, _ = trained(Net(), False)
    assert trainer.graphs is None
    assert trainer.wrapped_step("training_step") == trainer.module.training_step
