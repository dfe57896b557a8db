"""The image child: `python -m pipeline.training.image_child`. Pictures of strangers are opened in here only.

A request is a JSON line and the file's bytes; the answer a JSON line and, if it went well, the crop's uint8 RGB
pixels. It ends with its parent, whose end closes its input, and kills itself over a picture that takes too long.
"""

from __future__ import annotations

import io
import json
import signal
import sys
from typing import Any, BinaryIO

from PIL import Image, ImageOps

MAX_SECONDS = 30
MAX_PIXELS = 128 << 20


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns there and refuses twice that
    serve(sys.stdin.buffer, sys.stdout.buffer)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the input ends."""
    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(request["bytes"])
        signal.alarm(MAX_SECONDS)  # its default action ends the process
        try:
            pixels = cropped(data, request)
        # The per-picture boundary: Pillow's plugins raise whatever their authors liked.
        except Exception as error:  # noqa: BLE001
            head, pixels = {"error": f"{type(error).__name__}: {error}"}, b""
        else:
            head = {"bytes": len(pixels)}
        signal.alarm(0)
        answers.write(json.dumps(head).encode() + b"\n" + pixels)
        answers.flush()


def cropped(data: bytes, request: dict[str, Any]) -> bytes:
    """The crop's pixels, row by row: short side resized to `short_side`, a crop of `size` taken at fractions `at` of
    the room there is. Pillow's errors, and ValueError for a picture with no pixels."""
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    width, height = image.size
    scale = request["short_side"] / min(width, height)
    target_height, target_width = request["size"]
    resized = (max(target_width, round(width * scale)), max(target_height, round(height * scale)))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    down, right = request["at"]
    top, left = round(down * (resized[1] - target_height)), round(right * (resized[0] - target_width))
    return image.crop((left, top, left + target_width, top + target_height)).tobytes()


if __name__ == "__main__":
    main()
