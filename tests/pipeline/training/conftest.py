"""Tars of real clips and pictures, and the settings of a run that takes seconds."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from webdataset.writer import TarWriter

from pipeline.training.settings import TrainSettings

TINY_WIDTHS = [32, 32, 32, 32]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny convolutions wait for a second thread longer than it saves where other tests run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def clip_tars(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of three good clips (five distinct), one that claims success and is half a file, one that never
    came."""
    folder = tmp_path_factory.mktemp("clips") / "tars"
    v2d_shards(folder, num_shards=3, good=3, failed=1, broken=1)
    return folder


@pytest.fixture(scope="session")
def held_out_tars(real_clips: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tar of a scene that is in no other."""
    folder = tmp_path_factory.mktemp("held-out")
    with TarWriter(str(folder / "00099.tar")) as tar:
        tar.write({"__key__": "carphone", "mp4": real_clips["carphone_pristine.mp4"].read_bytes(), "txt": "a man"})
    return folder


@pytest.fixture(scope="session")
def picture_tars(real_clips: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames of real clips as PNG and JPEG files of several sizes, and a file that is no picture."""
    from pipeline.decode.frames import open_frames

    folder = tmp_path_factory.mktemp("pictures")
    with TarWriter(str(folder / "00000.tar")) as tar:
        for name in ("bikes.mp4", "carphone_pristine.mp4", "single_face.mp4"):
            with open_frames(str(real_clips[name]), "pyav") as frames:
                for frame in frames:
                    if frame.number in (0, 9):
                        kind = "png" if frame.number else "jpg"
                        key = f"{Path(name).stem}_{frame.number}"
                        tar.write({"__key__": key, kind: _encoded(frame.rgb(), kind), "txt": name})
                    if frame.number > 9:
                        break
        tar.write({"__key__": "no_picture", "jpg": b"\xff\xd8 not a picture", "txt": ""})
    return folder


def _encoded(frame_HWC: Any, kind: str) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(frame_HWC).save(out, "jpeg" if kind == "jpg" else kind)
    return out.getvalue()


@pytest.fixture
def tiny_run(clip_tars: Path, held_out_tars: Path, tmp_path: Path) -> Callable[..., TrainSettings]:
    """make(output="run", **sections): a run of a CV-VAE of width 32 on clips of 5 x 16 x 16, L1 and KL only."""

    def make(output: str = "run", **sections: dict[str, Any]) -> TrainSettings:
        clips = {"name": "clips", "urls": str(clip_tars), "frames": 5, "size": [16, 16], "short_side": [20, 24]}
        clips |= {"frame_stride": [1, 3], "max_start": 12, "batch_size": 2}
        held_out = {**clips, "name": "held_out", "urls": str(held_out_tars)}
        plain: dict[str, Any] = {
            "model": {"spec": "cvvae-sd21-tiny", "widths": TINY_WIDTHS, "seed": 1},
            "data": {"sources": [clips], "held_out": held_out, "lanes": 2, "decode_children": 1},
            "loop": {"steps": 6, "seed": 3},
            "generator": {"lr": 2e-3, "eps": 1e-8, "warmup_steps": 2},
            "loss": {"perceptual": 0, "adversarial": 0, "kl": 1e-6},
            "keep": {"checkpoint_every": 2, "evaluate_every": 3, "log_every": 1},
            "output": {"url": str(tmp_path / output)},
        }
        for name, section in sections.items():
            plain[name] = {**plain.get(name, {}), **section}
        return TrainSettings.model_validate(plain)

    return make
