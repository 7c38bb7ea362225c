"""benchmarks/gpu.py: it says what it needs, and its code runs on a machine without a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(checkout / "benchmarks" / "gpu.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_without_a_device_it_says_that_it_needs_one(checkout: Path, tmp_path: Path) -> None:
    done = run(checkout, "--out", str(tmp_path))
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert run(checkout, "--device", "cpu").returncode == 2


def test_a_rehearsal_runs_every_part_and_finds_the_same_losses(checkout: Path, tmp_path: Path) -> None:
    done = run(checkout, "--device", "cpu", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu-*-rehearsal.json")
    found = json.loads(path.read_text())
    assert found["rehearsal"] is True
    assert found["left_out"].keys() <= {"lightning", "host synchronisations between log points"}
    assert len(found["results"]) == 9
    assert all(of["fine"] for of in found["results"]["numerics"].values())
    assert found["results"]["numerics"]["transformer, trainkit"]["largest_relative_difference"] < 1e-6
    assert found["results"]["MFU"]["ways"]["trainkit"]["tokens_per_s"] > 0
    assert found["results"]["(a) tiny MLP"]["hand"]["ratio"] == 1.0
    text = path.with_suffix(".md").read_text()
    assert "A rehearsal on tiny sizes" in text
    assert "## (h) checkpoint" in text


def test_what_does_not_fit_into_the_time_is_left_out_and_listed(checkout: Path, tmp_path: Path) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("gpu_benchmark", checkout / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    gpu = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = gpu
    spec.loader.exec_module(gpu)
    bench = gpu.Bench(torch.device("cpu"), quick=False, seconds=10)
    bench.part("long", 60, lambda: pytest.fail("it has no time"))
    bench.part("short", 1, lambda: {"done": 1})
    assert bench.results == {"short": {"done": 1}}
    assert "it needs 60 s" in bench.left_out["long"]
    net = gpu.tasks(quick=False)["gpt"].net()
    assert sum(parameter.numel() for parameter in net.parameters()) > 100e6
    assert net.flops_per_token() == pytest.approx(6 * 123_640_320 + 12 * 12 * 768 * 1024, rel=0.01)
