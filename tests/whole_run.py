"""A whole run in this process, without Ray: the driver's steps and one encoder. For tests of stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cvvae import VideoVAE
from pipeline.checkpoints import VAESource, load_source
from pipeline.decode.pool import DecodePool
from pipeline.documents import Manifest
from pipeline.encoder import TileEncoder
from pipeline.policies import DecodePolicy, EncodePolicy, FormatName, ResizePolicy, WindowPolicy
from pipeline.run import EncodeSettings, OutputSpec, RunLog, commit_all, finish_run, plan_run
from pipeline.scratch import Scratch
from pipeline.shard import ShardEncoder
from pipeline.sources import SourceSpec, WebDatasetSource
from pipeline.storage import Store

Run = Callable[..., Manifest]


def settings_for(
    source: str | SourceSpec,
    output: str,
    options: dict[str, Any] | None = None,
    *,
    format_name: FormatName = "webdataset",
    vae: VAESource | None = None,
) -> EncodeSettings:
    """Small and quick: one window of 32 x 32 per clip. `options` are for a source given by URL and the output."""
    options = options or {}
    return EncodeSettings(
        source=WebDatasetSource(urls=source, options=options) if isinstance(source, str) else source,
        output=OutputSpec(url=output, options=options, format=format_name),
        vae=vae or VAESource(spec="cvvae-sd21-tiny", options={}),
        windows=WindowPolicy(max_windows=1),
        resize=ResizePolicy(buckets=((32, 32),)),
        encode=EncodePolicy(batch_pixels=2 * 17 * 32 * 32),  # the default would be 62 blank tiles for two
    )


@contextmanager
def one_encoder(scratch: Path, policy: EncodePolicy | None = None, *, vae: VideoVAE | None = None) -> Iterator[Run]:
    """run(settings, limit=None) -> Manifest, any number of times with the same decode children.

    `limit` stops after so many shards, as a kill would: finish_run then says what is missing. `vae` encodes in the
    place of the one that the settings name.
    """
    with DecodePool(DecodePolicy(), 1) as pool:

        def run(settings: EncodeSettings, limit: int | None = None) -> Manifest:
            plan, log = plan_run(settings, settings.model_dump(mode="json")), RunLog()
            model = vae or load_source(settings.vae)
            tiles = TileEncoder(model, policy or settings.encode, torch.device("cpu"), threads=1)
            encoder = ShardEncoder(plan.job(), tiles, pool, Scratch(scratch))
            stored = (encoder.run(shard) for shard in plan.todo[:limit])
            list(commit_all(plan, stored, log, set_aside_poison=False))
            return finish_run(plan, log)

        yield run


def upload(folder: Path, store: Store, name: str) -> None:
    """The files of a local folder as objects under `name`."""
    for path in sorted(folder.iterdir()):
        assert store.create(f"{name}/{path.name}", path)


def dataset_bytes(store: Store) -> dict[str, bytes]:
    """Every object that must be equal between two runs over the same input, by name."""
    names = ["manifest.json", "README.md"]
    names += [f"{folder}/{name}" for folder in ("shards", "index", "receipts") for name in store.names(folder, "")]
    return {name: store.read_bytes(name) for name in names}
