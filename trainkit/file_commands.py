"""The commands about checkpoint files: `trainkit inspect FILE` and `trainkit convert IN OUT`.

`inspect` needs no torch, so that it answers at once.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from trainkit.checkpoint import archive, manifest, table
from trainkit.checkpoint.manifest import Manifest
from trainkit.checkpoint.table import Table
from trainkit.errors import CheckpointError

COMMANDS = {
    "inspect": "show what is in a checkpoint, and whether it is whole",
    "convert": "make a checkpoint of another program's file, or a file of its weights",
}

HELP = {
    "inspect": f"""\
trainkit inspect: {COMMANDS["inspect"]}

usage: trainkit inspect FILE [FILE2 ...] [--all]

Each byte of a file is compared with what was written. Nothing in it is run. A
checkpoint that several processes have written is a directory; name that.

options:
  --all         list every tensor of the weights, not the first ten
  -h, --help    this page

exit code: 0 all files are whole, 1 one is not, 2 the command line is wrong

example:
  trainkit inspect runs/digits/version_0/checkpoints/*.ckpt
""",
    "convert": f"""\
trainkit convert: {COMMANDS["convert"]}

usage: trainkit convert IN OUT

  IN            OUT             what is made
  .ckpt, .pt    .ckpt           of Lightning's checkpoint, or of what torch.save
                                wrote, one of trainkit's, to go on from
  .ckpt, .pt    .safetensors    a file with the weights, for other programs
  .safetensors  .ckpt           a checkpoint with the weights only
  directory     .ckpt           one file of what several processes have written
  directory     .safetensors    its weights only

No processes are needed for the last two, and little memory: what is too much
for it waits on the disk where OUT goes, which has to have room for it twice.

Files of other programs are read by torch.load(weights_only=True): what is more
than tensors and plain values is refused, and nothing in a file is run. IN is
not changed, and OUT must not be there yet.

options:
  -h, --help    this page

exit code: 0 done, 1 it can't be done, 2 the command line is wrong

example:
  trainkit convert lightning.ckpt new.ckpt
""",
}

_LABEL = 15
_MOST = 10


def main(command: str, words: Sequence[str]) -> int:
    """Run one of the commands and return the exit code."""
    if any(word in ("-h", "--help") for word in words):
        sys.stdout.write(HELP[command])
        return 0
    options = [word for word in words if word.startswith("--")]
    files = [word for word in words if not word.startswith("--")]
    unknown = [option for option in options if command != "inspect" or option != "--all"]
    if unknown:
        return _refuse(command, f"{command} has no option {unknown[0]}")
    if command == "convert":
        if len(files) != 2:
            return _refuse(command, f"convert needs two files, IN and OUT. Received: {' '.join(files) or 'none'}")
        return _convert(*files)
    if not files:
        return _refuse(command, "inspect needs a file")
    whole = [_inspect(path, bool(options), first=index == 0) for index, path in enumerate(files)]
    return 0 if all(whole) else 1


def _refuse(command: str, reason: str) -> int:
    print(f"error: {reason}\nsee `trainkit {command} --help`", file=sys.stderr)
    return 2


def _convert(source: str, target: str) -> int:
    from trainkit.checkpoint.convert import convert

    try:
        made = convert(source, target)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"converted {source} to {target}: {made}, {_size(os.path.getsize(target))}")
    return 0


# ---------------------------------------------------------------- inspect
def _inspect(path: str, everything: bool, first: bool) -> bool:
    """Print what is in a file and return whether it is whole."""
    print(path if first else f"\n{path}", flush=True)
    found, problem = _looked_into(path)
    lines: list[tuple[str, str]] = []
    if found is not None:
        try:
            lines = list(_contents(found, everything))
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError):
            problem = problem or f"its {archive.TABLE} is not what trainkit writes."
    size = "" if found is None else _size(found.size if isinstance(found, Manifest) else os.path.getsize(path))
    good = f"yes, every byte of {_parts(found)} ({size}) verified" if found is not None else ""
    _line("whole", f"no: {problem}" if problem else good)
    for label, text in lines:
        _line(label, text)
    return not problem


def _parts(found: Table | Manifest) -> str:
    if isinstance(found, Manifest):
        return f"{len(found.files) + 1} files"
    return f"{len(found.records) + 1} records"


def _looked_into(path: str) -> tuple[Table | Manifest | None, str]:
    """Return a file's trainkit.json, None when it can't be read, and why the file is not whole, "" when it is."""
    found: Table | Manifest | None = None
    try:
        if manifest.is_ours(path):
            found = manifest.read(path)
            manifest.check(found)
            return found, ""
        with table.opened(path) as (file, _):
            found = in_file = table.read(file)
            table.check(file, in_file)
    except CheckpointError as error:
        return found, str(error).replace(f"{path} ", "it ", 1)
    except OSError as error:
        return None, f"it can't be read: {(error.strerror or str(error)).lower()}"
    return found, ""


def _contents(found: Table | Manifest, everything: bool) -> Iterator[tuple[str, str]]:
    """Yield labels and texts; a text of several lines is shown as it is."""
    state = dict(_items(found.state))
    yield "written by", " with ".join(f"{name} {version}" for name, version in found.writer.items())
    yield from _place(state)
    yield from _weights(dict(_items(state.get("state_dict"))), found.finite, everything)
    if states := _list(state.get("optimizer_states")):
        yield "optimizers", "\n".join(map(_optimizer, states))
    if schedules := _list(state.get("lr_schedulers")):
        yield "schedules", str(len(schedules))
    if callbacks := list(_items(state.get("callbacks"))):
        yield "callbacks", "\n".join(name for name, _ in callbacks)
    for key, label in (("hyper_parameters", "module takes"), ("datamodule_hyper_parameters", "data takes")):
        if values := list(_items(state.get(key))):
            width = max(len(name) for name, _ in values)
            yield label, "\n".join(f"{name:{width}}  {_text(value)}" for name, value in values)
    shown = {"state_dict", "optimizer_states", "lr_schedulers", "callbacks", "hyper_parameters", "epoch", "global_step"}
    if rest := [key for key in state if key not in shown | {"datamodule_hyper_parameters", "progress"}]:
        yield "also", ", ".join(rest)


def _place(state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    numbers = [f"{key} {state[key]}" for key in ("epoch", "global_step") if type(state.get(key)) is int]
    progress = dict(_items(state.get("progress")))
    if {"epoch", "batch"} <= set(progress):
        numbers.append(f"{progress['epoch']} epochs done, {progress['batch']} batches into the next")
    if numbers:
        yield "at", ", ".join(numbers)


def _weights(weights: dict[str, Any], finite: bool, everything: bool) -> Iterator[tuple[str, str]]:
    tensors = {name: value["$tensor"] for name, value in weights.items() if _is_tensor(value)}
    if not tensors:
        return
    dtypes = ", ".join(dict.fromkeys(str(tensor["dtype"]) for tensor in tensors.values()))
    count = sum(math.prod(tensor["shape"]) for tensor in tensors.values())
    good = "all finite" if finite else "NOT FINITE"
    yield "weights", f"{len(tensors):,} tensors, {count:,} numbers, {dtypes}, {good}"
    listed = list(tensors.items()) if everything else list(tensors.items())[:_MOST]
    width = min(max(len(name) for name, _ in listed), _width() - _LABEL - 32)
    lines = [
        f"{_shortened(name, width):{width}}  {tensor['dtype']:8}  {' x '.join(map(str, tensor['shape'])) or 'one'}"
        for name, tensor in listed
    ]
    more = len(tensors) - len(listed)
    yield "", "\n".join([*lines, *([f"and {more:,} more: --all shows them"] if more else [])])


def _optimizer(state: Any) -> str:
    parts = dict(_items(state))
    groups = [dict(_items(group)) for group in _list(parts.get("param_groups"))]
    rates = ", ".join(dict.fromkeys(_text(group.get("lr")) for group in groups))
    count = sum(len(_list(group.get("params"))) for group in groups)
    many = "group" if len(groups) == 1 else "groups"
    return f"{count} parameters in {len(groups)} {many}, lr {rates}"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("$tensor"), dict) and "shape" in value["$tensor"]


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a dict in typed JSON holds."""
    if isinstance(value, dict):
        tag = next(iter(value), "")
        inside = value[tag] if tag in ("$dict", "$ordered", "$counter") else value
        pairs = inside.items() if isinstance(inside, dict) else inside if isinstance(inside, list) else ()
        yield from ((key if isinstance(key, str) else _text(key), item) for key, item in pairs)


def _list(value: Any) -> list[Any]:
    if isinstance(value, dict) and "$tuple" in value:
        value = value["$tuple"]
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    """Return typed JSON as Python would show the value."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if not isinstance(value, dict):
        return repr(value)
    tag = next(iter(value), "")
    if tag in ("", "$dict", "$ordered", "$counter") or not tag.startswith("$"):
        return "{" + ", ".join(f"{key!r}: {_text(item)}" for key, item in _items(value)) + "}"
    if tag == "$tuple":
        inside = ", ".join(map(_text, value[tag]))
        return f"({inside}{',' if len(value[tag]) == 1 else ''})"
    if _is_tensor(value):
        return f"tensor of {value[tag]['dtype']}, {' x '.join(map(str, value[tag]['shape'])) or 'one'}"
    return f"{tag[1:]} {value[tag]}"


def _line(label: str, text: str) -> None:
    """Print a label and its text, within the width of the terminal."""
    for line in text.splitlines() or [""]:
        listed = "\n" in text or not label
        printable = "".join(character if character.isprintable() else "?" for character in line)
        parts = [printable] if listed else textwrap.wrap(printable, _width() - _LABEL, break_on_hyphens=False)
        for part in parts:
            print(f"  {label:{_LABEL - 2}}{_shortened(part, _width() - _LABEL) if listed else part}".rstrip())
            label = ""


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _width() -> int:
    return min(max(shutil.get_terminal_size((80, 24)).columns, 60), 120)


def _size(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
