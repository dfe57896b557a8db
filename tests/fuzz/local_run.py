"""The encode job without Ray: plan, encode shard by shard in this process, commit, finish, verify."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cvvae import SPECS, VideoVAE, seeded_vae
from pipeline.decode.pool import DecodePool
from pipeline.documents import Manifest
from pipeline.encoder import TileEncoder
from pipeline.formats import FORMATS
from pipeline.policies import EncodePolicy
from pipeline.records import Latent
from pipeline.run import EncodeSettings, RunLog, RunPlan, commit_all, finish_run, plan_run
from pipeline.scratch import Scratch
from pipeline.shard import ShardEncoder, ShardJob, ShardStored
from pipeline.storage import Store
from pipeline.verify import verify_dataset

FRAMES = 9


def settings_for(source: dict[str, Any], output: Path, **sections: Any) -> EncodeSettings:
    """Windows of 9 frames at 32x32. Every tile is a batch of its own, so that a latent does not depend on the clips
    beside it and equal clips have equal numbers."""
    return EncodeSettings.model_validate(
        {
            "source": source,
            "output": {"url": str(output)},
            "vae": {"spec": "cvvae-sd21-tiny", "seed": 3},
            "windows": {"frames": FRAMES, "max_windows": 2},
            "resize": {"buckets": ((32, 32),)},
            "encode": {"batch_pixels": 1, "threads": 1},
            **sections,
        }
    )


def run_local(settings: EncodeSettings, pool: DecodePool, scratch: Scratch) -> Manifest:
    """Errors as the job's; one of a shard names it."""
    plan = plan_run(settings, {})
    for _ in commit_all(plan, encoded(plan, pool, scratch), RunLog(), set_aside_poison=False):
        pass
    return finish_run(plan, RunLog())


@cache
def tiny_vae() -> VideoVAE:
    return seeded_vae(SPECS["cvvae-sd21-tiny"], 3)


def shard_encoder(job: ShardJob, encode: EncodePolicy, pool: DecodePool, scratch: Scratch) -> ShardEncoder:
    return ShardEncoder(job, TileEncoder(tiny_vae(), encode, torch.device("cpu"), threads=1), pool, scratch)


def encoded(plan: RunPlan, pool: DecodePool, scratch: Scratch) -> Iterator[ShardStored]:
    shards = shard_encoder(plan.job(), plan.settings.encode, pool, scratch)
    for shard in plan.todo:
        try:
            yield shards.run(shard)
        except Exception as error:
            error.add_note(f"shard {shard.id} of {shard.url}")
            raise


def stored_latents(output: Path) -> dict[tuple[str, str], Latent]:
    """All latents of a WebDataset output by (shard id, key)."""
    latents = {}
    for path in sorted((output / "shards").iterdir()):
        with path.open("rb") as file:
            latents |= {(latent.row.shard_id, latent.row.key): latent for latent in FORMATS["webdataset"].read(file)}
    return latents


def assert_verified(settings: EncodeSettings) -> None:
    """`latents verify --source` is green."""
    report = verify_dataset(Store(settings.output.url), source=settings.source)
    assert report.problems == []
