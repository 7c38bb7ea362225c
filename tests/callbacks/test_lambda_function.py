from __future__ import annotations

from typing import Any

import pytest

from trainkit import Trainer
from trainkit.callbacks import LambdaCallback, ModelCheckpoint
from trainkit.callbacks.lambda_function import HOOKS


@pytest.mark.filterwarnings("ignore:[\\s\\S]*set up differently")  # as another class
def test_each_function_is_called_as_the_hook_of_a_callback_is(TinyModule: Any, TinyData: Any) -> None:
    called: dict[str, tuple[Any, ...]] = {}

    def note(name: str) -> Any:
        return lambda *arguments: called.setdefault(name, arguments)

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    callback = LambdaCallback(**{name: note(name) for name in HOOKS})
    trainer = Trainer(callbacks=[callback, ModelCheckpoint("here", save_last=True)], max_epochs=1, **quiet)
    module = TinyModule()
    trainer.fit(module, datamodule=TinyData())
    trainer.test(module, datamodule=TinyData(), verbose=False)
    trainer.predict(module, datamodule=TinyData())

    class Fails(TinyModule):  # type: ignore[misc]
        def on_train_start(self) -> None:
            raise RuntimeError("on purpose")

    trainer.max_epochs = 2
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(Fails(), datamodule=TinyData(), ckpt_path="here/last.ckpt")
    assert called.keys() == set(HOOKS)
    assert all(arguments[0] is trainer for arguments in called.values())
    assert called["setup"][1:] == (module, "fit")
    assert called["on_train_batch_start"][3] == 0
    assert len(called["on_train_batch_end"]) == 5
    assert isinstance(called["on_exception"][2], RuntimeError)
    assert "state_dict" in called["on_load_checkpoint"][2]


def test_none_leaves_a_hook_alone(TinyModule: Any) -> None:
    assert vars(LambdaCallback(on_fit_start=None, on_fit_end=print)) == {"on_fit_end": print}


def test_an_unknown_hook_is_a_type_error_that_names_the_nearest() -> None:
    with pytest.raises(TypeError, match="did you mean 'on_train_batch_end'"):
        LambdaCallback(on_train_bach_end=print)


def test_what_can_not_be_called_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"on_fit_start=.*must be a function"):
        LambdaCallback(on_fit_start=3)  # type: ignore[arg-type]


def test_a_function_with_the_wrong_arguments_is_an_error_before_the_first_step(TinyModule: Any, TinyData: Any) -> None:
    callback = LambdaCallback(on_train_batch_end=lambda trainer: None)
    trainer = Trainer(callbacks=callback, max_epochs=1, logger=False, enable_progress_bar=False, accelerator="cpu")
    with pytest.raises(TypeError, match="on_train_batch_end"):
        trainer.fit(TinyModule(), datamodule=TinyData())
    assert trainer.global_step == 0
