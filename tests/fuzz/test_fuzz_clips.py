"""Mutated clips through the real pool: every one ends, as windows or as a rejection, and always the same way."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

from pipeline.decode.blob import Blob
from pipeline.decode.pool import ClipDone, ClipRetracted, DecodeEvent, DecodePool, WindowReady
from pipeline.errors import RejectionClass
from pipeline.policies import ResizePolicy, WindowPolicy
from pipeline.records import Clip
from tests.fuzz.conftest import POLICY
from tests.fuzz.mutations import mutate, seeds, tell
from tests.fuzz.peak_memory import PeakMemory

WINDOWS = WindowPolicy(frames=9, fps=10, tail="pad")
RESIZE = ResizePolicy(buckets=((32, 32), (32, 64)))
LENGTHS = (1, 5, 9)
GOOD_EVERY = 20
SLACK = 1 << 30
"""What a child may allocate between two looks at it, five a second."""
TIMED = {"timeout", "out_of_memory", "decoder_crashed"}


def mutated(small_clips: dict[str, bytes], seed: int) -> bytes:
    draw = random.Random(f"clip {seed}")
    originals = list(small_clips.values())
    return mutate(draw.choice(originals), originals, draw)


def clip(key: str, data: bytes) -> Clip:
    return Clip(
        key=key,
        shard_id="00000",
        video=Blob.from_bytes(data),
        video_sha256="",
        file_name="clip.mp4",
        caption="",
        metadata={},
    )


def with_good_ones(small_clips: dict[str, bytes], numbers: Iterable[int]) -> Iterator[Clip]:
    """The mutated clips, and after every twenty a whole one."""
    for count, seed in enumerate(numbers, start=1):
        yield clip(f"seed {seed}", mutated(small_clips, seed))
        if count % GOOD_EVERY == 0:
            yield clip(f"good after {seed}", small_clips["plain.mp4"])


Account = dict[str, list[tuple]]


def account(events: Iterable[DecodeEvent]) -> Account:
    """Per clip, all that reached the parent, pixels as their hash: equal only if everything is."""
    lines: Account = {}
    for event in events:
        line = lines.setdefault(event.clip.key, [])
        assert not (line and line[-1][0] == "end"), f"{event.clip.key}: something came after its end"
        match event:
            case WindowReady(window):
                digest = hashlib.sha256(window.frames_THWC.tobytes()).hexdigest()
                details = (window.frame_indices, window.frame_times, window.fps, window.crop, window.source)
                line.append(("window", window.index, window.shape, digest, details))
            case ClipRetracted():
                line.append(("retracted",))
            case ClipDone(_, summary, rejection):
                line.append(("end", summary, rejection))
    return lines


def check(key: str, lines: list[tuple]) -> str:
    """One clip's account is in itself right; returns how it ended."""
    _, summary, rejection = lines[-1]
    last = max((at for at, line in enumerate(lines) if line[0] == "retracted"), default=-1)
    valid = [line for line in lines[last + 1 :] if line[0] == "window"]
    if rejection is not None:
        assert valid == [], f"{key}: rejected, and windows of it stand"
        assert rejection.message, key
        return RejectionClass(rejection.error_class).value
    assert summary.windows == len(valid) > 0, key
    assert [line[1] for line in valid] == list(range(len(valid))), key
    assert all(line[2][0] == WINDOWS.frames for line in valid), key
    return "encoded"


def sweep(small_clips: dict[str, bytes], numbers: list[int], pool: DecodePool) -> Account:
    with PeakMemory() as peak:
        lines = account(pool.decode(with_good_ones(small_clips, numbers), WINDOWS, RESIZE, LENGTHS))
    assert {f"seed {seed}" for seed in numbers} <= lines.keys(), "every clip has an end"
    ends = Counter(check(key, line) for key, line in lines.items() if key.startswith("seed"))
    tell(numbers, "clips", dict(ends))
    assert ends.total() == len(numbers)
    (good,) = account(pool.decode(iter([clip("good", small_clips["plain.mp4"])]), WINDOWS, RESIZE, LENGTHS)).values()
    assert check("good", good) == "encoded"
    for key in lines.keys() - {f"seed {seed}" for seed in numbers}:
        assert lines[key] == good, f"{key}: a whole clip came out otherwise"
    assert peak.own_growth < 512 << 20
    assert peak.largest_child < (POLICY.memory_mb << 20) + SLACK
    return lines


def assert_same(one: Account, other: Account) -> None:
    for key, lines in one.items():
        timed = {line[-1].error_class for line in (lines[-1], other[key][-1]) if line[-1] is not None} & TIMED
        assert timed or lines == other[key], f"{key}: it came out in two ways, so receipts would differ"


def test_mutated_clips(small_clips: dict[str, bytes], pool: DecodePool) -> None:
    """Twice, by two children and by one: what becomes of a clip is a function of its bytes."""
    numbers = seeds(0, 150)
    by_two = sweep(small_clips, numbers, pool)
    with DecodePool(POLICY, 1) as single:
        by_one = sweep(small_clips, numbers, single)
    assert_same(by_two, by_one)


def test_mutated_clips_with_decord_first(small_clips: dict[str, bytes]) -> None:
    """decord decodes in a thread of its own; what it gives must not depend on who is quicker."""
    numbers = seeds(0, 40)
    policy = POLICY.model_copy(update={"backends": ("decord", "pyav")})
    results = []
    for children in (2, 1):
        with DecodePool(policy, children) as pool:
            results.append(sweep(small_clips, numbers, pool))
    assert_same(*results)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("start", range(1_000_000, 1_020_000, 2_000))
def test_many_mutated_clips(small_clips: dict[str, bytes], pool: DecodePool, start: int) -> None:
    """20,000 in all, about three minutes on two idle cores."""
    sweep(small_clips, seeds(start, 2_000), pool)
