"""What looks like a secret is not written to any file, and nothing else is hidden."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from trainkit import DataModule, Module, Trainer
from trainkit.checkpoint import store
from trainkit.loggers import CSVLogger, JSONLinesLogger, TensorBoardLogger
from trainkit.redaction import is_secret, redacted, redacted_words

SECRETS = """
api_key apikey API_KEY apiKey openaiApiKey wandb_api_key hf_token token auth_token accessToken access-token secret
client_secret aws_secret_access_key secretKey password db_password passwd PASSWORD pwd passphrase user_password_hash
credential credentials gcp_credentials private_key key ssh_key api_keys authorization model.init_args.hf_token
"""
HARMLESS = """
keyword_args num_tokens monkey key_dim tokenizer keys tokens max_tokens token_type_ids n_keys hotkey keyboard turkey
pad_token eos_token sort_key primary_key public_key label_key secretary passes passthrough compass accessor keypoints
tokenize lr betas model.token.dim author authority
"""


@pytest.mark.parametrize("name", SECRETS.split())
def test_it_looks_like_a_secret(name: str) -> None:
    assert is_secret(name, "abc")


@pytest.mark.parametrize("name", HARMLESS.split())
def test_it_does_not_look_like_a_secret(name: str) -> None:
    assert not is_secret(name, "abc")


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("password", 1234, True),
        ("password", None, False),
        ("password", "", False),
        ("use_password", True, False),
        ("password_length", 8, False),
        ("token", 3, False),
        ("state_key", torch.zeros(2), False),
        ("credentials", {"user": "x"}, True),
        (3, "abc", False),
        ("", "abc", False),
    ],
)
def test_the_value_counts_too(name: Any, value: Any, hidden: bool) -> None:
    assert is_secret(name, value) is hidden


def test_secrets_inside_are_found_and_what_has_none_is_not_copied() -> None:
    found: list[str] = []
    inner = {"sizes": [1, 2]}
    given = {"inner": inner, "list": [{"api_key": "x"}], "space": Namespace(token="y", lr=1), "lr": 0.1}
    assert redacted(given, found) == {
        "inner": inner,
        "list": [{"api_key": "***"}],
        "space": Namespace(token="***", lr=1),
        "lr": 0.1,
    }
    assert found == ["list.0.api_key", "space.token"]
    assert given["list"] == [{"api_key": "x"}]
    assert redacted(inner) is inner


def test_a_command_line_is_shown_without_them() -> None:
    words = ["--model.api_key=abc", "--model.hf_token", "def", "--model.lr", "0.1", "--x.password", "--y"]
    assert redacted_words(words) == [
        *("--model.api_key=***", "--model.hf_token", "***", "--model.lr", "0.1", "--x.password", "***"),
    ]


class Keyed(Module):
    def __init__(self, api_key: str, width: int = 2, service: Any = None, hf_token: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, width)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(DataModule):
    def __init__(self, db_password: str) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)


def fitted(**hparams: Any) -> tuple[Trainer, Keyed]:
    loggers = [CSVLogger("runs", "csv"), JSONLinesLogger("runs", "json"), TensorBoardLogger("runs", "tb")]
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=loggers, enable_progress_bar=False, log_every_n_steps=1)
    module = Keyed(**hparams)
    trainer.fit(module, datamodule=Data(db_password="marker-1"))
    trainer.save_checkpoint("it.ckpt")
    return trainer, module


def test_no_file_of_a_run_has_them_and_the_run_does(recwarn: pytest.WarningsRecorder) -> None:
    hparams = {"api_key": "marker-2", "service": {"url": "here", "token": "marker-3"}}
    _, module = fitted(**hparams)
    assert (module.hparams.api_key, module.hparams.service["token"]) == ("marker-2", "marker-3")
    files = [os.path.join(folder, name) for folder, _, names in os.walk(".") for name in names]
    assert {os.path.basename(file) for file in files} >= {"hparams.yaml", "it.ckpt"}
    assert not [file for file in files if b"marker" in Path(file).read_bytes()]
    told = [str(warning.message) for warning in recwarn if "looks like a secret" in str(warning.message)]
    assert len(told) == 2
    assert "'api_key', 'service.token' of Keyed looks like a secret" in told[0]
    assert "'db_password' of Data" in told[1]
    recwarn.clear()


@pytest.mark.filterwarnings("ignore:the hyperparameter .* looks like a secret")
def test_they_are_given_again_when_a_checkpoint_is_loaded() -> None:
    fitted(api_key="marker", service={"url": "here"})
    assert Keyed.load_from_checkpoint("it.ckpt", api_key="again").hparams.api_key == "again"
    with (
        pytest.warns(UserWarning, match=r"'api_key': files get '\*\*\*'.*load_from_checkpoint\(path, api_key="),
        pytest.raises(TypeError, match="Keyed needs 'api_key'"),
    ):
        Keyed.load_from_checkpoint("it.ckpt")
    with pytest.raises(TypeError, match="Data needs 'db_password'"), pytest.warns(UserWarning, match="'db_password'"):
        Data.load_from_checkpoint("it.ckpt")


@pytest.mark.filterwarnings("ignore:the hyperparameter .* looks like a secret")
def test_one_that_has_a_default_is_the_default_with_a_warning() -> None:
    fitted(api_key="marker", hf_token="marker")
    with pytest.warns(UserWarning, match="does not have 'hf_token'"):
        module = Keyed.load_from_checkpoint("it.ckpt", api_key="again")
    assert module.hparams.hf_token is None
    assert store.load("it.ckpt")["hyper_parameters"] == {
        "api_key": "***",
        "width": 2,
        "service": None,
        "hf_token": "***",
    }
