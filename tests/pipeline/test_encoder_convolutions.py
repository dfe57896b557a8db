"""An encoder in half precision looks at this machine's convolutions first; wrong ones store nothing."""

from __future__ import annotations

import logging

import pytest
import torch

from cvvae import SPECS, seeded_vae
from cvvae.conv_probe import ConvProbe
from pipeline.encoder import TileEncoder, check_convolutions
from pipeline.errors import ConfigError
from pipeline.policies import EncodePolicy

CPU = torch.device("cpu")


def test_wrong_convolutions_are_refused() -> None:
    with pytest.raises(ConfigError, match="bfloat16 are wrong on this machine"):
        check_convolutions(ConvProbe(0.3, 1.0, None), "bfloat16", CPU)


def test_slow_convolutions_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_convolutions(ConvProbe(0.001, 12.5, 3 << 20), "float16", CPU)
    assert "dtype=float16 device=cpu take 12.5 times as long" in caplog.text
    assert "3 MiB" in caplog.text


def test_good_ones_are_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        check_convolutions(ConvProbe(0.001, 1.1, None), "bfloat16", CPU)
    assert not caplog.records


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_encoder_starts_on_this_machine(dtype: str) -> None:
    policy = EncodePolicy.model_validate({"dtype": dtype})
    encoder = TileEncoder(seeded_vae(SPECS["cvvae-sd21-tiny"], 0), policy, CPU, threads=1)
    assert encoder.numerics()["threads"] == 1
