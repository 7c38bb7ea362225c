"""Batches: one epoch at a time, from any batch on, with a look ahead for the last; in step with other processes."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, Self

from trainkit.errors import MisconfigurationException, warn

if TYPE_CHECKING:
    from trainkit.data.loader import Loader
    from trainkit.data.together import Question, Together


class Empty:
    """In place of a batch that this process has no sample of, though others do."""

    def __repr__(self) -> str:
        return "EMPTY"


EMPTY = Empty()
"""What training gets for a batch that other processes have all samples of."""


class Batches:
    """Give batches with their index and whether they are the last, epoch by epoch, from any batch on.

    It looks one batch ahead where what it is made of may yield less than it claims.
    """

    name: str
    claimed: int | float
    """How many batches an epoch says it has; infinity when it does not say."""
    num_batches: int | float
    """How many of them are taken: in all processes the same number, though one may have no sample of the last."""
    elsewhere = False
    """Whether other processes may have batches though this one has none: all of them begin and end an evaluation."""
    together: Together | None = None
    """Who asks the other processes whether they have another batch; None where that is known."""
    must_keep_length = False
    """Whether fewer batches than it claims are an error, since other processes count on them."""
    must_yield = False
    """Whether an epoch without a batch is an error, even when no length promises one."""
    read_once = False
    """Whether it is an iterator, which gives its batches once and never again."""
    looks_ahead = 2
    """How many batches it may look ahead while it asks other processes; 1 where states are saved."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.claimed = self.num_batches = 0
        self.fetching: Callable[[Iterator[Any]], Iterator[Any]] | None = None
        """What a profiler watches the batches through."""
        self._warned = False

    @property
    def parts(self) -> list[Loader]:
        """The loaders that it takes batches from."""
        return []

    @property
    def promised(self) -> float:
        """How many batches an epoch that begins now gives for sure."""
        return 0

    def count(self) -> None:
        """Work out how many batches there are, from what it is made of."""

    def taken(self, epoch: int) -> int | float:
        """Return at which batch this process's epoch ends."""
        return self.num_batches

    def taken_by_all(self, epoch: int) -> int | float:
        """Return at which batch the epoch of the last process ends."""
        return self.taken(epoch)

    def share(self, epoch: int, batch_idx: int) -> float:
        """Return by what a loss that is a mean over the samples of a batch counts among those of all processes.

        It is this process's samples, as a multiple of the mean over processes: 1.0 where all have as many, 0.0 where
        it has none. The mean over processes of the loss times this is the mean over samples.
        """
        return 1.0

    def lacking(self, epoch: int, batch_idx: int) -> bool:
        """Whether some process has no sample of a batch: all of them know it, and that one gets `EMPTY`."""
        return False

    def stand_in(self, epoch: int, batch_idx: int) -> Any:
        """Return what another process has of a batch that this one has no sample of."""
        raise IndexError(f"{self.name} has a sample of batch {batch_idx} in epoch {epoch}.")

    def open(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Return an iterator that begins with batch `start` of an epoch."""
        return iter(())

    def prepare(self, epoch: int, start: int = 0) -> None:
        """Let workers load what begins with batch `start` of an epoch, before anybody asks for it."""
        for part in self.parts if start == 0 else ():
            part.prepare(epoch)

    def places(self, batch_idx: int) -> list[tuple[int, int] | None]:
        """Return which batch of its data each part gives to a batch, and in which lap; None for one that is over."""
        return [(batch_idx, 0)] * len(self.parts)

    def samples_of(self, epoch: int, batch_idx: int) -> list[Any] | None:
        """Return the indices of the samples in a batch of an epoch; None where the data have none.

        Several loaders that are drawn from at once have an entry each.
        """
        return None

    def batch_at(self, epoch: int, batch_idx: int) -> Any:
        """Return one batch of an epoch, with the samples and the random numbers that it has in the run.

        It is loaded in this process. Data with indices may be gone through by somebody else meanwhile.

        Raises:
            IndexError: there is no such batch.
        """
        raise IndexError(f"{self.name} has no batch {batch_idx} in epoch {epoch}.")

    def limited_to(self, most: float) -> Self:
        """Return the same with at most so many batches."""
        shorter = copy.copy(self)
        shorter.num_batches = min(most, self.num_batches)
        return shorter

    def epoch(self, epoch: int, start: int = 0) -> Generator[tuple[int, Any, bool]]:
        """Yield (index, batch, is_last) from batch `start` of an epoch on.

        Of several processes that train, each yields as many; where it has no sample of a batch, that is `EMPTY`.
        """
        limit = self.taken(epoch)
        if start >= limit:
            return
        batches = self.open(epoch, start)
        if self.fetching is not None:
            batches = self.fetching(batches)
        if self.together is not None:
            yield from self._in_step(self.together, batches, start, limit)
            return
        index = start
        if self.promised >= limit:  # nobody has to look ahead, or hold a batch while the next one is made
            while index < limit:
                yield index, next(batches), index + 1 == limit
                index += 1
            return
        batch = next(batches, batches)
        if batch is batches:
            if start == 0:
                self._tell_of_no_batch()
            return
        while index + 1 < limit:  # at the limit there is nothing to look ahead for
            following = next(batches, batches)
            if following is batches:
                break
            yield index, batch, False
            batch, index = following, index + 1
            del following
        if index + 1 < limit:
            self._tell_of_fewer(index + 1)
        yield index, batch, True

    def _in_step(
        self, together: Together, batches: Iterator[Any], start: int, limit: float
    ) -> Generator[tuple[int, Any, bool]]:
        """Yield as many batches as every process has: the first one without another ends the epoch of all.

        Where it may look two batches ahead the answer is there when it is needed, and nobody waits for it.
        """
        waiting: deque[tuple[Any, Question]] = deque()
        index, asked, over = start, start, False
        while True:
            while asked < min(limit, index + 1 + self.looks_ahead):
                batch = batches if over else next(batches, batches)
                over = batch is batches
                waiting.append((batch, together.ask(over)))
                asked += 1
                del batch
            if index == start and self._ended(waiting[0][1], index):
                if waiting[0][1].everywhere() and start == 0:
                    self._tell_of_no_batch()
                return
            batch, _ = waiting.popleft()
            is_last = index + 1 >= limit or self._ended(waiting[0][1], index + 1)
            yield index, batch, is_last
            del batch
            if is_last:
                for _, question in waiting:
                    question.first_to_end()  # nobody leaves while the answer is on its way
                return
            index += 1

    def _ended(self, question: Question, batches: int) -> bool:
        """Whether some process has no batch after so many, and say so where others would have had one."""
        rank = question.first_to_end()
        if rank is None:
            return False
        if question.everywhere() and batches > 0:
            self._tell_of_fewer(batches)
        elif not question.everywhere() and not self._warned:
            self._warned = True
            warn(
                f"{self.name} gave {batches} batches on rank {rank} and more on others: the epoch ends there for all. "
                "Let every process have as many, or limit_train_batches say how many there are."
            )
        return True

    def _tell_of_fewer(self, batches: int) -> None:
        if self.must_keep_length:
            raise MisconfigurationException(
                f"{self.name} yielded {batches} batches in this process although its length is {self.claimed}, and the "
                "other processes count on its length. Let `len` say how many there are, or leave it out: then they "
                "ask each other before each batch."
            )
        if self.claimed != math.inf and not self._warned:
            self._warned = True
            warn(f"{self.name} yielded {batches} batches although its length is {self.claimed}; the epoch ends there.")

    def _tell_of_no_batch(self) -> None:
        once = " A generator can be read once only; give something that can be iterated over again."
        message = f"{self.name} yielded no batch%s.{once if self.read_once else ''}"
        if self.claimed != math.inf:
            raise MisconfigurationException(message % f" although its length is {self.claimed}")
        if self.must_yield:
            raise MisconfigurationException(message % ", and max_epochs=-1 would wait for it forever")
        if not self._warned:
            self._warned = True
            warn(message % ": the epoch is over at once")

    def state_dict(self) -> dict[str, Any]:
        """Return what the order is drawn from and where it is."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def close(self) -> None:
        """Stop persistent workers."""
        for part in self.parts:
            part.close()
