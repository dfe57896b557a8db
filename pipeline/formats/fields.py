"""A window's row as flat named fields: the one table that KEY.json, Parquet shards and the index share.

FastVideo's column names where it has one for the thing; a `source_` prefix for what is true of the video it was
cut from. The source's own metadata is one JSON string, not an object: its keys differ from sample to sample, and
readers that infer a schema from the first rows (Hugging Face datasets, Arrow) fail on that.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import DatasetError
from pipeline.formats.header import canonical_line
from pipeline.policies import DTypeName
from pipeline.records import LatentRow, SourceVideo


def _require_utf8(text: str) -> str:
    text.encode("utf-8")  # a lone surrogate raises a ValueError
    return text


Text = Annotated[str, AfterValidator(_require_utf8)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


class RowFields(BaseModel):
    """Names, types and order of the fields. docs/format.md says what each means."""

    # A reader must not fail on a column that somebody added; it must fail on a string where a number belongs.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    id: Text
    clip_key: Text
    window_index: NonNegative
    shard_id: Text
    bucket: Text
    caption: Text
    file_name: Text
    media_type: Literal["video"]
    width: Positive
    height: Positive
    num_frames: Positive
    duration_sec: float
    fps: float | None
    frame_indices: list[NonNegative]
    frame_times: list[float]
    padded_frames: NonNegative
    trimmed_frames: NonNegative
    crop: Annotated[list[float], Field(min_length=4, max_length=4)]
    source_width: Positive
    source_height: Positive
    source_sample_aspect_ratio: float
    source_rotation: int
    source_fps: float | None
    source_duration_sec: float | None
    source_codec: Text
    source_decoder: Text
    video_sha256: Text
    pair_sha256: Text
    metadata: Text
    has_logvar: bool
    vae_latent_dtype: DTypeName
    vae_latent_shape: Annotated[list[Positive], Field(min_length=4, max_length=4)]


def fields_of(row: LatentRow) -> dict[str, Any]:
    """The row's fields. ValueError if one cannot be stored: text that is not UTF-8, NaN, an impossible shape."""
    try:
        return _checked(row).model_dump()
    except ValidationError as error:
        raise ValueError(f"{row.key!r}: {_problems(error)}") from error
    except ValueError as error:
        raise ValueError(f"{row.key!r}: metadata: {error}") from error


def _checked(row: LatentRow) -> RowFields:
    source = row.source
    return RowFields(
        id=row.key,
        clip_key=row.clip_key,
        window_index=row.window_index,
        shard_id=row.shard_id,
        bucket=row.bucket,
        caption=row.caption,
        file_name=row.file_name,
        media_type="video",
        width=row.width,
        height=row.height,
        num_frames=row.num_frames,
        duration_sec=row.duration_sec,
        fps=row.fps,
        frame_indices=list(row.frame_indices),
        frame_times=list(row.frame_times),
        padded_frames=row.padded_frames,
        trimmed_frames=row.trimmed_frames,
        crop=list(row.crop),
        source_width=source.width,
        source_height=source.height,
        source_sample_aspect_ratio=source.sample_aspect_ratio,
        source_rotation=source.rotation,
        source_fps=source.fps,
        source_duration_sec=source.duration,
        source_codec=source.codec,
        source_decoder=source.decoder,
        video_sha256=row.video_sha256,
        pair_sha256=row.pair_sha256,
        metadata=canonical_line(row.metadata),
        has_logvar=row.has_logvar,
        vae_latent_dtype=row.latent_dtype,  # type: ignore[arg-type] - checked by the model
        vae_latent_shape=list(row.latent_shape),
    )


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'row'}: {e['msg']}" for e in error.errors())


def row_from(fields: Any, where: str) -> LatentRow:
    """The row that gave these fields; DatasetError names `where`, the field and what is wrong with it."""
    try:
        checked = RowFields.model_validate(fields)
        metadata = json.loads(checked.metadata)
    except ValidationError as error:
        raise DatasetError(f"{where}: {_problems(error)}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where}: metadata: not JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise DatasetError(f"{where}: metadata: expected a JSON object, got {type(metadata).__name__}")
    row = _row(checked, metadata)
    if row.bucket != checked.bucket:
        raise DatasetError(f"{where}: bucket: expected {row.bucket}, got {checked.bucket}")
    return row


def _row(fields: RowFields, metadata: dict[str, Any]) -> LatentRow:
    channels, time, height, width = fields.vae_latent_shape
    left, top, crop_width, crop_height = fields.crop
    return LatentRow(
        key=fields.id,
        clip_key=fields.clip_key,
        window_index=fields.window_index,
        shard_id=fields.shard_id,
        num_frames=fields.num_frames,
        height=fields.height,
        width=fields.width,
        latent_shape=(channels, time, height, width),
        latent_dtype=fields.vae_latent_dtype,
        has_logvar=fields.has_logvar,
        caption=fields.caption,
        file_name=fields.file_name,
        fps=fields.fps,
        duration_sec=fields.duration_sec,
        frame_indices=tuple(fields.frame_indices),
        frame_times=tuple(fields.frame_times),
        padded_frames=fields.padded_frames,
        trimmed_frames=fields.trimmed_frames,
        crop=(left, top, crop_width, crop_height),
        source=SourceVideo(
            width=fields.source_width,
            height=fields.source_height,
            sample_aspect_ratio=fields.source_sample_aspect_ratio,
            rotation=fields.source_rotation,
            fps=fields.source_fps,
            duration=fields.source_duration_sec,
            codec=fields.source_codec,
            decoder=fields.source_decoder,
        ),
        pair_sha256=fields.pair_sha256,
        video_sha256=fields.video_sha256,
        metadata=metadata,
    )
