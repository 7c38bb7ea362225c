"""Shared parameters are found, and shared again."""

from __future__ import annotations

from torch import nn

from trainkit.shared_parameters import find_shared_parameters, set_shared_parameters


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rest = nn.Embedding(3, 3), nn.ModuleDict({"head": nn.Linear(3, 3)})
        self.other = nn.Linear(3, 3, bias=False)
        self.rest["head"].weight = self.embed.weight
        self.twice = self.other


def test_shared_parameters_are_found_by_all_their_names() -> None:
    assert find_shared_parameters(nn.Linear(1, 1)) == []
    assert find_shared_parameters(Tied()) == [["embed.weight", "rest.head.weight"], ["other.weight", "twice.weight"]]


def test_what_was_taken_apart_is_shared_again() -> None:
    module = Tied()
    shared = find_shared_parameters(module)
    module.rest["head"].weight = nn.Parameter(module.embed.weight.detach().clone())
    assert find_shared_parameters(module) == [["other.weight", "twice.weight"]]
    assert set_shared_parameters(module, shared) is module
    assert module.rest["head"].weight is module.embed.weight
