"""A whole run in this process: the driver and one encoder, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints import VAESource, load_source
from pipeline.decode.pool import DecodePool
from pipeline.documents import Manifest
from pipeline.encoder import TileEncoder
from pipeline.policies import ResizePolicy, WindowPolicy
from pipeline.run import EncodeSettings, OutputSpec, RunLog, commit_all, finish_run, plan_run
from pipeline.scratch import Scratch
from pipeline.shard import ShardEncoder
from pipeline.sources import WebDatasetSource


def small_settings(source: Path | str, output: Path | str, options: dict[str, Any] | None = None) -> EncodeSettings:
    """A window of 32 x 32 per clip and the smallest VAE. `options` are the store's, for both ends."""
    return EncodeSettings(
        source=WebDatasetSource(urls=str(source), options=options or {}),
        output=OutputSpec(url=str(output), options=options or {}),
        vae=VAESource(spec="cvvae-sd21-tiny", options={}),
        windows=WindowPolicy(max_windows=1),
        resize=ResizePolicy(buckets=((32, 32),)),
    )


def encode_here(settings: EncodeSettings, scratch: Path, limit: int | None = None) -> Manifest:
    """Encode what is left. `limit` stops after so many shards, as a kill would."""
    plan, log = plan_run(settings, {}), RunLog()
    tiles = TileEncoder(load_source(settings.vae), settings.encode, torch.device("cpu"))
    with DecodePool(settings.decode, 1) as pool:
        encoder = ShardEncoder(plan.job(), tiles, pool, Scratch(scratch))
        stored = (encoder.run(shard) for shard in plan.todo[:limit])
        list(commit_all(plan, stored, log, set_aside_poison=False))
    return finish_run(plan, log)
