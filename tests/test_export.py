"""Modules in other runtimes give what they give here."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainkit import Module, Trainer
from trainkit.errors import MisconfigurationException

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
GIVEN_UP = "PyTorch gives TorchScript up"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


class Net(Module):
    """Dropout and batch norm: in training mode the outputs would be others."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.inner = Inner(width)
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 2))
        self.strict_loading = False

    @property
    def width(self) -> Any:
        return self.hparams.width

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


Net.__jit_unused_properties__ = [*Module.__jit_unused_properties__, "width"]  # type: ignore[attr-defined]


class Inner(Module):
    """A Module inside a Module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.line = nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.line(x))


def quiet(**settings: Any) -> Trainer:
    off: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(max_epochs=1, **off, **settings)


@pytest.fixture(params=["new", "trained"])
def net(request: pytest.FixtureRequest) -> Net:
    module = Net()
    if request.param == "trained":
        quiet(accelerator="cpu").fit(module, DataLoader(torch.randn(8, 4), batch_size=4))  # type: ignore[arg-type]
    module.head[0].eval()  # frozen by its owner
    return module


def expected(net: Net, x: Tensor) -> Tensor:
    modes = [part.training for part in net.modules()]
    with torch.no_grad():
        y = net.eval()(x)
    for part, training in zip(net.modules(), modes, strict=True):
        part.training = training
    return y  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["script", "trace"])
def test_torchscript_is_in_evaluation_mode_and_leaves_every_mode_alone(net: Net, method: str, tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    modes, run = [part.training for part in net.modules()], vars(net).get("_trainer")
    with pytest.warns(DeprecationWarning, match=GIVEN_UP):
        exported = net.to_torchscript(tmp_path / "net.pt", method=method, example_inputs=x)
    assert [part.training for part in net.modules()] == modes
    assert vars(net).get("_trainer") is run
    with pytest.warns(FutureWarning, match="deprecated"):
        loaded = torch.jit.load(tmp_path / "net.pt")
    assert torch.equal(exported(x), expected(net, x))
    assert torch.equal(loaded(x), expected(net, x))
    assert not exported.training


def test_a_trace_takes_the_example_of_the_module_through_its_transfer_hooks() -> None:
    class Scaled(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch["x"]

    net = Scaled()
    net.example_input_array = {"x": torch.randn(3, 4)}
    with pytest.warns(DeprecationWarning, match=GIVEN_UP):
        exported = net.to_torchscript(method="trace", check_inputs=None)
    assert torch.equal(exported(torch.ones(3, 4)), expected(net, torch.ones(3, 4)))


def test_an_error_inside_gives_modes_and_run_back() -> None:
    class Unreadable(Net):
        def forward(self, x: Tensor) -> Tensor:
            return (lambda: x)()  # TorchScript has no lambda

    net = Unreadable()
    with pytest.warns(DeprecationWarning, match=GIVEN_UP), pytest.raises(Exception, match=r"(?i)lambda"):
        net.to_torchscript()
    assert net.training
    with pytest.raises(RuntimeError, match="not attached"):
        net.trainer  # noqa: B018


def test_what_can_not_be_exported_is_refused() -> None:
    with pytest.raises(ValueError, match="method must be 'script' or 'trace'"):
        Net().to_torchscript(method="temp")
    with pytest.warns(DeprecationWarning, match=GIVEN_UP), pytest.raises(ValueError, match=r"set self\.example_input"):
        Net().to_torchscript(method="trace")
    with pytest.raises(ValueError, match="to_onnx needs inputs for forward"):
        Net().to_onnx("net.onnx")


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, while it exports
def test_an_onnx_file_computes_the_same(net: Net, dynamo: bool, tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    modes = [part.training for part in net.modules()]
    program = net.to_onnx(tmp_path / "net.onnx", x, dynamo=dynamo, verbose=False)
    assert (program is not None) == dynamo
    assert [part.training for part in net.modules()] == modes
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(tmp_path / "net.onnx")
    (y,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), expected(net, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_onnx_goes_into_a_file_object_too() -> None:
    file = BytesIO()
    Net().to_onnx(file, (torch.randn(3, 4),), dynamo=False, verbose=False)
    onnx.checker.check_model(onnx.load_from_string(file.getvalue()))


@pytest.mark.parametrize("device", DEVICES)
def test_torch_export_takes_a_module_as_it_is(device: str) -> None:
    net = Net()
    trainer = quiet(accelerator=device)
    trainer.fit(net, DataLoader(torch.randn(8, 4), batch_size=4))  # type: ignore[arg-type]
    x = torch.randn(3, 4, device=device)
    net.to(device).eval()
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_traced_on_a_device_computes_the_same_there(device: str) -> None:
    net, x = Net().to(device), torch.randn(3, 4)
    with pytest.warns(DeprecationWarning, match=GIVEN_UP):
        exported = net.to_torchscript(method="trace", example_inputs=x)  # brought to the device
    x = x.to(device)
    torch.testing.assert_close(exported(x), expected(net, x), rtol=0, atol=0)


def test_tensorrt_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match="needs torch_tensorrt: pip install torch-tensorrt"):
        Net().to_tensorrt()
    monkeypatch.setattr("trainkit.export.find_spec", lambda package: package)
    with pytest.raises(MisconfigurationException, match="runs on CUDA devices only"):
        Net().to_tensorrt(default_device="cpu")
