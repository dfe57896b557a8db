"""Which prefixes a spec claims to be exact; tests/cvvae/test_conformance.py holds the models to it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cvvae import SPECS


def test_tiles_make_prefixes_exact_where_they_end() -> None:
    spec = SPECS["cvvae-sd21"]
    assert not spec.prefix_exact
    exact = [number for number in range(1, 50, 4) if spec.has_exact_prefix(49, number, 64, 64)]
    assert exact == [17, 33, 49]


def test_causal_families_have_every_prefix() -> None:
    spec = SPECS["wan21"]
    assert all(spec.has_exact_prefix(33, number, 64, 64) for number in range(1, 34, 4))


def test_another_cut_in_space_is_another_prefix() -> None:
    """OD-VAE cuts in space what it cuts in time, so a short clip of large frames is computed in another way."""
    spec = SPECS["od-vae"]
    assert spec.longest_tile == 33
    assert spec.encode_tiling_of(65, 256, 256) != spec.encode_tiling_of(33, 256, 256)
    assert not spec.has_exact_prefix(65, 33, 256, 256)


def test_lengths_that_do_not_fit_are_refused() -> None:
    spec = replace(SPECS["cvvae-sd21"])
    with pytest.raises(ValueError, match="got 16"):
        spec.has_exact_prefix(17, 16, 64, 64)
    with pytest.raises(ValueError, match="prefix_frames: expected at most 17, got 33"):
        spec.has_exact_prefix(17, 33, 64, 64)
