"""Whole evaluations on real clips with tiny VAEs: figures, files, what is refused; the page in a real browser."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from cvvae import SPECS, save_vae, seeded_vae
from cvvae.i3d import I3D
from cvvae.lpips import LPIPS
from jobs.cli import app as latents
from jobs.evaluate_vae import apply_overrides, evaluate, find_preset, load_vaes, parse_size, read_report, split_label
from jobs.metric_weights import FILES, FOLDER_VARIABLE
from pipeline.errors import ConfigError
from tests.browser import seen_in_browser


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other are slow where tests share a machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clips(real_clips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three real clips and half of one."""
    folder = tmp_path_factory.mktemp("clips")
    for name in ("single_face.mp4", "no_face.mp4", "carphone_pristine.mp4"):
        shutil.copy(real_clips[name], folder / name)
    (folder / "half.mp4").write_bytes(real_clips["no_face.mp4"].read_bytes()[:20_000])
    return folder


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LPIPS and I3D with random weights, in files as the converter writes them."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    lpips = LPIPS("alex")
    for head in lpips.heads:
        head.weight.data.abs_()
    safetensors.torch.save_file(lpips.state_dict(), folder / FILES["lpips-alex"])
    safetensors.torch.save_file(I3D().state_dict(), folder / FILES["i3d"])
    return folder


def run(output: Path, clips: Path | str, *vaes: str, **options: object) -> dict:
    defaults: dict = {"size": ["48x64"], "motion": "off", "decode_children": 1}
    evaluate(vae=list(vaes), clips=[str(clips)], output=output, **(defaults | options))
    return read_report(output)


def test_several_families_on_real_clips_with_every_metric(
    clips: Path, random_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(random_weights))
    names = ("cvvae-sd21-tiny", "ivvae-z4-tiny", "open-sora-1.2-tiny")
    report = run(tmp_path, clips, *names, preset="ivvae-kinetics", frames=[9], limit=0)
    (result,) = report["results"]
    assert result["windows"] == 3
    assert list(result["vaes"]) == list(names)
    for of_vae in result["vaes"].values():
        assert set(of_vae["metrics"]) == {"psnr", "psnr_video", "ssim", "lpips", "information", "fvd"}
        assert set(of_vae["by_position"]["ssim"]) == {"0", "1", "2", "3"}
        assert all(of_vae["metrics"][metric]["mean"] is not None for metric in of_vae["metrics"])
    assert report["published"] == []  # another size is another protocol
    assert [failure["key"] for failure in report["failures"]] == ["half.mp4"]
    lines = [json.loads(line) for line in (tmp_path / "windows.jsonl").read_text().splitlines()]
    assert [line["key"].rpartition("_")[0] for line in lines] == [
        *("carphone_pristine.mp4", "no_face.mp4", "single_face.mp4")
    ]
    mean = np.mean([line["vaes"]["ivvae-z4-tiny"]["ssim"] for line in lines])
    assert result["vaes"]["ivvae-z4-tiny"]["metrics"]["ssim"]["mean"] == pytest.approx(mean, rel=1e-12)


def test_the_same_command_gives_the_same_bytes(clips: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        run(tmp_path / folder, clips, "ivvae-z4-tiny", frames=[5, 1], posterior="sample", motion="auto")
    for name in ("report.json", "windows.jsonl", "index.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    report = read_report(tmp_path / "a")
    assert [result["shape"]["frames"] for result in report["results"]] == [1, 5]
    assert [motion["shape"] for motion in report["motion"]] == ["5 frames, 48 x 64"]


def test_checkpoints_are_compared_under_labels_and_mode_differs_from_sample(clips: Path, tmp_path: Path) -> None:
    vae = seeded_vae(SPECS["cvvae-sd3-tiny"], 3)
    save_vae(vae, tmp_path / "mine")
    figures = {}
    for posterior in ("mode", "sample"):
        report = run(
            tmp_path / posterior, clips / "no_face.mp4", f"mine={tmp_path / 'mine'}", frames=[1], posterior=posterior
        )
        assert report["vaes"]["mine"]["seeded"] is False
        assert report["vaes"]["mine"]["spec"].startswith("cvvae-sd3")
        figures[posterior] = report["results"][0]["vaes"]["mine"]["metrics"]["psnr"]["mean"]
    assert figures["mode"] != figures["sample"]


def test_a_motion_subset_is_chosen_first(clips: Path, tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    report = run(tmp_path, clips, "ivvae-z4-tiny", frames=[5], motion="on", motion_subset=2, motion_buckets=2)
    assert report["clips"] == {"files": 4, "chosen": 2}
    assert report["results"][0]["windows"] == 2
    assert sum(bucket["windows"] for bucket in report["motion"][0]["buckets"]) == 2


def test_a_window_that_one_vae_cannot_give_back_counts_for_none(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One VAE of two overflows on one clip: both lose it, and the report names it."""
    broken = seeded_vae(SPECS["ivvae-z4-tiny"], 0)
    decode = broken.decode
    calls = iter(range(9))

    def overflowing(latent: torch.Tensor) -> torch.Tensor:
        return decode(latent) * (torch.inf if next(calls) == 1 else 1.0)

    monkeypatch.setattr(broken, "decode", overflowing)
    loaded = load_vaes(["cvvae-sd21-tiny"], seed=0, dtype=torch.float32, device=torch.device("cpu"))
    named = {**loaded, "broken": type(loaded["cvvae-sd21-tiny"])(broken, is_seeded=True)}
    monkeypatch.setattr("jobs.evaluate_vae.load_vaes", lambda *args, **kwargs: named)
    report = run(tmp_path, clips, "any", frames=[5])
    assert report["results"][0]["windows"] == 2
    lost = [failure for failure in report["failures"] if failure["error_class"] == "non_finite"]
    assert [failure["key"] for failure in lost] == ["no_face.mp4_00000"]
    assert "broken decoded NaN or infinity" in lost[0]["message"]


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "nothing"}, "--preset: expected one of plain"),
        ({"metric": ["vmaf"]}, "--metric: expected of psnr"),
        ({"size": ["64"]}, "--size: expected HEIGHTxWIDTH"),
        ({"size": ["4x4"]}, "multiples of 8"),
        ({"device": "abacus"}, "--device: 'abacus' cannot be used"),
        ({"metric": ["fvd"], "frames": [5]}, "FVD needs 9 frames"),
        ({"motion": "off", "motion_subset": 3}, "--motion-subset 0"),
    ],
)
def test_settings_that_do_not_fit_are_one_message(
    options: dict, message: str, clips: Path, random_weights: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(random_weights))
    with pytest.raises(SystemExit):
        run(tmp_path, clips, "ivvae-z4-tiny", **options)
    assert message in " ".join(capsys.readouterr().err.split())


def test_missing_weights_and_clips_are_one_message(clips: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(SystemExit):
        run(tmp_path, clips, "ivvae-z4-tiny", preset="cvvae-webvid", limit=0)
    assert "python jobs/convert_metric_weights.py lpips-alex" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, clips / "half.mp4", "ivvae-z4-tiny", frames=[5])
    error = " ".join(capsys.readouterr().err.split())
    assert "none of 1 files could be evaluated: half.mp4:" in error
    assert not list(tmp_path.glob(".windows*"))


def test_vaes_are_named_and_refused() -> None:
    device = torch.device("cpu")
    assert split_label("iv=weights/iv.pth") == ("iv", "weights/iv.pth")
    assert split_label("s3://bucket/a=b/vae3d_v1-1/") == ("vae3d_v1-1", "s3://bucket/a=b/vae3d_v1-1/")
    with pytest.raises(ConfigError, match="'ivvae-z4-tiny' twice"):
        load_vaes(["ivvae-z4-tiny"] * 2, seed=0, dtype=torch.float32, device=device)
    with pytest.raises(ConfigError, match="does not exist"):
        load_vaes(["nowhere/vae"], seed=0, dtype=torch.float32, device=device)
    with pytest.raises(ConfigError, match="user:password"):
        load_vaes(["https://me:secret@host/vae"], seed=0, dtype=torch.float32, device=device)


def test_sizes_and_unchanged_presets() -> None:
    assert parse_size("480x848") == (480, 848)
    assert parse_size("own") is None
    preset = find_preset("cvvae-webvid")
    nothing = type(
        "Given", (), dict.fromkeys(("metrics", "frames", "sizes", "frame_stride", "limit", "motion_subset"))
    )
    assert apply_overrides(preset, nothing).published == preset.published


def test_latents_evaluate_is_a_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["latents", "evaluate", "--help"])
    with pytest.raises(SystemExit) as stop:
        __import__("jobs.cli").cli.main()
    assert stop.value.code == 0
    assert "evaluate" in CliRunner().invoke(latents, ["--help"]).output


# --- the page -------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Tags that are open, sources of images, references to anything outside."""

    VOID = frozenset({"meta", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if tag == "img" and name == "src":
                self.images.append(value or "")
            if name in ("src", "href") and not (value or "").startswith("data:"):
                self.outside.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    run(folder, clips, "<b>=cvvae-sd21-tiny".replace("<b>", "a b"), "ivvae-z4-tiny", frames=[9], motion="auto")
    return folder / "index.html"


def test_the_page_stands_alone_and_is_whole(page: Path) -> None:
    text = page.read_text()
    parsed = _Page(text)
    assert parsed.open == []
    assert parsed.outside == []
    assert "<script" not in text
    # three windows a VAE at most, each with source, both VAEs and an error; then two more
    assert len(parsed.images) == 2 * 3 * 4 + 2 * 3
    assert "half.mp4" in text
    assert "random (seeded)" in text


def test_names_from_outside_are_escaped(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(clips / "no_face.mp4", tmp_path / "in" / "<img src=x onerror=alert(1)>&.mp4")
    run(tmp_path / "out", tmp_path / "in", "ivvae-z4-tiny", frames=[1])
    text = (tmp_path / "out" / "index.html").read_text()
    assert "<img src=x" not in text
    assert "&lt;img src=x onerror" in text


@pytest.mark.slow
def test_the_page_in_a_real_browser(page: Path, tmp_path: Path) -> None:
    """Needs a Chromium. Every image is decoded, every chart has a size, the console stays empty."""
    seen = seen_in_browser(page, tmp_path)
    assert len(seen["images"]) == 30
    assert all(seen["images"])
    assert len(seen["charts"]) >= 4
    assert all(width > 200 for width in seen["charts"])
    assert seen["wide"] <= 0
