"""What the precision table's numbers mean."""

from __future__ import annotations

import math

import pytest
import torch
from typer.testing import CliRunner

from jobs.measure_precision import difference, measure_precision, smooth_video


def test_difference_against_numbers_worked_out_by_hand() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert difference(expected, expected) == (0.0, 0.0)
    relative, largest = difference(torch.tensor([3.0, 4.5]), expected)
    assert relative == pytest.approx(0.5 / 5.0)
    assert largest == 0.5
    assert not math.isfinite(difference(torch.tensor([3.0, math.nan]), expected)[0])


def test_the_video_is_smooth_and_in_range() -> None:
    video = smooth_video(9, 32, 40, seed=1)
    assert video.shape == (1, 3, 9, 32, 40)
    assert video.abs().max() <= 1
    assert video.diff(dim=2).abs().mean() < 0.25 * video.std()
    assert torch.equal(video, smooth_video(9, 32, 40, seed=1))


def test_the_table_names_models_and_dtypes() -> None:
    import typer

    app = typer.Typer()
    app.command()(measure_precision)
    done = CliRunner().invoke(app, ["--frames", "1", "--size", "16"])
    assert done.exit_code == 0, done.output
    assert done.output.count("bf16") == done.output.count("fp16") == 3
