"""A dataset of latents of real clips, encoded in this process: no Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from cvvae import SPECS, seeded_vae
from pipeline.dataset import DatasetFolder
from pipeline.decode.pool import DecodePool
from pipeline.documents import RunFile, RunIdentity
from pipeline.encoder import TileEncoder
from pipeline.manifest import build_manifest
from pipeline.policies import DecodePolicy, EncodePolicy, ResizePolicy, WindowPolicy
from pipeline.scratch import Scratch
from pipeline.shard import ShardEncoder, ShardJob
from pipeline.sources import WebDatasetSource, plan_source
from pipeline.storage import Store

TWO_WINDOWS = WindowPolicy(max_windows=2)


def encode_clips(
    tars: Sequence[Path],
    output: Path,
    *,
    side: int = 32,
    vae: str = "cvvae-sd21-tiny",
    windows: WindowPolicy = TWO_WINDOWS,
) -> None:
    """Windows of every clip, at side x side, with seeded weights of a spec."""
    model = seeded_vae(SPECS[vae], 0).eval()
    assert model.weights_sha256 is not None
    resize = ResizePolicy(buckets=((side, side),))
    identity = RunIdentity(
        weights_sha256=model.weights_sha256,
        vae=model.spec.to_dict(),
        windows=windows,
        resize=resize,
        decode_backends=("pyav",),
        compute_dtype="float32",
        storage_dtype="float16",
        logvar=False,
    )
    source = WebDatasetSource(urls=tuple(map(str, tars)))
    job = ShardJob(
        source=source,
        windows=windows,
        resize=resize,
        decode=DecodePolicy(),
        identity=identity,
        format="webdataset",
        store=Store(str(output)),
    )
    with tempfile.TemporaryDirectory() as folder, DecodePool(DecodePolicy(backends=("pyav",)), 1) as pool:
        scratch = Scratch(Path(folder))
        encoder = ShardEncoder(job, TileEncoder(model, EncodePolicy(), torch.device("cpu")), pool, scratch)
        receipts = [encoder.run(shard).receipt for shard in plan_source(source).shards]
        scratch.close()
    run = RunFile(fingerprint=identity.fingerprint, identity=identity, format="webdataset", source={}, config={})
    DatasetFolder(Store(str(output))).finish(build_manifest(run, receipts, ()), "")
