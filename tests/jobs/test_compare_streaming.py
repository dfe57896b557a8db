"""The job that compares streams, tiles and one shot, and the plain transcription that benchmarks measure against."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import typer
from typer.testing import CliRunner

from jobs.compare_streaming import Figures, Model, Way, compare_streaming, measure
from jobs.measure_precision import difference, smooth_video


def tiny(name: str = "ivvae-z4-tiny") -> Model:
    return Model(name, None, "fp32", "cpu")


def run(model: Model, way: Way, folder: Path) -> dict[str, torch.Tensor]:
    figures = measure(model, way, (9, 16, 16), folder, 1)
    assert isinstance(figures, Figures), figures
    assert min(figures.encode_seconds, figures.decode_seconds) > 0
    return safetensors.torch.load_file(folder / f"{way}.safetensors")


@pytest.mark.parametrize("name", ["ivvae-z4-tiny", "ivvae-baseline-tiny"])
def test_a_stream_gives_one_shot_and_tiles_do_not(name: str, tmp_path: Path) -> None:
    exact = run(tiny(name), Way("one shot"), tmp_path)
    streamed = run(tiny(name), Way("stream", 4), tmp_path)
    tiled = run(tiny(name), Way("tiles", 4), tmp_path)
    torch.testing.assert_close(exact["video"][0], smooth_video(9, 16, 16, seed=0)[0])
    for part in ("mean", "pixels"):
        assert difference(streamed[part], exact[part])[0] < 1e-5
        assert difference(tiled[part], exact[part])[0] > 1e-3


def test_models_that_do_not_stream_say_so(tmp_path: Path) -> None:
    model = tiny("cvvae-sd21-tiny")
    assert measure(model, Way("stream", 4), (5, 16, 16), tmp_path, 1) == "does not stream"
    assert isinstance(measure(model, Way("one shot"), (5, 16, 16), tmp_path, 1), Figures)
    too_short = measure(tiny(), Way("tiles", 6), (9, 16, 16), tmp_path, 1)
    assert "tile_frames: expected a positive multiple of time_stride=4" in str(too_short)


def test_the_table_has_a_row_for_every_way() -> None:
    app = typer.Typer()
    app.command()(compare_streaming)
    arguments = ["--frames", "9", "--size", "16", "--chunk", "4", "--tile", "6"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    rows = [line for line in result.output.splitlines() if "one shot" in line or " 1 + " in line or "stream," in line]
    assert [len(row.split("│")) for row in rows] == [9, 9, 9]
    assert "expected a positive multiple" in rows[1]
    assert all(0 <= float(cell) < 1e-5 for cell in rows[2].split("│")[5:7])


def test_unknown_specs_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match=r"expected names of SPECS, got \['ivvae'\]"):
        compare_streaming(spec=["ivvae"])
