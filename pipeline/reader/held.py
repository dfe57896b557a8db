"""Pieces that a worker holds: under way, or loaded and waiting for later batches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from pipeline.errors import DatasetError, StorageError
from pipeline.reader.pieces import LoadedPiece
from pipeline.reader.plan import ANY_EPOCH, Piece

UNREADABLE = (DatasetError, StorageError, FileNotFoundError)


class Awaited:
    """A piece under way, or there."""

    __slots__ = ("_get", "_loaded")

    def __init__(self, get: Callable[[], LoadedPiece]) -> None:
        """`get` is called once, or by each of the threads that ask at the same time."""
        self._get = get
        self._loaded: LoadedPiece | Exception | None = None

    def result(self) -> LoadedPiece:
        """The piece, or the error that its loading ended with, each time."""
        if self._loaded is None:
            try:
                self._loaded = self._get()
            except UNREADABLE as error:
                self._loaded = error
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded

    @property
    def failed(self) -> bool:
        """Whether loading it has ended with an error."""
        return isinstance(self._loaded, Exception)


class HeldPieces:
    """Finds a piece that is held, or has it loaded. One thread asks.

    Pieces of an epoch stay until they are let go. Of a dataset that fits into the buffer, whole blocks stay for the
    epochs to come, those used last if there is no room for all.
    """

    def __init__(self, load: Callable[[Piece], Awaited], most_bytes: int) -> None:
        """`most_bytes` of whole blocks, not counting those that are in use."""
        self._load, self._most_bytes = load, most_bytes
        self._of_epoch: dict[Piece, Awaited] = {}
        self._blocks: OrderedDict[Piece, tuple[Awaited, int]] = OrderedDict()
        self._block_bytes = 0
        self.asked_bytes = 0
        """Of all pieces so far that had to be loaded."""

    def __len__(self) -> int:
        return len(self._of_epoch) + len(self._blocks)

    def get(self, piece: Piece, nbytes: int) -> Awaited:
        """The piece, whose numbers are of `nbytes`."""
        if piece.epoch == ANY_EPOCH:
            return self._block(piece, nbytes)
        held = self._of_epoch.get(piece)
        if held is None:
            held = self._of_epoch[piece] = self._asked(piece, nbytes)
        return held

    def _asked(self, piece: Piece, nbytes: int) -> Awaited:
        self.asked_bytes += nbytes
        return self._load(piece)

    def _block(self, piece: Piece, nbytes: int) -> Awaited:
        if piece in self._blocks:
            self._blocks.move_to_end(piece)
        else:
            self._blocks[piece] = self._asked(piece, nbytes), nbytes
            self._block_bytes += nbytes
            while self._block_bytes > self._most_bytes and len(self._blocks) > 1:
                _, (_, freed) = self._blocks.popitem(last=False)
                self._block_bytes -= freed
        return self._blocks[piece][0]

    def let_go(self, pieces: Iterable[Piece]) -> None:
        """Forget pieces of an epoch."""
        for piece in pieces:
            self._of_epoch.pop(piece, None)

    def let_go_blocks(self) -> None:
        self._blocks.clear()
        self._block_bytes = 0

    def clear(self) -> None:
        self._of_epoch.clear()
        self.let_go_blocks()

    def let_go_before(self, epoch: int) -> None:
        """Forget all of earlier epochs, and blocks that could not be read in those: a store may be back."""
        self.let_go([piece for piece in self._of_epoch if piece.epoch < epoch])
        for piece in [piece for piece, (held, _) in self._blocks.items() if held.failed]:
            self._block_bytes -= self._blocks.pop(piece)[1]
