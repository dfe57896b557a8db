"""Seeded damage to bytes: the same seed gives the same damage, and one seed can be run alone.

CVVAE_FUZZ_SEED=1234 pytest tests/fuzz -m "slow or not slow"
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence

SEED_VARIABLE = "CVVAE_FUZZ_SEED"
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x100000)
_HEADER = 2048
"""Most of what a parser decides, it decides within this many bytes of either end."""


def seeds(start: int, count: int) -> list[int]:
    """`count` seeds, or the one that the environment names."""
    alone = os.environ.get(SEED_VARIABLE)
    return [int(alone)] if alone else list(range(start, start + count))


def tell(numbers: Sequence[int], what: str, outcome: object) -> None:
    """Say which seeds ran and what came of them: pytest shows it where a test fails, and with -s."""
    span = f"seeds {numbers[0]}..{numbers[-1]}; {SEED_VARIABLE}=N runs one"
    sys.stdout.write(f"\n{len(numbers)} mutated {what} ({span}): {outcome}\n")


def mutate(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    """`data` after one to three mutations; what is spliced or swapped in comes from `others`."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        data = draw.choice(MUTATIONS)(data, others, draw)
    return data


def _place(data: bytes, draw: random.Random) -> int:
    """A position; half of the time near one of the ends, where headers and indexes are."""
    near = min(_HEADER, len(data))
    return draw.choice((draw.randrange(near + 1), len(data) - draw.randrange(near + 1), *[_anywhere(data, draw)] * 2))


def _anywhere(data: bytes, draw: random.Random) -> int:
    return draw.randrange(len(data) + 1)


def _span(data: bytes, draw: random.Random) -> slice:
    start = _place(data, draw)
    return slice(start, start + draw.choice((1, 4, 16, 188, 512, 4096, 1 << 16)))


def flip_bits(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        at = _place(data, draw)
        if at < len(damaged):
            damaged[at] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def set_number(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    """A field that says too much, or nothing: lengths, counts, sizes, times."""
    at, width = _place(data, draw), draw.choice((1, 2, 4, 8))
    number = draw.choice(_EXTREMES) & ((1 << 8 * width) - 1)
    return data[:at] + number.to_bytes(width, draw.choice(("big", "little"))) + data[at + width :]


def cut(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    return data[: _place(data, draw)]


def drop_span(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    span = _span(data, draw)
    return data[: span.start] + data[span.stop :]


def zero_span(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    span = _span(data, draw)
    return data[: span.start] + bytes(len(data[span])) + data[span.stop :]


def repeat_span(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    span = _span(data, draw)
    return data[: span.stop] + data[span] * draw.choice((1, 1, 5, 50)) + data[span.stop :]


def splice(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    other = draw.choice(others)
    at = _place(data, draw)
    return data[:at] + other[_span(other, draw)] + data[at:]


def swap_header(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    """Another file's beginning before this one's rest."""
    size = draw.choice((4, 12, 64, 512, 4096))
    return draw.choice(others)[:size] + data[size:]


def join(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    """The first part of this file and the last of another."""
    other = draw.choice(others)
    return data[: _anywhere(data, draw)] + other[_anywhere(other, draw) :]


Mutation = Callable[[bytes, Sequence[bytes], random.Random], bytes]
MUTATIONS: tuple[Mutation, ...] = (
    *(
        flip_bits,
        flip_bits,
        set_number,
        set_number,
        cut,
        drop_span,
        zero_span,
        repeat_span,
        splice,
        swap_header,
        join,
    ),
)
