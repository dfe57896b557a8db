"""`latents evaluate --image-vae` on real clips: the image VAE itself, what was inflated from it, and a stranger."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cvvae import SPECS, save_vae
from cvvae.cv_vae import CVVAESpec
from cvvae.image_vae import ImageVAE
from cvvae.image_vae_checkpoint import load_image_vae, save_image_vae
from cvvae.inflation import inflate
from cvvae.regularization import choose_frames, decoder_side, encoder_side
from jobs.evaluate_vae import evaluate, load_judge, load_vaes, read_report
from jobs.evaluation.compatibility import CompatibilityMeasure
from jobs.evaluation.compatibility_page import KEPT_FIRST, StripKeeper
from jobs.evaluation.presets import ClipShape
from pipeline.errors import ConfigError

CPU = torch.device("cpu")
WIDTHS = (32, 32, 32, 32)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """image: an image VAE; video: the CV-VAE inflated from it."""
    folder = tmp_path_factory.mktemp("vaes")
    torch.manual_seed(0)
    image = ImageVAE(in_channels=3, latent_channels=4, widths=WIDTHS)
    save_image_vae(image, folder / "image", scaling_factor=0.18215)
    spec = SPECS["cvvae-sd21-tiny"]
    assert isinstance(spec, CVVAESpec)
    save_vae(inflate(load_image_vae(folder / "image"), replace(spec, name="narrow", widths=WIDTHS)), folder / "video")
    return folder


@pytest.fixture(scope="module")
def evaluated(vaes: Path, real_clips: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real clips, three VAEs."""
    pytest.importorskip("cv2")
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "clips").mkdir()
    for name in ("single_face.mp4", "carphone_pristine.mp4"):
        shutil.copy(real_clips[name], folder / "clips" / name)
    given = [f"itself={vaes / 'image'}", f"inflated={vaes / 'video'}", "stranger=cvvae-sd21-tiny"]
    evaluate(
        vae=given,
        image_vae=f"image={vaes / 'image'}",
        clips=[str(folder / "clips")],
        output=folder / "out",
        size=["16x24"],
        frames=[5],
        motion="on",
        motion_buckets=2,
        decode_children=1,
    )
    return folder / "out"


def test_the_image_vae_itself_is_the_ceiling_and_a_stranger_is_far_below(evaluated: Path) -> None:
    section = read_report(evaluated)["compatibility"]
    assert section["default_mapping"] == "slice"
    (result,) = section["results"]
    everything, *by_motion = result["buckets"]
    assert [bucket["windows"] for bucket in result["buckets"]] == [2, 1, 1]
    assert list(everything["vaes"]) == ["itself", "inflated", "stranger"]
    itself, inflated, stranger = everything["vaes"].values()
    for mapping in ("slice", "average", "first"):
        assert itself["image_decoder"][mapping]["below_ceiling"]["mean"] == pytest.approx(0, abs=1e-3)
    assert itself["latents"]["cosine"]["mean"] == pytest.approx(1, abs=1e-5)
    assert itself["latents"]["relative_rms"] < 1e-3
    assert itself["latents"]["frechet"] == pytest.approx(0, abs=1e-6)
    assert itself["latents"]["mmd"] == pytest.approx(0, abs=1e-6)
    assert inflated["latents"]["cosine"]["mean"] > stranger["latents"]["cosine"]["mean"]
    assert inflated["latents"]["relative_rms"] < stranger["latents"]["relative_rms"]
    assert inflated["latents"]["frechet"] < stranger["latents"]["frechet"]
    assert "between_psnr" in inflated["video_decoder"]["slice"]
    assert "between_psnr" not in itself["video_decoder"]["slice"]  # every frame has a latent
    assert {"from", "to", "windows"} < set(by_motion[0])


def test_means_are_those_of_the_lines(evaluated: Path) -> None:
    lines = [json.loads(line) for line in (evaluated / "compatibility.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    everything = read_report(evaluated)["compatibility"]["results"][0]["buckets"][0]
    for decoder in ("image_decoder", "video_decoder"):
        values = [line["vaes"]["inflated"][decoder]["average"]["psnr"] for line in lines]
        mean = everything["vaes"]["inflated"][decoder]["average"]["psnr"]["mean"]
        assert mean == pytest.approx(np.mean(values), rel=1e-12)
    best = everything["vaes"]["inflated"]["best_mapping"]
    psnr = {m: of["psnr"]["mean"] for m, of in everything["vaes"]["inflated"]["image_decoder"].items()}
    assert psnr[best] == max(psnr.values())


def test_the_page_has_the_tables_and_pictures(evaluated: Path) -> None:
    text = (evaluated / "index.html").read_text()
    assert "Compatibility with image" in text
    assert "image decodes inflated" in text
    assert "inflated decodes image" in text
    assert text.count("image decodes video latents") == 3


def test_the_measure_compares_what_the_regularization_compares(vaes: Path) -> None:
    """The paper's two sides, as they are trained, give the figures of the table."""
    judge = load_judge(str(vaes / "image"), CPU)
    named = load_vaes([str(vaes / "video")], seed=0, dtype=torch.float32, device=CPU)
    vae = named["video"].vae
    source = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        latent = vae.encode(source * 2 - 1).mode()
        figures, shown = CompatibilityMeasure(judge, {"video": vae}, with_ssim=False, seed=0)(
            source, {"video": latent}, "clip"
        )
        for mapping in ("first", "slice", "average"):
            choice = choose_frames(vae.spec, 9, mapping)
            for side, compared in (
                ("image_decoder", decoder_side(judge.vae, source * 2 - 1, latent, choice)),
                ("video_decoder", encoder_side(vae, judge.vae, source * 2 - 1, choice)),
            ):
                error = (compared.prediction.clamp(-1, 1) - compared.target).square() / 4
                psnr = (-10 * error.mean(dim=(0, 1, 3, 4)).log10()).mean()
                assert figures["video"][side][mapping]["psnr"] == pytest.approx(float(psnr), abs=1e-3)
    assert {caption: video.shape[2] for caption, video in shown.items()} == {
        "image itself, 3 frames": 3,
        "image decodes video": 3,
        "video decodes image": 9,
    }


def test_what_cannot_be_judged_is_refused(vaes: Path) -> None:
    judge = load_judge(str(vaes / "image"), CPU)
    other = load_vaes(["ivvae-z16-tiny"], seed=0, dtype=torch.float32, device=CPU)["ivvae-z16-tiny"].vae
    with pytest.raises(ConfigError, match="no VAE to compare with it: ivvae-z16-tiny: its latents have 16 channels"):
        CompatibilityMeasure(judge, {"ivvae-z16-tiny": other}, with_ssim=False, seed=0)
    with pytest.raises(ConfigError, match=r"--image-vae .*video: .*_class_name: expected 'AutoencoderKL'"):
        load_judge(str(vaes / "video"), CPU)


def test_who_is_left_out_and_other_scales_are_noted(vaes: Path) -> None:
    judge = load_judge(str(vaes / "image"), CPU)
    names = ["ivvae-z4-tiny", "ivvae-z16-tiny"]
    loaded = load_vaes(names, seed=0, dtype=torch.float32, device=CPU)
    both = dict(zip(("iv", "deep"), (loaded[name].vae for name in names), strict=True))
    measure = CompatibilityMeasure(judge, both, with_ssim=False, seed=0)
    assert list(measure.vaes) == ["iv"]
    left_out, note = measure.notes
    assert left_out.startswith("deep is not compared with image: its latents have 16 channels at 1/8 of a side")
    assert note.startswith("iv states scale and shift (1.3196, 0.125), image (0.18215, 0.0)")


def test_the_stillest_and_the_most_moving_window_are_shown() -> None:
    keeper, shape = StripKeeper(), ClipShape(1, (8, 8))
    for number, motion in enumerate((3.0, 2.0, 5.0, 9.0, 1.0, 4.0)):
        keeper.add(
            shape, f"clip{number}", motion, np.zeros((1, 8, 8, 3), np.uint8), {"a": torch.zeros(1, 3, 1, 8, 8)}
        )
    assert [strip.title.partition(":")[0] for strip in keeper.strips()] == ["clip4", "clip3", "clip0", "clip1"]
    assert KEPT_FIRST == 2
