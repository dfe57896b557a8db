"""Batches of tiles: the numbers are those of the windows encoded alone, whatever stands beside them."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvvae import SPECS, DiagonalGaussian, VideoVAE, seeded_vae
from cvvae.od_vae import ODVAESpec
from pipeline.encoder import StageClock, TileEncoder
from pipeline.policies import EncodePolicy

CPU = torch.device("cpu")
TILE = 17 * 16 * 16


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return seeded_vae(SPECS["cvvae-sd21-tiny"], 5)


def frames(num_frames: int, height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def encode_all(encoder: TileEncoder, windows: list[np.ndarray]) -> dict[int, DiagonalGaussian]:
    batcher = encoder.batcher()
    done: list[tuple[int, DiagonalGaussian]] = []
    for number, window in enumerate(windows):
        done += batcher.add(window, number)
    done += batcher.flush()
    assert len(done) == len(windows), "every window comes out once"
    return dict(done)


def test_stacked_tiles_give_the_numbers_of_each_window_alone(vae: VideoVAE) -> None:
    """Windows of one, two and a short tile, two buckets, a batch that is never full at the end."""
    shapes = [(17, 16, 16), (33, 16, 16), (5, 16, 16), (17, 16, 24), (21, 16, 24), (17, 16, 16)]
    windows = [frames(*shape, seed=number) for number, shape in enumerate(shapes)]
    results = encode_all(TileEncoder(vae, EncodePolicy(batch_pixels=2 * TILE), CPU), windows)
    for number, window in enumerate(windows):
        video = torch.from_numpy(window).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            alone = vae.encode(video)
        torch.testing.assert_close(results[number].mean, alone.mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(results[number].logvar, alone.logvar, rtol=1e-4, atol=1e-4)


def test_tiles_of_windows_that_are_cut_in_space_stay_apart() -> None:
    """OD-VAE cuts in space what it cuts in time: the 9 frames of a short window are not those of a long one."""
    spec = SPECS["od-vae-tiny"]
    assert isinstance(spec, ODVAESpec)
    vae = seeded_vae(replace(spec, tile_size=64, tile_overlap=0.25, tile_frames=8, decode_tile_frames=2), 5)
    windows = [frames(length, 8, 64, seed=length) for length in (13, 9, 21, 9)]
    encoder = TileEncoder(vae, EncodePolicy(batch_pixels=2 * 9 * 8 * 64), CPU)
    results = encode_all(encoder, windows)
    for number, window in enumerate(windows):
        video = torch.from_numpy(window).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            alone = vae.encode(video)
        torch.testing.assert_close(results[number].mean, alone.mean, rtol=1e-4, atol=1e-4)
    assert encoder.clock.tiles == 2 + 1 + 3 + 1


@settings(max_examples=8, deadline=None)
@given(neighbours=st.lists(st.sampled_from([5, 17, 33]), max_size=3), seed=st.integers(0, 5))
def test_neighbours_do_not_change_a_bit(vae: VideoVAE, neighbours: list[int], seed: int) -> None:
    """Same batch shape, other content and another place in it: bitwise the same numbers."""
    encoder = TileEncoder(vae, EncodePolicy(batch_pixels=2 * TILE), CPU)
    window = frames(17, 16, 16, seed=99)
    alone = encode_all(encoder, [window])[0]
    others = [frames(length, 16, 16, seed=seed + n) for n, length in enumerate(neighbours)]
    together = encode_all(encoder, [*others, window])[len(others)]
    assert torch.equal(alone.mean, together.mean)
    assert torch.equal(alone.logvar, together.logvar)


def test_one_batch_shape_per_tile_shape(vae: VideoVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TileEncoder(vae, EncodePolicy(batch_pixels=3 * TILE), CPU)
    seen: list[tuple[int, ...]] = []
    original = encoder.encode

    def watched(batch: np.ndarray, clock: StageClock, **more: int) -> torch.Tensor:
        seen.append(batch.shape)
        return original(batch, clock, **more)

    monkeypatch.setattr(encoder, "encode", watched)
    encode_all(encoder, [frames(n, 16, 16, seed=n) for n in (33, 49, 17, 17, 21)])
    assert set(seen) == {(3, 17, 16, 16, 3), (2, 5, 16, 16, 3)}
    assert encoder.clock.tiles == 2 + 3 + 1 + 1 + 2
    assert encoder.clock.filler_tiles == sum(shape[0] for shape in seen) - encoder.clock.tiles


def test_batch_size_is_at_least_one(vae: VideoVAE) -> None:
    encoder = TileEncoder(vae, EncodePolicy(batch_pixels=1), CPU)
    assert encoder.batch_size((17, 256, 256)) == 1
    assert TileEncoder(vae, EncodePolicy(), CPU).batch_size((17, 128, 128)) == 4


def test_bfloat16_is_near_float32(vae: VideoVAE) -> None:
    windows = [frames(17, 16, 16, seed=1)]
    exact = encode_all(TileEncoder(vae, EncodePolicy(batch_pixels=TILE), CPU), windows)[0].mean
    half = encode_all(
        TileEncoder(seeded_vae(SPECS["cvvae-sd21-tiny"], 5), EncodePolicy(dtype="bfloat16", batch_pixels=TILE), CPU),
        windows,
    )[0].mean
    relative = float((exact - half).norm() / exact.norm())
    assert 0 < relative < 0.05


def test_numerics_name_what_decides_the_last_bits(vae: VideoVAE) -> None:
    numerics = TileEncoder(vae, EncodePolicy(), CPU).numerics()
    assert numerics["libraries"]["torch"] == torch.__version__
    assert numerics["tail_batch_share"] == 4
    assert numerics["memory_format"] == "channels_last_3d"


def test_waits_passes_items_through() -> None:
    clock = StageClock()
    assert list(clock.waits("wait", iter([1, 2, 3]))) == [1, 2, 3]
    assert clock.seconds["wait"] >= 0


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_hold_where_the_work_is_done(vae: VideoVAE, threads: int) -> None:
    """PyTorch counts threads per calling thread: a count set elsewhere is ignored, and the receipt would lie."""
    encoder = TileEncoder(vae, EncodePolicy(), CPU, threads=threads)
    assert encoder.numerics()["threads"] == threads
    batch = np.zeros((1, 17, 64, 64, 3), dtype=np.uint8)
    results: list[float] = []

    def work() -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(2):
            encoder.encode(batch, StageClock())
        results.append((time.process_time() - cpu) / (time.perf_counter() - wall))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if threads == 1:
        assert results[0] < 1.3, "cores in use"
