"""Log variances in one byte: what the code promises, over all that a posterior can hold."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cvvae.posterior import LOGVAR_RANGE
from pipeline.logvar_code import LOGVAR_LIMITS, STEPS, logvar_from_int8, logvar_to_int8

logvars = st.lists(st.floats(*LOGVAR_RANGE, width=32), min_size=1, max_size=20).map(torch.tensor)


@given(logvars)
def test_the_nearest_of_the_grid_comes_back(logvar: torch.Tensor) -> None:
    code = logvar_to_int8(logvar)
    assert code.dtype == torch.int8
    error = (logvar_from_int8(code) - logvar.clamp(*LOGVAR_LIMITS)).abs()
    assert float(error.max()) <= 0.5 / STEPS + 1e-6
    std = torch.expm1(0.5 * error)
    assert float(std.max()) <= 0.032
    assert float((0.5 * (torch.expm1(error) - error)).max()) <= 0.001


def test_every_code_is_itself() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8)
    assert torch.equal(logvar_to_int8(logvar_from_int8(codes)), codes)
    assert logvar_from_int8(codes)[[0, -1]].tolist() == [*LOGVAR_LIMITS] == [-24.0, 7.875]


def test_what_is_outside_is_the_nearest_limit() -> None:
    found = logvar_from_int8(logvar_to_int8(torch.tensor([*LOGVAR_RANGE], dtype=torch.float16)))
    assert found.tolist() == [*LOGVAR_LIMITS]
