"""Decode children behind a TCP link, without Ray: the events are those of local ones, whatever is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import psutil
import pytest

from pipeline.decode import door
from pipeline.decode.link import Invitation
from pipeline.decode.pool import DecodeEvent, DecodePool, WindowReady
from pipeline.decode.relay import serve
from pipeline.errors import ConfigError, PipelineError
from pipeline.policies import DecodePolicy, WindowPolicy
from tests.awkward_clips import LENGTHS, ClipMaker, clips
from tests.pipeline.decode.test_pool import SMALL, account

RELAY = """
import sys
from pipeline.decode.link import Invitation
from pipeline.decode.relay import serve
host, port, secret = sys.stdin.read().split()
serve(Invitation(host, int(port), bytes.fromhex(secret)))
"""
TRIM = WindowPolicy(tail="trim")


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s"
        time.sleep(0.02)


class Relay:
    """A relay in a process of its own, as on another node."""

    def __init__(self, pool: DecodePool) -> None:
        invitation = pool.invitation
        assert invitation is not None
        self.process = subprocess.Popen([sys.executable, "-c", RELAY], stdin=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{invitation.host} {invitation.port} {invitation.secret.hex()}")
        self.process.stdin.close()

    @property
    def child(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child


@contextmanager
def remote_pool(
    local: int, remote: int, policy: DecodePolicy | None = None
) -> Iterator[tuple[DecodePool, list[Relay]]]:
    """A pool whose relays have come in; after it they must have ended by themselves."""
    relays: list[Relay] = []
    try:
        with DecodePool(policy or DecodePolicy(), local, num_remote=remote) as pool:
            for number in range(remote):  # one after the other: who comes first is served first
                relays.append(Relay(pool))
                wait_for(lambda: pool.remote_children > number)  # noqa: B023
            yield pool, relays
        for relay in relays:
            assert relay.process.wait(timeout=60) in (0, -signal.SIGKILL)
    finally:
        for relay in relays:
            relay.process.kill()


@pytest.fixture(scope="module")
def mixed(maker: ClipMaker, real_clips: dict[str, Path]) -> list[Path]:
    """Good, cut and impossible clips."""
    fast = maker.convert(real_clips["single_face.mp4"], "fast_face.mp4", "-c", "copy", "-movflags", "faststart")
    cut = maker.damaged(fast, "cut_face.mp4", fast.read_bytes()[: fast.stat().st_size // 2])
    text = maker.folder / "remote_text.mp4"
    text.write_text("no video")
    empty = maker.folder / "empty.mp4"
    empty.write_bytes(b"")
    return [real_clips["carphone_distorted.mp4"], text, cut, empty, real_clips["single_face.mp4"]]


@pytest.fixture(scope="module")
def expected(mixed: list[Path]) -> list[tuple]:
    with DecodePool(DecodePolicy(), 1) as pool:
        return account(pool.decode(clips(mixed), TRIM, SMALL, LENGTHS))


def test_the_events_are_those_of_local_children(mixed: list[Path], expected: list[tuple]) -> None:
    """Good clips, a cut one, a text and an empty file; two calls, so that a relay serves clip after clip."""
    with remote_pool(0, 2) as (pool, relays):
        assert "secret" not in repr(pool.invitation)
        pids = [relay.child.pid for relay in relays]
        assert not set(pids) & set(pool.child_pids())
        for times in (1, 2):
            assert account(pool.decode(clips(mixed), TRIM, SMALL, LENGTHS)) == expected
            assert pool.remote_clips == times * len(mixed)
        assert (pool.children_replaced, pids) == (0, [relay.child.pid for relay in relays])


@pytest.mark.parametrize(
    ("victim", "moment"), [("child", "between clips"), ("child", "after a window"), ("relay", "after a window")]
)
def test_what_is_killed_elsewhere_changes_no_event(
    victim: str, moment: str, mixed: list[Path], expected: list[tuple]
) -> None:
    with remote_pool(0, 1, DecodePolicy(windows_in_flight=1)) as (pool, (relay,)):
        child = relay.child
        events = pool.decode(clips(mixed), TRIM, SMALL, LENGTHS)
        seen: list[DecodeEvent] = list(islice(events, 2 if moment == "after a window" else 0))
        os.kill(child.pid if victim == "child" else relay.process.pid, signal.SIGKILL)
        wait_for(lambda: moment == "after a window" or pool.remote_children == 0)
        relay_left = relay if victim == "child" else Relay(pool)
        try:
            assert account([*seen, *events]) == expected
            # the one clip that it had, or was to have, went to the local child; no other did
            assert pool.children_replaced == (moment == "after a window")
            assert pool.remote_clips == len(mixed) - 1
            wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
        finally:
            if relay_left is not relay:
                pool.close()
                assert relay_left.process.wait(timeout=60) == 0


def test_a_clip_that_kills_two_children_is_refused_as_ever(real_clips: dict[str, Path]) -> None:
    """The first elsewhere, the second here."""
    with remote_pool(0, 1, DecodePolicy(windows_in_flight=1)) as (pool, (relay,)):
        path = real_clips["bikes.mp4"]
        killed: list[int] = []
        events: list[DecodeEvent] = []
        for event in pool.decode(clips([path]), WindowPolicy(), SMALL, LENGTHS):
            events.append(event)
            if isinstance(event, WindowReady) and len(killed) < 2:
                wait_for(lambda: not killed or pool.child_pids())
                killed.append(pool.child_pids()[0] if killed else relay.child.pid)
                os.kill(killed[-1], signal.SIGKILL)
        rejection = account(events)[-1][2]
        assert (rejection.error_class, rejection.message) == (
            "decoder_crashed",
            "the decode child died (2 attempts)",
        )


def test_limits_hold_elsewhere(real_clips: dict[str, Path], mixed: list[Path], expected: list[tuple]) -> None:
    """A clip that takes too long gets the rejection that it gets here; a child that stands still is given up."""
    policy = DecodePolicy(cpu_seconds=0.05)
    slow = real_clips["WolfgangLanger_Pexels.mp4"]
    with remote_pool(0, 1, policy) as (pool, (relay,)):
        first = relay.child
        (end,) = account(pool.decode(clips([slow]), WindowPolicy(frames=469), SMALL, LENGTHS))
        assert end[2].error_class == "timeout"
        assert end[2].message == "no window and no end within 0.05 s of CPU time or 0.5 s (2 attempts)"
        wait_for(lambda: pool.remote_children == 1)
        assert relay.child != first
    with remote_pool(0, 1, DecodePolicy(cpu_seconds=0.4)) as (pool, (relay,)):
        stopped = relay.child
        stopped.suspend()
        assert account(pool.decode(clips(mixed[:1]), TRIM, SMALL, LENGTHS)) == [
            line for line in expected if line[0].startswith("000")
        ]
        wait_for(lambda: not stopped.is_running())


def test_a_node_that_is_cut_off_is_given_up(
    mixed: list[Path], expected: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its link stays open and says nothing."""
    monkeypatch.setattr(door, "SILENT_SECONDS", 1.0)
    with remote_pool(0, 1) as (pool, (relay,)):
        os.kill(relay.process.pid, signal.SIGSTOP)
        try:
            events = pool.decode(clips(mixed[:1]), TRIM, SMALL, LENGTHS)
            assert account(events) == [line for line in expected if line[0].startswith("000")]
        finally:
            os.kill(relay.process.pid, signal.SIGCONT)


def test_a_slow_consumer_holds_children_back_and_leaving_frees_them(real_clips: dict[str, Path]) -> None:
    with remote_pool(0, 1, DecodePolicy(windows_in_flight=2)) as (pool, (relay,)):
        path = real_clips["WolfgangLanger_Pexels.mp4"]
        events = pool.decode(clips([path]), WindowPolicy(frames=1), SMALL, LENGTHS)
        next(events)
        child = relay.child
        wait_for(lambda: pool.depth()[1] == 2)
        time.sleep(0.3)
        before = child.cpu_times().user
        time.sleep(0.5)
        assert (pool.depth()[1], child.cpu_times().user - before < 0.05) == (2, True)
        events.close()
        wait_for(lambda: not child.is_running())
        wait_for(lambda: pool.remote_children == 1)
        short = real_clips["carphone_distorted.mp4"]
        assert account(pool.decode(clips([short]), WindowPolicy(), SMALL, LENGTHS))[-1][2] is None
        assert pool.remote_clips == 1


def test_who_does_not_know_the_secret_does_not_come_in(caplog: pytest.LogCaptureFixture) -> None:
    with DecodePool(DecodePolicy(), 1, num_remote=1) as pool:
        invitation = pool.invitation
        assert invitation is not None
        with pytest.raises(PipelineError, match=r"not let in by the encoder at 127\.0\.0\.1:\d+"):
            serve(Invitation(invitation.host, invitation.port, bytes(32)))
        assert "it does not know the invitation's secret" in caplog.text
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n" * 9):  # who hangs up, who speaks something else
            with socket.create_connection((invitation.host, invitation.port)) as stranger:
                stranger.sendall(said)
        assert pool.remote_children == 0


def test_other_versions_are_refused_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.decode.relay.what_decides_bytes", lambda decoders: {"decoders": {"pyav": "1.0"}})
    with DecodePool(DecodePolicy(), 1, num_remote=1) as pool:
        invitation = pool.invitation
        assert invitation is not None
        with pytest.raises(PipelineError, match=r"its versions are .*'pyav': '1\.0'.*, the encoder's .*'pillow'"):
            serve(invitation)


def test_a_door_that_nobody_reaches_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(PipelineError, match=rf"at 127\.0\.0\.1:{port}: .*refused"):
        serve(Invitation("127.0.0.1", port, bytes(32)))


def test_a_pool_needs_somebody() -> None:
    with pytest.raises(ConfigError, match="at least 1 child, got 0 here, 0 elsewhere"):
        DecodePool(DecodePolicy(), 0)
