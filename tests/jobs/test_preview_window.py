"""A window of a real dataset to look at: the file opens and shows source and decoded frames; what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from cvvae import save_vae, seeded_vae
from cvvae.families import SPECS
from jobs.preview_window import preview, read_window
from jobs.side_by_side import GAP, LABEL_HEIGHT, write_picture, write_video
from pipeline.checkpoints import VAESource
from tests.whole_run import one_encoder, settings_for

app = typer.Typer()
app.command()(preview)


@pytest.fixture(scope="module")
def dataset(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview")
    v2d_shards(folder / "source", num_shards=2, good=2, failed=1, broken=0)
    settings = settings_for(
        str(folder / "source"), str(folder / "out"), vae=VAESource(spec="cvvae-sd21-tiny", options={})
    )
    with one_encoder(folder / "scratch") as run:
        run(settings)
    return folder / "out"


def look(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, " ".join(f"{done.output} {done.stderr} {done.exception!r}".split())


def test_a_video_has_the_source_on_its_left(dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "look.mp4"
    code, said = look(dataset, "000010001_00000", "--vae", "cvvae-sd21-tiny", "--output", path)
    assert code == 0, said
    figure = re.search(r"PSNR (\d+\.\d+) dB", said)
    assert figure is not None
    assert 3 < float(figure[1]) < 60
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 17
    side = 256
    assert frames[0].shape == (side + LABEL_HEIGHT, 2 * side + GAP, 3)
    left = np.stack(frames)[:, LABEL_HEIGHT:, :side].astype(float)
    right = np.stack(frames)[:, LABEL_HEIGHT:, -side:].astype(float)
    assert left.std() > 15, "a real picture"
    assert np.abs(left - right).mean() > 5, "random weights do not give the source back"


def test_other_files_and_other_weights(dataset: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "vae"
    save_vae(seeded_vae(SPECS["cvvae-sd21-tiny"], 5), checkpoint)
    pair = read_window(str(dataset), "000000000_00000", vae=str(checkpoint))
    files = [write_video(tmp_path / f"look.{suffix}", pair) for suffix in ("gif", "webp")]
    for path, frames in zip([*files, write_picture(tmp_path / "look.png", [pair, pair])], (17, 17, 1), strict=True):
        with Image.open(path) as image:
            assert getattr(image, "n_frames", 1) in range(frames - 3, frames + 1)  # equal frames are merged
            assert np.asarray(image.convert("RGB")).std() > 15
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_without_a_key_the_first_clips_are_shown(dataset: Path, tmp_path: Path) -> None:
    code, said = look(dataset, "--output", tmp_path / "look.png")
    assert code == 0, said
    assert said.count("PSNR") == 2
    with Image.open(tmp_path / "look.png") as image:
        assert image.height == 2 * (2 * 256 + LABEL_HEIGHT) + GAP


def test_the_source_may_have_moved(dataset: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(dataset.parent / "source", moved)
    code, said = look(
        *(dataset, "000000000_00000", "--vae", "cvvae-sd21-tiny", "--source", moved, "--output", tmp_path / "a.png")
    )
    assert code == 0, said


def test_what_is_refused_says_why(dataset: Path, tmp_path: Path) -> None:
    png = tmp_path / "look.png"
    code, said = look(dataset, "000000000", "--vae", "cvvae-sd21-tiny", "--output", png)
    assert (code, "there are 000000000_00000" in said) == (1, True), said
    run = json.loads((dataset / "run.json").read_bytes())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps({**run, "config": {}}))
    for name in ("receipts", "index", "shards"):
        shutil.copytree(dataset / name, tmp_path / "out" / name)
    code, said = look(tmp_path / "out", "000000000_00000", "--output", png)
    assert (code, "name it with --vae" in said) == (1, True), said
    code, said = look(dataset, "000000000_00000", "--vae", "cvvae-sd3-tiny", "--output", png)
    assert (code, "latent_channels" in said) == (1, True), said
    code, said = look(dataset, "000000000_00000", "--output", tmp_path / "look.avi")
    assert (code, ".webp" in said) == (1, True), said
    assert not png.exists()


def test_another_video_in_the_source_is_refused(dataset: Path, tmp_path: Path, v2d_shards, good_videos) -> None:
    v2d_shards(tmp_path / "source", num_shards=2, good=3, failed=0, broken=0)  # other clips under some keys
    code, said = look(
        *(dataset, "000010000_00000", "--vae", "cvvae-sd21-tiny", "--source", tmp_path / "source"),
        *("--output", tmp_path / "a.png"),
    )
    assert (code, "another video or caption" in said) == (1, True), said
