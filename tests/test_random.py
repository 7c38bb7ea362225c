"""Seeds and the state of every random source."""

from __future__ import annotations

import contextlib
import copy
import os
import random
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.random import MAX_SEED, draw_seed, isolated_random, random_state, seed_everything, set_random_state
from trainkit.rank_zero import rank_zero_only


def draws() -> tuple[Any, ...]:
    return random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))


def test_a_seed_repeats_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert seed_everything(7) == 7
    first = draws()
    assert draws() != first
    seed_everything(7)
    assert draws() == first
    seed_everything(8)
    assert draws() != first
    assert capsys.readouterr().out == "seed 7\nseed 7\nseed 8\n"


def test_other_ranks_do_not_print_the_seed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    seed_everything(7)
    assert not capsys.readouterr().out


def test_a_seed_is_left_in_the_environment_for_processes_that_are_started(capsys: pytest.CaptureFixture[str]) -> None:
    seed_everything(7, workers=True, verbose=False)
    assert (os.environ["PL_GLOBAL_SEED"], os.environ["PL_SEED_WORKERS"]) == ("7", "1")
    assert seed_everything(verbose=False) == 7
    assert os.environ["PL_SEED_WORKERS"] == "0"
    assert capsys.readouterr().out == ""


def test_without_any_seed_it_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert seed_everything() == 0


@pytest.mark.parametrize("seed", [0, MAX_SEED])
def test_the_range_has_both_its_ends(seed: int) -> None:
    assert seed_everything(seed) == seed


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.0, "1", True, float("nan"), [1]])
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed must be a whole number from 0 to 4294967295\. Received"):
        seed_everything(seed)


@pytest.mark.parametrize("given", ["", "abc", "1.5", "²"])
def test_an_environment_variable_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", given)
    with pytest.raises(ValueError, match="environment variable PL_GLOBAL_SEED must be a whole number"):
        seed_everything()


@pytest.mark.parametrize("given", ["-1", str(MAX_SEED + 1)])
def test_an_environment_variable_out_of_range_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", given)
    with pytest.raises(ValueError, match="from 0 to 4294967295"):
        seed_everything()


def test_a_state_brings_every_source_back() -> None:
    seed_everything(3, verbose=False)
    draws()  # from here gauss and randn have a second number in hand
    state = random_state()
    kept = copy.deepcopy(state)
    first = [draws() for _ in range(3)]
    set_random_state(state)
    assert [draws() for _ in range(3)] == first
    set_random_state(kept)
    assert [draws() for _ in range(3)] == first


def test_a_state_is_made_of_what_a_checkpoint_can_hold() -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or type(value) in (int, float, str) or isinstance(value, torch.Tensor)

    state = random_state()
    assert all(plain(value) for value in state.values())


def test_a_state_survives_lists_in_the_place_of_tuples() -> None:
    state = random_state()
    version, internal, gauss = state["python"]
    first = draws()
    set_random_state({**state, "python": [version, list(internal), gauss]})
    assert draws() == first


def test_what_is_drawn_in_isolation_was_never_drawn() -> None:
    seed_everything(3, verbose=False)
    first = draws()
    seed_everything(3, verbose=False)
    with isolated_random():
        draws()
        seed_everything(99, verbose=False)
    assert draws() == first
    seed_everything(3, verbose=False)
    with contextlib.suppress(RuntimeError), isolated_random():
        draws()
        raise RuntimeError("inside")
    assert draws() == first


def test_a_seed_is_drawn_from_the_generator_that_is_given() -> None:
    generator = torch.Generator().manual_seed(1)
    seed_everything(3, verbose=False)
    before = torch.get_rng_state()
    first, second = draw_seed(generator), draw_seed(generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert first != second
    assert draw_seed(torch.Generator().manual_seed(1)) == first
    assert 0 <= draw_seed() < 2**63
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_the_gpus_state_comes_back() -> None:
    torch.cuda.init()
    seed_everything(3, verbose=False)
    state = random_state()
    first = torch.rand(3, device="cuda")
    set_random_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), first)


@pytest.mark.parametrize("include_cuda", [True, False])
def test_isolated_code_draws_the_same_again_after_an_error_too(include_cuda: bool) -> None:
    drawn = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside"), isolated_random(include_cuda):  # noqa: PT012
            drawn.append((torch.rand(1).item(), random.random(), float(np.random.rand())))
            raise RuntimeError("inside")
    assert drawn[0] == drawn[1]
    assert ("cuda" in random_state(include_cuda)) == (include_cuda and torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
