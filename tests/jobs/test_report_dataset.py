"""The page about a real dataset: what is on it, that it stands alone, in a real browser; seams and components."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cvvae import SPECS
from jobs.dataset_report.latents import Components, histograms
from jobs.dataset_report.seams import LATENT_BORDER, SEAM, SeamMeter, space_overlap, time_borders
from jobs.evaluation.charts import bar_chart
from jobs.report_dataset import run_report
from pipeline.decode_back import WindowPair
from pipeline.planning.estimate import EncodePlan, Estimate
from pipeline.policies import WindowPolicy
from pipeline.records import LatentRow
from tests.browser import seen_in_browser
from tests.whole_run import one_encoder, settings_for


def plan_of(fingerprint: str) -> EncodePlan:
    """A plan that expects one to three of everything."""
    few = Estimate(low=1.0, value=2.0, high=3.0)
    names = ("clips", "windows", "frames", "frames decoded", "payload bytes")
    return EncodePlan(
        fingerprint=fingerprint,
        device="cpu",
        sampled_groups=1,
        sampled_samples=2,
        sample_seconds=1.0,
        shards=1,
        samples=few,
        totals=dict.fromkeys(names, few),
        buckets={},
        rejections={},
        unseen_class_share=0.5,
        storage_bytes={},
        encode_seconds=few,
        decode_core_seconds=few,
        encoder_frames_per_second=few,
        decode_frames_per_second=few,
        decode_cores_per_encoder=few,
        decode_children=1,
        work_seconds=few,
        walls=(),
        longest_shard_seconds=1.0,
        slow_shards=(),
        num_slow_shards=0,
    )


@pytest.fixture(scope="module")
def dataset(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of two tiles, and rejections; a plan, a run's report, and a document that is none."""
    folder = tmp_path_factory.mktemp("report")
    v2d_shards(folder / "source", num_shards=1, good=3, failed=1, broken=1)
    settings = settings_for(str(folder / "source"), str(folder / "out"))
    windows = WindowPolicy(frames=33, max_windows=1, tail="trim")
    encode = settings.encode.model_copy(update={"proof_share": 1.0})
    with one_encoder(folder / "scratch") as run:
        manifest = run(settings.model_copy(update={"windows": windows, "encode": encode}))
    (folder / "out" / "plan.json").write_bytes(plan_of(manifest.fingerprint).to_bytes())
    report = {
        "run_id": "<b>run",
        "outcome": "finished",
        "started_unix": 1.0,
        "wall_seconds": 20.0,
        "shard_seconds": {"00000": {"encode": 3.0}},
        "committed_after_seconds": {"00000": 10.0},
    }
    (folder / "out" / "runs").mkdir()
    (folder / "out" / "runs" / "a.json").write_text(json.dumps(report))
    (folder / "out" / "runs" / "b.json").write_text("{}")
    (folder / "out" / "runs" / "c.json").write_text(json.dumps({"run_id": "c", "outcome": "running"}))
    return folder / "out"


@pytest.fixture(scope="module")
def page(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_report(str(dataset), tmp_path_factory.mktemp("page") / "report.html", windows=2)


def test_the_page_says_all_of_it_and_stands_alone(page: Path, dataset: Path) -> None:
    text = page.read_text()
    manifest = json.loads((dataset / "manifest.json").read_bytes())
    assert manifest["fingerprint"] in text
    for bucket in manifest["buckets"]:
        assert f"<h2>{bucket}" in text
    for name in manifest["rejections"]:
        assert f"<h3>{name}</h3>" in text
    assert "Plan against actual" in text
    assert "outside" in text, "five samples were planned as one to three"
    assert "tile borders" in text
    assert "from one pass without tiles" in text
    assert "runs/b.json is not a run" in text
    assert "runs/c.json: a run that goes on" in text
    assert "<b>run" not in text
    assert "&lt;b&gt;run" in text
    references = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(references) > 9
    assert all(reference.startswith("data:") for reference in references)
    assert "<script" not in text


def test_a_source_that_is_gone_is_a_note_and_not_the_end(dataset: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(dataset, tmp_path / "out"))
    run = json.loads((out / "receipts" / "00000.json").read_bytes())
    run["source"]["url"] = str(tmp_path / "gone.tar")
    (out / "receipts" / "00000.json").write_text(json.dumps(run))
    (out / "manifest.json").unlink()
    text = run_report(str(out), tmp_path / "report.html", windows=2).read_text()
    assert "gone.tar does not exist" in text
    assert "Unfinished" in text
    assert "No window of it was decoded" in text


def test_the_page_in_a_real_browser(page: Path, tmp_path: Path) -> None:
    """Needs a Chromium. Every image is decoded, every chart has a size, the console stays empty."""
    seen = seen_in_browser(page, tmp_path)
    assert len(seen["images"]) >= 6
    assert all(seen["images"])
    assert len(seen["charts"]) >= 4
    assert all(width > 200 for width in seen["charts"])
    assert seen["wide"] <= 0


# --- seams and components alone ----------------------------------------------------------------------------------


def pair_with_error(error_T: np.ndarray) -> WindowPair:
    """A window whose decoded frame t is brighter than its source by error_T[t]."""
    source = np.full((len(error_T), 16, 16, 3), 100, np.uint8)
    decoded = source + error_T.astype(np.uint8)[:, None, None, None]
    row = object.__new__(LatentRow)
    return WindowPair(
        row=row,
        source_THWC=source,
        decoded_THWC=decoded,
        latent_CTHW=torch.zeros(4, 9, 2, 2),
        psnr_T=(1.0,),
        ssim_T=(),
    )


def test_a_step_at_a_tile_border_is_a_seam_and_elsewhere_is_none() -> None:
    spec = SPECS["cvvae-sd21-tiny"]
    seams, borders = time_borders(spec, 33)
    assert seams == {17}
    assert borders == set(range(1, 33, 4))
    meter = SeamMeter(spec)
    meter.add(pair_with_error(np.where(np.arange(33) < 17, 0, 51)))
    assert meter.means()[SEAM] == pytest.approx(0.2)
    assert meter.means()[LATENT_BORDER] == 0
    other = SeamMeter(spec)
    other.add(pair_with_error(np.where(np.arange(33) < 5, 0, 51)))
    assert other.means()[SEAM] == 0
    assert other.ratio() == 0
    single = SeamMeter(spec)
    single.add(pair_with_error(np.zeros(17)))
    assert SEAM not in single.means()
    assert single.ratio() is None


def test_overlaps_in_space_are_where_the_tiling_says() -> None:
    spec = SPECS["cvvae-sd21"]
    tiling = spec.encode_tiling_of(17, 1024, 1024)
    assert tiling is not None
    overlap_HW = space_overlap(spec, 17, 1024, 1024)
    assert overlap_HW is not None
    second = tiling.starts(1024)[1]
    assert overlap_HW[0, second]
    assert overlap_HW[0, second + tiling.tile - tiling.stride - 1]
    assert not overlap_HW[0, 0]
    assert space_overlap(spec, 17, 64, 64) is None


def test_components_find_the_direction_that_varies() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 5, 8, 8, generator=generator)
    noise = torch.randn(4, 5, 8, 8, generator=generator)
    latent = torch.cat([one, -2 * one, 3 * one, noise[:1]])
    components = Components.of([latent])
    assert components.shares[0] == pytest.approx(0.75, abs=0.02), "three of four channels are one"
    assert sum(components.shares) == pytest.approx(1.0)
    pictures = components.pictures(latent, enlarge=3)
    assert pictures.shape == (5, 24, 24, 3)
    assert pictures.dtype == np.uint8
    assert pictures[..., 0].std() > 30
    assert all(sum(each.shares) == pytest.approx(1.0) for each in histograms([latent]))


def test_a_histogram_has_a_bar_per_bin_as_high_as_its_share() -> None:
    chart = bar_chart([0.5, 1.5, 2.5], [1.0, 4.0, 0.0], x_title="<dB>", y_title="windows", decimals=1)
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', chart)]
    assert heights[1] == pytest.approx(4 * heights[0], abs=0.2)
    assert heights[2] == 0
    assert "<dB>" not in chart
    assert bar_chart([], [], x_title="", y_title="", decimals=0) == ""
