"""What is known about checkpoint files, and finding them again."""

from __future__ import annotations

import math
import os
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from trainkit.checkpoint import store
from trainkit.checkpoint.ledger import Finder, described, free_path
from trainkit.checkpoint.policy import Saved


def test_the_files_kept_are_described_with_the_best_and_the_worst_of_them() -> None:
    scores = {"a": torch.tensor(2.0), "b": torch.tensor(1.0), "c": torch.tensor(math.nan)}
    saved = [Saved(path, float(score)) for path, score in scores.items()]
    attributes = described(saved, scores, 3, "min")
    assert list(attributes["best_k_models"]) == ["a", "b", "c"]
    assert (attributes["best_model_path"], attributes["best_model_score"]) == ("b", 1.0)
    assert (attributes["kth_best_model_path"], attributes["kth_value"]) == ("c", math.inf)
    assert described(saved, scores, 3, "max")["kth_value"] == -math.inf
    assert "kth_value" not in described(saved, scores, 4, "min")
    assert described(saved, scores, -1, "min")["kth_best_model_path"] == "c"
    assert "kth_value" not in described([], {}, -1, "min")


@given(there=st.sets(st.integers(0, 5)), taken=st.sets(st.integers(0, 5)), overwrite=st.booleans())
def test_a_new_file_never_takes_the_place_of_one_that_is_not_to_be_replaced(
    there: set[int], taken: set[int], overwrite: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("free")
    paths = [str(directory / f"x-v{number}") for number in range(20)]
    for number in there:
        Path(paths[number]).touch()
    found = free_path(
        lambda version: paths[version or 0], os.path.exists, {paths[n] for n in taken}, {paths[3]}, overwrite, 1
    )
    free = [n for n in range(20) if n not in taken and (overwrite or n == 3 or n not in there)]
    assert found == paths[min(free)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store.save(tmp_path / "run" / "best.ckpt", {"global_step": 1})
    return tmp_path / "run"


def test_files_are_found_in_the_directory_that_was_moved(run: Path) -> None:
    find = Finder(str(run), "/somewhere/else", str(run / "best.ckpt"), [])
    assert find.same
    assert find("/somewhere/else/best.ckpt") == str(run / "best.ckpt")
    assert find("/somewhere/else/gone.ckpt") == ""
    assert find("") == ""


def test_another_directory_is_not_the_same_and_its_files_are_found_where_they_are(run: Path) -> None:
    find = Finder(str(run.parent / "new"), str(run), str(run / "best.ckpt"), ["new.ckpt"])
    assert not find.same
    assert find(str(run / "best.ckpt")) == str(run / "best.ckpt")
    assert find(str(run / "new.ckpt")) == ""


def test_a_file_of_the_same_moment_is_made_if_the_process_did_not_live_to_write_it(run: Path) -> None:
    find = Finder(str(run), str(run), str(run / "best.ckpt"), [str(run / "last.ckpt")])
    assert find(str(run / "last.ckpt")) == str(run / "last.ckpt")
    assert os.path.samefile(run / "last.ckpt", run / "best.ckpt")


def test_without_a_file_to_resume_from_everything_is_where_it_was(run: Path) -> None:
    find = Finder(None, str(run), "", [])
    assert find.same
    assert not find.beside
    assert find(str(run / "best.ckpt")) == str(run / "best.ckpt")
