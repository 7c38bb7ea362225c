"""Two machines on this one: network namespaces with torchrun's agent and its worker, that can be killed and cut off.

    with Nodes(folder, environ) as nodes:
        nodes.start(0, "train.py", "--max-restarts=3")
        nodes.start(1, "train.py", "--max-restarts=3")
        nodes.cut(1)

It takes root and `ip`; `reason()` says why there can be none here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

PORT = 29433
QUICK = "last_call_timeout=2,join_timeout=120"
"""How many seconds agents wait: for more nodes when there are enough, and for enough."""


def _ip(*words: str, check: bool = True) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check).stdout


def reason() -> str:
    """Return why there can be no network namespaces here, "" if there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root, for network namespaces"
    if shutil.which("ip") is None:
        return "needs `ip` of iproute2, for network namespaces"
    name = f"tkp{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"there are no network namespaces here: {made.stderr.strip()}"
    _ip("netns", "del", name, check=False)
    return ""


class Nodes:
    """Two nodes and the switch between them.

    Args:
        folder: where scripts run and logs go; the file system that the nodes share.
        environ: the environment variables of their processes.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self.environ = {**environ, "GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.folder, self.tag = folder, f"tk{os.getpid()}"
        self.agents: dict[int, subprocess.Popen[bytes]] = {}
        self._net = 100 + os.getpid() % 100

    def name(self, node: int) -> str:
        """Return what a node's namespace is called."""
        return f"{self.tag}n{node}"

    def address(self, node: int) -> str:
        """Return where a node is."""
        return f"10.{self._net}.7.{node + 1}"

    def __enter__(self) -> Self:
        _ip("link", "add", f"{self.tag}b", "type", "bridge")
        _ip("link", "set", f"{self.tag}b", "up")
        for node in (0, 1):
            name, outer = self.name(node), f"{self.tag}v{node}"
            _ip("netns", "add", name)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", outer, "master", f"{self.tag}b", "up")
            _ip("-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in (0, 1):
            self.kill(node)
            _ip("netns", "del", self.name(node), check=False)
            _ip("link", "del", f"{self.tag}v{node}", check=False)
        _ip("link", "del", f"{self.tag}b", check=False)

    def start(self, node: int, script: str, *options: str) -> None:
        """Start torchrun's agent on a node, with one worker."""
        command = [
            "ip", "netns", "exec", self.name(node), sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2",
            "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={self.address(0)}:{PORT}",
            f"--rdzv-conf={QUICK},is_host={int(node == 0)}", f"--local-addr={self.address(node)}", *options, script,
        ]  # fmt: skip
        with (self.folder / f"node{node}.log").open("ab") as log:
            self.agents[node] = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, node: int) -> None:
        """Let a node lose its power: nobody on it can say good-bye."""
        for pid in map(int, _ip("netns", "pids", self.name(node), check=False).split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if node in self.agents:
            self.agents.pop(node).wait()

    def cut(self, node: int) -> None:
        """Pull a node's cable."""
        _ip("link", "set", f"{self.tag}v{node}", "nomaster")

    def heal(self, node: int) -> None:
        """Plug it in again."""
        _ip("link", "set", f"{self.tag}v{node}", "master", f"{self.tag}b")

    def wait(self, node: int, timeout: float = 120.0) -> int:
        """Wait for a node's agent to end, and return its exit code."""
        return self.agents.pop(node).wait(timeout)

    def said(self) -> str:
        """Return what all of them have said."""
        return "\n".join(f"-- {log.name}\n{log.read_text()}" for log in sorted(self.folder.glob("node*.log")))

    def until(self, what: Callable[[], bool], timeout: float = 90.0) -> float:
        """Wait until something is so, and return how many seconds that took."""
        began = time.monotonic()
        while not what():
            assert time.monotonic() - began < timeout, self.said()
            time.sleep(0.05)
        return time.monotonic() - began
