"""Which parts of a module a policy chooses: by class, by a function, or by one of those that torch's FSDP takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn

from trainkit.errors import MisconfigurationException

Policy = Collection[type[nn.Module]] | type[nn.Module] | Callable[..., Any]


def check_policy(argument: str, policy: Any) -> None:
    """Refuse what is no policy.

    Raises:
        MisconfigurationException: it is neither classes nor callable.
    """
    classes = _classes(policy)
    if classes is not None and classes and all(isinstance(c, type) and issubclass(c, nn.Module) for c in classes):
        return
    if classes is None and callable(policy):
        return
    raise MisconfigurationException(
        f"{argument} must be a set of module classes, such as {{nn.TransformerEncoderLayer}}, or a function "
        f"of a module that says whether it is meant. Received: {policy!r}."
    )


def chosen(module: nn.Module, policy: Policy) -> list[nn.Module]:
    """Return the parts that a policy chooses, parts before their owners; never the module itself.

    A function is called with a part, and with what torch's own policies take: `(module, recurse, nonwrapped_numel)`.
    """
    classes = _classes(policy)
    if classes is not None:
        kinds = tuple(classes)
        return list(_parts(module, lambda part: isinstance(part, kinds)))
    says: Any = getattr(policy, "_lambda_fn", policy)  # torch's CustomPolicy
    if len(inspect.signature(says).parameters) < 3:
        return list(_parts(module, lambda part: bool(says(part))))
    found: list[nn.Module] = []
    for child in module.children():
        _ask(child, says, found)
    return found


def _classes(policy: Any) -> list[Any] | None:
    if isinstance(policy, type):
        return [policy]
    if isinstance(policy, (set, frozenset, list, tuple)):
        return list(policy)
    of_torch = getattr(policy, "_module_classes", None)  # its ModuleWrapPolicy
    return None if of_torch is None else list(of_torch)


def _parts(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    seen: set[nn.Module] = set()

    def visit(part: nn.Module) -> Iterator[nn.Module]:
        for child in part.children():
            if child not in seen:
                seen.add(child)
                yield from visit(child)
                if wanted(child):
                    yield child

    return visit(module)


def _ask(part: nn.Module, says: Callable[..., Any], found: list[nn.Module]) -> int:
    """Let a policy decide on a part and its own, and return how many numbers are in parts that it has chosen."""
    total = sum(parameter.numel() for parameter in part.parameters())
    taken = 0
    if says(module=part, recurse=True, nonwrapped_numel=total):
        taken = sum(_ask(child, says, found) for child in part.children())
    if part not in found and says(module=part, recurse=False, nonwrapped_numel=total - taken):
        found.append(part)
        return total
    return taken
