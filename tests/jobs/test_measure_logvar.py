"""What the table of stored log variances says, on a dataset and on numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from jobs.measure_logvar import gaussian_kl, logvar_table, stored_logvars
from tests.pipeline.reader.made_datasets import write_dataset


def test_the_divergence_is_that_of_two_gaussians() -> None:
    one, other = torch.distributions.Normal(0.0, math.exp(-1.0)), torch.distributions.Normal(0.0, math.exp(-1.2))
    expected = float(torch.distributions.kl_divergence(one, other))
    assert float(gaussian_kl(torch.tensor(-2.0 + 2.4, dtype=torch.float64))) == pytest.approx(expected, rel=1e-5)


def test_more_bits_are_closer_and_the_grid_keeps_its_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    logvars = [torch.randn(4, 5, 6, 7, generator=generator) * 3 - 8 for _ in range(3)]
    rows = {row[0]: row for row in logvar_table(logvars).rows}
    rms = {name: float(row[4].rstrip("%")) for name, row in rows.items()}
    grid = rows["int8, fixed grid of 1/8"]
    assert float(grid[3]) <= 0.001
    assert float(grid[5].rstrip("%")) <= 3.2
    assert rms["float16"] < rms["bfloat16"] < rms["a scalar for each window and channel"]
    assert rms["float16"] < rms[grid[0]] < rms["a scalar for each channel"]


@pytest.mark.parametrize("logvar", [True, "int8"])
def test_a_dataset_gives_its_log_variances(tmp_path: Path, logvar: bool | str) -> None:
    latents = write_dataset(tmp_path, shards=1, small=3, long=0, logvar=logvar)
    found = stored_logvars(str(tmp_path), 2)
    assert len(found) == 2
    stored = latents["00000/clip000_00000"].logvar_CTHW
    assert stored is not None
    assert torch.equal(found[0], stored.float() / 8 - 8 if logvar == "int8" else stored.float())


def test_one_without_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, shards=1, small=1, long=0)
    with pytest.raises(SystemExit, match="has no log variances"):
        stored_logvars(str(tmp_path), 1)
