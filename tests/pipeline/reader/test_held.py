"""Pieces that are held: loaded once while they are, and let go when there is no room or no use for them."""

from __future__ import annotations

from typing import cast

import pytest

from pipeline.errors import DatasetError, StorageError
from pipeline.reader.held import Awaited, HeldPieces
from pipeline.reader.pieces import LoadedPiece
from pipeline.reader.plan import ANY_EPOCH, Piece


def held_pieces(most_bytes: int) -> tuple[HeldPieces, list[Piece]]:
    """With a list of what was loaded."""
    loaded: list[Piece] = []

    def load(piece: Piece) -> Awaited:
        loaded.append(piece)
        return Awaited(lambda: cast(LoadedPiece, piece))

    return HeldPieces(load, most_bytes), loaded


def block(number: int) -> Piece:
    return Piece(ANY_EPOCH, 0, number, 0, 10)


def test_a_piece_of_an_epoch_is_loaded_again_once_it_was_let_go() -> None:
    held, loaded = held_pieces(0)
    one, other = Piece(3, 0, 0, 0, 5), Piece(4, 0, 0, 0, 5)
    assert held.get(one, 7) is held.get(one, 7)
    held.get(other, 7)
    held.let_go_before(4)
    held.get(other, 7)
    assert (len(held), loaded, held.asked_bytes) == (1, [one, other], 14)
    held.let_go([other])
    held.get(other, 7)
    assert loaded == [one, other, other]


def test_blocks_stay_while_there_is_room_and_the_longest_unused_goes_first() -> None:
    held, loaded = held_pieces(30)
    for number in (0, 1, 2, 0, 3):  # 3 takes the place of 1
        held.get(block(number), 10)
    held.let_go_before(9)
    held.let_go([block(0)])
    assert len(held) == 3
    for number in (0, 2, 3, 1):
        held.get(block(number), 10)
    assert [piece.shard for piece in loaded] == [0, 1, 2, 3, 1]
    held.let_go_blocks()
    held.get(block(1), 10)
    assert len(loaded) == 6


def test_an_error_is_kept_with_its_piece() -> None:
    calls = []

    def fail() -> LoadedPiece:
        calls.append(1)
        raise DatasetError("damaged")

    awaited = Awaited(fail)
    for _ in range(2):
        with pytest.raises(DatasetError, match="damaged"):
            awaited.result()
    assert calls == [1]
    assert awaited.failed


def test_a_block_that_could_not_be_read_is_tried_again_in_the_next_epoch() -> None:
    attempts: list[Piece] = []

    def load(piece: Piece) -> Awaited:
        attempts.append(piece)

        def get() -> LoadedPiece:
            raise StorageError("away")

        return Awaited(get)

    held = HeldPieces(load, 100)
    for _ in range(2):
        with pytest.raises(StorageError, match="away"):
            held.get(block(0), 60).result()
    assert len(attempts) == 1
    held.let_go_before(1)
    held.get(block(0), 60)
    assert len(attempts) == 2
