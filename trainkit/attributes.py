"""Find and set an attribute by name where its author may have put it: the module, the data module, or their hparams."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainkit.module import Module


def has_attribute(module: Module, name: str) -> bool:
    """Whether any of them has it."""
    return any(True for _ in _holders(module, name))


def get_attribute(module: Module, name: str) -> Any:
    """Return its value; the data module's wins over the module's, hparams over plain attributes.

    Raises:
        AttributeError: none of them has it.
    """
    holders = list(_holders(module, name))
    if not holders:
        raise _missing(module, name)
    holder, last = holders[-1]
    return holder[last] if isinstance(holder, MutableMapping) else getattr(holder, last)


def set_attribute(module: Module, name: str, value: Any) -> None:
    """Set it on all that have it.

    Raises:
        AttributeError: none of them has it.
    """
    holders = list(_holders(module, name))
    if not holders:
        raise _missing(module, name)
    for holder, last in holders:
        if isinstance(holder, MutableMapping):
            holder[last] = value
        else:
            setattr(holder, last, value)


def _holders(module: Module, name: str) -> Iterator[tuple[Any, str]]:
    """Yield what holds the attribute, and its name there: "optim.lr" is `lr` of what `optim` is."""
    trainer = module.__dict__.get("_trainer")
    datamodule = trainer.datamodule if trainer is not None else None
    for owner in (module, datamodule):
        if owner is None:
            continue
        for root in (owner, owner.hparams):
            *path, last = name.split(".")
            holder = root
            for part in path:
                holder = _step(holder, part)
            if last in holder if isinstance(holder, MutableMapping) else hasattr(holder, last):
                yield holder, last


def _step(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, MutableMapping) else getattr(holder, name, None)


def _missing(module: Module, name: str) -> AttributeError:
    return AttributeError(
        f"neither {type(module).__name__} nor its data module has {name!r}, as an attribute or in hparams."
    )
