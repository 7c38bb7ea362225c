"""Which positions of an epoch each of several processes takes."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.slices import Slices

PARTS, SIZES, TOTALS = st.integers(1, 6), st.integers(1, 9), st.integers(0, 60)


@given(PARTS, SIZES, TOTALS, st.booleans())
def test_the_pieces_of_a_batch_are_the_batch_in_order_and_as_even_as_can_be(
    parts: int, size: int, total: int, drop_last: bool
) -> None:
    stop = total // size * size if drop_last else total
    pieces = [list(Slices(part, parts, size).pieces(0, total, drop_last)) for part in range(parts)]
    batches = list(zip(*pieces, strict=True))
    assert len(batches) == Slices(0, parts, size).count(total, drop_last)
    for k, batch in enumerate(batches):
        assert [place for piece in batch for place in piece] == list(range(k * size, min((k + 1) * size, stop)))
        lengths = [len(piece) for piece in batch]
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] - lengths[-1] <= 1
        for part, piece in enumerate(batch):
            slices = Slices(part, parts, size)
            share = Fraction(len(piece) * parts, sum(lengths))
            assert slices.share(k, total) == float(share)
            assert slices.batch_at(k * size) == k
            assert (k < slices.own_count(total, drop_last)) == (len(piece) > 0)


@given(PARTS, SIZES, TOTALS, st.integers(0, 60), st.integers(0, 9))
def test_an_epoch_goes_on_at_any_position_with_batches_of_another_size(
    parts: int, size: int, total: int, first: int, first_batch: int
) -> None:
    first = min(first, total)
    rest = []
    for part in range(parts):
        slices = Slices(part, parts, size, first_batch, first)
        assert slices.begin(first_batch) == first
        pieces = list(slices.pieces(first, total, False))
        assert first_batch + len(pieces) == slices.count(total, False)
        rest += [place for piece in pieces for place in piece]
    assert sorted(rest) == list(range(first, total))
