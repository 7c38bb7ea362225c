"""`trainkit certify`: kill the training run of a config at random instants and prove that it goes on exactly."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainkit import cli
from trainkit.cli import UsageError
from trainkit.errors import MisconfigurationException

HELP = """\
trainkit certify: kill a training run at random and prove that it goes on exactly

usage: trainkit certify [--trials N] [--kills N] ... --config FILE [--KEY VALUE ...]

Trains twice to the end, to see whether the run is deterministic at all. Then
trains again, is killed with SIGKILL at random instants and started again, and
compares every batch, loss, weight, metric and logged row. Works in a temporary
directory: loggers, checkpoints and what is recorded go there and are removed.

options:
  --trials N        how many runs are killed (default 3)
  --kills N         how often each of them is (default 2)
  --seed N          what the instants are drawn from (default 0)
  --save_every N    save every n updates, beside what the config saves
                    (default: a tenth of the run)
  --ignore PATTERN  a name that may differ, "metric time/*" for example;
                    may be given several times
  --timeout SECONDS after which a run counts as one that hangs (default 600)
  -h, --help        this page

All other options are those of `trainkit fit`. Keep the run short: a few
hundred batches show what there is to see.

exit codes: 0 exact, 1 not exact, 2 it can't be tried

example:
  trainkit certify --config configs/digits.yaml --trainer.max_epochs 2
"""
NUMBERS = {"--trials": 3, "--kills": 2, "--seed": 0, "--save_every": 0, "--timeout": 600}


def main(words: Sequence[str]) -> int:
    """Run `trainkit certify` and return its exit code.

    Raises:
        UsageError: an option that can't be read.
    """
    numbers, ignore, rest = dict(NUMBERS), [], []
    queue = list(words)
    while queue:
        name, equals, value = queue.pop(0).partition("=")
        if name in ("-h", "--help"):
            sys.stdout.write(HELP)
            return 0
        if name not in NUMBERS and name != "--ignore":
            rest.append(name + equals + value)
            continue
        if not equals:
            value = queue.pop(0) if queue else ""
        if name == "--ignore":
            ignore.append(value)
        elif value.isdigit():
            numbers[name] = int(value)
        else:
            raise UsageError(
                f"{name} must be a whole number, not {value!r}", f"for example {name} 3", "trainkit certify --help"
            )
    line = cli.read(["fit", *rest])
    if not line.files and not line.options:
        raise UsageError("certify needs a run", "for example --config config.yaml", "trainkit certify --help")
    if any(name == "ckpt_path" for name, _ in line.options):
        raise UsageError("certify begins a run of its own", "leave --ckpt_path out", "trainkit certify --help")

    from trainkit.testing.certify import certify

    def start(directory: Path, every: int) -> Command:
        return Command(["-m", "trainkit.testing", str(directory), str(every), *rest], directory)

    try:
        certificate = certify(
            start,
            numbers["--trials"],
            numbers["--kills"],
            numbers["--seed"],
            numbers["--save_every"] or None,
            ignore,
            numbers["--timeout"],
            tell=lambda told: print(told, flush=True),
        )
    except MisconfigurationException as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(certificate)
    return 0 if certificate.exact else 1


class Command:
    """A run in a process of its own, started by its command line."""

    def __init__(self, arguments: list[str], directory: Path) -> None:
        with open(directory / "output.txt", "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self.pid = self._process.pid

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()

    def join(self, timeout: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
