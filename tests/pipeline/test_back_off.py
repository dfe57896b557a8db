"""A device that runs out of memory: smaller batches, the same as if the config had asked for them, and said so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cvvae import VideoVAE
from pipeline.checkpoints import VAESource, load_source
from pipeline.decode.pool import DecodePool
from pipeline.encoder import BatchTooLarge, TileEncoder
from pipeline.errors import ShardError
from pipeline.policies import DecodePolicy, EncodePolicy
from pipeline.run import plan_run
from pipeline.scratch import Scratch
from pipeline.shard import ShardEncoder, ShardStored
from tests.whole_run import settings_for

TILE = 17 * 32 * 32


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with DecodePool(DecodePolicy(), 1) as pool:
        yield pool


@pytest.fixture(scope="module")
def source(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("back_off") / "source"
    v2d_shards(folder, num_shards=1, good=5, failed=0, broken=0)
    return folder


def small_device(tiles: int) -> VideoVAE:
    """A VAE whose device holds batches of so many tiles."""
    vae = load_source(VAESource.model_validate({"spec": "cvvae-sd21-tiny"}))
    encode_tile = vae.encode_tile

    def limited(video_BCTHW: torch.Tensor, **options: Any) -> torch.Tensor:
        if len(video_BCTHW) > tiles:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")
        return encode_tile(video_BCTHW, **options)

    vae.encode_tile = limited  # type: ignore[method-assign]
    return vae


def encoded(source: Path, out: Path, pool: DecodePool, vae: VideoVAE, batch_tiles: int) -> tuple[Path, ShardStored]:
    settings = settings_for(str(source), str(out))
    plan = plan_run(settings, {})
    tiles = TileEncoder(vae, EncodePolicy(batch_pixels=batch_tiles * TILE), torch.device("cpu"), threads=1)
    (shard,) = plan.todo
    return out, ShardEncoder(plan.job(), tiles, pool, Scratch(out.parent / "scratch")).run(shard)


def test_bytes_are_those_of_the_smaller_batches(
    source: Path, tmp_path: Path, pool: DecodePool, caplog: pytest.LogCaptureFixture
) -> None:
    backed_off, shrunk = encoded(source, tmp_path / "a", pool, small_device(2), batch_tiles=4)
    assert shrunk.receipt.numerics["batch_pixels"] == 2 * TILE, "the receipt says what was done"
    assert "batch_pixels=34816 before=69632" in caplog.text
    asked_for, small = encoded(source, tmp_path / "b", pool, small_device(2), batch_tiles=2)
    assert shrunk.receipt == small.receipt
    for stored in (small.receipt.payload, small.receipt.index):
        assert (backed_off / stored.path).read_bytes() == (asked_for / stored.path).read_bytes()
    assert shrunk.receipt.counts.windows_stored == 5


def test_a_tile_that_does_not_fit_alone_stops_its_shard(source: Path, tmp_path: Path, pool: DecodePool) -> None:
    with pytest.raises(ShardError, match="one tile of 17 x 32 x 32 does not fit in the memory of cpu"):
        encoded(source, tmp_path / "c", pool, small_device(0), batch_tiles=4)


def test_batches_of_a_shard_under_way_do_not_change() -> None:
    """Two shards are in work; the one that ran out of memory is not the one that decides for the other."""
    encoder = TileEncoder(small_device(99), EncodePolicy(batch_pixels=8 * TILE), torch.device("cpu"), threads=1)
    before = encoder.batcher()
    assert encoder.shrink(BatchTooLarge((17, 32, 32), before.batch_pixels))
    assert encoder.batcher().batch_pixels == 4 * TILE
    assert before.batch_pixels == 8 * TILE
    assert encoder.shrink(BatchTooLarge((17, 32, 32), before.batch_pixels)), "halved since: not once more"
    assert encoder.batch_pixels == 4 * TILE
    assert not encoder.shrink(BatchTooLarge((17, 32, 32), TILE))
