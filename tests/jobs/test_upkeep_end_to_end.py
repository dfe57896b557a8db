"""What a person types when a dataset is not whole: verify, repair, retry, diff, gc, on real clips with real Ray."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from jobs.cli import VERBS
from jobs.v2d_shards import DownloadedVideo, write_shard
from pipeline.storage import Store
from tests.whole_run import dataset_bytes

pytestmark = pytest.mark.usefixtures("ray_cluster")

Typed = Callable[..., str]
SHARDS = 4
SLOW = "noface_face.mov"
"""Its first window takes longer than the fifth of a second after which a decode child is looked at."""


@pytest.fixture(scope="module")
def latents() -> Typed:
    """latents(verb, *words, codes=(0,)): the verb as the command line has it; what it prints, on one line."""
    app = typer.Typer()
    for verb in ("encode", "verify", "repair", "retry", "diff", "gc", "status"):
        app.command(verb)(getattr(importlib.import_module(VERBS[verb][0]), verb))

    def typed(*words: str | Path, codes: tuple[int, ...] = (0,)) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code in codes, (done.output, done.exception)
        return " ".join(done.output.split())

    return typed


@pytest.fixture(scope="module")
def hasty(
    good_videos: list[DownloadedVideo],
    real_clips: dict[str, Path],
    latents: Typed,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A dataset whose run had no time for a slow clip, nor, on a busy machine, for some of the others."""
    folder = tmp_path_factory.mktemp("upkeep")
    (folder / "source").mkdir()
    slow = DownloadedVideo(video=real_clips[SLOW].read_bytes(), caption="slow")
    for number in range(SHARDS):
        write_shard(folder / "source", number, [good_videos[number], *([slow] if number == 1 else [])])
    config = {
        "source": {"kind": "webdataset", "urls": str(folder / "source")},
        "output": {"url": str(folder / "out")},
        "vae": {"spec": "cvvae-sd21-tiny"},
        "windows": {"frames": 17, "fps": 5, "max_windows": 1, "tail": "trim", "min_tail_frames": 5},
        "resize": {"buckets": [[32, 32]]},
        "encode": {"batch_pixels": 2 * 17 * 32 * 32, "threads": 1},
        "decode": {"cpu_seconds": 0.05},
        "cluster": {"decode_children": 1, "num_actors": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    latents("encode", folder / "config.yaml", codes=(0, 1))  # 1: a very busy machine, and no clip came through
    return folder / "out"


@pytest.fixture(scope="module")
def retried(hasty: Path, latents: Typed) -> tuple[Path, str]:
    """The same after a retry with the time that it needs, and what that said."""
    out = Path(shutil.copytree(hasty, hasty.parent / "retried"))
    return out, latents("retry", out, "--class", "timeout", "--set", "decode.cpu_seconds=60")


def everything(folder: Path) -> dict[str, bytes]:
    return dataset_bytes(Store(str(folder)))


def test_retry_gives_the_clips_that_had_too_little_time(
    hasty: Path, retried: tuple[Path, str], latents: Typed
) -> None:
    timeouts = json.loads((hasty / "manifest.json").read_bytes())["rejections"]["timeout"]
    out, said = retried
    assert f"tried again: {timeouts} in" in said
    assert f"encoded now: {timeouts}" in said
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert manifest["rejections"] == {}
    assert manifest["counts"]["windows_stored"] == SHARDS + 1
    assert "verified" in latents("verify", out, "--source")
    assert f"{SHARDS} of {SHARDS} done, 0 left" in latents("status", out)
    compared = latents("diff", hasty, out, codes=(1,))
    assert f"windows only in B: {timeouts}" in compared
    assert f"rejections only in A: {timeouts}" in compared
    assert "nothing to try again" in latents("retry", out, "--class", "timeout")


def test_repair_makes_what_was_deleted_changed_and_cut(retried: tuple[Path, str], latents: Typed) -> None:
    whole = retried[0]
    out = Path(shutil.copytree(whole, whole.parent / "damaged"))
    deleted, flipped, cut = (out / "shards" / f"0000{number}.tar" for number in range(3))
    deleted.unlink()
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:5000])
    found = latents("verify", out, codes=(1,))
    assert all(f"0000{number}" in found for number in range(3))
    assert "00003" not in found
    assert f"latents repair {out}" in found
    assert "encoded again: 00000, 00001, 00002" in latents("repair", out)
    assert everything(out) == everything(whole), "the slow clip has the time that the retry gave it"
    assert "nothing to repair" in latents("repair", out)
    assert "the same data" in latents("diff", whole, out)


def test_gc_takes_what_a_killed_attempt_left(retried: tuple[Path, str], latents: Typed) -> None:
    out = retried[0]
    before = everything(out)
    (out / "shards" / "00009.tar").write_bytes(b"of an attempt")
    assert "shards/00009.tar" in latents("verify", out, codes=(1,))
    assert "shards/00009.tar 13 bytes" in latents("gc", out)
    assert "removed 1 objects, 13 bytes" in latents("gc", out, "--delete")
    assert everything(out) == before
    latents("verify", out)
