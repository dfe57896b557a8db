"""Windows to latents: tiles of many windows stacked into batches of one fixed shape per bucket.

What is stacked is not windows but the VAE's temporal tiles, so batches stay full whatever the clips' lengths.
Every batch of a tile shape has the same size; the last one is filled up with blank tiles whose results are thrown
away. The composition of the batches is a function of the windows' order alone.

Layouts: frames_BTHWC uint8 cross to the device and become video_BCTHW in [-1, 1] there; the permuted view of
channels-last frames is already in PyTorch's channels_last_3d layout, so nothing is copied to get it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from cvvae import DiagonalGaussian, Tile, VideoVAE
from cvvae.conv_probe import ConvProbe, probe_conv3d
from pipeline.activity import ENCODE, EncoderActivity
from pipeline.errors import ConfigError
from pipeline.formats.tensors import TORCH_DTYPES
from pipeline.policies import DTypeName, EncodePolicy

_LIBRARIES = ("torch", "numpy", "pillow", "av", "decord", "pyarrow", "webdataset")
_TAIL_BATCH_SHARE = 4

log = logging.getLogger(__name__)

Token = TypeVar("Token")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True)
class _OpenWindow(Generic[Token]):
    """A window whose tiles are not all encoded yet."""

    token: Token
    num_frames: int
    missing: int
    moments: list[Tensor | None]


@dataclass(slots=True)
class _PendingTile(Generic[Token]):
    frames_THWC: np.ndarray
    drop: int
    position: int
    window: _OpenWindow[Token]


class _BatchKind(NamedTuple):
    """What tiles have in common that may share a batch. With some VAEs the window decides whether its tiles are cut
    in space, not the tile."""

    shape: tuple[int, int, int]
    cut_in_space: bool


@dataclass(slots=True)
class EncodeClock:
    """What an encoder did, for reports; never stored in the dataset."""

    busy_seconds: float = 0.0
    frames: int = 0
    """Frames run through the VAE: shared frames of tiles and filler count."""
    window_frames: int = 0
    """Frames of the windows that came out whole."""
    tiles: int = 0
    filler_tiles: int = 0


class BatchTooLarge(Exception):
    """The device ran out of memory over a batch. Caught by who encodes a shard, which then starts over."""

    def __init__(self, shape: tuple[int, int, int], batch_pixels: int) -> None:
        super().__init__(f"a batch of tiles {shape} at batch_pixels {batch_pixels}")
        self.shape = shape
        self.batch_pixels = batch_pixels


class TileEncoder:
    """One VAE replica and the rule by which tiles are batched. May be used from several threads.

    All batches run in one thread of its own: PyTorch keeps the number of CPU threads per calling thread, so that a
    count set anywhere else would not hold where the work is done.
    """

    def __init__(
        self, vae: VideoVAE, policy: EncodePolicy, device: torch.device, *, threads: int | None = None
    ) -> None:
        """`threads` is the number of CPU threads; None leaves PyTorch's default.

        ConfigError if this machine's convolutions are wrong in the compute dtype; a warning if they are slow.
        """
        self.policy = policy
        self.device = device
        self.spec = vae.spec
        self.clock = EncodeClock()
        self.activity = EncoderActivity()
        self.batch_pixels = policy.batch_pixels
        """Of the shards that are begun from now on: the policy's, or less once the device ran out of memory."""
        self._memory_format = _memory_format(policy)
        self._vae = vae.eval().requires_grad_(False).to(device=device, dtype=TORCH_DTYPES[policy.dtype])
        self._vae.use_memory_format(self._memory_format)
        self._encode_tile = torch.compile(vae.encode_tile) if policy.compile else vae.encode_tile
        self._thread = ThreadPoolExecutor(1, "encode", initializer=make_deterministic, initargs=(threads,))
        if policy.dtype != "float32":
            dtype = TORCH_DTYPES[policy.dtype]
            probed = self._thread.submit(probe_conv3d, dtype, device, self._memory_format).result()
            check_convolutions(probed, policy.dtype, device)

    def shrink(self, batch: BatchTooLarge) -> bool:
        """Halve the batches of shards begun from now on, unless another shard has done so since; False if the batch
        that did not fit held a single tile."""
        size = self.batch_size(batch.shape, batch.batch_pixels)
        if size == 1:
            return False
        pixels = batch.batch_pixels // 2
        while self.batch_size(batch.shape, pixels) == size:
            pixels //= 2
        self.batch_pixels = min(self.batch_pixels, pixels)
        return True

    def batch_size(self, tile_shape: tuple[int, int, int], batch_pixels: int | None = None) -> int:
        """Tiles of (T, H, W) in one batch; `batch_pixels` are those of a shard that was begun before.

        Tiles shorter than a whole one come from tails and are few: their batches are a quarter, so that less of the
        last one is filler.
        """
        pixels = batch_pixels or self.batch_pixels
        if self.spec.longest_tile is not None and tile_shape[0] < self.spec.longest_tile:
            pixels //= _TAIL_BATCH_SHARE
        return max(1, pixels // int(np.prod(tile_shape)))

    def tiles(self, num_frames: int) -> tuple[Tile, ...]:
        return self._vae.time_tiles(num_frames)

    def batcher(self, clock: StageClock | None = None) -> TileBatcher[Any]:
        """A batcher for one shard (batches never mix shards); `clock` takes the time its batches need."""
        return TileBatcher(self, clock or StageClock())

    def encode(
        self,
        frames_BTHWC: np.ndarray,
        clock: StageClock,
        *,
        num_frames: int | None = None,
        batch_pixels: int | None = None,
    ) -> Tensor:
        """Raw moments (B, 2C, t, h, w), float32 on the CPU, of a full batch of uint8 tiles of windows of `num_frames`
        frames; None: the tiles are whole windows. BatchTooLarge, with `batch_pixels`, if the device's memory does not
        suffice."""
        asked = time.perf_counter()
        length = num_frames or frames_BTHWC.shape[1]
        encoded = self._thread.submit(self._encode, frames_BTHWC, length).result()
        if encoded is None:
            _, *shape, _ = frames_BTHWC.shape
            raise BatchTooLarge((shape[0], shape[1], shape[2]), batch_pixels or self.batch_pixels)
        moments, started, ended = encoded
        clock.add("wait for encoder", started - asked)
        clock.add("encode", ended - started)
        return moments

    def encode_alone(self, frames_THWC: np.ndarray) -> Tensor | None:
        """Mean (C, t, h, w), float32 on the CPU, of one window by itself through the model's own `encode`; None if it
        does not fit in the device's memory."""
        return self._thread.submit(self._whole_window, self._vae.encode, frames_THWC).result()

    def encode_untiled(self, frames_THWC: np.ndarray) -> Tensor | None:
        """The same in one pass without tiles in time. ValueError unless `can_be_untiled`."""
        if not self.can_be_untiled(len(frames_THWC)):
            raise ValueError(f"expected a window of tiles that share frames, got one of {len(frames_THWC)} frames")
        return self._thread.submit(self._whole_window, self._vae.encode_untiled, frames_THWC).result()

    def can_be_untiled(self, num_frames: int) -> bool:
        """Whether one pass over a window can be held against its tiles: there are several, and they share frames, or
        one pass would be another model's answer."""
        tiles = self.tiles(num_frames)
        return len(tiles) > 1 and all(tile.drop for tile in tiles[1:])

    def _whole_window(self, encode: Callable[[Tensor], DiagonalGaussian], frames_THWC: np.ndarray) -> Tensor | None:
        @torch.inference_mode()
        def mean() -> Tensor:
            return encode(self._video(frames_THWC[None])).mean[0].to("cpu", torch.float32)

        return self._if_it_fits(mean, [1, *frames_THWC.shape])

    def _video(self, frames_BTHWC: np.ndarray) -> Tensor:
        """video_BCTHW in [-1, 1] on the device, in the compute dtype and memory format."""
        frames = torch.from_numpy(frames_BTHWC) if frames_BTHWC.flags.writeable else torch.tensor(frames_BTHWC)
        if self.device.type == "cuda":
            frames = frames.pin_memory().to(self.device, non_blocking=True)
        video_BCTHW = frames.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)
        return video_BCTHW.to(dtype=TORCH_DTYPES[self.policy.dtype], memory_format=self._memory_format)

    def _encode(self, frames_BTHWC: np.ndarray, num_frames: int) -> tuple[Tensor, float, float] | None:
        with self.activity.during(ENCODE):
            return self._if_it_fits(lambda: self._encode_batch(frames_BTHWC, num_frames), list(frames_BTHWC.shape))

    def _if_it_fits(self, work: Callable[[], Result], shape_BTHWC: list[int]) -> Result | None:
        """None if the device ran out of memory. Not an exception: its traceback would hold on to the tensors."""
        try:
            return work()
        except torch.OutOfMemoryError as error:
            log.warning("device out of memory: batch=%s: %s", shape_BTHWC, str(error).split(". ")[0])
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    @torch.inference_mode()
    def _encode_batch(self, frames_BTHWC: np.ndarray, num_frames: int) -> tuple[Tensor, float, float]:
        started = time.perf_counter()
        moments = self._encode_tile(self._video(frames_BTHWC), num_frames=num_frames).to("cpu", torch.float32)
        ended = time.perf_counter()
        self.clock.busy_seconds += ended - started
        self.clock.frames += frames_BTHWC.shape[0] * frames_BTHWC.shape[1]
        return moments, started, ended

    def device_memory(self) -> dict[str, float]:
        """Bytes of the GPU's memory that PyTorch holds, by name; nothing on a CPU."""
        if self.device.type != "cuda":
            return {}
        return {
            "gpu_bytes.allocated": torch.cuda.memory_allocated(self.device),
            "gpu_bytes.reserved": torch.cuda.memory_reserved(self.device),
            "gpu_bytes.peak": torch.cuda.max_memory_allocated(self.device),
        }

    def numerics(self, batch_pixels: int | None = None) -> dict[str, Any]:
        """What decides the last bits of the numbers: recorded in every receipt, not part of the identity.
        `batch_pixels` are those that a shard was encoded with."""
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
            threads = None
        else:
            device = f"cpu {torch.backends.cpu.get_cpu_capability()}"
            threads = self._thread.submit(torch.get_num_threads).result()
        return {
            "device": device,
            "threads": threads,
            "batch_pixels": batch_pixels or self.batch_pixels,
            "tail_batch_share": _TAIL_BATCH_SHARE,
            "memory_format": str(self._vae.memory_format).removeprefix("torch."),
            "compile": self.policy.compile,
            "cudnn": torch.backends.cudnn.version() if self.device.type == "cuda" else None,
            "libraries": _library_versions((*_LIBRARIES, *self._vae.libraries)),
        }


class TileBatcher(Generic[Token]):
    """Collects tiles of one shard; gives (token, moments) as soon as a window's last tile is encoded."""

    def __init__(self, encoder: TileEncoder, clock: StageClock) -> None:
        self._encoder = encoder
        self._clock = clock
        self.batch_pixels = encoder.batch_pixels
        """Fixed for the whole shard, whatever becomes of another one."""
        self._pending: dict[_BatchKind, list[_PendingTile[Token]]] = {}

    def add(self, frames_THWC: np.ndarray, token: Token) -> Iterator[tuple[Token, DiagonalGaussian]]:
        """Take a window's frames (uint8); yield the windows this completes, moments (1, C, t, h, w) float32."""
        tiles = self._encoder.tiles(frames_THWC.shape[0])
        window: _OpenWindow[Token] = _OpenWindow(token, len(frames_THWC), len(tiles), [None] * len(tiles))
        for position, tile in enumerate(tiles):
            frames = frames_THWC[tile.start : tile.stop]
            shape = (frames.shape[0], frames.shape[1], frames.shape[2])
            kind = _BatchKind(shape, self._encoder.spec.encode_tiling_of(len(frames_THWC), *shape[1:]) is not None)
            queue = self._pending.setdefault(kind, [])
            queue.append(_PendingTile(frames, tile.drop, position, window))
            if len(queue) == self._encoder.batch_size(shape, self.batch_pixels):
                yield from self._encode(kind)

    def flush(self) -> Iterator[tuple[Token, DiagonalGaussian]]:
        """Encode what is left, in the order of the tile shapes."""
        for kind in sorted(self._pending):
            if self._pending[kind]:
                yield from self._encode(kind)

    def _encode(self, kind: _BatchKind) -> Iterator[tuple[Token, DiagonalGaussian]]:
        pending, self._pending[kind] = self._pending[kind], []
        shape = kind.shape
        size = self._encoder.batch_size(shape, self.batch_pixels)
        batch = np.zeros((size, *shape, 3), dtype=np.uint8)
        for slot, tile in zip(batch, pending, strict=False):
            slot[:] = tile.frames_THWC
        self._encoder.clock.tiles += len(pending)
        self._encoder.clock.filler_tiles += size - len(pending)
        # windows of one kind are cut alike in space, so any of their lengths will do
        length = pending[0].window.num_frames
        moments = self._encoder.encode(batch, self._clock, num_frames=length, batch_pixels=self.batch_pixels)
        for index, tile in enumerate(pending):
            window = tile.window
            window.moments[tile.position] = moments[index : index + 1, :, tile.drop :]
            window.missing -= 1
            if window.missing == 0:
                self._encoder.clock.window_frames += window.num_frames
                parts = [part for part in window.moments if part is not None]
                yield window.token, DiagonalGaussian.from_moments(torch.cat(parts, dim=2))


@dataclass(slots=True)
class StageClock:
    """Seconds per stage of a shard's work, for the report; `activity` learns which stage goes on."""

    activity: EncoderActivity = field(default_factory=EncoderActivity)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with self.activity.during(stage):
                yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def waits(self, stage: str, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; the time until each comes counts for `stage`."""
        while True:
            with self.measure(stage):
                item = next(items, None)
            if item is None:
                return
            yield item


def make_deterministic(threads: int | None) -> None:
    """Switches under which equal batches give equal bits: no TF32, no autotuned kernels (process-wide), and a fixed
    number of CPU threads for the calling thread."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if threads is not None:
        torch.set_num_threads(threads)


def check_convolutions(probed: ConvProbe, dtype: DTypeName, device: torch.device) -> None:
    """ConfigError if convolutions are wrong: nothing that they give may be stored. A warning if they are slow."""
    if probed.is_wrong:
        raise ConfigError(
            f"encode.dtype: 3-D convolutions in {dtype} are wrong on this machine (PyTorch {torch.__version__}, "
            f"{device.type}): relative error {probed.relative_rms:.2g}. Known of bfloat16 with cuDNN 9.8 to 9.10 and "
            "of CPUs with AMX. Update PyTorch or cuDNN (pip install -U nvidia-cudnn-cu12), or take float32"
        )
    if probed.is_slow:
        memory = "" if probed.extra_bytes is None else f" and {probed.extra_bytes >> 20} MiB of scratch memory"
        log.warning(
            "3-D convolutions are slow: dtype=%s device=%s take %.1f times as long as they should%s. Without "
            "hardware for that dtype float32 is faster; with it, update PyTorch or cuDNN (2.9.0 is known for it).",
            *(dtype, device.type, probed.slowdown, memory),
        )


def _memory_format(policy: EncodePolicy) -> torch.memory_format:
    if policy.memory_format == "contiguous":
        return torch.contiguous_format
    return torch.channels_last_3d


def _library_versions(names: Iterable[str]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
