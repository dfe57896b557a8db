"""Shapes, clips, motion, totals and pictures of an evaluation, each on its own."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cvvae import SPECS
from cvvae.i3d import NUM_LOGITS
from jobs.evaluation.charts import line_chart
from jobs.evaluation.clips import SourceWindow, WindowReader, find_clips
from jobs.evaluation.examples import Gallery, picture_uri
from jobs.evaluation.measure import Figures, Measured
from jobs.evaluation.motion import MotionMeter, choose_evenly, quantile_edges
from jobs.evaluation.presets import PRESETS, ClipShape, FittedShape, fit_shape
from jobs.evaluation.totals import RunningMean, ShapeTotals, motion_table
from pipeline.decode.pool import DecodePool
from pipeline.errors import ConfigError, SourceError
from pipeline.policies import DecodePolicy


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other are slow where tests share a machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CV, IV, OPEN_SORA = (SPECS[name] for name in ("cvvae-sd21-tiny", "ivvae-z4-tiny", "open-sora-1.2-tiny"))


def test_a_shape_is_fitted_to_all_vaes_and_says_what_was_given_up() -> None:
    fitted = fit_shape(ClipShape(20, (100, 161)), [CV, IV])
    assert fitted.shape == ClipShape(17, (96, 160))
    assert [note.split(":")[0] for note in fitted.notes] == [
        "17 of 20 frames",
        "17 frames, 96 x 160 instead of 20 frames, 100 x 161",
    ]
    both = fit_shape(ClipShape(33, None), [CV, OPEN_SORA]).shape.frames
    assert CV.is_valid_num_frames(both)
    assert OPEN_SORA.is_valid_num_frames(both)
    assert not any(
        CV.is_valid_num_frames(more) and OPEN_SORA.is_valid_num_frames(more) for more in range(both + 1, 34)
    )


def test_shapes_that_nothing_takes_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 32 pixels and multiples of 8"):
        fit_shape(ClipShape(1, (24, 64)), [CV], metrics=["lpips"])


def test_presets_name_themselves_and_publish_only_what_they_measure() -> None:
    for name, preset in PRESETS.items():
        assert preset.name == name
        for row in preset.published:
            assert set(row.figures) <= set(preset.metrics)


# --- clips ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool():
    with DecodePool(DecodePolicy(), 2) as pool:
        yield pool


def test_windows_of_files_images_and_failures(real_clips, tmp_path: Path, pool: DecodePool) -> None:
    for name in ("single_face.mp4", "no_face.mp4"):
        (tmp_path / name).write_bytes(real_clips[name].read_bytes())
    (tmp_path / "half.mp4").write_bytes(real_clips["no_face.mp4"].read_bytes()[:20_000])
    (tmp_path / "page.mp4").write_text("<html>not a video</html>")
    (tmp_path / "picture.png").write_bytes(png(90, 120))
    (tmp_path / "readme.txt").write_text("nobody's clip")
    files = find_clips([str(tmp_path)])
    assert [file.key for file in files] == ["half.mp4", "no_face.mp4", "page.mp4", "picture.png", "single_face.mp4"]

    reader = WindowReader(pool, frame_stride=2, windows_per_clip=2)
    windows = list(reader.read(files, FittedShape(ClipShape(5, (64, 96)), 8, 8)))
    assert [window.key for window in windows] == [
        *("no_face.mp4_00000", "no_face.mp4_00001"),
        *("single_face.mp4_00000", "single_face.mp4_00001"),
    ]
    assert {window.frames_THWC.shape for window in windows} == {(5, 64, 96, 3)}
    assert {key: failure.error_class for (key, _), failure in reader.failures.items()} == {
        "half.mp4": "unsupported_container",
        "page.mp4": "unsupported_container",
        "picture.png": "too_short",
    }


def png(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 77, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_own_size_is_each_clips_cut_to_multiples(real_clips, tmp_path: Path, pool: DecodePool) -> None:
    (tmp_path / "picture.png").write_bytes(png(90, 121))
    (tmp_path / "tiny.png").write_bytes(png(20, 121))
    (tmp_path / "broken.jpg").write_bytes(png(90, 121)[:60])
    reader = WindowReader(pool, frame_stride=1, windows_per_clip=1)
    images = find_clips([str(tmp_path)])
    windows = list(reader.read(images, FittedShape(ClipShape(1, None), 8, 32)))
    assert [window.frames_THWC.shape for window in windows] == [(1, 88, 120, 3)]
    assert {key for key, _ in reader.failures} == {"tiny.png", "broken.jpg"}
    # 176 x 144 with pixels of 128:117 is 192 x 144 on the screen
    videos = find_clips([str(real_clips["carphone_pristine.mp4"]), str(real_clips["no_face.mp4"])])
    windows = list(reader.read(videos, FittedShape(ClipShape(5, None), 8, 8)))
    assert [window.frames_THWC.shape for window in windows] == [(5, 144, 192, 3), (5, 536, 960, 3)]


def test_tars_are_read_and_a_random_choice_is_refused_in_them(v2d_shards, tmp_path: Path, pool: DecodePool) -> None:
    tars = v2d_shards(tmp_path / "in", num_shards=1, good=2, failed=1, broken=0)
    reader = WindowReader(pool, frame_stride=1, windows_per_clip=1)
    windows = list(reader.read(find_clips([str(tars[0])]), FittedShape(ClipShape(5, (64, 64)), 8, 8)))
    assert len(windows) == 2
    assert all(window.clip_key.startswith(f"{tars[0].name}/") for window in windows)
    assert [failure.error_class for failure in reader.failures.values()] == ["upstream_failed"]
    with pytest.raises(ConfigError, match="--limit 0"):
        find_clips([str(tars[0])], limit=1)


def test_a_random_choice_follows_the_seed_and_equal_names_get_their_paths(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        for number in range(6):
            (tmp_path / folder / f"{number}.mp4").touch()
    some = find_clips([str(tmp_path / "a")], limit=3, seed=1)
    assert len(some) == 3
    assert some == find_clips([str(tmp_path / "a")], limit=3, seed=1)
    assert {tuple(file.key for file in find_clips([str(tmp_path / "a")], limit=3, seed=s)) for s in range(9)} > {
        tuple(file.key for file in some)
    }
    everything = find_clips([str(tmp_path / "*" / "*.mp4")])
    assert len({file.key for file in everything}) == 12
    with pytest.raises(SourceError, match="does not exist"):
        find_clips([str(tmp_path / "c")])
    with pytest.raises(SourceError, match="nothing to evaluate"):
        find_clips([str(tmp_path / "*.jpg")])


# --- motion -----------------------------------------------------------------------------------------------------


def test_motion_of_a_moving_texture_is_its_speed() -> None:
    pytest.importorskip("cv2")
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 255, (54, 120, 3), np.uint8))
    texture = np.asarray(coarse.resize((960, 432), Image.Resampling.BICUBIC))
    meter = MotionMeter()
    speeds = [meter(np.stack([texture[:, s * n : s * n + 768] for n in range(4)])) for s in (0, 3, 6)]
    assert speeds[0] == pytest.approx(0.0, abs=0.05)
    assert speeds[1] == pytest.approx(3.0, rel=0.1)
    assert speeds[2] == pytest.approx(6.0, rel=0.1)
    assert meter(texture[None]) is None


@given(scores=st.lists(st.floats(0, 50), min_size=1, max_size=80), count=st.integers(1, 90), seed=st.integers(0, 3))
def test_a_choice_has_the_count_and_does_not_depend_on_order(scores: list[float], count: int, seed: int) -> None:
    named = {f"{number:03d}": score for number, score in enumerate(scores)}
    chosen = choose_evenly(named, count, seed=seed)
    assert len(chosen) == min(count, len(named))
    assert chosen == choose_evenly(dict(reversed(named.items())), count, seed=seed)


def test_a_choice_is_more_even_than_the_clips() -> None:
    scores = {f"{n:04d}": float(s) for n, s in enumerate(np.random.default_rng(1).exponential(2.0, 3000))}
    chosen = sorted(scores[key] for key in choose_evenly(scores, 200, seed=0))
    top = np.percentile(list(scores.values()), 99)
    halves = [sum(score < top / 2 for score in each) / len(each) for each in (list(scores.values()), chosen)]
    assert halves[0] > 0.85
    assert 0.4 < halves[1] < 0.65


def test_edges_of_buckets() -> None:
    assert quantile_edges([1.0, 2.0, 3.0, 4.0], 2) == [2.5]
    assert quantile_edges([1.0, 1.0, 1.0], 4) == []
    assert quantile_edges([], 4) == []


# --- totals and pictures ----------------------------------------------------------------------------------------


def measured(key: str, psnr: dict[str, list[float]], features: float | None = None) -> Measured:
    """A window of 5 frames of one grey, with these figures."""
    vector = None if features is None else torch.full((NUM_LOGITS,), features).index_fill(0, torch.tensor([0]), 1.0)
    frames = np.full((len(next(iter(psnr.values()))), 16, 16, 3), 90, np.uint8)
    figures = {
        label: Figures({"psnr": sum(each) / len(each)}, {"psnr": each}, vector) for label, each in psnr.items()
    }
    return Measured(SourceWindow(f"{key}_00000", key, frames, 25.0), figures, dict.fromkeys(psnr, frames), vector)


@given(values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30))
def test_a_running_mean_is_the_mean_and_its_error(values: list[float]) -> None:
    running = RunningMean()
    for value in [*values, math.nan]:
        running.add(value)
    assert running.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert running.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-6)
    assert (running.count, running.undefined) == (len(values), 1)


def test_totals_by_position_by_frame_and_against_the_first() -> None:
    positions = {"a": (None, 0, 1, 2, 3), "b": (None, 0, 1, 2, 3)}
    totals = ShapeTotals(ClipShape(5, (16, 16)), positions)
    totals.add(measured("x", {"a": [30, 20, 21, 22, 23], "b": [31, 22, 23, 24, 25]}))
    totals.add(measured("y", {"a": [40, 30, 31, 32, 33], "b": [41, 32, 33, 34, 35]}))
    summary = totals.to_json()
    assert summary["windows"] == 2
    assert summary["vaes"]["a"]["by_position"]["psnr"] == {"0": 25.0, "1": 26.0, "2": 27.0, "3": 28.0}
    assert summary["vaes"]["b"]["by_frame"]["psnr"] == [36.0, 27.0, 28.0, 29.0, 30.0]
    assert summary["vaes"]["b"]["metrics"]["psnr"]["mean"] == pytest.approx(30.0)
    difference = summary["vaes"]["b"]["over_first"]["psnr"]
    assert difference["mean"] == pytest.approx(1.8)
    assert difference["standard_error"] == pytest.approx(0.0, abs=1e-9)
    assert "fvd" not in summary["vaes"]["a"]["metrics"]


def test_fvd_of_a_single_window_is_unknown_and_of_equal_features_zero() -> None:
    totals = ShapeTotals(ClipShape(5, None), {"a": (None, 0, 1, 2, 3)})
    totals.add(measured("x", {"a": [30.0] * 5}, features=0.5))
    assert totals.to_json()["vaes"]["a"]["metrics"]["fvd"]["mean"] is None
    totals.add(measured("y", {"a": [30.0] * 5}, features=1.5))
    assert totals.to_json()["vaes"]["a"]["metrics"]["fvd"]["mean"] == pytest.approx(0.0, abs=1e-6)


def test_buckets_of_motion_cover_every_window_that_moves() -> None:
    lines = [{"motion": m, "vaes": {"a": {"psnr": 30.0 + m, "frames": {}}}} for m in (0.0, 1.0, 2.0, 5.0)]
    lines.append({"motion": None, "vaes": {"a": {"psnr": 99.0, "frames": {}}}})
    table = motion_table(lines, [1.0, 4.0])
    assert [(row["from"], row["to"], row["windows"]) for row in table] == [
        (None, 1.0, 1),
        (1.0, 4.0, 2),
        (4.0, None, 1),
    ]
    assert [row["vaes"]["a"]["psnr"]["mean"] for row in table] == [30.0, 31.5, 35.0]


def test_the_gallery_keeps_the_worst_and_the_first_and_no_more() -> None:
    gallery = Gallery(worst=2, first=1)
    shape = ClipShape(3, None)
    for number, quality in enumerate([30.0, 10.0, 20.0, 15.0, 40.0]):
        gallery.add(measured(str(number), {"a": [quality] * 3, "b": [50.0 - quality] * 3}), shape)
    worst = {label: [example.key for example in kept] for _, label, kept in gallery.worst()}
    assert worst == {"a": ["1_00000", "3_00000"], "b": ["4_00000", "0_00000"]}
    assert [example.key for example in gallery.first()] == ["0_00000"]


def test_pictures_are_animated_and_come_back() -> None:
    frames = [np.full((20, 30, 3), value, np.uint8) for value in (10, 120, 240)]
    uri = picture_uri(frames)
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,"))))
    assert (image.n_frames, image.size) == (3, (30, 20))
    image.seek(2)
    assert abs(np.asarray(image.convert("RGB")).mean() - 240) < 4


@given(
    values=st.lists(st.none() | st.floats(-1e4, 1e4, allow_nan=False), min_size=1, max_size=20),
)
def test_charts_draw_every_number_inside_their_frame(values: list[float | None]) -> None:
    chart = line_chart({"a": values}, [str(n) for n in range(len(values))], x_title="x", y_title="y", decimals=2)
    assert chart.count("<circle") == sum(value is not None for value in values)
    assert "nan" not in chart
    for part in chart.split('cy="')[1:]:
        assert 0 <= float(part.split('"')[0]) <= 260


def test_every_published_figure_stands_in_the_document() -> None:
    """As the tables write them: 0.810 is .810."""
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    cells = {float(number) for number in re.findall(r"(?<![\w.])\d*\.\d+(?![\w.])", text)}
    for preset in PRESETS.values():
        assert f"`{preset.name}`" in text or preset.name in ("plain", "ivvae-motionhd-720p", "ivvae-motionhd-1080p")
        for row in preset.published:
            assert set(row.figures.values()) <= cells, (preset.name, row.method)
