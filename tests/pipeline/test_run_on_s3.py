"""A whole run with source and output on a real S3 server, without Ray: the same bytes as on local disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints import VAESource, load_source
from pipeline.decode.pool import DecodePool
from pipeline.documents import Manifest
from pipeline.encoder import TileEncoder
from pipeline.errors import PipelineError
from pipeline.policies import ResizePolicy, WindowPolicy
from pipeline.run import EncodeSettings, OutputSpec, RunLog, commit_all, finish_run, plan_run
from pipeline.scratch import Scratch
from pipeline.shard import ShardEncoder
from pipeline.sources import WebDatasetSource
from pipeline.storage import Store
from pipeline.verify import verify_dataset
from tests.s3_server import S3Server


def settings_for(source: str, output: str, server: S3Server | None = None) -> EncodeSettings:
    options = server.options if server else {}
    return EncodeSettings(
        source=WebDatasetSource(urls=source, options=options),
        output=OutputSpec(url=output, options=options),
        vae=VAESource(spec="cvvae-sd21-tiny", options={}),
        windows=WindowPolicy(max_windows=1),
        resize=ResizePolicy(buckets=((32, 32),)),
    )


def run(settings: EncodeSettings, scratch: Path, limit: int | None = None) -> Manifest:
    """The driver and one encoder in this process. `limit` stops after so many shards, as a kill would."""
    plan, log = plan_run(settings, {}), RunLog()
    tiles = TileEncoder(load_source(settings.vae), settings.encode, torch.device("cpu"))
    with DecodePool(settings.decode, 1) as pool:
        encoder = ShardEncoder(plan.job(), tiles, pool, Scratch(scratch))
        stored = (encoder.run(shard) for shard in plan.todo[:limit])
        list(commit_all(plan, stored, log, set_aside_poison=False))
    return finish_run(plan, log)


def test_a_bucket_holds_what_a_disk_would(
    s3_server: S3Server, v2d_shards: Callable[..., list[Path]], tmp_path: Path
) -> None:
    tars = v2d_shards(tmp_path / "source", num_shards=2, good=1, failed=1, broken=0)
    bucket = Store(f"{s3_server.url}/run", options=s3_server.options)
    for tar in tars:
        for path in (tar, tar.with_suffix(".parquet")):
            bucket.create(f"source/{path.name}", path)
    settings = settings_for(f"{bucket.url}/source", f"{bucket.url}/out", s3_server)
    with pytest.raises(PipelineError, match="1 of 2 shards came to no end"):
        run(settings, tmp_path / "scratch", limit=1)
    on_s3 = run(settings, tmp_path / "scratch")
    on_disk = run(settings_for(str(tmp_path / "source"), str(tmp_path / "out")), tmp_path / "scratch")
    assert on_s3.to_bytes() == on_disk.to_bytes()
    out = Store(f"{bucket.url}/out", options=s3_server.options)
    for name in ("shards/00000.tar", "shards/00001.tar", "index/00000.parquet", "index/00001.parquet", "README.md"):
        assert out.read_bytes(name) == (tmp_path / "out" / name).read_bytes()
    assert verify_dataset(out, source=settings.source).problems == []
