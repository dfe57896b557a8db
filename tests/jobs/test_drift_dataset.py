"""`latents drift` on a small dataset of real clips: the same VAE, touched ones, a source that is gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import typer

from cvvae import SPECS, VideoVAE, save_vae, seeded_vae
from jobs.drift_dataset import DriftLimits, describe, drift
from pipeline.dataset import DatasetFolder
from pipeline.drift import DriftReport, DriftSample, choose_windows, measure_drift
from pipeline.errors import ConfigError, DatasetError, SourceError
from pipeline.policies import EncodePolicy, WindowPolicy
from pipeline.storage import Store
from tests.whole_run import one_encoder, settings_for

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of two windows of 5 x 32 x 32, in float16."""
    folder = tmp_path_factory.mktemp("drift")
    v2d_shards(folder / "source", num_shards=2, good=2, failed=0, broken=0)
    policy = EncodePolicy(batch_pixels=2 * 5 * 32 * 32)  # without it most of each batch would be filler
    settings = settings_for(str(folder / "source"), str(folder / "out"), format_name="parquet")
    short = settings.model_copy(update={"windows": WindowPolicy(frames=5, max_windows=1)})
    with one_encoder(folder / "scratch", policy) as run:
        run(short)
    return folder


def dataset(folder: Path) -> DatasetFolder:
    return DatasetFolder(Store(str(folder / "out")))


def recorded() -> VideoVAE:
    return seeded_vae(SPECS["cvvae-sd21-tiny"], 0)


def touched(part: str, factor: float) -> VideoVAE:
    """The recorded VAE with a last convolution scaled."""
    vae = recorded()
    with torch.no_grad():
        kernel = getattr(vae, part).conv_out.weight
        kernel *= factor
    return vae


def measured(folder: Path, new: VideoVAE, windows: int = 1) -> DriftReport:
    return measure_drift(dataset(folder), recorded(), new, DriftSample(windows=windows), device=CPU)


def test_a_scaled_encoder_has_drifted_by_that_much(finished: Path) -> None:
    """Twice the last kernel: twice the latents, but for the bias."""
    report = measured(finished, touched("encoder", 2.0))
    assert report.drift.relative_rms == pytest.approx(1.0, rel=0.2)
    assert report.drift.channel_shift.std.tolist() == pytest.approx([2.0] * 4, rel=0.01)
    document = describe(report, DriftLimits())
    assert document["keep"] is False
    assert document["reasons"][0].startswith(f"relative RMS {report.drift.relative_rms:.4f} is above 0.05")
    assert describe(report, DriftLimits(max_rms=2.0, max_loss=100.0))["keep"] is True


def test_another_decoder_alone_keeps_the_dataset(finished: Path) -> None:
    report = measured(finished, touched("decoder", 0.5), windows=2)
    assert report.problems == []
    assert len(set(report.keys)) == 2
    assert 0 < report.control.relative_rms < 1e-3  # float16's rounding
    assert report.drift.relative_rms == report.control.relative_rms
    assert report.psnr["old_on_old"] == pytest.approx(report.psnr["old_on_new"], abs=0.01)
    assert report.psnr["new_on_old"] != report.psnr["old_on_old"]
    assert report.decoder_loss == pytest.approx(0, abs=0.01)
    assert describe(report, DriftLimits())["keep"] is True


def test_the_sample_is_the_seeds(finished: Path) -> None:
    folder = dataset(finished)

    def keys(**sample: int) -> list[str]:
        return [row.row.key for _, rows in choose_windows(folder, DriftSample(**sample)) for row in rows]

    assert keys(windows=3, seed=1) == keys(windows=3, seed=1)
    assert len({tuple(sorted(keys(windows=1, seed=seed))) for seed in range(8)}) > 1
    assert len(keys(windows=99)) == 4
    assert len({receipt.shard_id for receipt, _ in choose_windows(folder, DriftSample(shards=1))}) == 1


def test_the_verb_says_what_to_do_and_exits_with_it(finished: Path, tmp_path: Path, capsys) -> None:
    """A dataset whose run.json does not say where its VAE lies; it is given."""
    save_vae(recorded(), tmp_path / "own")
    own = tmp_path / "own" / "diffusion_pytorch_model.safetensors"
    arguments = {"windows": 1, "shards": 1, "seed": 0, "max_rms": 0.05, "max_loss": 0.5, "device": "cpu"}
    out = str(shutil.copytree(finished / "out", tmp_path / "out"))
    run_file = tmp_path / "out" / "run.json"
    run_file.write_text(json.dumps({**json.loads(run_file.read_text()), "config": {}}))
    with pytest.raises(SystemExit):
        drift(out, vae="cvvae-sd21-tiny", recorded=None, report=None, **arguments)
    assert "name it with --recorded" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        drift(out, vae="cvvae-sd21-tiny", recorded=str(own.parent), report=None, **arguments)
    assert "expected weights of sha256" in " ".join(capsys.readouterr().err.split())
    save_vae(touched("encoder", 2.0), tmp_path / "new")
    with pytest.raises(typer.Exit) as stop:
        drift(
            out,
            vae=str(tmp_path / "new"),
            recorded="cvvae-sd21-tiny",
            report=tmp_path / "drift" / "drift.json",
            **arguments,
        )
    assert stop.value.exit_code == 1
    assert "encode again: relative RMS" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "drift" / "drift.json").read_text())["keep"] is False


# --- what cannot be compared ----------------------------------------------------------------------------------------


def test_a_source_that_is_gone_is_named(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished / "out", tmp_path / "out"))
    moved = finished / "elsewhere"
    (finished / "source").rename(moved)
    try:
        with pytest.raises(SourceError, match=r"none of the sampled .* source of shard 0000\d cannot be read"):
            measured(copy.parent, recorded())
    finally:
        moved.rename(finished / "source")


def test_what_is_missing_in_part_is_named_and_not_counted(finished: Path, tmp_path: Path) -> None:
    """One of two tars is gone."""
    copy = Path(shutil.copytree(finished / "out", tmp_path / "out"))
    tar = finished / "source" / "00001.tar"
    tar.rename(tmp_path / "00001.tar")
    try:
        report = measured(copy.parent, recorded(), windows=4)
    finally:
        (tmp_path / "00001.tar").rename(tar)
    assert len(report.keys) == 2
    assert len(report.problems) == 2
    assert all("source of shard 00001 cannot be read" in problem for problem in report.problems)


def test_vaes_that_do_not_belong_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"latent_channels: expected 4, got 16.*encode another dataset"):
        measured(finished, seeded_vae(SPECS["cvvae-sd3-tiny"], 0))
    with pytest.raises(ConfigError, match="the recorded VAE: expected weights of sha256"):
        measure_drift(
            dataset(finished), seeded_vae(SPECS["cvvae-sd21-tiny"], 1), recorded(), DriftSample(), device=CPU
        )
    with pytest.raises(DatasetError):
        choose_windows(DatasetFolder(Store(str(tmp_path / "nothing"))), DriftSample())
