from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import ModelPruning
from trainkit.errors import MisconfigurationException


class Net(Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(5, 8)
            self.rest = nn.Sequential(nn.Tanh(), nn.Linear(8, 2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.05)


class EverySecond(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


class Watch(Callback):
    """Count what is pruned as an epoch ends, after the callbacks before this one, and save after some updates."""

    def __init__(self, *save_at: int) -> None:
        self.save_at = save_at
        self.pruned: list[int] = []

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        self.pruned.append(sum(int((mask == 0).sum()) for name, mask in module.named_buffers() if name[-4:] == "mask"))

    def on_save_point(self, trainer: Trainer, module: Module) -> None:
        if trainer.global_step in self.save_at:
            trainer.save_checkpoint(f"{trainer.global_step}.ckpt")


def data() -> Any:
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :2].tanh()), 4)


def fit(*callbacks: Callback, module: Net | None = None, ckpt_path: str | None = None, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        callbacks=list(callbacks), **{**quiet, "enable_checkpointing": False, "max_epochs": 3, **settings}
    )
    torch.manual_seed(0)
    trainer.fit(module or Net(), data(), data(), ckpt_path=ckpt_path)
    return trainer


def zeros(weights: dict[str, Tensor]) -> int:
    return sum(int((value == 0).sum()) for value in weights.values())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


SIZES = {"first.weight": 40, "rest.1.weight": 16, "first.bias": 8}


@pytest.mark.parametrize("name", ["l1_unstructured", "L1_Unstructured", "random_unstructured", prune.L1Unstructured])
def test_a_share_of_all_weights_together_is_pruned_in_every_epoch(name: Any) -> None:
    watch, module = Watch(), Net()
    fit(ModelPruning(name, amount=0.25), watch, module=module)
    assert watch.pruned == [16, 28, 37]  # a quarter of 64, then of 48 and of 36
    assert {key: value.numel() for key, value in module.state_dict().items()} == SIZES
    assert zeros(module.state_dict()) == 37


def test_the_smallest_weights_go_and_stay_zero_in_training() -> None:
    class Look(Callback):
        def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
            if trainer.current_epoch == 1:
                self.kept = {name: mask.bool() for name, mask in module.named_buffers()}
                self.before = {name: getattr(module.first, name).clone() for name in ("weight", "bias")}

    look, module = Look(), Net()
    # pruned once, after the first epoch
    fit(ModelPruning("l1_unstructured", amount=0.5, apply_pruning=lambda epoch: epoch == 0), look, module=module)
    kept = look.kept["first.weight_mask"]
    assert 0 < kept.sum() < 40
    assert not module.first.weight[~kept].any()
    assert not torch.equal(module.first.weight[kept], look.before["weight"][kept])


def test_a_number_is_pruned_when_the_amount_is_one() -> None:
    watch = Watch()
    fit(ModelPruning("l1_unstructured", amount=5), watch)
    assert watch.pruned == [5, 10, 15]


def test_amount_and_whether_to_prune_may_depend_on_the_epoch() -> None:
    watch = Watch()
    fit(ModelPruning("l1_unstructured", amount=lambda epoch: epoch, apply_pruning=lambda epoch: epoch != 1), watch)
    assert watch.pruned == [0, 0, 2]


def test_each_parameter_by_itself() -> None:
    module = Net()
    fit(ModelPruning("l1_unstructured", use_global_unstructured=False, amount=0.5), module=module, max_epochs=1)
    assert {name: zeros({name: value}) for name, value in module.state_dict().items()} == {
        name: size // 2 for name, size in SIZES.items()
    }


@pytest.mark.parametrize(
    ("settings", "rows", "columns"),
    [
        ({"pruning_fn": "ln_structured", "pruning_dim": 0, "pruning_norm": 1}, 4, 0),
        ({"pruning_fn": "ln_structured", "pruning_dim": 1, "pruning_norm": 2}, 0, 2),
        ({"pruning_fn": "random_structured", "pruning_dim": 0}, 4, 0),
    ],
)
def test_whole_rows_or_columns(settings: dict[str, Any], rows: int, columns: int) -> None:
    module = Net()
    callback = ModelPruning(
        **settings, parameters_to_prune=[(module.first, "weight")], use_global_unstructured=False, amount=0.5
    )
    fit(callback, module=module, max_epochs=1)
    assert int((module.first.weight == 0).all(1).sum()) == rows
    assert int((module.first.weight == 0).all(0).sum()) == columns
    assert zeros(module.rest.state_dict()) == 0


def test_a_pruning_method_of_the_users() -> None:
    watch = Watch()
    fit(ModelPruning(EverySecond, parameter_names=["weight"]), watch)
    assert watch.pruned == [28, 42, 49]


def test_only_the_parameters_asked_for() -> None:
    class Heads(ModelPruning):
        def filter_parameters_to_prune(self, parameters_to_prune: Any = ()) -> Any:
            return [(part, name) for part, name in parameters_to_prune if part.out_features == 2]

    for callback, names in (
        (ModelPruning("l1_unstructured", parameter_names=["bias"]), {"first.bias"}),
        (ModelPruning("l1_unstructured", parameter_names=["weight"]), {"first.weight", "rest.1.weight"}),
        (Heads("l1_unstructured"), {"rest.1.weight"}),
    ):
        module = Net()
        fit(callback, module=module)
        assert {name for name, value in module.state_dict().items() if zeros({name: value})} == names


def test_the_winning_ticket_goes_back_to_the_first_weights_every_time() -> None:
    module, first = Net(seed=9), Net(seed=9).state_dict()  # not what `fit` seeds with
    pairs = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
            pairs.append((copy.deepcopy(module.first.weight_orig), first["first.weight"]))

    fit(ModelPruning("l1_unstructured", amount=0.2), Look(), module=module)
    assert len(pairs) == 3
    assert all(torch.equal(now, before) for now, before in pairs)


def test_without_the_hypothesis_the_weights_stay() -> None:
    kept, back = Net(), Net()
    fit(ModelPruning("l1_unstructured", amount=0.2, use_lottery_ticket_hypothesis=False), module=kept, max_epochs=1)
    fit(ModelPruning("l1_unstructured", amount=0.2), module=back, max_epochs=1)
    assert not torch.equal(kept.first.weight, back.first.weight)
    assert torch.equal(kept.first.weight == 0, back.first.weight == 0)
    chosen = Net()
    fit(
        ModelPruning("l1_unstructured", amount=0.2, use_lottery_ticket_hypothesis=lambda epoch: epoch > 0),
        module=chosen,
        max_epochs=1,
    )
    assert equal(chosen.state_dict(), kept.state_dict())


def test_resampling_draws_new_first_weights() -> None:
    module, first = Net(seed=9), Net(seed=9).state_dict()  # not what `fit` seeds with
    fit(ModelPruning("l1_unstructured", amount=0.2, resample_parameters=True), module=module, max_epochs=1)
    kept = module.first.weight != 0
    assert not torch.isclose(module.first.weight[kept], first["first.weight"][kept]).any()


def test_pruning_can_follow_validation() -> None:
    class Look(Callback):
        def on_validation_end(self, trainer: Trainer, module: Module) -> None:
            seen.append(any(name.endswith("_mask") for name, _ in module.named_buffers()))

    seen: list[bool] = []
    fit(ModelPruning("l1_unstructured", prune_on_train_epoch_end=False), Look(), max_epochs=1, num_sanity_val_steps=1)
    assert seen == [False, True]


def test_a_checkpoint_has_the_zeros_in_the_weights() -> None:
    module = Net()
    fit(ModelPruning("l1_unstructured", amount=0.25), Watch(4, 12), module=module)
    weights = torch.load("4.ckpt", weights_only=True)["state_dict"]
    assert {name: value.numel() for name, value in weights.items()} == SIZES
    assert zeros(weights) == 16
    assert equal(Net.load_from_checkpoint("12.ckpt").state_dict(), module.state_dict())


def test_masks_can_be_left_in_checkpoints_and_in_the_module() -> None:
    module = Net()
    fit(ModelPruning("l1_unstructured", amount=0.25, make_pruning_permanent=False), Watch(4), module=module)
    weights = torch.load("4.ckpt", weights_only=True)["state_dict"]
    assert {"first.weight_orig", "first.weight_mask", "first.bias_orig"} <= weights.keys()
    assert prune.is_pruned(module)
    trained = Net()
    trainer = Trainer(callbacks=[ModelPruning("l1_unstructured", make_pruning_permanent=False)], logger=False,
                      enable_progress_bar=False, accelerator="cpu")  # fmt: skip
    trainer.validate(trained, data(), ckpt_path="4.ckpt", verbose=False)
    assert zeros(trained.state_dict()) == 16


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"make_pruning_permanent": False},
        {"use_lottery_ticket_hypothesis": False},
        {"resample_parameters": True},
        {"use_global_unstructured": False},
        {"use_lottery_ticket_hypothesis": lambda epoch: epoch == 2},
    ],
)
@pytest.mark.parametrize("step", [2, 4, 7, 8])
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(settings: dict[str, Any], step: int) -> None:
    def make() -> ModelPruning:
        return ModelPruning("l1_unstructured", amount=0.25, **settings)

    whole, resumed = Net(), Net(seed=5)
    fit(make(), Watch(step), module=whole)
    fit(make(), module=resumed, ckpt_path=f"{step}.ckpt")
    assert equal(resumed.state_dict(), whole.state_dict())


def test_a_run_that_ended_can_be_trained_on() -> None:
    whole, first, second = Net(), Net(), Net(seed=5)
    fit(ModelPruning("l1_unstructured", amount=0.25), module=whole)
    fit(ModelPruning("l1_unstructured", amount=0.25), module=first, max_epochs=2).save_checkpoint("ended.ckpt")
    fit(ModelPruning("l1_unstructured", amount=0.25), module=second, ckpt_path="ended.ckpt")
    assert equal(second.state_dict(), whole.state_dict())


def test_two_of_them_share_a_run_and_resume_in_it() -> None:
    def make() -> list[Callback]:
        return [
            ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.2, apply_pruning=lambda e: e != 1),
            ModelPruning("l1_unstructured", parameter_names=["bias"], amount=0.2, apply_pruning=lambda e: e == 1),
        ]

    watch, whole = Watch(6, 8), Net()
    fit(*make(), watch, module=whole)
    assert watch.pruned == [11, 13, 22]
    for step in (6, 8):
        resumed = Net(seed=5)
        fit(*make(), module=resumed, ckpt_path=f"{step}.ckpt")
        assert equal(resumed.state_dict(), whole.state_dict())


def test_verbose_tells_how_many_are_zero(capsys: pytest.CaptureFixture[str]) -> None:
    fit(ModelPruning("l1_unstructured", amount=0.25, verbose=1), max_epochs=2)
    assert capsys.readouterr().out.splitlines() == [
        "ModelPruning: L1Unstructured 0/64 (0.00%) -> 16/64 (25.00%)",
        "ModelPruning: L1Unstructured 16/64 (25.00%) -> 28/64 (43.75%)",
    ]
    fit(ModelPruning("l1_unstructured", use_global_unstructured=False, amount=0.25, verbose=2), max_epochs=1)
    assert capsys.readouterr().out.splitlines() == [
        "ModelPruning: l1_unstructured 0/64 (0.00%) -> 16/64 (25.00%)",
        "  first.weight: 0/40 (0.00%) -> 10/40 (25.00%)",
        "  rest.1.weight: 0/16 (0.00%) -> 4/16 (25.00%)",
        "  first.bias: 0/8 (0.00%) -> 2/8 (25.00%)",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pruning_fn": "l1_unstructred"}, "did you mean 'l1_unstructured'"),
        ({"pruning_fn": 3}, "must be one of l1_unstructured"),
        ({"pruning_fn": EverySecond()}, "Give the class, not an object of it"),
        ({"pruning_fn": EverySecond, "use_global_unstructured": False}, "use_global_unstructured=True"),
        ({"pruning_fn": "ln_structured"}, "pruning_dim"),
        ({"pruning_fn": "random_structured", "use_global_unstructured": False}, "pruning_dim"),
        ({"pruning_fn": "ln_structured", "pruning_dim": 0}, "pruning_norm"),
        ({"pruning_fn": "ln_structured", "pruning_dim": 0, "pruning_norm": 1}, "'structured'"),
        ({"pruning_fn": "l1_unstructured", "amount": "half"}, "amount"),
        ({"pruning_fn": "l1_unstructured", "parameter_names": ["weights"]}, "parameter_names"),
        ({"pruning_fn": "l1_unstructured", "verbose": 3}, "verbose"),
    ],
)
def test_what_can_not_work_is_an_error_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        ModelPruning(**settings)


def test_parameters_that_are_not_there_are_an_error_before_the_first_step() -> None:
    module = Net()
    for pairs in ([(nn.Linear(5, 8), "weight")], [(module.first, "scale")], ["first.weight"], nn.Linear(1, 1)):
        with pytest.raises(MisconfigurationException, match="parameters_to_prune"):
            fit(ModelPruning("l1_unstructured", parameters_to_prune=pairs), module=module)


def test_a_checkpoint_with_other_parameters_pruned_is_an_error_that_names_them() -> None:
    fit(ModelPruning("l1_unstructured"), Watch(4), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"first\.bias pruned"):
        fit(ModelPruning("l1_unstructured", parameter_names=["weight"]), ckpt_path="4.ckpt")
