from __future__ import annotations

import os
import socket
import threading

import pytest

from pipeline.decode.blob import Blob
from pipeline.decode.wire import Channel, Job
from pipeline.policies import ResizePolicy, WindowPolicy


@pytest.fixture
def ends():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        yield Channel(left), Channel(right)


def test_messages_and_blobs_arrive_in_order(ends: tuple[Channel, Channel]) -> None:
    """Many at once: a descriptor stays with its own message."""
    sender, receiver = ends
    blobs = [Blob.from_bytes(bytes([number]) * 5000) if number % 3 else None for number in range(12)]
    for number, blob in enumerate(blobs):
        sender.send({"number": number, "text": "é" * number}, blob)
    for number in range(12):
        message, blob = receiver.receive()
        assert message == {"number": number, "text": "é" * number}
        assert (blob is None) == (number % 3 == 0)
        if blob is not None:
            assert blob.map()[:] == bytes([number]) * 5000
            assert not os.get_inheritable(blob.fd)


def test_a_message_larger_than_the_sockets_buffer(ends: tuple[Channel, Channel]) -> None:
    sender, receiver = ends
    long = {"times": [number / 7 for number in range(200_000)]}
    thread = threading.Thread(target=sender.send, args=(long, Blob.from_bytes(b"x")))
    thread.start()
    message, blob = receiver.receive()
    thread.join()
    assert message == long  # floats survive exactly
    assert blob is not None
    assert blob.size == 1


@pytest.mark.parametrize("sent", [b"", b"\x00\x00", b"\x00\x00\x00\x05{}"])
def test_a_peer_that_goes_away(sent: bytes) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    left.sendall(sent)
    left.close()
    with right, pytest.raises(EOFError):
        Channel(right).receive()


def test_a_job_survives_the_trip(ends: tuple[Channel, Channel]) -> None:
    job = Job(
        number=7,
        backends=("decord", "pyav"),
        windows=WindowPolicy(frames=9, fps=12.5, tail="trim"),
        resize=ResizePolicy(buckets=((256, 256), (128, 448)), filter="lanczos"),
        lengths=(1, 5, 9),
        threads=2,
        windows_in_flight=3,
    )
    ends[0].send(job.to_message())
    message, _ = ends[1].receive()
    received = Job.from_message(message)
    assert received.windows == job.windows
    assert received.resize == job.resize
    assert tuple(received.backends) == job.backends
    assert (received.number, received.lengths, received.threads, received.windows_in_flight) == (7, (1, 5, 9), 2, 3)
