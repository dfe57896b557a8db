"""What a dataset's own documents say of where it came from: its source, its shards' sources, its VAE, its config."""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError

from cvvae import VideoVAE
from pipeline.checkpoints import VAESource, load_source
from pipeline.documents import RunFile, ShardReceipt
from pipeline.errors import ConfigError, DatasetError
from pipeline.policies import DecodePolicy
from pipeline.records import VideoShard
from pipeline.sources import SourceSpec


def recorded_source(run: RunFile) -> SourceSpec:
    """The source section of the run. DatasetError if it is not one."""
    fields = {name: value for name, value in run.source.items() if name != "table_sha256"}
    try:
        return TypeAdapter[SourceSpec](SourceSpec).validate_python(fields)
    except ValidationError as error:
        raise DatasetError(f"run.json: source: {error}") from error


def recorded_shard(receipt: ShardReceipt) -> VideoShard:
    """The source shard that a receipt was made from."""
    source = receipt.source
    return VideoShard(
        id=receipt.shard_id,
        kind=source.kind,
        url=source.url,
        size=source.size,
        etag=source.etag,
        rows=source.rows,
        byte_span=source.byte_span,
    )


def recorded_decoding(run: RunFile) -> DecodePolicy:
    """How the run decoded its clips: the limits of its config, the backends of its identity."""
    fields = {**run.config.get("decode", {}), "backends": run.identity.decode_backends}
    try:
        return DecodePolicy.model_validate(fields)
    except ValidationError as error:
        raise DatasetError(f"run.json: config.decode: {error}") from error


def recorded_vae(run: RunFile, *, option: str = "--vae") -> VideoVAE:
    """The VAE that the dataset was encoded with, float32 on the CPU. ConfigError, which points to the command's
    `option`, if it is not to be had any more, or what lies in its place has other weights."""
    fields = run.config.get("vae")
    if not fields:
        raise ConfigError(f"run.json does not say where the VAE came from: name it with {option}")
    try:
        vae = load_source(VAESource.model_validate(fields))
    except ValidationError as error:
        raise DatasetError(f"run.json: config.vae: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"the dataset's own VAE: {error}; say with {option} where it lies now") from error
    if vae.weights_sha256 != run.identity.weights_sha256:
        raise ConfigError(
            f"the VAE that run.json names ({fields.get('checkpoint') or fields.get('spec')}) has weights sha256 "
            f"{vae.weights_sha256} now, the dataset was encoded with {run.identity.weights_sha256}; name those "
            f"weights with {option}"
        )
    return vae
