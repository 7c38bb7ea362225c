"""The largest batch size that fits into memory, found by trying."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainkit import loop
from trainkit.attributes import get_attribute, set_attribute
from trainkit.errors import MisconfigurationException, warn
from trainkit.memory import garbage_collection_cuda, is_oom_error
from trainkit.random import isolated_random
from trainkit.rehearsal import Updates, loaders_in, rehearsal

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

MODES = ("power", "binsearch")
KINDS = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}
"""The loaders whose batch size a stage is about."""

Fits = Callable[[int], bool]


def doubled(fits: Fits, start: int, most: int, trials: int) -> int:
    """Return the largest size that fits among `start`, twice it, four times it, ...; or half of it, a quarter, ...

    Args:
        fits: try a size.
        start: the first size to try.
        most: the largest size that makes sense.
        trials: how many sizes to try at most.
    """
    size, best = start, 0
    for _ in range(trials):
        if fits(size):
            best = size
            if size >= most:
                break
            size = min(2 * size, most) if size < most else size
        elif best:
            break
        else:
            size //= 2
    return best or size


def bisected(fits: Fits, start: int, most: int, trials: int) -> int:
    """Return the largest size that fits: doubled until one does not, then narrowed down.

    Arguments as for `doubled`, but for `trials`, which counts the sizes that fit.
    """
    size, best, failed = start, 0, 0
    while trials > 0:
        if fits(size):
            best, trials = size, trials - 1
            if size >= most:
                break
        else:
            failed = size
        if failed and failed - best <= 1:
            break
        size = (max(best, 1) + failed) // 2 if failed else min(2 * best, most)
    return best or size


def find_batch_size(
    trainer: Trainer,
    mode: str = "power",
    steps_per_trial: int = 3,
    init_val: int = 2,
    max_trials: int = 25,
    batch_arg_name: str = "batch_size",
    margin: float = 0.05,
    max_val: int = 8192,
) -> int | None:
    """Look for the largest batch size of the run's stage, set it, and return it; nothing else is changed.

    Called before the first batch by `BatchSizeFinder`. For the arguments see there.

    Raises:
        RuntimeError: memory runs out with a single sample.
    """
    if trainer.fast_dev_run:
        warn("the batch-size finder is left out: in a fast_dev_run there are too few batches for it.")
        return None
    module, before = trainer.module, get_attribute(trainer.module, batch_arg_name)
    try:
        samples = _num_samples(trainer)
        # a batch of everything can't grow: begin with the one that is set
        start = before if isinstance(before, int) and before >= samples else min(init_val, max_val)

        def fits(size: int) -> bool:
            set_attribute(module, batch_arg_name, size)
            enough = _runs(trainer, steps_per_trial)
            if trainer.is_global_zero:
                trainer.print(f"{batch_arg_name} = {size} {'fits' if enough else 'does not fit into memory'}")
            if size <= 1 and not enough:
                raise RuntimeError(f"{trainer.stage} runs out of memory with {batch_arg_name} = 1 already.")
            return enough

        # the first power of two that takes all samples is the last one to try
        most = max(start, min(max_val, _power_above(start, samples)))
        size = (doubled if mode == "power" else bisected)(fits, start, int(most), max_trials)
    except BaseException:
        set_attribute(module, batch_arg_name, before)
        raise
    if mode == "binsearch":
        size = max(1, int(size * (1 - margin)))
    set_attribute(module, batch_arg_name, size)
    _reload(trainer)
    return size


def _power_above(start: int, samples: float) -> float:
    """Return `start` doubled until it is at least the number of samples."""
    size: float = start
    while size < samples < math.inf:
        size *= 2
    return size if samples < math.inf else math.inf


def _runs(trainer: Trainer, steps: int) -> bool:
    """Run a few steps of the stage, and return whether memory was enough."""
    try:
        _run(trainer, steps)
    except (RuntimeError, MemoryError) as error:
        if not is_oom_error(error):
            raise
        enough = False
    else:
        enough = True
    garbage_collection_cuda()  # here, where the error and the frames it held are gone
    return enough


def _run(trainer: Trainer, steps: int) -> None:
    stage = trainer.stage or "fit"
    kind = KINDS[stage]
    with rehearsal(trainer, [Updates(steps, trainer.interruption)]):
        if stage == "fit":
            trainer.sources.load_train()
            if trainer.num_training_batches == 0:
                raise MisconfigurationException("the batch-size finder needs training batches; limit_train_batches=0.")
            loop.fit(trainer)
            return
        setattr(trainer, f"limit_{kind}_batches", steps)
        trainer.sources.load_evaluation(kind)
        loaders = trainer.sources.loaders[kind]
        if stage == "predict":
            loop.predict(trainer, loaders, keep=False)
        else:
            loop.evaluate(trainer, "validation" if stage == "validate" else "test", loaders)


def _num_samples(trainer: Trainer) -> float:
    """Return how many samples the stage's data set has; infinity when it does not say."""
    kind = KINDS[trainer.stage or "fit"]
    with rehearsal(trainer, []):
        if kind == "train":
            trainer.sources.load_train()
        else:
            setattr(trainer, f"limit_{kind}_batches", 1)  # the rehearsal turned validation off
            trainer.sources.load_evaluation(kind)
        sizes = [_length(getattr(loader, "dataset", None)) for loader in loaders_in(trainer.sources.objects.get(kind))]
    return max(sizes, default=math.inf)


def _length(dataset: Any) -> float:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return math.inf


def _reload(trainer: Trainer) -> None:
    """Ask for the loaders that were there already once more, now that the batch size is another."""
    sources = trainer.sources
    with isolated_random():
        if "train" in sources.loaders and trainer.stage == "fit":
            seed = sources.train.state_dict()
            sources.load_train()
            sources.train.load_state_dict(seed)
        for kind in ("val", "test", "predict"):
            if (held := sources.loaders.get(kind)) is not None:
                sources.load_evaluation(kind)
                held[:] = sources.loaders[kind]  # the loop that is about to begin has this very list
                sources.loaders[kind] = held
