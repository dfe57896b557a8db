"""The seam to diffusers: what all its VAEs share here. One module per group of classes states the rest.

Of a diffusers model only the network is taken (`encoder`, `decoder` and the 1x1 convolutions beside them), never the
class around it: tiling, slicing, framewise switches and the caches it keeps on itself stay behind, so there is
nothing to switch off, nothing left over from a call before, and state dicts have the published keys. How the network
is driven is written in each adapter and tested against diffusers' own `encode` and `decode`.

A spec needs no diffusers, so readers of a dataset do without; building a model imports it.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from cvvae.spec import VAESpec
from cvvae.vae import StreamState, VideoVAE

SERIES = "0.42"
"""The releases of diffusers that new specs mean: a fix of a class there changes latents (fp16 norms did)."""
INSTALL = "pip install 'cvvae-latents[peers]'"

PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")

Arguments = Mapping[str, Any]
"""Constructor arguments of a diffusers class, lists as tuples."""


class Geometry(NamedTuple):
    """What constructor arguments say of latents."""

    latent_channels: int
    time_stride: int
    space_stride: int


def _accept(arguments: Arguments) -> None:
    """No rule beyond those of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusersClass:
    """A diffusers class as far as it is known without importing it."""

    name: str
    """`_class_name` in config.json."""
    arguments: Mapping[str, Any]
    """Constructor arguments that decide the network, with the defaults of the class: a config may leave them out."""
    ignored: frozenset[str] = frozenset()
    """Arguments that decide no number here: of tiling, of pipelines, of training."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Arguments with the only value that is supported."""
    geometry: Callable[[Arguments], Geometry]
    check: Callable[[Arguments], None] = _accept
    """ValueError on arguments that contradict each other."""
    normalised_by: tuple[str, ...] = ("scaling_factor",)
    """Which of scaling_factor, shift_factor, latents_mean and latents_std the class has as arguments."""
    statistics_in_weights: bool = False
    """Mean and std of the latents are tensors of the checkpoint, `latents_mean` and `latents_std`."""

    def complete(self, given: Arguments) -> tuple[tuple[str, Any], ...]:
        """All arguments that decide the network, sorted by name: those given, and defaults for the others."""
        return tuple(sorted({**self.arguments, **given}.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusersSpec(VAESpec):
    """A VAE of diffusers: which class, with which arguments, driven how. The subclass of each family names the class.

    `config` are the constructor arguments that decide the network, sorted by name; strides and channels must be what
    follows from them. Latents are normalised by `scaling_factor` and `shift_factor` alone.
    Tiles are this package's, the same for all families, and none unless `tile_frames` or `tile_size` asks for them.
    """

    config: tuple[tuple[str, Any], ...]
    diffusers: str = SERIES
    """The releases whose numbers these are. Any can be described; only with that one installed a model is built."""
    tile_overlap: float = 0.25

    peer: ClassVar[DiffusersClass]

    def __post_init__(self) -> None:
        VAESpec.__post_init__(self)
        arguments = self.arguments
        if list(arguments) != sorted(self.peer.arguments):
            wrong = sorted(set(arguments) ^ set(self.peer.arguments))
            raise ValueError(
                f"VAESpec {self.name!r}: config: expected each argument of {self.peer.name} once and in order, "
                f"wrong or missing: {wrong}"
            )
        try:
            check_arguments(self.peer, arguments)
        except ValueError as error:
            raise ValueError(f"VAESpec {self.name!r}: config: {error}") from error
        stated = Geometry(self.latent_channels, self.time_stride, self.space_stride)
        if stated != self.peer.geometry(arguments):
            raise ValueError(
                f"VAESpec {self.name!r}: expected {self.peer.geometry(arguments)}, which follow from config, "
                f"got {stated}"
            )

    @property
    def arguments(self) -> dict[str, Any]:
        """`config` as a dict."""
        return dict(self.config)


def check_arguments(peer: DiffusersClass, arguments: Arguments) -> None:
    """ValueError on an argument of another kind than the class's default, or with a value that is not supported."""
    for name, value in arguments.items():
        default = peer.arguments[name]
        if name in peer.fixed and value != peer.fixed[name]:
            raise ValueError(
                f"{name}: expected {peer.fixed[name]!r}, got {value!r}; others are not supported for {peer.name}"
            )
        if not _same_kind(value, default):
            raise ValueError(f"{name}: expected what is like {default!r}, got {value!r}")
    peer.check(arguments)


def _same_kind(value: Any, default: Any) -> bool:
    """Where the default is None, a size may be left out."""
    if default is None:
        return value is None or type(value) is int
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(_same_kind(item, default[0]) for item in value if default)
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default)


class DiffusersVAE(VideoVAE):
    """The network of a diffusers VAE behind this package's interface. ImportError, saying what to install, without
    diffusers; ValueError with another release of it than the spec's.

    Calls share no state and may overlap. What diffusers clamps on decoding is not clamped here.
    """

    libraries = ("diffusers",)

    encoder: nn.Module
    decoder: nn.Module
    quant_conv: nn.Module
    post_quant_conv: nn.Module

    def __init__(self, spec: DiffusersSpec) -> None:
        super().__init__(spec)
        parts = dict(whole_model(spec).named_children())
        assert set(parts) <= set(PARTS), f"{spec.peer.name} has parts that no adapter drives: {sorted(parts)}"
        for name in PARTS:  # where a class has no such convolution, one that changes nothing and has no keys
            self.add_module(name, parts.get(name, nn.Identity()))
        self._norms_over_groups = any(isinstance(module, nn.GroupNorm) for module in self.modules())

    def _require_streaming(self) -> None:
        if not self.streams:
            raise ValueError(
                f"spec {self.spec.name!r} does not stream: tile_frames={self.spec.tile_frames} and "
                f"tile_size={self.spec.tile_size} ask for tiles that are computed apart from each other"
            )

    def _check_chunk(self, chunk_BCTHW: Tensor, state: StreamState | None) -> None:
        """ValueError unless these are frames that `encode_chunk` may be given after `state`."""
        self._require_streaming()
        self._check_tensor(chunk_BCTHW, name="chunk_BCTHW", channels=self.spec.in_channels)
        num_frames, height, width = chunk_BCTHW.shape[2:]
        unit = self.spec.time_stride
        if (num_frames - (state is None)) % unit:
            expected = f"1 + {unit}*k frames in the first chunk" if state is None else f"{unit}*k frames"
            raise ValueError(f"chunk_BCTHW: expected {expected}, got {num_frames}")
        self.spec.latent_shape(1, height, width)  # the sides: a frame of this size must be valid

    def use_memory_format(self, memory_format: torch.memory_format) -> Self:
        """Contiguous, whatever is asked for, where the network has group norms: PyTorch's is off by 5e-5 in large
        clips whose channels are last."""
        return super().use_memory_format(torch.contiguous_format if self._norms_over_groups else memory_format)

    def _arranged(self, x: Tensor) -> Tensor:
        """`x` in the model's memory format: what follows a convolution keeps the layout of its input."""
        return x.contiguous(memory_format=self.memory_format)


def whole_model(spec: DiffusersSpec) -> nn.Module:
    """The diffusers object that `spec` describes, weights not set."""
    library = _import_diffusers(spec.diffusers)
    return getattr(library, spec.peer.name)(**as_json(spec.arguments))


def as_json(arguments: Arguments) -> dict[str, Any]:
    """Lists for tuples, as a config.json gives them: not every class takes tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}


def _import_diffusers(series: str) -> ModuleType:
    try:
        library = importlib.import_module("diffusers")
    except ImportError as error:
        raise ImportError(f"this VAE is one of diffusers, which is not installed: {INSTALL}") from error
    if library.__version__.split(".")[:2] != series.split("."):
        raise ValueError(f"diffusers: expected a release {series}.x, got {library.__version__}; {INSTALL}")
    return library
