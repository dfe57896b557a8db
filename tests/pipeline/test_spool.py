"""The spool: what was appended in any order comes back bit for bit in stored order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.records import Latent, LatentRow, SourceVideo
from pipeline.spool import LatentSpool

VIDEO = SourceVideo(
    width=64, height=64, sample_aspect_ratio=1.0, rotation=0, fps=25.0, duration=1.0, codec="h264", decoder="pyav-18"
)


def row(key: str, *, shape: tuple[int, int, int, int] = (4, 2, 3, 5), **changes: Any) -> LatentRow:
    fields: dict[str, Any] = {
        "key": key,
        "clip_key": key[:-6],
        "window_index": 0,
        "shard_id": "00000",
        "num_frames": 1 + (shape[1] - 1) * 4,
        "height": shape[2] * 8,
        "width": shape[3] * 8,
        "latent_shape": shape,
        "latent_dtype": "float16",
        "has_logvar": False,
        "caption": "",
        "file_name": "a.mp4",
        "fps": 25.0,
        "duration_sec": 1.0,
        "frame_indices": (0,),
        "frame_times": (0.0,),
        "padded_frames": 0,
        "trimmed_frames": 0,
        "crop": (0.0, 0.0, 64.0, 64.0),
        "source": VIDEO,
        "pair_sha256": "",
        "video_sha256": "",
    }
    return LatentRow(**fields | changes)


def latent(key: str, seed: int, shape: tuple[int, int, int, int], dtype: torch.dtype, logvar: bool) -> Latent:
    generator = torch.Generator().manual_seed(seed)
    mean, variance = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return Latent(row=row(key, shape=shape), mean_CTHW=mean, logvar_CTHW=variance if logvar else None)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs=st.lists(st.tuples(st.integers(0, 99), shapes, dtypes, st.booleans(), st.booleans()), max_size=12))
def test_round_trip_in_stored_order(tmp_path: Path, specs: list[tuple[int, Any, torch.dtype, bool, bool]]) -> None:
    appended = [
        latent(f"{key:03d}_{number:05d}", number, shape, dtype, logvar)
        for number, (key, shape, dtype, logvar, _) in enumerate(specs)
    ]
    kept = {one.row.key for one, spec in zip(appended, specs, strict=True) if spec[-1]}
    with LatentSpool(tmp_path / "spool") as spool:
        for one in appended:
            spool.append(one)
        for _ in range(2):
            found = list(spool.ordered(lambda row: row.key in kept))
            expected = sorted((one for one in appended if one.row.key in kept), key=lambda one: one.row.sort_key)
            assert [one.row for one in found] == [one.row for one in expected]
            for one, other in zip(found, expected, strict=True):
                assert_same(one.mean_CTHW, other.mean_CTHW)
                assert (one.logvar_CTHW is None) == (other.logvar_CTHW is None)
                if one.logvar_CTHW is not None and other.logvar_CTHW is not None:
                    assert_same(one.logvar_CTHW, other.logvar_CTHW)


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_rows_are_kept_by_identity_not_by_key(tmp_path: Path) -> None:
    """A retracted attempt leaves a row of the same key."""
    void, counts = (latent("k_00000", seed, (1, 1, 1, 1), torch.float32, False) for seed in (0, 1))
    with LatentSpool(tmp_path / "spool") as spool:
        spool.append(void)
        spool.append(counts)
        (found,) = spool.ordered(lambda row: row is counts.row)
        assert torch.equal(found.mean_CTHW, counts.mean_CTHW)


def test_tensors_need_not_be_contiguous(tmp_path: Path) -> None:
    mean = torch.arange(24.0).reshape(1, 2, 3, 4).transpose(1, 3)
    with LatentSpool(tmp_path / "spool") as spool:
        spool.append(Latent(row=row("k_00000", shape=(1, 4, 3, 2)), mean_CTHW=mean))
        (found,) = spool.ordered(lambda row: True)
    assert torch.equal(found.mean_CTHW, mean)


def test_latents_may_be_appended_while_others_are_read(tmp_path: Path) -> None:
    one, two, late = (latent(f"{n}_00000", n, (2, 1, 2, 2), torch.float16, True) for n in range(3))
    with LatentSpool(tmp_path / "spool") as spool:
        spool.append(one)
        spool.append(two)
        reader = spool.ordered(lambda row: True)
        assert torch.equal(next(reader).mean_CTHW, one.mean_CTHW)
        spool.append(late)
        assert torch.equal(next(reader).mean_CTHW, two.mean_CTHW)
        assert next(reader, None) is None
        assert len(list(spool.ordered(lambda row: True))) == 3


def test_the_file_is_closed(tmp_path: Path) -> None:
    with LatentSpool(tmp_path / "spool") as spool:
        pass
    with pytest.raises(ValueError, match="closed"):
        spool.append(latent("k_00000", 0, (1, 1, 1, 1), torch.float16, False))
