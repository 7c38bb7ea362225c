"""What devices could do at best: dense peaks in operations a second, as their vendors publish them.

Numbers with structured sparsity are twice as high and nothing that trains reaches them, so they are not used here.
"tf32" is what float32 matrix products run in when `torch.set_float32_matmul_precision` allows it.
"""

from __future__ import annotations

import re

import torch

from trainkit.errors import warn


def _peaks(
    fp64: float | None, fp32: float, tf32: float | None, bf16: float | None, fp16: float, int8: float | None
) -> dict[torch.dtype | str, float]:
    """Return a device's peaks by dtype, from tera-operations a second."""
    given: dict[torch.dtype | str, float | None] = {torch.float64: fp64, torch.float32: fp32, "tf32": tf32}
    given |= {torch.bfloat16: bf16, torch.float16: fp16, torch.int8: int8}
    return {dtype: peak * 1e12 for dtype, peak in given.items() if peak is not None}


# A pattern of the device's name in lower case, the first that fits counts.
PEAKS: list[tuple[str, dict[torch.dtype | str, float]]] = [
    # Blackwell, Hopper
    (r"\bg?b200\b", _peaks(37, 75, 1125, 2250, 2250, 4500)),
    (r"h200.*nvl", _peaks(30, 60, 417.5, 835.5, 835.5, 1670.5)),
    (r"g?h200", _peaks(33.5, 66.9, 494.7, 989.4, 989.4, 1978.9)),
    (r"h100.*nvl", _peaks(30, 60, 417.5, 835.5, 835.5, 1670.5)),
    (r"h100.*(pcie|hbm2e)", _peaks(25.6, 51.2, 378, 756, 756, 1513)),
    (r"h100|h800", _peaks(33.5, 66.9, 494.7, 989.4, 989.4, 1978.9)),
    (r"h20\b", _peaks(1, 44, 74, 148, 148, 296)),
    # Ada
    (r"rtx 6000 ada", _peaks(None, 91.1, 182.1, 364.2, 364.2, 728.5)),
    (r"rtx 4090", _peaks(None, 82.6, 82.6, 165.2, 165.2, 660.6)),
    (r"rtx 4080 super", _peaks(None, 52.2, 52.2, 104.4, 104.4, 417.6)),
    (r"rtx 4080", _peaks(None, 48.7, 48.7, 97.5, 97.5, 389.9)),
    (r"\bl40s\b", _peaks(None, 91.6, 183.2, 362, 362, 733)),
    (r"\bl40\b", _peaks(None, 90.5, 90.5, 181, 181, 362)),
    (r"\bl4\b", _peaks(None, 30.3, 60, 121, 121, 242)),
    # Ampere
    (r"a100|a800", _peaks(9.7, 19.5, 156, 312, 312, 624)),
    (r"a30\b", _peaks(5.2, 10.3, 82, 165, 165, 330)),
    (r"a6000", _peaks(None, 38.7, 77.4, 154.8, 154.8, 309.7)),
    (r"a40\b", _peaks(None, 37.4, 74.8, 149.7, 149.7, 299.3)),
    (r"a10g?\b", _peaks(None, 31.2, 62.5, 125, 125, 250)),
    (r"rtx 3090 ti", _peaks(None, 40, 40, 80, 80, 320)),
    (r"rtx 3090", _peaks(None, 35.6, 35.6, 71, 71, 284)),
    (r"rtx 3080 ti", _peaks(None, 34.1, 34.1, 68, 68, 272.8)),
    (r"rtx 3080", _peaks(None, 29.8, 29.8, 59.5, 59.5, 238)),
    (r"rtx 3070", _peaks(None, 20.3, 20.3, 40.6, 40.6, 162.6)),
    # Turing, Volta
    (r"\bt4\b", _peaks(None, 8.1, None, None, 65, 130)),
    (r"titan rtx", _peaks(None, 16.3, None, None, 130.5, 261)),
    (r"quadro rtx 5000", _peaks(None, 11.2, None, None, 89.2, None)),
    (r"rtx 2080 super", _peaks(None, 11.2, None, None, 44.6, 178.4)),
    (r"rtx 2080 ti", _peaks(None, 14.2, None, None, 56.9, 227.7)),
    (r"rtx 2080", _peaks(None, 10.6, None, None, 42.4, 169.6)),
    (r"rtx 2070 super", _peaks(None, 9.1, None, None, 36.3, 145)),
    (r"v100s", _peaks(8.2, 16.4, None, None, 130, None)),
    (r"v100.*pcie", _peaks(7, 14, None, None, 112, None)),
    (r"v100", _peaks(7.8, 15.7, None, None, 125, None)),
    # AMD
    (r"mi300x", _peaks(81.7, 163.4, 653.7, 1307.4, 1307.4, 2614.9)),
]


def get_available_flops(device: torch.device, dtype: torch.dtype | str) -> int | None:
    """Return how many operations a second a device could do at best, in matrix products of a dtype.

    It is the vendor's dense peak; a real run reaches a part of it.

    Args:
        device: only "cuda" devices are known.
        dtype: what is multiplied. float32 is taken as tf32 where torch may use that.

    Returns:
        The number, or None where it is not known; for a cuda device a warning says so.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = next((peaks for pattern, peaks in PEAKS if re.search(pattern, name.lower())), None)
    if peaks is None or re.search(r"laptop|max-q|\bmig\b", name.lower()):  # a part of what the name stands for
        warn(f"how many FLOPs {name!r} could do is not known, so there will be no MFU.")
        return None
    if dtype is torch.float32 and "tf32" in peaks and torch.get_float32_matmul_precision() != "highest":
        dtype = "tf32"
    if dtype not in peaks:
        warn(f"how many FLOPs {name!r} could do in {dtype} is not known, so there will be no MFU.")
        return None
    return int(peaks[dtype])
