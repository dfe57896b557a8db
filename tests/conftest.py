"""What every test may ask for: real clips, small real shards, an ffmpeg, and one Ray for the whole run."""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from jobs.v2d_shards import DownloadedVideo
    from tests.s3_server import S3Server

PROJECT = Path(__file__).resolve().parents[1]


_TOKEN_FOLDER = tempfile.TemporaryDirectory(prefix="ray-token-")
_RAY_ENVIRONMENT = {
    # workers import the packages and the test modules from the project's folder, installed or not
    "PYTHONPATH": os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    # a token of its own keeps Ray from writing ~/.ray/auth_token
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": str(Path(_TOKEN_FOLDER.name) / "token"),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


def pytest_configure() -> None:
    """Before any test module is collected: Ray reads its authentication mode when it is imported."""
    token = Path(_RAY_ENVIRONMENT["RAY_AUTH_TOKEN_PATH"])
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ.update(_RAY_ENVIRONMENT)


def pytest_unconfigure() -> None:
    _TOKEN_FOLDER.cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, never passed, without a CUDA device."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session")
def real_clips() -> dict[str, Path]:
    """The real clips by file name ("bikes.mp4"); jobs/real_clips.py lists them with what is odd about each."""
    from jobs.real_clips import fetch_real_clips

    return fetch_real_clips()


@pytest.fixture(scope="session")
def good_videos(real_clips: dict[str, Path]) -> list[DownloadedVideo]:
    """Short real shots that decode well, as video2dataset rows: 30, 46, 50, 55 (640x272) and 72 frames (640x360)."""
    from jobs.make_demo_data import BIKES_SHOTS, MAN
    from jobs.remux import copy_span
    from jobs.v2d_shards import DownloadedVideo

    shots = [BIKES_SHOTS[number] for number in (0, 1, 3, 4)]
    videos = [(copy_span(real_clips["bikes.mp4"], start=start, stop=stop), text) for start, stop, text in shots]
    videos.append((real_clips["single_face.mp4"].read_bytes(), MAN))
    return [DownloadedVideo(video=video, caption=caption) for video, caption in videos]


@pytest.fixture(scope="session")
def v2d_shards(good_videos: list[DownloadedVideo]) -> Callable[..., list[Path]]:
    """make(folder, num_shards=2, good=2, failed=1, broken=1) writes shards into a new folder and returns their tars.

    Every shard: `good` samples (the good_videos in turn), then `failed` ones that video2dataset could not download
    (json and txt only), then `broken` ones that claim success and are half a file.
    """
    from jobs.v2d_shards import FAILED_TO_DOWNLOAD, DownloadedVideo, write_shard

    def make(folder: Path, *, num_shards: int = 2, good: int = 2, failed: int = 1, broken: int = 1) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        turns = itertools.cycle(good_videos)
        whole = good_videos[0].video
        assert whole is not None
        gone = DownloadedVideo(caption="gone", status=FAILED_TO_DOWNLOAD, error_message="HTTP Error 404: Not Found")
        half = DownloadedVideo(caption="half a file", video=whole[: len(whole) // 2])
        return [
            write_shard(folder, number, [*itertools.islice(turns, good), *[gone] * failed, *[half] * broken]).tar
            for number in range(num_shards)
        ]

    return make


@pytest.fixture(scope="session")
def ffmpeg() -> str:
    """Path of an ffmpeg with x264, x265, VP9 and SVT-AV1, for making awkward clips."""
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server with an empty bucket, on loopback, for the rest of the run; AWS_* are set for it."""
    from tests.s3_server import running_s3

    with running_s3() as server:
        yield server


@pytest.fixture(scope="session")
def ray_environment() -> dict[str, str]:
    """The environment of every Ray in the tests; it is in os.environ too, so that subprocesses have it."""
    return _RAY_ENVIRONMENT


@pytest.fixture(scope="session")
def ray_cluster(ray_environment: dict[str, str]) -> Iterator[str]:
    """The one Ray of the run: 4 logical CPUs, 2 of them lent to remote decoders, no dashboard, its processes talk
    over loopback. Yields its address.

    127.0.0.2, since Ray silently replaces 127.0.0.1 by the address of a network card; its servers bind all
    interfaces whatever the address, which is what the token is for.
    """
    import ray

    # Not under pytest's tmp_path: a Unix socket's path may have 107 bytes.
    folder = tempfile.mkdtemp(prefix="ray-")
    # The encoders' scratch space is of this run alone: a test takes folders in it away.
    patch = pytest.MonkeyPatch()
    patch.setenv("TMPDIR", folder)
    patch.setattr(tempfile, "tempdir", None)
    context = ray.init(
        num_cpus=4,
        num_gpus=0,
        resources={"decode": 2},
        object_store_memory=256 << 20,
        include_dashboard=False,
        logging_level="warning",
        log_to_driver=False,
        _node_ip_address="127.0.0.2",
        _temp_dir=folder,
    )
    yield context.address_info["address"]
    ray.shutdown()
    patch.undo()
    shutil.rmtree(folder, ignore_errors=True)
