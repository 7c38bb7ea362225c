"""Where in the data a batch is, written down so that anybody can fetch the same one again, with the same draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from trainkit.data.loader import Batches
from trainkit.data.slices import Slices
from trainkit.errors import MisconfigurationException
from trainkit.random import isolated_random


def position_of(batches: Batches, epoch: int, batch_idx: int) -> dict[str, Any]:
    """Return where a batch is, in plain values.

    epoch, batch   counted from 0
    loaders        for each loader: its name, the seed its order and its draws come from, how often it was gone through
                   before in this epoch, the batch of that lap, the positions of the samples in the lap, and their
                   indices in the data set; the last two are None for data without indices; of several processes also
                   which part of a batch it is (`Slices`)
    """
    loaders = []
    for part, place in zip(batches.parts, batches.places(batch_idx), strict=True):
        index, lap = place or (batch_idx, 0)
        samples = part.samples_of(epoch, index, lap)
        found = {
            "name": part.name,
            "seed": part.seed,
            "lap": lap,
            "batch": index,
            "positions": None,
            "samples": samples,
        }
        if part.indexed is not None and samples is not None:
            slices = part.indexed.slices_in(epoch, lap)
            first = part.indexed.positions_of(epoch, index, lap).start
            if part.indexed.asked.whole_batches:
                first *= len(part.samples_of(epoch, 0, lap) or ())  # where only the last one is smaller
            found["positions"] = list(range(first, first + len(samples)))
            if not slices.whole:
                found["part"] = list(astuple(slices))
        loaders.append(found)
    return {"epoch": epoch, "batch": batch_idx, "loaders": loaders}


def fetch(batches: Batches, position: Mapping[str, Any]) -> Any:
    """Return the batch at a position, with the same draws; the process's own random state stays as it is.

    Raises:
        MisconfigurationException: there are other loaders than those of the position, or they have no such batch.
    """
    epoch, batch_idx, parts = int(position["epoch"]), int(position["batch"]), batches.parts
    saved = position.get("loaders", [{}] * len(parts))
    if len(saved) != len(parts):
        raise MisconfigurationException(
            f"replay: the position is one of {len(saved)} loaders, and {batches.name} has {len(parts)}. Give the "
            "loaders of the run."
        )
    for part, loader in zip(parts, saved, strict=True):
        if loader.get("seed") is not None:
            part.reseed(loader["seed"])
        if part.indexed is not None and "part" in loader:
            part.indexed.take(Slices(*loader["part"]))
    with isolated_random():
        try:
            return batches.batch_at(epoch, batch_idx)
        except IndexError:
            raise MisconfigurationException(
                f"replay: {batches.name} has no batch {batch_idx} in an epoch: it has {batches.num_batches}. Give the "
                "data and the batch size of the run."
            ) from None
