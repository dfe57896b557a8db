"""Windows of a dataset to look at: the source frames, read again, beside what the stored latents decode to.

The source must still be the video that the latent was made from (cut_again.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cvvae import VideoVAE, spec_from_dict
from cvvae.metrics import SSIM_WINDOW, psnr_of_frames, ssim_of_frames, to_unit_range
from pipeline.cut_again import cut_again, shape_of
from pipeline.dataset import DatasetFolder, index_name
from pipeline.decode.pool import DecodePool
from pipeline.documents import RunFile
from pipeline.errors import ConfigError, DatasetError, SourceError
from pipeline.formats import FORMATS, IndexRow, read_index, read_index_columns
from pipeline.recorded import recorded_shard, recorded_source
from pipeline.records import LatentRow
from pipeline.sources import SourceSpec, plan_source

SHOWN_KEYS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPair:
    """A window as it was and as its latent gives it back."""

    row: LatentRow
    source_THWC: np.ndarray
    """uint8 RGB."""
    decoded_THWC: np.ndarray
    """uint8 RGB, clamped and rounded as it would be shown."""
    latent_CTHW: Tensor
    """Raw mean, float32."""
    psnr_T: tuple[float, ...]
    """dB of each frame, peak 1, before rounding to 8 bits."""
    ssim_T: tuple[float, ...]
    """Of each frame; empty if a side is below SSIM's window of 11 pixels."""

    @property
    def psnr(self) -> float:
        """Mean over frames, dB."""
        return sum(self.psnr_T) / len(self.psnr_T)

    @property
    def ssim(self) -> float | None:
        return sum(self.ssim_T) / len(self.ssim_T) if self.ssim_T else None


def find_window(dataset: DatasetFolder, key: str) -> tuple[str, IndexRow]:
    """Shard id and index row of a window. Shards whose id begins the key, as video2dataset's do, are looked at
    first. DatasetError if no committed shard has it; it names the windows of that clip, or the nearest keys."""
    seen: list[str] = []
    for shard_id in sorted(dataset.receipt_ids(), key=lambda one: (not key.startswith(one), one)):
        with dataset.open_seekable(index_name(shard_id)) as file:
            _, table = read_index_columns(file, ["id"])
            keys: list[str] = table.column("id").to_pylist()
            if key in keys:
                file.seek(0)
                return shard_id, read_index(file).rows[keys.index(key)]
        seen += keys if len(seen) < 100_000 else []
    near = [other for other in seen if other.startswith(f"{key}_")] or difflib.get_close_matches(
        key, seen, SHOWN_KEYS
    )
    hint = f"; there are {', '.join(near[:SHOWN_KEYS])}" if near else ""
    raise DatasetError(f"{dataset.store.full_url('')}: no committed shard holds a window {key!r}{hint}")


class DecodeBack:
    """Reads windows of one dataset back. One decode pool and one VAE for all of them."""

    def __init__(
        self, dataset: DatasetFolder, vae: VideoVAE, pool: DecodePool, *, source: SourceSpec | None = None
    ) -> None:
        """`vae` may have other weights than the dataset's, but latents of the same shape: else ConfigError. `source`
        is where the clips lie now; None: where run.json says."""
        self.dataset = dataset
        self.run: RunFile = dataset.run_file()
        self._vae = vae.eval().requires_grad_(False)
        self._pool = pool
        self._source = source or recorded_source(self.run)
        self._moved = {shard.id: shard for shard in plan_source(source).shards} if source else {}
        stored = spec_from_dict(self.run.identity.vae)
        for name in ("latent_channels", "time_stride", "space_stride"):
            if getattr(vae.spec, name) != getattr(stored, name):
                raise ConfigError(
                    f"--vae: {vae.spec.name} has {name} {getattr(vae.spec, name)}, the latents are of {stored.name} "
                    f"with {getattr(stored, name)}: it cannot decode them"
                )

    def pairs(self, shard_id: str, rows: Sequence[IndexRow]) -> Iterator[WindowPair]:
        """Windows of one shard, in the source's order. The source is read up to the last of them.

        DatasetError if the source is not what was encoded; SourceError, StorageError if it cannot be read.
        """
        receipt = self.dataset.receipt(shard_id)
        with self.dataset.open_seekable(receipt.payload.path) as file:
            fetched = FORMATS[self.run.format].fetch(file, list(rows))
            latents = {latent.row.key: latent.mean_CTHW.float() for latent in fetched}
        try:
            shard = self._moved.get(shard_id) or recorded_shard(receipt)
            for row, window in cut_again(self.run, shard, self._source, [one.row for one in rows], self._pool):
                if isinstance(window, str):
                    raise DatasetError(f"{row.key}: {window}")
                yield self._pair(row, window.frames_THWC, latents[row.key])
        except FileNotFoundError as error:
            raise SourceError(f"{receipt.source.url} does not exist: give its place with --source") from error

    @torch.inference_mode()
    def _pair(self, row: LatentRow, frames_THWC: np.ndarray, latent_CTHW: Tensor) -> WindowPair:
        vae = self._vae
        raw = vae.decode(latent_CTHW[None].to(vae.device, vae.dtype))
        decoded_BCTHW = to_unit_range(raw, vae.spec.pixel_range).cpu()
        if tuple(decoded_BCTHW.shape[2:]) != shape_of(row):
            raise ConfigError(
                f"{row.key}: {vae.spec.name} decodes it to {tuple(decoded_BCTHW.shape[2:])}, not {shape_of(row)}"
            )
        source_THWC = frames_THWC.copy()  # the window's memory is read-only, and torch would complain
        source_BCTHW = torch.from_numpy(source_THWC).permute(3, 0, 1, 2)[None].float() / 255
        big_enough = min(row.height, row.width) >= SSIM_WINDOW
        return WindowPair(
            row=row,
            source_THWC=source_THWC,
            decoded_THWC=(decoded_BCTHW[0] * 255).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().numpy(),
            latent_CTHW=latent_CTHW,
            psnr_T=tuple(psnr_of_frames(decoded_BCTHW, source_BCTHW)[0].tolist()),
            ssim_T=tuple(ssim_of_frames(decoded_BCTHW, source_BCTHW)[0].tolist()) if big_enough else (),
        )
