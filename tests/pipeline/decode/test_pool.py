"""The pool with real children and real clips: order, retries, limits, and nothing left behind."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.decode.pool import ClipDone, ClipRetracted, DecodeEvent, DecodePool, WindowReady
from pipeline.errors import ConfigError, PipelineError
from pipeline.policies import DecodePolicy, ResizePolicy, WindowPolicy
from pipeline.records import Clip
from tests.awkward_clips import CODE_HEIGHT, CODE_WIDTH, LENGTHS, ClipMaker, clips, read_codes

SMALL = ResizePolicy(buckets=((64, 64),))
CODED = ResizePolicy(buckets=((CODE_HEIGHT, CODE_WIDTH),))


def account(events: Iterable[DecodeEvent]) -> list[tuple]:
    """Events with the pixels' hashes: equal only if everything is."""
    lines: list[tuple] = []
    for event in events:
        match event:
            case WindowReady(window, of):
                digest = hashlib.sha256(window.frames_THWC.tobytes()).hexdigest()
                lines.append((of.key, window.key, digest, window.frame_indices, window.frame_times, window.source))
            case ClipRetracted(of):
                lines.append((of.key, "retracted"))
            case ClipDone(of):
                lines.append((of.key, event.summary, event.rejection))
    return lines


def only_end(events: Iterable[DecodeEvent]) -> ClipDone:
    *_, end = events
    assert isinstance(end, ClipDone)
    return end


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with DecodePool(DecodePolicy(), 2) as shared:
        yield shared


@pytest.fixture(scope="module")
def mixed(maker: ClipMaker, real_clips: dict[str, Path]) -> list[Path]:
    """Good, cut and impossible clips, long ones before short ones."""
    names = ("bikes.mp4", "carphone_distorted.mp4", "no_face.mp4", "single_face.mp4")
    good = [real_clips[name] for name in names]
    fast = maker.convert(good[0], "fast.mp4", "-c", "copy", "-movflags", "faststart")
    cut = maker.damaged(fast, "cut.mp4", fast.read_bytes()[: fast.stat().st_size // 2])
    text = maker.folder / "text.mp4"
    text.write_text("no video")
    return [good[0], text, cut, *good[1:]]


def test_events_do_not_depend_on_the_number_of_children(pool: DecodePool, mixed: list[Path]) -> None:
    with DecodePool(pool.policy, 1) as single:
        alone = account(single.decode(clips(mixed), WindowPolicy(tail="trim"), SMALL, LENGTHS))
    together = account(pool.decode(clips(mixed), WindowPolicy(tail="trim"), SMALL, LENGTHS))
    assert alone == together
    keys = [line[0] for line in together]
    assert keys == sorted(keys)
    ends = [line for line in together if len(line) == 3]
    assert len(ends) == len(mixed)
    refused = {line[0]: line[2].error_class for line in ends if line[2] is not None}
    assert refused == {"001-text": "unsupported_container", "002-cut": "corrupt_frames"}
    assert ("002-cut", "retracted") in together  # windows of its first half had been given


def test_an_empty_shard_has_no_events(pool: DecodePool) -> None:
    assert list(pool.decode(iter(()), WindowPolicy(), SMALL, LENGTHS)) == []


def test_a_clips_blob_is_closed_at_its_end_and_little_is_read_ahead(pool: DecodePool, mixed: list[Path]) -> None:
    taken: list[Clip] = []

    def watched() -> Iterator[Clip]:
        for one in clips(mixed * 2):
            taken.append(one)
            yield one

    ended = 0
    for event in pool.decode(watched(), WindowPolicy(), SMALL, LENGTHS):
        assert len(taken) <= ended + 3  # two children and one more
        if isinstance(event, ClipDone):
            ended += 1
            with pytest.raises(ValueError, match="closed"):
                _ = event.clip.video.fd
    assert ended == len(mixed) * 2


def test_two_shards_share_the_children(pool: DecodePool, mixed: list[Path]) -> None:
    expected = account(pool.decode(clips(mixed), WindowPolicy(), SMALL, LENGTHS))
    results: dict[int, list[tuple]] = {}

    def run(number: int) -> None:
        results[number] = account(pool.decode(clips(mixed), WindowPolicy(), SMALL, LENGTHS))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [results.get(number) for number in range(2)] == [expected] * 2


def test_a_slow_consumer_holds_the_children_back(real_clips: dict[str, Path]) -> None:
    """Two windows wait, a third is being made: a child that waits for its consumer uses no time and no deadline."""
    policy = DecodePolicy(cpu_seconds=0.2, windows_in_flight=2)
    with DecodePool(policy, 1) as pool:
        events = pool.decode(clips([real_clips["WolfgangLanger_Pexels.mp4"]]), WindowPolicy(frames=1), SMALL, LENGTHS)
        first = next(events)
        assert isinstance(first, WindowReady)
        child = psutil.Process(pool.child_pids()[0])
        time.sleep(0.5)
        before = child.cpu_times().user
        time.sleep(2.2)  # longer than the wall limit of ten times 0.2 s
        assert child.cpu_times().user - before < 0.05
        rest = account(events)
        assert len(rest) == 471 + 1
        assert rest[-1][2] is None


def test_a_backend_that_cannot_is_followed_by_one_that_can(maker: ClipMaker, real_clips: dict[str, Path]) -> None:
    """decord knows no AV1; in a transport stream with B-frames it fails midway, and has given no window by then: how
    far it comes is chance."""
    av1 = maker.coded(20, "pool_av1.mp4", "-c:v", "libsvtav1", "-preset", "10", "-crf", "10", "-pix_fmt", "yuv420p")
    stream = maker.convert(real_clips["bikes.mp4"], "pool.ts", "-frames:v", "40", "-c:v", "libx264")
    with DecodePool(DecodePolicy(backends=("decord", "pyav")), 1) as pool:
        assert [name.split("-")[0] for name in pool.decoders] == ["decord", "pyav"]
        events = list(pool.decode(clips([av1]), WindowPolicy(frames=9), CODED, LENGTHS))
        assert [type(event) for event in events] == [WindowReady, WindowReady, ClipDone]
        assert isinstance(events[1], WindowReady)
        assert read_codes(events[1].window.frames_THWC) == list(range(9, 18))
        assert events[1].window.source.decoder == pool.decoders[1]

        events = list(pool.decode(clips([stream]), WindowPolicy(frames=1), SMALL, LENGTHS))
        windows = [event for event in events if isinstance(event, WindowReady)]
        assert {window.window.source.decoder for window in windows} == {pool.decoders[1]}
        assert isinstance(events[-1], ClipDone)
        assert events[-1].summary is not None
        assert (events[-1].summary.windows, len(events)) == (40, 41)
        assert [w.window.frame_indices for w in windows] == [(n,) for n in range(40)]


def test_pyav_hands_over_midway(pool: DecodePool, maker: ClipMaker) -> None:
    path = maker.coded(20, "pool_backwards.avi", "-c:v", "libx264", "-bf", "2", "-crf", "12", "-pix_fmt", "yuv420p")
    events = list(pool.decode(clips([path]), WindowPolicy(frames=1), CODED, LENGTHS))
    kinds = [type(event) for event in events]
    given = kinds.index(ClipRetracted)
    assert kinds == [WindowReady] * given + [ClipRetracted] + [WindowReady] * 20 + [ClipDone]
    windows = [event.window for event in events if isinstance(event, WindowReady)]
    assert [read_codes(window.frames_THWC)[0] for window in windows[given:]] == list(range(20))
    assert given > 0
    assert [windows[at].source.decoder for at in (0, -1)] == list(pool.decoders)


def test_the_first_backends_error_is_reported_with_the_others(pool: DecodePool, maker: ClipMaker) -> None:
    coded = maker.coded(5, "pool_coded.mp4")
    path = maker.convert(coded, "pool_tilted.mp4", "-c", "copy", before=("-display_rotation", "45"))
    end = only_end(pool.decode(clips([path]), WindowPolicy(), CODED, LENGTHS))
    assert end.rejection is not None
    assert end.rejection.error_class == "decode_failed"
    assert end.rejection.message.startswith("the display matrix is no quarter turn")
    assert "; then decode" in end.rejection.message
    assert (end.rejection.key, end.rejection.scope, end.rejection.shard_id) == (end.clip.key, "clip", "00000")


@pytest.mark.parametrize("moment", ["between clips", "before its first window", "after a window"])
def test_a_killed_child_is_replaced_and_the_clip_tried_again(
    pool: DecodePool, real_clips: dict[str, Path], moment: str
) -> None:
    with DecodePool(pool.policy, 1) as mine:
        list(mine.decode(clips([real_clips["carphone_distorted.mp4"]]), WindowPolicy(), SMALL, LENGTHS))
        old = mine.child_pids()
        path = real_clips["single_face.mp4"]
        expected = account(pool.decode(clips([path]), WindowPolicy(), SMALL, LENGTHS))
        events = mine.decode(clips([path]), WindowPolicy(), SMALL, LENGTHS)
        seen: list[DecodeEvent] = []
        if moment == "after a window":
            seen.append(next(events))
        if moment == "before its first window":
            threading.Timer(0.03, os.kill, (old[0], signal.SIGKILL)).start()
        else:
            os.kill(old[0], signal.SIGKILL)
        seen.extend(events)
        assert account(seen) == expected, "the consumer sees nothing of it, so batches stay what they were"
        assert mine.child_pids() != old


def test_a_clip_that_kills_two_children_is_refused_and_the_next_one_read(real_clips: dict[str, Path]) -> None:
    with DecodePool(DecodePolicy(windows_in_flight=1), 1) as pool:
        paths = [real_clips["bikes.mp4"], real_clips["carphone_distorted.mp4"]]
        events = pool.decode(clips(paths), WindowPolicy(), SMALL, LENGTHS)
        kinds: list[str] = []
        killed: set[int] = set()
        for event in events:
            kinds.append(type(event).__name__)
            if isinstance(event, WindowReady) and event.clip.key.startswith("000"):
                for pid in set(pool.child_pids()) - killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            if isinstance(event, ClipDone) and event.clip.key.startswith("000"):
                assert event.rejection is not None
                assert event.rejection.error_class == "decoder_crashed"
                assert event.rejection.message == "the decode child died (2 attempts)"
        end = kinds.index("ClipDone")
        assert kinds[end - 1] == "ClipRetracted"
        assert kinds[end + 1 :] == ["WindowReady"] * 7 + ["ClipDone"]
        assert len(killed) == 2


def test_a_stopped_child_runs_into_the_wall_limit(pool: DecodePool, real_clips: dict[str, Path]) -> None:
    """It uses no CPU time; the fresh one reads the clip."""
    path = real_clips["carphone_distorted.mp4"]
    expected = account(pool.decode(clips([path]), WindowPolicy(), SMALL, LENGTHS))
    with DecodePool(DecodePolicy(cpu_seconds=0.2), 1) as mine:
        stopped = mine.child_pids()
        os.kill(stopped[0], signal.SIGSTOP)
        started = time.monotonic()
        assert account(mine.decode(clips([path]), WindowPolicy(), SMALL, LENGTHS)) == expected
        assert time.monotonic() - started >= 2
        assert not psutil.pid_exists(stopped[0])


def test_a_clip_that_takes_too_long_is_refused_after_two_attempts(real_clips: dict[str, Path]) -> None:
    """472 frames for one window take about a second of CPU time."""
    with DecodePool(DecodePolicy(cpu_seconds=0.05), 1) as pool:
        paths = [real_clips["WolfgangLanger_Pexels.mp4"], real_clips["carphone_distorted.mp4"]]
        first = pool.child_pids()
        events = list(pool.decode(clips(paths), WindowPolicy(frames=469), SMALL, LENGTHS))
        end = events[0]
        assert isinstance(end, ClipDone)
        assert end.rejection is not None
        assert end.rejection.error_class == "timeout"
        assert end.rejection.message == "no window and no end within 0.05 s of CPU time or 0.5 s (2 attempts)"
        assert isinstance(events[1], ClipDone)
        assert events[1].rejection is not None
        assert events[1].rejection.error_class == "too_short"
        assert first != pool.child_pids()


def test_a_clip_that_needs_too_much_memory_is_refused(maker: ClipMaker) -> None:
    """B-frames of 6K: libav holds a dozen of 32 MB each."""
    path = maker.coded(
        *(14, "vast.mp4", "-vf", "scale=6144:3456:flags=neighbor", "-c:v", "libx264", "-preset", "ultrafast"),
        *("-refs", "6", "-bf", "2", "-pix_fmt", "yuv420p"),
    )
    with DecodePool(DecodePolicy(memory_mb=200), 1) as pool:
        end = only_end(pool.decode(clips([path]), WindowPolicy(frames=13), SMALL, LENGTHS))
    assert end.rejection is not None
    assert end.rejection.error_class == "out_of_memory"
    assert end.rejection.message == "the decode child needs more than 200 MB (2 attempts)"


def test_an_abandoned_call_frees_the_children(pool: DecodePool, mixed: list[Path]) -> None:
    taken = []

    def watched() -> Iterator[Clip]:
        for one in clips(mixed):
            taken.append(one)
            yield one

    events = pool.decode(watched(), WindowPolicy(frames=1), SMALL, LENGTHS)
    assert len(list(islice(events, 3))) == 3
    started = time.monotonic()
    assert hasattr(events, "close")
    events.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert time.monotonic() - started < 2
    for one in taken:
        with pytest.raises(ValueError, match="closed"):
            _ = one.video.fd
    assert account(pool.decode(clips(mixed[-1:]), WindowPolicy(), SMALL, LENGTHS))[-1][2] is None


def test_leaving_does_not_wait_for_others(mixed: list[Path]) -> None:
    """The only child is held by a call whose consumer takes nothing; another call, still in the queue, is left."""
    with DecodePool(DecodePolicy(), 1) as pool:
        first = pool.decode(clips(mixed[:1]), WindowPolicy(frames=1), SMALL, LENGTHS)
        next(first)
        failures = []

        def start_and_leave() -> None:
            def broken() -> Iterator[Clip]:
                yield from clips(mixed[-1:])
                raise OSError("the store went away")

            try:
                list(pool.decode(broken(), WindowPolicy(), SMALL, LENGTHS))
            except OSError as error:
                failures.append(error)

        second = threading.Thread(target=start_and_leave)
        second.start()
        second.join(timeout=5)
        assert len(failures) == 1
        assert account(first)[-1][1].windows == 250


def test_damaged_clips_write_nothing_on_our_stderr(
    pool: DecodePool, mixed: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    list(pool.decode(clips(mixed[:3]), WindowPolicy(), SMALL, LENGTHS))
    assert capfd.readouterr() == ("", "")


def test_a_source_that_breaks_is_heard(pool: DecodePool, mixed: list[Path]) -> None:
    def broken() -> Iterator[Clip]:
        yield from clips(mixed[:2])
        raise OSError("the store went away")

    with pytest.raises(OSError, match="went away"):
        list(pool.decode(broken(), WindowPolicy(), SMALL, LENGTHS))
    assert account(pool.decode(clips(mixed[-1:]), WindowPolicy(), SMALL, LENGTHS))[-1][2] is None


def test_closing_the_pool_ends_what_runs(real_clips: dict[str, Path]) -> None:
    pool = DecodePool(DecodePolicy(), 1)
    events = pool.decode(clips([real_clips["bikes.mp4"]] * 3), WindowPolicy(frames=1), SMALL, LENGTHS)
    next(events)
    pids = pool.child_pids()
    pool.close()
    with pytest.raises(PipelineError, match="closed"):
        list(events)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert pool.child_pids() == []
    with pytest.raises(PipelineError, match="closed"):
        list(pool.decode(clips([real_clips["bikes.mp4"]]), WindowPolicy(), SMALL, LENGTHS))
    pool.close()


def test_windows_outlive_the_pool_and_leave_no_descriptor(real_clips: dict[str, Path]) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with DecodePool(DecodePolicy(), 1) as pool:
        events = list(pool.decode(clips([real_clips["carphone_pristine.mp4"]]), WindowPolicy(), SMALL, LENGTHS))
    windows = [event.window for event in events if isinstance(event, WindowReady)]
    assert len(windows) == 7
    assert all(window.frames_THWC.std() > 10 for window in windows)
    assert not np.array_equal(windows[0].frames_THWC, windows[-1].frames_THWC)
    del events, windows
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_impossible_settings_are_refused_before_anything_runs(pool: DecodePool) -> None:
    with pytest.raises(ConfigError, match="a length that the VAE takes, got 16; the longest below is 13"):
        pool.decode(iter(()), WindowPolicy(frames=16), SMALL, LENGTHS)
    with pytest.raises(ConfigError, match="at least 1 child"):
        DecodePool(DecodePolicy(), 0)
