"""Windows encoded again by themselves and without tiles: what the receipt says, and what stops a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cvvae import SPECS, VideoVAE, seeded_vae
from jobs.dataset_report.facts import gather
from jobs.dataset_report.page import page_body
from jobs.show_status import as_record, status_table
from pipeline.checkpoints import VAESource, load_source
from pipeline.dataset import DatasetFolder
from pipeline.encoder import StageClock, TileEncoder
from pipeline.errors import ShardError
from pipeline.policies import EncodePolicy, WindowPolicy
from pipeline.records import LatentRow
from pipeline.run import EncodeSettings
from pipeline.status import StatusReader
from pipeline.storage import Store
from pipeline.tile_proof import Deviation, TileProver
from tests.whole_run import Run, dataset_bytes, one_encoder, settings_for


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with one_encoder(tmp_path_factory.mktemp("proof-scratch")) as encode:
        yield encode


@pytest.fixture(scope="module")
def source(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proof") / "source"
    v2d_shards(folder, num_shards=1, good=3, failed=0, broken=0)
    return folder


def settings(source: Path, output: Path, **encode: float) -> EncodeSettings:
    """Windows of two tiles."""
    made = settings_for(str(source), str(output))
    policy = made.encode.model_copy(update=encode)
    return made.model_copy(update={"windows": WindowPolicy(frames=33, max_windows=1), "encode": policy})


def test_the_receipt_says_how_far_apart_and_no_latent_changes(source: Path, tmp_path: Path, run: Run) -> None:
    run(settings(source, tmp_path / "plain"))
    run(settings(source, tmp_path / "proved", proof_share=1.0))
    plain, proved = (dataset_bytes(Store(str(tmp_path / name))) for name in ("plain", "proved"))
    assert {name for name in plain if plain[name] != proved[name]} == {"receipts/00000.json"}
    receipt = json.loads(proved["receipts/00000.json"])
    proof = receipt.pop("tile_proof")
    assert receipt == json.loads(plain["receipts/00000.json"])
    assert proof["windows"] == proof["windows_of_many_tiles"] == receipt["counts"]["windows_stored"] == 2
    assert proof["alone_relative_rms"] < 1e-5, "batches, filler and joining change nothing but rounding"
    assert 1e-4 < proof["untiled_relative_rms"] < 2, "tiles do change what frames see of each other"
    assert DatasetFolder(Store(str(tmp_path / "proved"))).receipt("00000").tile_proof is not None


def test_a_limit_stops_the_run_and_nothing_of_the_shard_is_stored(source: Path, tmp_path: Path, run: Run) -> None:
    with pytest.raises(ShardError, match=r"encode.proof_untiled_limit is 1e-09"):
        run(settings(source, tmp_path / "out", proof_share=1.0, proof_untiled_limit=1e-9))
    assert not (tmp_path / "out" / "shards").exists()


def small_device(pixels: int) -> VideoVAE:
    """A VAE whose device holds so many pixels at once."""
    vae = load_source(VAESource.model_validate({"spec": "cvvae-sd21-tiny"}))

    def limited(encode: Callable[..., Any]) -> Callable[..., Any]:
        def within(video_BCTHW: torch.Tensor, **options: Any) -> Any:
            if video_BCTHW[:, 0].numel() > pixels:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"
                )
            return encode(video_BCTHW, **options)

        return within

    for name in ("encode", "encode_untiled", "encode_tile"):
        setattr(vae, name, limited(getattr(vae, name)))
    return vae


@pytest.mark.parametrize("fits", ["no pass without tiles", "nothing but a tile"])
def test_a_reference_that_does_not_fit_is_counted_and_ends_nothing(
    fits: str, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tile = 17 * 32 * 32
    wanted = settings(source, tmp_path / "out", proof_share=1.0, batch_pixels=tile)
    vae = small_device(tile)
    if fits == "no pass without tiles":
        vae.encode = load_source(wanted.vae).encode  # type: ignore[method-assign]
    with one_encoder(tmp_path / "scratch", vae=vae) as run:
        manifest = run(wanted)
    dataset = DatasetFolder(Store(str(tmp_path / "out")))
    proof, stored = dataset.receipt("00000").tile_proof, manifest.counts.windows_stored
    assert proof is not None
    assert (proof.windows_out_of_memory, proof.windows_of_many_tiles, stored) == (2, 0, 2)
    assert (proof.windows, proof.alone_largest is None) == (
        (2, False) if fits == "no pass without tiles" else (0, True)
    )
    assert caplog.text.count("tile proof: not proven: out of memory: shard=00000 key=") == 2
    assert manifest.windows_not_proven == dataset.manifest().windows_not_proven == 2
    for _ in ("by the manifest", "by the receipts"):
        look = StatusReader(dataset.store).read()
        assert look.windows_not_proven == as_record(look)["windows_not_proven"] == 2
        assert any("out of memory: 2 windows" in cell for cell in status_table(look).columns[1].cells)
        (tmp_path / "out" / "manifest.json").unlink(missing_ok=True)
    assert "Not proven, out of memory: 2 windows" in "".join(page_body(gather(dataset), []))


@pytest.fixture(scope="module")
def encoder() -> TileEncoder:
    vae = seeded_vae(SPECS["cvvae-sd21-tiny"], 0)
    return TileEncoder(vae, EncodePolicy(proof_share=0.25), torch.device("cpu"), threads=1)


def test_wrong_numbers_are_found(encoder: TileEncoder) -> None:
    row = object.__new__(LatentRow)
    object.__setattr__(row, "key", "clip_00000")
    frames_THWC = np.random.default_rng(0).integers(0, 256, (17, 32, 32, 3), np.uint8)
    right = encoder.encode_alone(frames_THWC)
    assert right is not None
    prover = TileProver("00000", encoder, StageClock())
    prover.check(row, frames_THWC, right)
    summary = prover.summary([row])
    assert summary is not None
    assert (summary.windows, summary.alone_largest, summary.untiled_largest) == (1, 0.0, None)
    for wrong in (right * 1.1, right.roll(1, dims=-1), torch.full_like(right, torch.nan)):
        with pytest.raises(ShardError, match=r"encode.proof_limit is 0\.05"):
            prover.check(row, frames_THWC, wrong)


def test_the_share_is_chosen_by_key_alone(encoder: TileEncoder) -> None:
    keys = [f"{number:09d}_00000" for number in range(2000)]
    chosen = [key for key in keys if TileProver("a", encoder, StageClock()).chooses(key)]
    assert 400 < len(chosen) < 600
    again = TileProver("b", encoder, StageClock())
    assert [key for key in keys if again.chooses(key)] == chosen
    assert not TileProver("a", encoder, StageClock()).summary([])


def test_deviation_is_relative_to_the_reference() -> None:
    reference = torch.tensor([3.0, -4.0])
    found = Deviation.between(reference * 1.5, reference)
    assert found.relative_rms == pytest.approx(0.5)
    assert found.largest == pytest.approx(2.0)


@pytest.mark.parametrize("spec", ["ivvae-z4-tiny", "open-sora-1.2-tiny"])
def test_one_pass_is_only_asked_of_tiles_that_share_frames(spec: str) -> None:
    """A stream has no tiles; Open-Sora's clips of 17 share nothing, and one pass over two would be another model."""
    encoder = TileEncoder(seeded_vae(SPECS[spec], 0), EncodePolicy(), torch.device("cpu"), threads=1)
    num_frames = 34 if "open-sora" in spec else 33
    assert not encoder.can_be_untiled(num_frames)
    with pytest.raises(ValueError, match="tiles that share frames"):
        encoder.encode_untiled(np.zeros((num_frames, 32, 32, 3), np.uint8))
