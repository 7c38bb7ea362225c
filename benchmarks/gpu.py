"""Measure trainkit on one CUDA device, beside the hand-written loop and Lightning, in under eight minutes.

    python benchmarks/gpu.py                          # on a machine with a CUDA device
    python benchmarks/gpu.py --device cpu --quick     # a rehearsal of the same code: its numbers mean nothing

Nothing is installed: Lightning is measured where it is there, under either of its names. Every part has its share of
the time; what did not fit is listed at the end. The clock is read, and the device waited for, when the first batch
after the warm-up and when the last one is drawn. The ways to train take turns; a number is the median over the rounds.
Results go to benchmarks/results/gpu-*.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

PEAK = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
    "A10G": 70e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bfloat16 FLOP/s by what a device's name contains, from its data sheet; the first that fits counts."""
OFF: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- what is trained
@dataclass(frozen=True)
class Task:
    """A net, its loss, its optimizer and a batch of it."""

    name: str
    net: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: Callable[[torch.device], tuple[Tensor, Tensor]]
    lr: float = 1e-3

    def optimizer(self, net: nn.Module, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters(), lr=self.lr, **options)


class CNN(nn.Module):
    """Five convolutions with batch norm on 28 x 28 pixels, as in workload (c)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [1, width, 2 * width, 2 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for place, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            pool = nn.MaxPool2d(2) if place % 2 == 0 else nn.Identity()
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), pool, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 9, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(size, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(size, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """A causal Transformer; the embedding is the output layer's weight, too."""

    def __init__(self, words: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.scores = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.scores.weight = self.words.weight
        self.register_buffer("index", torch.arange(length), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        return self.scores(self.norm(self.blocks(self.words(codes) + self.places(self.index))))

    def flops_per_token(self) -> float:
        """6 for every weight that is multiplied with (the table of places is not), and 12 x layers x width x length for
        attention, which is counted as if it were not causal (Chowdhery et al., PaLM, 2022, appendix B)."""
        weights = sum(p.numel() for p in self.parameters()) - self.places.weight.numel()
        length, width = self.places.weight.shape
        return 6.0 * weights + 12.0 * len(self.blocks) * width * length


def token_loss(scores: Tensor, codes: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), codes.flatten())


def images(size: int, *shape: int) -> Callable[[torch.device], tuple[Tensor, Tensor]]:
    return lambda device: (torch.randn(size, *shape, device=device), torch.randint(10, (size,), device=device))


def codes(size: int, length: int, words: int) -> Callable[[torch.device], tuple[Tensor, Tensor]]:
    return lambda device: (2 * (torch.randint(words, (size, length), device=device),))[:2]


def tasks(quick: bool) -> dict[str, Task]:
    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    if quick:
        return {
            "mlp": Task("mlp", mlp, F.cross_entropy, images(8, 64)),
            "cnn": Task("cnn", lambda: CNN(4), F.cross_entropy, images(4, 1, 28, 28)),
            "transformer": Task("transformer", lambda: GPT(64, 16, 32, 1, 2), token_loss, codes(2, 16, 64)),
            "gpt": Task("gpt", lambda: GPT(64, 16, 32, 2, 2), token_loss, codes(2, 16, 64)),
            "h2d": Task("h2d", lambda: CNN(4), F.cross_entropy, images(8, 1, 28, 28)),
        }
    return {
        "mlp": Task("mlp", mlp, F.cross_entropy, images(32, 64)),
        "cnn": Task("cnn", lambda: CNN(32), F.cross_entropy, images(512, 1, 28, 28)),
        "transformer": Task("transformer", lambda: GPT(256, 256, 384, 6, 6), token_loss, codes(32, 256, 256)),
        "gpt": Task("gpt", lambda: GPT(50304, 1024, 768, 12, 12), token_loss, codes(16, 1024, 50304), 3e-4),
        "h2d": Task("h2d", lambda: CNN(32), F.cross_entropy, images(8192, 1, 28, 28)),
    }


# ---------------------------------------------------------------------------------------------- how it is timed
class Batches:
    """The batches that every way to train draws from; it reads the clock twice.

    Some ways draw a batch ahead, all of them as many: between the two readings lie equally many steps.

    Args:
        batches: used in turn.
        count: how many steps.
        warm_up: steps before the clock begins.
        device: what to wait for when the clock is read.
    """

    def __init__(self, batches: list[Any], count: int, warm_up: int, device: torch.device) -> None:
        self.batches, self.count, self.warm_up, self.device = batches, count, warm_up, device
        self.seconds = 0.0
        """Of a step."""
        self.at: Callable[[int], None] = lambda index: None
        """Called with a batch's index before it is drawn."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        began = 0.0
        for index in range(self.count):
            if index in (self.warm_up, self.count - 1):
                wait_for(self.device)
                now = time.perf_counter()
                began, self.seconds = now, (now - began) / (self.count - 1 - self.warm_up)
            self.at(index)
            yield self.batches[index % len(self.batches)]


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Setting:
    """How a task is trained, in words that all three ways understand."""

    precision: str = "32-true"
    compile: Any = None
    channels_last: bool = False
    log: int = 0
    defaults: bool = False
    fused: bool = True
    more: dict[str, Any] = field(default_factory=dict)


Losses = list[Tensor]
TYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def by_hand(task: Task, setting: Setting, batches: Batches, device: torch.device, losses: Losses | None) -> nn.Module:
    """The loop that a careful person writes for this device."""
    net = task.net().to(device)
    if setting.channels_last:
        net = net.to(memory_format=torch.channels_last)
    optimizer = task.optimizer(net, fused=setting.fused)
    dtype = TYPES.get(setting.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    model = torch.compile(net) if setting.compile else net
    for inputs, targets in batches:
        inputs, targets = (part.to(device, non_blocking=True) for part in (inputs, targets))
        if setting.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext():
            loss = task.loss(model(inputs), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if losses is not None:
            losses.append(loss.detach())
    return net


def module_of(base: Any, task: Task, setting: Setting, losses: Losses | None, fused: bool | None) -> Any:
    class Trained(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = task.net()

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = task.loss(self.net(batch[0]), batch[1])
            for number in range(setting.log):
                self.log(f"loss{number}", loss)
            return loss

        def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].detach().clone())  # type: ignore[union-attr]

        def configure_optimizers(self) -> Any:
            return task.optimizer(self.net, **({} if fused is None else {"fused": fused}))

    if losses is None:
        del Trained.on_train_batch_end
    return Trained()


def trained_by(
    library: Any, base: Any, task: Task, setting: Setting, batches: Batches, device: torch.device,
    losses: Losses | None, fused: bool | None, **own: Any,
) -> nn.Module:  # fmt: skip
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    options = {**({} if setting.defaults else OFF), **own, "precision": setting.precision, **setting.more}
    with tempfile.TemporaryDirectory() as folder, quiet():
        module = module_of(base, task, setting, losses, fused)
        trainer = library.Trainer(accelerator=accelerator, devices=1, max_epochs=1, default_root_dir=folder, **options)
        trainer.fit(module, batches)
    return module.net


def by_trainkit(
    task: Task, setting: Setting, batches: Batches, device: torch.device, losses: Losses | None
) -> nn.Module:
    import trainkit

    own: dict[str, Any] = {"compile": setting.compile, "channels_last": setting.channels_last}
    own["fused_optimizers"] = setting.fused  # what configure_optimizers leaves open
    return trained_by(trainkit, trainkit.Module, task, setting, batches, device, losses, None, **own)


def by_lightning(
    task: Task, setting: Setting, batches: Batches, device: torch.device, losses: Losses | None
) -> nn.Module:
    library = lightning()
    assert library is not None
    if setting.compile or setting.channels_last:
        raise LeftOut("Lightning has no argument for it")
    return trained_by(library, library.LightningModule, task, setting, batches, device, losses, setting.fused)


def lightning() -> Any:
    """Return Lightning under the name it has here, None where it is not installed."""
    for name in ("lightning", "pytorch_lightning"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep bars and notices of a run off the screen."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


WAYS: dict[str, Callable[..., nn.Module]] = {"hand": by_hand, "trainkit": by_trainkit, "lightning": by_lightning}


class LeftOut(Exception):
    """Why something was not measured."""


class Bench:
    """Run parts until the time is over, and keep what they say.

    Args:
        device: where.
        quick: tiny sizes and few steps.
        seconds: for everything together.
    """

    def __init__(self, device: torch.device, quick: bool, seconds: float) -> None:
        self.device, self.quick, self.end = device, quick, time.monotonic() + seconds
        self.tasks = tasks(quick)
        self.results: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}
        self.ways = [way for way in WAYS if way != "lightning" or lightning() is not None]
        if "lightning" not in self.ways:
            self.left_out["lightning"] = "neither lightning nor pytorch_lightning is installed"

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def part(self, name: str, needs: float, run: Callable[[], Any]) -> None:
        """Run one part, unless the time that it needs is not there any more."""
        if self.seconds_left < (needs if not self.quick else 0):
            self.left_out[name] = f"no time: it needs {needs:.0f} s, and {max(self.seconds_left, 0):.0f} s were left"
            return
        began = time.monotonic()
        try:
            self.results[name] = run()
        except LeftOut as why:
            self.left_out[name] = str(why)
        except Exception as error:
            self.left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - began:.1f} s, {self.seconds_left:.0f} s left", flush=True)

    def batches(self, task: Task, steps: int, warm_up: int, host: bool = False) -> Batches:
        torch.manual_seed(1)
        made = [task.batch(torch.device("cpu") if host else self.device) for _ in range(4)]
        if host and self.device.type == "cuda":
            made = [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in made]
        return Batches(made, steps, warm_up, self.device)

    def time(
        self,
        task: Task,
        steps: int,
        ways: dict[str, tuple[str, Setting]],
        rounds: int = 3,
        warm_up: int = 10,
        host: bool = False,
    ) -> dict[str, Any]:
        """Return milliseconds a step and peak memory of each way, and the ratios to the first, taking turns."""
        steps, warm_up, rounds = (steps, warm_up, rounds) if not self.quick else (8, 5, 1)
        times: dict[str, list[float]] = {name: [] for name in ways}
        memory: dict[str, float] = {}
        for _ in range(rounds):
            for name, (way, setting) in ways.items():
                if way not in self.ways:
                    continue
                batches = self.batches(task, steps, warm_up, host)
                torch.manual_seed(0)
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                try:
                    WAYS[way](task, setting, batches, self.device, None)
                except Exception as error:
                    self.left_out[f"{task.name}, {name}"] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
                    continue
                times[name].append(1000 * batches.seconds)
                if self.device.type == "cuda":
                    memory[name] = torch.cuda.max_memory_allocated() / 2**20
        first = statistics.median(next(iter(times.values())))
        return {
            name: {
                "ms": round(statistics.median(of), 4),
                "ratio": round(statistics.median(of) / first, 4),
                "min": round(min(of), 4),
                "max": round(max(of), 4),
                **({"peak_mb": round(memory[name], 1)} if name in memory else {}),
            }
            for name, of in times.items()
            if of
        }


# ---------------------------------------------------------------------------------------------- the parts
def numerics(bench: Bench) -> dict[str, Any]:
    """Losses of a few steps in every setting, against the hand-written loop in float32 without TF32."""
    allowed = {"32-true": 1e-3, "bf16-mixed": 5e-2, "16-mixed": 2e-2}
    from trainkit.precision import MixedPrecision

    # the first scale that torch takes overflows, and then an update is left out
    calm = torch.amp.GradScaler(bench.device.type, init_scale=64.0)
    settings = {
        "trainkit": Setting(),
        "trainkit bf16": Setting("bf16-mixed"),
        "trainkit fp16": Setting(
            "16-mixed", more={"precision": None, "plugins": [MixedPrecision("16-mixed", None, calm)]}
        ),
        "trainkit channels_last": Setting(channels_last=True),
        "trainkit compile": Setting(compile=True),
        "trainkit graph": Setting(compile="graph"),
    }
    if bench.quick:
        settings["trainkit compile"] = Setting(compile={"backend": "eager"})
    if bench.device.type != "cuda":
        del settings["trainkit graph"]
    found: dict[str, Any] = {}
    torch.set_float32_matmul_precision("highest")
    for task in (bench.tasks["cnn"], bench.tasks["transformer"]):
        truth = losses_of(bench, "hand", task, Setting())
        for name, setting in settings.items():
            losses = losses_of(bench, "trainkit", task, setting)
            difference = max(abs(one - other) / abs(other) for one, other in zip(losses, truth, strict=True))
            fine = difference <= allowed[setting.precision]
            found[f"{task.name}, {name}"] = {"largest_relative_difference": difference, "fine": fine}
    return found


def losses_of(bench: Bench, way: str, task: Task, setting: Setting) -> list[float]:
    losses: Losses = []
    torch.manual_seed(0)
    steps = 8 if bench.quick else 20
    WAYS[way](task, setting, bench.batches(task, steps, 1), bench.device, losses)
    return torch.stack([loss.float().reshape(()) for loss in losses]).tolist()


def tax(bench: Bench) -> dict[str, Any]:
    """(a) The framework's tax: next to nothing to compute, the device waits for the host."""
    ways = {name: (name, Setting()) for name in bench.ways}
    if bench.device.type == "cuda":
        ways["trainkit graph"] = ("trainkit", Setting(compile="graph"))
    ways |= {f"{name}, defaults": (name, Setting(defaults=True)) for name in bench.ways if name != "hand"}
    return bench.time(bench.tasks["mlp"], 1000, ways)


def logging(bench: Bench) -> dict[str, Any]:
    """(b) The same with one and five logged metrics, logger, bar and checkpoints on."""
    ways = {"hand": ("hand", Setting())}
    for log in (1, 5):
        ways |= {f"{n}, {log} logged": (n, Setting(log=log, defaults=True)) for n in bench.ways if n != "hand"}
    return bench.time(bench.tasks["mlp"], 600, ways, rounds=2)


def nets(name: str, steps: int) -> Callable[[Bench], dict[str, Any]]:
    """(c), (d) and (g): a real net in three precisions; peak memory goes with it."""

    def run(bench: Bench) -> dict[str, Any]:
        found = {}
        for precision in ("32-true", "bf16-mixed", "16-mixed"):
            ways = {way: (way, Setting(precision)) for way in bench.ways}
            found[precision] = bench.time(bench.tasks[name], steps, ways, rounds=2)
        return found

    return run


def compiled(bench: Bench) -> dict[str, Any]:
    """torch.compile and CUDA graphs on the Transformer, channels-last on the CNN; all in bfloat16."""
    compile: Any = {"backend": "eager"} if bench.quick else True
    eager, by = Setting("bf16-mixed"), Setting("bf16-mixed", compile=compile)
    ways = {
        "hand": ("hand", eager),
        "hand compiled": ("hand", by if not bench.quick else eager),
        "trainkit": ("trainkit", eager),
        "trainkit compile": ("trainkit", by),
    }
    last = Setting("bf16-mixed", channels_last=True)
    images = {
        "hand": ("hand", eager),
        "hand channels_last": ("hand", last),
        "trainkit channels_last": ("trainkit", last),
    }
    if bench.device.type == "cuda":
        ways["trainkit graph"] = ("trainkit", Setting("bf16-mixed", compile="graph"))
    return {
        "transformer": bench.time(bench.tasks["transformer"], 100, ways, rounds=2),
        "cnn": bench.time(bench.tasks["cnn"], 100, images, rounds=2),
    }


def overlap(bench: Bench) -> dict[str, Any]:
    """Batches in pinned host memory: does bringing the next one over cost anything while the current one computes?"""
    task, setting = bench.tasks["h2d"], Setting("bf16-mixed")
    there = bench.time(task, 60, {"on the device already": ("trainkit", setting)}, rounds=2)
    host = bench.time(task, 60, {way: (way, setting) for way in bench.ways}, rounds=2, host=True)
    return there | {f"{name}, from the host": value for name, value in host.items()}


def synchronisations(bench: Bench) -> dict[str, Any]:
    """How often the host waits for the device between two log points, with five metrics logged. It must not."""
    if bench.device.type != "cuda":
        raise LeftOut("needs a cuda device")
    counts = {}
    settings = {"trainkit": Setting(log=5), "trainkit bf16": Setting("bf16-mixed", log=5), "lightning": Setting(log=5)}
    for name, setting in settings.items():
        way = name.split()[0]
        if way not in bench.ways:
            continue
        batches = bench.batches(bench.tasks["cnn"], 40, 5)
        batches.at = lambda index: torch.cuda.set_sync_debug_mode("warn" if 10 <= index < 35 else "default")
        setting.more = {"log_every_n_steps": 1000, "logger": True}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                WAYS[way](bench.tasks["cnn"], setting, batches, bench.device, None)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts[name] = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    return counts


def checkpoint(bench: Bench) -> dict[str, Any]:
    """(h) Size of a checkpoint of the largest net, and the seconds that training stands still for it."""
    import trainkit
    from trainkit.callbacks import ModelCheckpoint

    task, found = bench.tasks["gpt"], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in {"trainkit": {}, "trainkit, asynchronous": {"asynchronous": True}}.items():
            module = module_of(trainkit.Module, task, Setting(), None, None)
            stops: list[float] = []

            class Timed(ModelCheckpoint):
                def on_save_point(self, *arguments: Any, stops: list[float] = stops) -> None:
                    wait_for(bench.device)
                    began = time.perf_counter()
                    super().on_save_point(*arguments)
                    stops.append(time.perf_counter() - began)

            keep = Timed(os.path.join(folder, name), every_n_train_steps=4, save_top_k=-1, **options)
            accelerator = "gpu" if bench.device.type == "cuda" else "cpu"
            plain = {**OFF, "enable_checkpointing": True, "callbacks": [keep], "default_root_dir": folder}
            with quiet():
                trainer = trainkit.Trainer(accelerator=accelerator, max_epochs=1, precision="bf16-mixed", **plain)
                trainer.fit(module, bench.batches(task, 5, 1))
            files = list(Path(folder, name).glob("*.ckpt"))
            found[name] = {"size_mb": round(files[0].stat().st_size / 2**20, 1), "stands_still_s": round(max(stops), 4)}
        if "lightning" in bench.ways:
            library: Any = lightning()
            module = module_of(library.LightningModule, task, Setting(), None, True)
            with quiet():
                trainer = library.Trainer(
                    accelerator="gpu" if bench.device.type == "cuda" else "cpu", max_steps=2, **OFF
                )
                trainer.fit(module, bench.batches(task, 3, 1))
                began = time.perf_counter()
                trainer.save_checkpoint(os.path.join(folder, "lightning.ckpt"))
            seconds, size = time.perf_counter() - began, os.path.getsize(os.path.join(folder, "lightning.ckpt"))
            found["lightning"] = {"size_mb": round(size / 2**20, 1), "stands_still_s": round(seconds, 4)}
    return found


def utilisation(bench: Bench) -> dict[str, Any]:
    """Model FLOPs utilisation of a GPT in bfloat16."""
    task = bench.tasks["gpt"]
    compile: Any = {"backend": "eager"} if bench.quick else True
    ways = {
        "hand": ("hand", Setting("bf16-mixed")),
        "trainkit": ("trainkit", Setting("bf16-mixed")),
        "lightning": ("lightning", Setting("bf16-mixed")),
        "trainkit compile": ("trainkit", Setting("bf16-mixed", compile=compile)),
    }
    if bench.device.type == "cuda":
        ways["trainkit graph"] = ("trainkit", Setting("bf16-mixed", compile="graph"))
    torch.set_float32_matmul_precision("high")
    found = bench.time(task, 20, {name: way for name, way in ways.items() if way[0] in bench.ways}, rounds=1, warm_up=6)
    net: Any = task.net()
    inputs, _ = task.batch(torch.device("cpu"))
    peak = peak_of(bench.device)
    for value in found.values():
        value["tokens_per_s"] = round(inputs.numel() / value["ms"] * 1000)
        flops = value["tokens_per_s"] * net.flops_per_token()
        value["mfu"] = round(flops / peak, 4) if peak else None
    sizes = {"parameters": sum(p.numel() for p in net.parameters()), "flops_per_token": net.flops_per_token()}
    return {
        **sizes,
        "peak_flops": peak,
        "formula": " ".join((GPT.flops_per_token.__doc__ or "").split()),
        "ways": found,
    }


def peak_of(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK.items() if part in name), None)


PARTS: dict[str, tuple[float, Callable[[Bench], Any]]] = {
    "numerics": (60, numerics),
    "(a) tiny MLP": (40, tax),
    "host synchronisations between log points": (15, synchronisations),
    "MFU": (90, utilisation),
    "compile, graph, channels-last": (70, compiled),
    "(d) Transformer": (40, nets("transformer", 60)),
    "(c) CNN": (40, nets("cnn", 100)),
    "(b) logging": (40, logging),
    "H2D overlap": (25, overlap),
    "(h) checkpoint": (25, checkpoint),
}
"""In the order of their weight, each with the seconds that it needs."""


# ---------------------------------------------------------------------------------------------- what comes out
def described(device: torch.device) -> dict[str, Any]:
    library = lightning()
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": on,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "lightning": getattr(library, "__version__", None),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def as_markdown(found: dict[str, Any]) -> str:
    machine = found["machine"]
    lines = [f"# {machine['device']}, {machine['date']}", ""]
    if found["rehearsal"]:
        lines += ["**A rehearsal on tiny sizes: these numbers mean nothing.**", ""]
    lines += [", ".join(f"{name} {value}" for name, value in machine.items() if name not in ("device", "date")), ""]
    for part, value in found["results"].items():
        lines += [f"## {part}", "", *rows(value), ""]
    if found["left_out"]:
        lines += ["## Left out", "", *(f"- {name}: {why}" for name, why in found["left_out"].items()), ""]
    return "\n".join(lines)


def rows(value: Any, prefix: str = "") -> list[str]:
    """Return a table for dicts of numbers, and one below the other for dicts of tables."""
    if not isinstance(value, dict):
        return [f"- {prefix}: {value}"]
    flat = [
        key for key, of in value.items() if isinstance(of, dict) and not any(isinstance(v, dict) for v in of.values())
    ]
    lines = [line for key, of in value.items() if not isinstance(of, dict) for line in rows(of, key)]
    if flat:
        columns = list(dict.fromkeys(column for key in flat for column in value[key]))
        lines += ["", "| " + " | ".join([prefix, *columns]) + " |", "|" + "---|" * (len(columns) + 1)]
        lines += ["| " + " | ".join([key, *(str(value[key].get(c, "")) for c in columns)]) + " |" for key in flat]
    for key, of in value.items():
        if isinstance(of, dict) and key not in flat:
            lines += ["", f"### {key}", *rows(of, "")]
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run everything; return the exit code: 2 where there is no device, 1 where numbers of trainkit are wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu for a rehearsal")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few steps: to see that everything runs")
    parser.add_argument("--minutes", type=float, default=7.5, help="stop after so many (default 7.5)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="the folder for the results")
    parser.add_argument("--parts", nargs="*", default=[], help="only those whose name contains one of these words")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks/gpu.py needs a CUDA device, and torch sees none here. `--device cpu --quick` rehearses it.",
            file=sys.stderr,
        )
        return 2
    if device.type != "cuda" and not given.quick:
        print(
            f"benchmarks/gpu.py measures a CUDA device; on {device.type} it only rehearses: add --quick.",
            file=sys.stderr,
        )
        return 2
    bench = Bench(device, given.quick, 60 * given.minutes)
    for name, (needs, run) in PARTS.items():
        if not given.parts or any(word in name for word in given.parts):
            bench.part(name, needs, lambda run=run: run(bench))
    machine = described(device)
    found = {"machine": machine, "rehearsal": given.quick, "results": bench.results, "left_out": bench.left_out}
    given.out.mkdir(parents=True, exist_ok=True)
    slug = "-".join(
        "".join(c if c.isalnum() else " " for c in f"{machine['device']} {machine['date'][:10]}").lower().split()
    )
    path = given.out / f"gpu-{slug}{'-rehearsal' if given.quick else ''}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(found))
    print(as_markdown(found))
    print(f"written to {path} and {path.with_suffix('.md')}")
    wrong = [name for name, of in bench.results.get("numerics", {}).items() if not of["fine"]]
    waits = [
        n for n, c in bench.results.get("host synchronisations between log points", {}).items() if "trainkit" in n and c
    ]
    for name in wrong + waits:
        print(f"wrong: {name}", file=sys.stderr)
    return 1 if wrong or waits else 0


if __name__ == "__main__":
    sys.exit(main())
