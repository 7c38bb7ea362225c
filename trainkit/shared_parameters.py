"""Parameters that several parts of a module share: find them, and share them again after a part was replaced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn


def find_shared_parameters(module: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several, in the order in which the module has them."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def set_shared_parameters(module: nn.Module, shared_params: Iterable[Sequence[str]]) -> nn.Module:
    """Make all names of each group mean the parameter that its first name means, and return the module.

    Args:
        module: for instance one that was converted for another device, which makes parameters anew.
        shared_params: what `find_shared_parameters` returned before.
    """
    for first, *others in shared_params:
        parameter = module.get_parameter(first)
        for name in others:
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, parameter)
    return module
