"""One measurement in a process of its own: `python -m benchmarks.child request.json`. The answer goes beside it."""

from __future__ import annotations

import importlib
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    request = Path(sys.argv[1])
    asked: dict[str, Any] = json.loads(request.read_text())
    workload = importlib.import_module(f"benchmarks.workloads.{asked['workload']}")
    if asked["workload"] != "startup":  # which measures the import
        import torch

        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    answers = {}
    for case in asked["cases"]:
        folder = request.parent / case
        folder.mkdir()
        answers[case] = workload.measure(case, asked["peer"], asked["quick"], folder)
        answers[case]["process_cpu"] = time.process_time()  # with imports and preparations
    request.with_name("answer.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
