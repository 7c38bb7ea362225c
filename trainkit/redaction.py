"""Keep secrets out of files: a hyperparameter whose name looks like one is written as "***"."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
"""What is written in a secret's place."""

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_STRONG = re.compile(r"passw.*|pwd|passphrase|secrets?|credentials?|authorization|.*(apikey|authtoken|accesstoken)s?")
_ACCESS = {"access", "api", "auth", "bearer", "private", "secret", "service", "session"}
_HARMLESS = {
    *("batch", "begin", "bos", "cache", "class", "cls", "column", "data", "dict", "end", "eos", "feature", "file"),
    *("foreign", "group", "id", "image", "index", "input", "label", "loss", "mask", "metric", "monitor", "next"),
    *("order", "output", "pad", "padding", "partition", "primary", "public", "query", "sample", "sep", "separator"),
    *("sort", "sos", "special", "start", "state", "stop", "target", "text", "unk"),
}
"""What a "key" or a "token" is of, in machine learning, when it opens no door: `pad_token`, `sort_key`."""


def is_secret(name: object, value: object = HIDDEN) -> bool:
    """Whether a value of this name looks like a secret: api_key, hf_token, password; not num_tokens, key_dim, sort_key.

    Args:
        name: of a hyperparameter, a config key or an option; of a dotted one the last part counts.
        value: None and booleans are none, numbers only where the name ends in a word like "password".
    """
    words = [word.lower() for word in _WORDS.findall(str(name).rpartition(".")[2])] if isinstance(name, str) else []
    if not words or value is None or isinstance(value, bool) or value == "":
        return False
    *before, last = words
    if isinstance(value, int | float | complex):
        return _STRONG.fullmatch(last) is not None
    if any(_STRONG.fullmatch(word) for word in words):
        return True
    if last in ("keys", "tokens"):
        return bool(before) and before[-1] in _ACCESS
    if last not in ("key", "token") or (before and before[-1] in _HARMLESS):
        return False
    return isinstance(value, str | bytes | Mapping | list | tuple)


def redacted(value: Any, found: list[str] | None = None, path: str = "") -> Any:
    """Return a value with "***" in the place of each secret in its mappings; what has none is returned as it is.

    Args:
        value: hyperparameters, or what is inside.
        found: gets the names of what was replaced, dotted.
        path: the name of `value`.
    """
    if isinstance(value, Namespace):
        inner = redacted(vars(value), found, path)
        return value if inner is vars(value) else Namespace(**inner)
    if isinstance(value, Mapping):
        items = {}
        for key, item in value.items():
            name = f"{path}.{key}".lstrip(".")
            items[key] = HIDDEN if is_secret(key, item) else redacted(item, found, name)
            if found is not None and items[key] is HIDDEN and not _is_hidden(item):
                found.append(name)
        return value if all(items[key] is item for key, item in value.items()) else items
    if type(value) in (list, tuple):
        inside = [redacted(item, found, f"{path}.{index}") for index, item in enumerate(value)]
        return value if all(new is old for new, old in zip(inside, value, strict=True)) else type(value)(inside)
    return value


def _is_hidden(value: object) -> bool:
    return isinstance(value, str) and value == HIDDEN


def hidden_in(value: Any, path: str = "") -> list[str]:
    """Return the dotted names under which a value that was read has "***" in a secret's place."""
    if isinstance(value, Mapping):
        own = [f"{path}.{key}".lstrip(".") for key, item in value.items() if _is_hidden(item) and is_secret(key)]
        return own + [name for key, item in value.items() for name in hidden_in(item, f"{path}.{key}".lstrip("."))]
    if type(value) in (list, tuple):
        return [name for index, item in enumerate(value) for name in hidden_in(item, f"{path}.{index}")]
    return []


def without_hidden(value: Any) -> Any:
    """Return what was read without the entries that are "***" in a secret's place."""
    if isinstance(value, Mapping):
        kept = ((key, item) for key, item in value.items() if not (_is_hidden(item) and is_secret(key)))
        return {key: without_hidden(item) for key, item in kept}
    return value


def redacted_words(words: Sequence[str]) -> list[str]:
    """Return a command line's words with "***" in the place of secrets: `--model.api_key=***`."""
    shown: list[str] = []
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.startswith("-") and equals and is_secret(name.lstrip("-"), value):
            shown.append(f"{name}={HIDDEN}")
        elif index and words[index - 1].startswith("--") and is_secret(words[index - 1].lstrip("-"), word):
            shown.append(HIDDEN)
        else:
            shown.append(word)
    return shown
