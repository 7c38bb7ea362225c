"""Run a program in several processes of one process group, as torchrun does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import NamedTuple


class Result(NamedTuple):
    """What one process left behind."""

    rank: int
    returncode: int
    stdout: str
    stderr: str


def run(nproc: int, source: str, *args: str, timeout: float = 60) -> list[Result]:
    """Run a program's source in so many processes, each with the environment that torchrun gives, and wait for all."""
    path = Path(f"program_{uuid.uuid4().hex[:8]}.py").resolve()
    path.write_text(source)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(nproc):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if nproc > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc),
                "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        command = [sys.executable, str(path), *args]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    results = []
    try:
        for rank, process in enumerate(processes):
            out, err = process.communicate(timeout=timeout)
            results.append(Result(rank, process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return results
