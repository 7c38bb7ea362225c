"""What configure_optimizers may return, and learning rates against hand-written loops."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader

from trainkit import Callback, Module, Trainer
from trainkit.errors import MisconfigurationException
from trainkit.optim import LRSchedulerConfig, configure
from trainkit.update import StepOptimizer

BATCHES = 5
EPOCHS = 4


class Model(Module):
    """Return from configure_optimizers what it was made with, called with its parameters."""

    def __init__(self, returns: Callable[[list[nn.Parameter]], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)
        self.returns = returns

    def loss(self, batch: Tensor) -> Tensor:
        return (self.a(batch) + self.b(batch)).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.returns(list(self.parameters())) if self.returns is not None else None


def loader() -> DataLoader[Any]:
    return DataLoader(torch.randn(BATCHES * 4, 2, generator=torch.Generator().manual_seed(1)), batch_size=4)  # type: ignore[arg-type]


def trainer_of(**settings: Any) -> Trainer:
    bare = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": EPOCHS,
        "fused_optimizers": False,  # the last bits of a plain loop
    }
    return Trainer(**{**bare, **settings})


# ---------------------------------------------------------------- forms
def sgd(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.1)


def with_scheduler(parameters: Any) -> tuple[SGD, StepLR]:
    optimizer = sgd(parameters)
    return optimizer, StepLR(optimizer, 1)


def dict_form(parameters: Any, **settings: Any) -> dict[str, Any]:
    optimizer, scheduler = with_scheduler(parameters)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **settings}}


def lists_form(parameters: Any, wrap: type = list, **settings: Any) -> Any:
    optimizer, scheduler = with_scheduler(parameters)
    return wrap(([optimizer], [{"scheduler": scheduler, **settings}] if settings else [scheduler]))


FORMS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "an optimizer": (sgd, 1, 0),
    "a list of optimizers": (lambda p: [sgd(p[:2]), sgd(p[2:])], 2, 0),
    "a tuple of optimizers": (lambda p: (sgd(p[:2]), sgd(p[2:])), 2, 0),
    "a list of one": (lambda p: [sgd(p)], 1, 0),
    "two lists": (lists_form, 1, 1),
    "two lists in a tuple": (lambda p: lists_form(p, tuple), 1, 1),
    "two lists, with settings": (lambda p: lists_form(p, interval="step"), 1, 1),
    "two lists, the second empty": (lambda p: ([sgd(p)], []), 1, 0),
    "two tuples": (lambda p: tuple((part,) for part in with_scheduler(p)), 1, 1),
    "a list and a scheduler": (lambda p: ([(pair := with_scheduler(p))[0]], pair[1]), 1, 1),
    "a dict": (lambda p: {"optimizer": sgd(p)}, 1, 0),
    "a dict without a scheduler": (lambda p: {"optimizer": sgd(p), "lr_scheduler": None}, 1, 0),
    "a dict with a scheduler": (lambda p: {"optimizer": (o := sgd(p)), "lr_scheduler": StepLR(o, 1)}, 1, 1),
    "a dict with settings": (dict_form, 1, 1),
    "a list of dicts": (lambda p: [dict_form(p[:2]), dict_form(p[2:])], 2, 2),
    "a tuple of dicts": (lambda p: (dict_form(p[:2]), {"optimizer": sgd(p[2:])}), 2, 1),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_understood(form: str) -> None:
    returns, num_optimizers, num_schedulers = FORMS[form]
    optimizers, configs = configure(Model(returns))
    assert (len(optimizers), len(configs)) == (num_optimizers, num_schedulers)
    assert all(isinstance(optimizer, Optimizer) for optimizer in optimizers)
    assert all(isinstance(config.scheduler, StepLR) for config in configs)
    assert all(config.frequency == 1 and config.interval in ("epoch", "step") for config in configs)
    trainer_of(max_epochs=1).fit(Model(returns), loader())


def test_none_trains_nothing_and_says_so() -> None:
    module = Model()
    before = copy.deepcopy(module.state_dict())
    trainer = trainer_of(max_epochs=1)
    with pytest.warns(UserWarning, match="configure_optimizers returned None"):
        trainer.fit(module, loader())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (lambda p: [], "may return"),
        (lambda p: ([], []), "Received no optimizer"),
        (lambda p: 3, "Received: 3"),
        (lambda p: "Adam", "Received: 'Adam'"),
        (with_scheduler, "among the optimizers: <torch.optim.lr_scheduler.StepLR"),
        (lambda p: [p], "among the optimizers"),
        (lambda p: [dict_form(p), sgd(p)], "among the optimizers: {"),
        (lambda p: {"lr": 0.1}, r"without 'optimizer': \['lr'\]"),
        (lambda p: {"optimizer": Adam}, "among the optimizers: <class"),
        (lambda p: {"optimizer": sgd(p), "lr_scheduler": {"interval": "step"}}, "needs the key 'scheduler'"),
        (lambda p: {"optimizer": sgd(p), "lr_scheduler": "cosine"}, "needs step, state_dict, load_state_dict"),
        (lambda p: dict_form(p, interval="batch"), "'step' or 'epoch'. Received: 'batch'"),
        (lambda p: dict_form(p, frequency=0), "at least 1. Received: 0"),
        (lambda p: dict_form(p, frequency=True), "at least 1. Received: True"),
        (lambda p: dict_form(p, frequency=1.5), "at least 1. Received: 1.5"),
        (lambda p: {"optimizer": (o := sgd(p)), "lr_scheduler": ReduceLROnPlateau(o)}, '"monitor": "val/loss"'),
        (lambda p: dict_form(p, reduce_on_plateau=True), "StepLR needs the name of the metric"),
        (lambda p: {"optimizer": sgd(p[:1]), "lr_scheduler": with_scheduler(p[1:])[1]}, "did not return"),
    ],
)
def test_anything_else_is_refused_with_what_is_possible(returns: Callable[..., Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        configure(Model(returns))


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (lambda p: {**dict_form(p), "lr_schedulers": 1}, "'lr_schedulers' means nothing"),
        (lambda p: dict_form(p, frequence=2), "'frequence' means nothing; did you mean 'frequency'"),
        (lambda p: {"optimizer": (o := sgd(p)), "lr_scheduler": OneCycleLR(o, 1.0, 9)}, "made for interval='step'"),
    ],
)
def test_what_is_likely_a_mistake_is_a_warning(returns: Callable[..., Any], message: str) -> None:
    with pytest.warns(RuntimeWarning, match=message):
        configure(Model(returns))


def test_a_scheduler_that_is_not_torchs_needs_a_state_and_a_step_like_theirs() -> None:
    class Stateless:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

        def step(self) -> None: ...

    class Takes(Stateless):
        def step(self, loss: float) -> None: ...  # type: ignore[override]

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    class Calls(Model):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None: ...

    def returning(kind: type[Stateless]) -> Callable[[Any], Any]:
        return lambda parameters: ([(optimizer := sgd(parameters))], [kind(optimizer)])

    with pytest.raises(TypeError, match="needs state_dict, load_state_dict, which Stateless has not"):
        configure(Model(returning(Stateless)))
    with pytest.raises(MisconfigurationException, match="override lr_scheduler_step"):
        configure(Model(returning(Takes)))
    assert len(configure(Calls(returning(Takes)))[1]) == 1


def test_a_plateau_needs_no_monitor_where_the_module_moves_it() -> None:
    module = Model(lambda parameters: ([(optimizer := sgd(parameters))], [ReduceLROnPlateau(optimizer)]))
    with pytest.raises(MisconfigurationException, match="needs the name of the metric"):
        configure(module)
    module.automatic_optimization = False
    assert configure(module)[1][0].monitor is None


def test_the_monitor_may_stand_beside_the_scheduler_in_its_dict_or_on_itself() -> None:
    def plateau(parameters: Any) -> tuple[SGD, ReduceLROnPlateau]:
        optimizer = sgd(parameters)
        return optimizer, ReduceLROnPlateau(optimizer)

    def beside(parameters: Any) -> dict[str, Any]:
        optimizer, scheduler = plateau(parameters)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "v"}

    def inside(parameters: Any) -> dict[str, Any]:
        optimizer, scheduler = plateau(parameters)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "v"}, "monitor": "other"}

    def on_itself(parameters: Any) -> Any:
        optimizer, scheduler = plateau(parameters)
        scheduler.monitor = "v"  # type: ignore[attr-defined]
        return [optimizer], [scheduler]

    for returns in (beside, inside, on_itself):
        (config,) = configure(Model(returns))[1]
        assert (config.monitor, config.reduce_on_plateau, config.strict) == ("v", True, True)


def test_a_finished_config_is_taken_as_it_is() -> None:
    def returns(parameters: Any) -> Any:
        optimizer, scheduler = with_scheduler(parameters)
        return [optimizer], [LRSchedulerConfig(scheduler, interval="step", frequency=3, name="lr")]

    (config,) = configure(Model(returns))[1]
    assert (config.interval, config.frequency, config.name) == ("step", 3, "lr")


# ---------------------------------------------------------------- schedules against hand-written loops
class Rates(Callback):
    """Note the learning rate in each batch: in training_step's time, and in on_train_batch_end."""

    def __init__(self) -> None:
        self.during: list[float] = []
        self.after: list[float] = []

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        self.during.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.after.append(trainer.optimizers[0].param_groups[0]["lr"])


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: StepLR(o, 2, gamma=0.5),
    "ExponentialLR": lambda o: ExponentialLR(o, 0.9),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=0.5, total_steps=EPOCHS * BATCHES + 1),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, T_max=7),
    "LambdaLR": lambda o: LambdaLR(o, lambda n: 1 / (1 + n)),
    "SequentialLR": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), ExponentialLR(o, 0.8)], milestones=[3]),
    "ChainedScheduler": lambda o: ChainedScheduler([LinearLR(o, 0.1, total_iters=3), ExponentialLR(o, 0.8)]),
}


def by_hand(
    make: Callable[[Optimizer], Any], interval: str, frequency: int, accumulate: int
) -> tuple[Any, list[float]]:
    """Train in a plain loop; return the weights and the learning rate of each batch's training step."""
    module = Model()
    optimizer = sgd(module.parameters())
    scheduler = make(optimizer)
    rates, updates = [], 0
    for epoch in range(EPOCHS):
        for index, batch in enumerate(loader()):
            if index % accumulate == 0:
                optimizer.zero_grad()
            rates.append(optimizer.param_groups[0]["lr"])
            loss = module.loss(batch)
            (loss / accumulate if accumulate > 1 else loss).backward()
            if (index + 1) % accumulate == 0 or index + 1 == BATCHES:
                optimizer.step()
                updates += 1
                if interval == "step" and updates % frequency == 0:
                    scheduler.step()
        if interval == "epoch" and (epoch + 1) % frequency == 0:
            scheduler.step()
    return module.state_dict(), rates


@pytest.mark.filterwarnings("ignore:OneCycleLR is made for interval='step'")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    ("interval", "frequency", "accumulate"), [("epoch", 1, 1), ("epoch", 3, 2), ("step", 1, 1), ("step", 3, 2)]
)
def test_learning_rates_and_weights_are_those_of_a_plain_loop(
    name: str, interval: str, frequency: int, accumulate: int
) -> None:
    def returns(parameters: Any) -> Any:
        optimizer = sgd(parameters)
        scheduler = {"scheduler": SCHEDULERS[name](optimizer), "interval": interval, "frequency": frequency}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    rates, module = Rates(), Model(returns)
    trainer_of(callbacks=rates, accumulate_grad_batches=accumulate).fit(module, loader())
    state, expected = by_hand(SCHEDULERS[name], interval, frequency, accumulate)
    assert rates.during == expected
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())


def test_schedules_have_moved_when_a_batch_has_ended() -> None:
    both = []
    for interval in ("step", "epoch"):
        rates = Rates()
        trainer_of(callbacks=rates, max_epochs=1).fit(
            Model(lambda p, interval=interval: dict_form(p, interval=interval)), loader()
        )
        both.append(rates)
    by_step, by_epoch = both
    assert by_step.after == pytest.approx([0.1 * 0.1**n for n in range(1, 6)])
    assert by_epoch.after == pytest.approx([0.1] * 4 + [0.01])


class Watched(Model):
    """Log a metric that stops improving: 3, 2, 1, 1, 1, ... once a validation."""

    def __init__(self, **settings: Any) -> None:
        def returns(parameters: Any) -> Any:
            optimizer = sgd(parameters)
            scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            given = {"scheduler": scheduler, "monitor": "val_loss", **settings}
            return {"optimizer": optimizer, "lr_scheduler": given}

        super().__init__(returns)
        self.validations = 0

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", float(max(3 - self.validations, 1)))

    def on_validation_end(self) -> None:
        self.validations += 1


def test_a_plateau_by_epoch_takes_the_metric_of_each_epoch() -> None:
    rates = Rates()
    trainer_of(callbacks=rates, max_epochs=6).fit(Watched(), loader(), loader())
    assert rates.during[::BATCHES] == [0.1, 0.1, 0.1, 0.1, 0.05, 0.025]


def test_a_plateau_by_epoch_moves_every_nth_epoch() -> None:
    rates = Rates()
    trainer_of(callbacks=rates, max_epochs=8).fit(Watched(frequency=2), loader(), loader())
    assert rates.during[::BATCHES] == [0.1] * 6 + [0.05, 0.05]  # it saw 2, 1 and 1


def test_a_plateau_by_epoch_sees_what_the_end_of_the_epoch_logged() -> None:
    class Ends(Watched):
        def on_train_epoch_end(self) -> None:
            self.log("train_end", 1.0)

    trainer_of(max_epochs=1).fit(Ends(monitor="train_end"), loader())


def test_a_plateau_by_step_moves_with_the_updates() -> None:
    rates = Rates()
    module = Watched(interval="step", monitor="level")
    levels = iter([3.0, 2.0, 2.0, 2.0, 1.0])
    module.training_step = lambda batch, batch_idx: (module.log("level", next(levels)), module.loss(batch))[1]  # type: ignore[method-assign]
    trainer_of(callbacks=rates, max_epochs=1).fit(module, loader())
    assert rates.during == [0.1, 0.1, 0.1, 0.05, 0.025]


def test_a_plateau_by_step_moves_after_the_validation_of_its_update() -> None:
    rates = Rates()
    trainer_of(callbacks=rates, max_epochs=1, val_check_interval=1).fit(Watched(interval="step"), loader(), loader())
    assert rates.during == [0.1, 0.1, 0.1, 0.1, 0.05]


def test_a_watched_metric_that_is_not_there_is_an_error_that_says_what_is() -> None:
    with pytest.raises(MisconfigurationException, match=r"watches 'loss', which was not logged.*there is: val_loss\."):
        trainer_of().fit(Watched(monitor="loss"), loader(), loader())


def test_a_watched_metric_may_come_later_if_the_schedule_is_not_strict() -> None:
    rates = Rates()
    trainer = trainer_of(callbacks=rates, max_epochs=6, check_val_every_n_epoch=2)
    with pytest.warns(RuntimeWarning, match="which was not logged so far"):
        trainer.fit(Watched(strict=False), loader(), loader())
    # validated after epochs 2, 4 and 6 with 3, 2 and 1; between them the old value is no improvement
    assert rates.during[::BATCHES] == [0.1, 0.1, 0.1, 0.05, 0.05, 0.025]


def test_a_run_cut_inside_an_epoch_moves_no_schedule_of_epochs() -> None:
    module = Watched()
    trainer = trainer_of(max_steps=BATCHES + 2)
    trainer.fit(module, loader(), loader())
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 1


def test_a_scheduler_of_ones_own_is_moved_through_lr_scheduler_step() -> None:
    class Warmup:
        """Has no base class of torch's and another idea of step."""

        def __init__(self) -> None:
            self.seen: list[int] = []

        def step(self, epoch: int) -> None:
            self.seen.append(epoch)

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen = state["seen"]

    class Own(Model):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            assert metric is None
            scheduler.step(self.current_epoch)

    warmup = Warmup()
    trainer_of().fit(Own(lambda p: ([sgd(p)], [{"scheduler": warmup, "monitor": "not looked at"}])), loader())
    assert warmup.seen == [0, 1, 2, 3]


def test_each_of_several_optimizers_has_its_schedule() -> None:
    def returns(parameters: Any) -> Any:
        return [dict_form(parameters[:2], interval="step"), dict_form(parameters[2:], frequency=2)]

    trainer = trainer_of(max_epochs=2)
    trainer.fit(Model(returns), loader())
    first, second = trainer.optimizers
    assert first.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1 ** (2 * BATCHES))
    assert second.param_groups[0]["lr"] == pytest.approx(0.01)


# ---------------------------------------------------------------- manual optimization
class Manual(Model):
    """Two optimizers that take turns, as in a GAN."""

    def __init__(self) -> None:
        super().__init__(lambda p: [sgd(p[:2]), Adam(p[2:], lr=0.01)])
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, second):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


def test_manual_optimization_is_what_it_says_bit_for_bit() -> None:
    module, hand = Manual(), Manual()
    trainer = trainer_of()
    trainer.fit(module, loader())
    first, second = configure(hand)[0]
    for _ in range(EPOCHS):
        for batch in loader():
            for optimizer in (first, second):
                optimizer.zero_grad()
                hand.loss(batch).backward()
                optimizer.step()
    assert all(torch.equal(hand.state_dict()[name], value) for name, value in module.state_dict().items())
    assert trainer.global_step == EPOCHS * BATCHES  # a batch counts once


def test_a_batch_in_which_nothing_stepped_is_not_counted() -> None:
    class Rarely(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            if batch_idx % 2 == 0:
                super().training_step(batch, batch_idx)

    trainer = trainer_of(max_epochs=1)
    trainer.fit(Rarely(), loader())
    assert trainer.global_step == 3


def test_manual_optimization_may_be_declared_on_the_class() -> None:
    class Declared(Model):
        automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    trainer = trainer_of(max_epochs=1)
    trainer.fit(Declared(sgd), loader())
    assert trainer.global_step == BATCHES


def test_manual_optimization_moves_its_schedules_itself() -> None:
    class Own(Manual):
        def configure_optimizers(self) -> Any:
            optimizer = sgd(self.parameters())
            watching = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "never logged"}
            return [optimizer], [
                StepLR(optimizer, 1),
                {"scheduler": StepLR(optimizer, 1), "interval": "step"},
                watching,
            ]

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            if batch_idx == 0:
                self.lr_schedulers()[0].step()

    trainer = trainer_of(max_epochs=2)
    trainer.fit(Own(), loader())
    assert [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs] == [2, 0, 0]


@pytest.mark.parametrize("make", [lambda p: torch.optim.LBFGS(p, max_iter=3), sgd])
def test_an_optimizer_that_takes_a_closure_gets_it_and_is_counted(make: Callable[..., Optimizer]) -> None:
    class Closure(Model):
        automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            losses.append(optimizer.step(closure).item())

        def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
            assert all(parameter.grad is not None for parameter in self.parameters())
            heard.append(optimizer)

    losses: list[float] = []
    heard: list[Optimizer] = []
    module, hand = Closure(make), Model(make)
    trainer = trainer_of(max_epochs=1)
    trainer.fit(module, loader())
    (optimizer,), _ = configure(hand)
    expected = []
    for batch in loader():

        def closure(batch: Tensor = batch) -> Tensor:
            optimizer.zero_grad()
            loss = hand.loss(batch)
            loss.backward()
            return loss

        expected.append(optimizer.step(closure).item())
    assert losses == expected
    assert all(torch.equal(hand.state_dict()[name], value) for name, value in module.state_dict().items())
    assert trainer.global_step == BATCHES
    assert set(heard) == set(trainer.optimizers)


def test_the_optimizer_handed_out_is_the_optimizer_in_all_but_step() -> None:
    module = Manual()
    trainer = trainer_of(max_epochs=1)
    trainer.fit(module, loader())
    handed, plain = module.optimizers()[0], module.optimizers(use_pl_optimizer=False)[0]
    assert isinstance(handed, StepOptimizer)
    assert plain is trainer.optimizers[0] is handed.optimizer
    assert handed.param_groups is plain.param_groups
    assert handed.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = handed.nothing_like_it


def test_a_module_that_has_trained_can_be_copied_and_pickled() -> None:
    module = Model(None)
    module.returns = None
    trainer = trainer_of(max_epochs=1)
    with pytest.warns(UserWarning, match="returned None"):
        trainer.fit(module, loader())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied.a.weight, module.a.weight)
        with pytest.raises(RuntimeError, match="not attached to a Trainer"):
            _ = copied.trainer
    assert module.trainer is trainer
