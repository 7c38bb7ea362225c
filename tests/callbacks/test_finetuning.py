from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import BackboneFinetuning, BaseFinetuning
from trainkit.errors import MisconfigurationException


class Net(Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
            self.head = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.1)


class Nested(nn.Module):
    """Parameters of its own, children in every container, batch normalization in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.rows = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
        self.named = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Sequential(nn.BatchNorm1d(2))})


class Watch(Callback):
    """Keep the learning rates of every group as an epoch ends, and save after some updates."""

    def __init__(self, *save_at: int) -> None:
        self.save_at = save_at
        self.rates: list[list[float]] = []

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        self.rates.append([round(group["lr"], 6) for group in trainer.optimizers[0].param_groups])

    def on_save_point(self, trainer: Trainer, module: Module) -> None:
        if trainer.global_step in self.save_at:
            trainer.save_checkpoint(f"{trainer.global_step}.ckpt")


class Gradual(BaseFinetuning):
    """Unfreeze one layer of the backbone with each epoch, the last first."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch in (1, 2):
            self.unfreeze_and_add_param_group(pl_module.backbone[2 - epoch], optimizer)


def fit(*callbacks: Callback, module: Module | None = None, ckpt_path: str | None = None, **settings: Any) -> Trainer:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        callbacks=list(callbacks), **{**quiet, "enable_checkpointing": False, "max_epochs": 4, **settings}
    )
    trainer.fit(module or Net(), loader, ckpt_path=ckpt_path)
    return trainer


def trainable(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---------------------------------------------------------------------- the helpers
def test_modules_are_flattened_to_those_with_parameters_and_the_leaves() -> None:
    net = Nested()
    names = {part: name for name, part in net.named_modules()}

    def flat(modules: Any) -> list[str]:
        return [names[part] for part in BaseFinetuning.flatten_modules(modules)]

    assert flat(net) == ["", "rows.0", "rows.1", "named.a", "named.b.0"]
    assert flat(net.named) == ["named.a", "named.b.0"]
    assert flat([net.rows[0], [net.named, (net.rows[1],)]]) == ["rows.0", "named.a", "named.b.0", "rows.1"]
    assert flat(part for part in net.rows) == ["rows.0", "rows.1"]
    assert flat(net.named.values()) == ["named.a", "named.b.0"]


def test_parameters_are_filtered_by_what_trains_them() -> None:
    net = Nested()
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    net.rows[0].bias.requires_grad = False

    def filtered(**settings: bool) -> list[str]:
        return [names[id(parameter)] for parameter in BaseFinetuning.filter_params(net, **settings)]

    assert filtered() == ["scale", "rows.0.weight", "named.a.weight", "named.b.0.weight", "named.b.0.bias"]
    assert filtered(train_bn=False) == ["scale", "rows.0.weight", "named.a.weight"]
    assert filtered(requires_grad=False) == ["rows.0.bias"]


def test_freezing_leaves_batch_norm_trainable_unless_told_otherwise() -> None:
    net = Nested()
    BaseFinetuning.freeze(net)
    assert trainable(net) == ["named.b.0.weight", "named.b.0.bias"]
    assert net.named["b"][0].track_running_stats
    BaseFinetuning.freeze(net, train_bn=False)
    assert trainable(net) == []
    assert not net.named["b"][0].track_running_stats
    BaseFinetuning.make_trainable([net.named["b"], net.rows])
    assert trainable(net) == ["rows.0.weight", "rows.0.bias", "named.b.0.weight", "named.b.0.bias"]
    assert net.named["b"][0].track_running_stats


def test_one_module_is_frozen_without_its_children() -> None:
    net = Nested()
    BaseFinetuning.freeze_module(net)
    assert trainable(net)[0] == "rows.0.weight"
    BaseFinetuning.freeze_module(net.named["b"][0])
    assert not net.named["b"][0].track_running_stats


def test_unfrozen_parameters_become_a_group_of_their_own() -> None:
    net = Nested()
    BaseFinetuning.freeze(net, train_bn=False)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    BaseFinetuning.unfreeze_and_add_param_group(net.rows, optimizer)
    BaseFinetuning.unfreeze_and_add_param_group([net.named["a"]], optimizer, initial_denom_lr=5)
    BaseFinetuning.unfreeze_and_add_param_group(net.named["b"], optimizer, lr=3, initial_denom_lr=5)
    groups = [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
    assert groups == [(0.5, 1), (0.05, 2), (0.1, 1), (3.0, 2)]


def test_batch_norm_can_be_left_out_of_the_group() -> None:
    net = Nested()
    BaseFinetuning.freeze(net)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    BaseFinetuning.unfreeze_and_add_param_group(net, optimizer, train_bn=False)
    assert len(optimizer.param_groups[1]["params"]) == 4


def test_batch_norm_that_was_never_frozen_is_no_reason_for_a_warning() -> None:
    backbone, head = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 1)
    BaseFinetuning.freeze(backbone)
    parameters = [p for p in (*backbone.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    BaseFinetuning.unfreeze_and_add_param_group(backbone, optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 2]


def test_parameters_that_the_optimizer_has_are_left_out_with_a_warning() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.load_state_dict(first.state_dict())  # equal values are not the same parameter
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    assert len(BaseFinetuning.filter_on_optimizer(optimizer, second.parameters())) == 2
    with pytest.warns(UserWarning, match="2 of the parameters to be added are in SGD already"):
        assert len(BaseFinetuning.filter_on_optimizer(optimizer, [*first.parameters(), second.bias])) == 1
    with pytest.warns(UserWarning, match="already"):
        BaseFinetuning.unfreeze_and_add_param_group(first, optimizer)
    assert len(optimizer.param_groups) == 1


# ---------------------------------------------------------------------- training
def test_what_is_frozen_does_not_move_until_it_is_unfrozen() -> None:
    class Look(Callback):
        def __init__(self) -> None:
            self.moved: list[list[str]] = []

        def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
            self.before = copy.deepcopy(module.state_dict())

        def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
            now = module.state_dict()
            self.moved.append(sorted({name[:10] for name in now if not torch.equal(now[name], self.before[name])}))

    watch, look = Watch(), Look()
    fit(Gradual(), watch, look)
    head, first, second = ["head.bias", "head.weigh"], "backbone.0", "backbone.1"
    assert look.moved == [head, [second, *head], [first, second, *head], [first, second, *head]]
    assert watch.rates == [[0.1], [0.1, 0.01], [0.1, 0.01, 0.01], [0.1, 0.01, 0.01]]


def test_the_function_is_called_for_every_optimizer_with_the_epoch() -> None:
    called: list[tuple[int, int]] = []

    class Calls(Gradual):
        def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
            called.append((epoch, pl_module.trainer.optimizers.index(optimizer)))

    class Two(Net):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([self.head.weight], 0.1), torch.optim.SGD([self.head.bias], 0.1)]

    fit(Calls(), module=Two(), max_epochs=2)
    assert called == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_evaluation_freezes_nothing() -> None:
    module = Net()
    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign, assignment]
    trainer = Trainer(callbacks=[Gradual()], logger=False, enable_progress_bar=False, accelerator="cpu")
    trainer.validate(module, DataLoader(torch.ones(2, 3)), verbose=False)
    assert len(trainable(module)) == 6


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"unfreeze_backbone_at_epoch": 1}, [None, 0.01, 0.02, 0.04]),
        ({"unfreeze_backbone_at_epoch": 0, "backbone_initial_ratio_lr": 0.5}, [0.05, 0.1, 0.1, 0.1]),
        (
            {"unfreeze_backbone_at_epoch": 1, "backbone_initial_lr": 0.06, "should_align": False},
            [None, 0.06, 0.12, 0.24],
        ),
        ({"unfreeze_backbone_at_epoch": 1, "lambda_func": lambda epoch: epoch}, [None, 0.01, 0.03, 0.1]),
        ({"unfreeze_backbone_at_epoch": 9}, [None, None, None, None]),
        ({}, [None, None, None, None]),
    ],
)
def test_the_backbones_rate_grows_from_the_epoch_asked_for(settings: dict[str, Any], rates: list[Any]) -> None:
    watch = Watch()
    fit(BackboneFinetuning(**settings), watch)
    assert watch.rates == [[0.1] if rate is None else [0.1, rate] for rate in rates]


def test_verbose_tells_both_rates_rounded(capsys: pytest.CaptureFixture[str]) -> None:
    fit(BackboneFinetuning(1, backbone_initial_ratio_lr=1 / 3, verbose=True, rounding=3), max_epochs=3)
    assert capsys.readouterr().out.splitlines() == [
        "BackboneFinetuning: learning rate 0.1, the backbone's 0.033",
        "BackboneFinetuning: learning rate 0.1, the backbone's 0.067",
    ]


@pytest.mark.parametrize("make", [Gradual, lambda: BackboneFinetuning(1), lambda: BackboneFinetuning(2)])
@pytest.mark.parametrize("step", [2, 4, 6, 8, 11, 12])
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(make: Any, step: int) -> None:
    whole, resumed = Net(), Net(seed=5)
    watch, seen = Watch(step), Watch()
    trainer = fit(make(), watch, module=whole)
    run = fit(make(), seen, module=resumed, ckpt_path=f"{step}.ckpt")
    assert equal(resumed.state_dict(), whole.state_dict())
    assert seen.rates == watch.rates[-len(seen.rates) :]
    assert trainable(resumed) == trainable(whole)
    sizes = [[len(group["params"]) for group in each.optimizers[0].param_groups] for each in (trainer, run)]
    assert sizes[0] == sizes[1]


def test_the_state_names_the_parameters_of_every_group() -> None:
    callback = Gradual()
    fit(callback, max_epochs=2)
    groups = callback.state_dict()["internal_optimizer_metadata"][0]
    assert [group["params"] for group in groups] == [
        ["head.weight", "head.bias"],
        ["backbone.1.0.weight", "backbone.1.0.bias"],
    ]
    assert callback.state_dict()["frozen"] == ["backbone.0.weight", "backbone.0.bias"]


def test_a_checkpoint_of_another_module_is_an_error_that_names_the_parameters() -> None:
    class Renamed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.tail = self.head
            del self.head

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.tail(self.backbone(batch[0])).mean()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name.replace("head", "tail"): value for name, value in weights.items()}

    fit(Gradual(), Watch(4), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"head\.bias, head\.weight"):
        fit(Gradual(), module=Renamed(), ckpt_path="4.ckpt")


def test_what_is_not_overridden_says_so() -> None:
    class Half(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            """Freeze nothing."""

    with pytest.raises(NotImplementedError, match="freeze_before_training"):
        fit(BaseFinetuning())
    with pytest.raises(NotImplementedError, match="Half has no finetune_function"):
        fit(Half())


def test_a_module_without_a_backbone_is_an_error_before_the_first_step() -> None:
    module = Net()
    module.backbone = None  # type: ignore[assignment]
    with pytest.raises(MisconfigurationException, match=r"module\.backbone"):
        fit(BackboneFinetuning(), module=module)


def test_parameters_that_were_never_frozen_are_left_out_with_a_warning() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(net[0].parameters(), lr=1.0)
    with pytest.warns(UserWarning, match="2 of the parameters to be added are in SGD already"):
        BaseFinetuning.unfreeze_and_add_param_group(net, optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
