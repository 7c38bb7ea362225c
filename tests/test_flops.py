from __future__ import annotations

from typing import Any

import pytest
import torch

from trainkit.flops import get_available_flops

CUDA = torch.device("cuda", 0)


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda text: monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: text)


@pytest.mark.parametrize(
    ("device_name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H100 NVL", torch.bfloat16, 835.5),
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA H200 NVL", torch.float16, 835.5),
        ("NVIDIA GH200 480GB", torch.float32, 66.9),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40", torch.bfloat16, 181),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA A100-SXM4-80GB", torch.float64, 9.7),
        ("NVIDIA A100 80GB PCIe", torch.bfloat16, 312),
        ("NVIDIA A10G", torch.float16, 125),
        ("NVIDIA A10", torch.float16, 125),
        ("NVIDIA A40", torch.float32, 37.4),
        ("NVIDIA RTX A6000", torch.float32, 38.7),
        ("NVIDIA RTX 6000 Ada Generation", torch.bfloat16, 364.2),
        ("NVIDIA GeForce RTX 4090", torch.float32, 82.6),
        ("NVIDIA GeForce RTX 4080 SUPER", torch.float32, 52.2),
        ("NVIDIA GeForce RTX 3090 Ti", torch.float32, 40),
        ("NVIDIA GeForce RTX 2080 Ti", torch.float32, 14.2),
        ("Tesla T4", torch.float16, 65),
        ("Tesla V100-SXM2-32GB", torch.float16, 125),
        ("Tesla V100-PCIE-16GB", torch.float16, 112),
        ("Tesla V100S-PCIE-32GB", torch.float16, 130),
        ("AMD Instinct MI300X", torch.bfloat16, 1307.4),
    ],
)
def test_a_device_is_known_by_its_name(name: Any, device_name: str, dtype: torch.dtype, tera: float) -> None:
    name(device_name)
    assert get_available_flops(CUDA, dtype) == pytest.approx(tera * 1e12)


def test_float32_is_tf32_where_torch_may_use_it(name: Any) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        name("NVIDIA A100-SXM4-40GB")
        assert get_available_flops(CUDA, torch.float32) == 156e12
        name("Tesla V100-SXM2-32GB")  # has none
        assert get_available_flops(CUDA, torch.float32) == 15.7e12
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "device_name", ["NVIDIA Unheard 9000", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"]
)
def test_an_unknown_device_warns(name: Any, device_name: str) -> None:
    name(device_name)
    with pytest.warns(UserWarning, match=f"{device_name}.*is not known"):
        assert get_available_flops(CUDA, torch.float32) is None


def test_a_dtype_the_device_does_not_have_warns(name: Any) -> None:
    name("Tesla T4")
    with pytest.warns(UserWarning, match="in torch.bfloat16 is not known"):
        assert get_available_flops(CUDA, torch.bfloat16) is None


def test_the_cpu_is_not_known_and_nobody_expects_it() -> None:
    assert get_available_flops(torch.device("cpu"), torch.float32) is None
