"""Pictures into crops, in child processes that can be killed (image_child.py)."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
from contextlib import suppress

import numpy as np

from pipeline.decode.supervisor import child_environment
from pipeline.errors import ClipError, RejectionClass


class ImageChild:
    """One child process; a new one is started where the last has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def crop(self, data: bytes, *, short_side: int, size: tuple[int, int], at: tuple[float, float]) -> np.ndarray:
        """uint8 RGB (H, W, 3) of an image file's bytes; see `image_child.cropped`. ClipError if it cannot be read."""
        request = {"bytes": len(data), "short_side": short_side, "size": size, "at": at}
        process = self._living()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n" + data)
            process.stdin.flush()
            head = json.loads(process.stdout.readline() or b"null")
            pixels = process.stdout.read(head["bytes"]) if head and "bytes" in head else b""
        except OSError:
            head, pixels = None, b""
        if head is None:
            self.close()
            raise ClipError(RejectionClass.DECODER_CRASHED, "decode", "the image child died or took too long")
        if "error" in head:
            raise ClipError(RejectionClass.DECODE_FAILED, "decode", str(head["error"])[:300])
        return np.frombuffer(pixels, np.uint8).reshape(*size, 3)

    def _living(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            command = [sys.executable, "-P", "-m", "pipeline.training.image_child"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment()
            )
        return self._process

    def close(self) -> None:
        """End it; safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):  # what was never read by the dead child
                        pipe.close()


class ImageDecoder:
    """Children shared by several threads."""

    def __init__(self, num_children: int) -> None:
        self._children: queue.SimpleQueue[ImageChild] = queue.SimpleQueue()
        self._all = [ImageChild() for _ in range(num_children)]
        for child in self._all:
            self._children.put(child)

    def crop(self, data: bytes, *, short_side: int, size: tuple[int, int], at: tuple[float, float]) -> np.ndarray:
        """As `ImageChild.crop`; waits for a free child."""
        child = self._children.get()
        try:
            return child.crop(data, short_side=short_side, size=size, at=at)
        finally:
            self._children.put(child)

    def close(self) -> None:
        for child in self._all:
            child.close()
