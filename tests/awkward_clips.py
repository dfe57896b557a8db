"""Video files whose every frame says its own number, and ways to make files awkward with a real ffmpeg.

A coded frame is 160x96: the lower half shows the number as eight black or white blocks (most significant first),
the upper half is a grey ramp whose left end is dark, so that a wrong turn or mirroring cannot read as a number.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.decode.blob import Blob
from pipeline.records import Clip

CODE_HEIGHT, CODE_WIDTH = 96, 160
LENGTHS = tuple(range(1, 500, 4))
"""Window lengths that a VAE of time stride 4 takes."""
_BITS = 8
_BLOCK = CODE_WIDTH // _BITS


def coded_frame(number: int) -> np.ndarray:
    """(96, 160, 3) uint8 RGB."""
    frame = np.empty((CODE_HEIGHT, CODE_WIDTH, 3), np.uint8)
    frame[: CODE_HEIGHT // 2] = np.linspace(40, 215, CODE_WIDTH).astype(np.uint8)[None, :, None]
    bits = [number >> (_BITS - 1 - bit) & 1 for bit in range(_BITS)]
    frame[CODE_HEIGHT // 2 :] = np.repeat(bits, _BLOCK)[None, :, None] * np.uint8(215) + np.uint8(20)
    return frame


def read_code(frame_HWC: np.ndarray) -> int:
    """The number a frame shows. AssertionError if the picture is turned, mirrored or not a coded frame."""
    assert frame_HWC.shape == (CODE_HEIGHT, CODE_WIDTH, 3), frame_HWC.shape
    ramp = frame_HWC[8:40].mean(axis=(0, 2))
    assert np.all(np.diff(ramp[10:-10].reshape(-1, 20).mean(axis=1)) > 10), "the ramp is not where it belongs"
    blocks = frame_HWC[CODE_HEIGHT // 2 + 12 : -12].mean(axis=(0, 2)).reshape(_BITS, _BLOCK)[:, 6:-6].mean(axis=1)
    assert np.all(np.abs(blocks - 127) > 60), f"blocks are neither black nor white: {blocks}"
    return int("".join("1" if block > 127 else "0" for block in blocks), 2)


def read_codes(frames_THWC: Iterable[np.ndarray]) -> list[int]:
    return [read_code(frame) for frame in frames_THWC]


@dataclass(frozen=True)
class ClipMaker:
    """Runs ffmpeg; files land in `folder`."""

    ffmpeg: str
    folder: Path

    def run(self, *arguments: str | Path, stdin: bytes = b"") -> None:
        command = [self.ffmpeg, "-v", "error", "-y", *map(str, arguments)]
        done = subprocess.run(command, input=stdin, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()

    def convert(self, source: Path, name: str, *options: str, before: Sequence[str] = ()) -> Path:
        """`source` with ffmpeg's output options (and input options `before`) as a new file."""
        self.run(*before, "-i", source, *options, self.folder / name)
        return self.folder / name

    def raw(self, frames: Sequence[np.ndarray], name: str, *options: str, rate: int = 25) -> Path:
        """RGB frames of one size as a video file."""
        height, width, _ = frames[0].shape
        self.run(
            *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(rate), "-i", "-"),
            *(*options, self.folder / name),
            stdin=b"".join(frame.tobytes() for frame in frames),
        )
        return self.folder / name

    def coded(self, count: int, name: str, *options: str, rate: int = 25, quarter_turns: int = 0) -> Path:
        """Frames 0..count-1, each stored turned counterclockwise by `quarter_turns`."""
        frames = [np.ascontiguousarray(np.rot90(coded_frame(number), quarter_turns)) for number in range(count)]
        sharp = ("-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p")
        return self.raw(frames, name, *(options or sharp), rate=rate)

    def damaged(self, source: Path, name: str, data: bytes) -> Path:
        """`data`, made from `source`'s, as a new file beside the others."""
        assert data != source.read_bytes(), "nothing was damaged"
        (self.folder / name).write_bytes(data)
        return self.folder / name


def clip(path: Path, key: str) -> Clip:
    return Clip(
        key=key,
        shard_id="00000",
        video=Blob.from_bytes(path.read_bytes()),
        video_sha256="",
        file_name=path.name,
        caption="",
        metadata={},
    )


def clips(paths: Iterable[Path]) -> Iterator[Clip]:
    """Keys sort in the files' order."""
    for number, path in enumerate(paths):
        yield clip(path, f"{number:03d}-{path.stem}")
