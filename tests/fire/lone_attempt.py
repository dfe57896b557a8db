"""One attempt at one shard in a process of its own: `python -m tests.fire.lone_attempt CONFIG SHARD [--set A.B=C]`.

What an encode actor does that its cluster has forgotten. Prints the receipt that a driver would be given.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from jobs.config import EncodeConfig, load_config
from pipeline.checkpoints import load_source
from pipeline.decode.pool import DecodePool
from pipeline.encoder import TileEncoder
from pipeline.run import plan_run
from pipeline.scratch import Scratch
from pipeline.shard import ShardEncoder


def main(config_path: str, shard_id: str, *overrides: str) -> None:
    """The shard must be without a receipt when this starts."""
    config = load_config(EncodeConfig, config_path, overrides)
    plan = plan_run(config, {})
    (shard,) = [shard for shard in plan.todo if shard.id == shard_id]
    encoder = TileEncoder(load_source(config.vae), config.encode, torch.device("cpu"), threads=config.encode.threads)
    scratch = Scratch(Path(config_path).parent / f"scratch-{shard_id}")
    with DecodePool(config.decode, 1) as pool:
        stored = ShardEncoder(plan.job(), encoder, pool, scratch).run(shard)
    scratch.close()
    sys.stdout.buffer.write(stored.receipt.to_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
