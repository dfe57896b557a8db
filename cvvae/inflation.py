"""Inflation: an image VAE's weights as the start of a CV-VAE (arXiv 2405.20279, section 3.2).

The paper copies 2-D kernels "to the corresponding positions" of 3-D ones without saying which. Here each 3-D kernel
is zero but for one slice: the last one in the causal encoder, so that latent j begins as the image latent of the last
frame it stands for; the centre one in the decoder; and a convolution that doubles time holds the kernel twice, so
that all frames of a group begin as the decoded image of their latent.

That is exact, to rounding, for z = 4 if norms see one frame at a time and temporal attention is left out. Not exact:
- norms pool over a tile's frames: exact for a single frame or a static clip only, and CV-VAE's z = 4 layout has
  another epsilon than Stable Diffusion;
- z = 4's attention over time has no residual around it and a norm in it, so it cannot start as the identity: it
  starts as the linear map that comes nearest to it;
- post_quant_conv's bias is folded into a convolution that pads zeros: it is too large in the border of the latent;
- the SD3 layout pads by repeating edges, and by one pixel on each side where Stable Diffusion's downsamplers pad
  on one side only.
`deviations` says how much all that is on given clips.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvvae.cv_vae import CVVAE, CVVAESpec
from cvvae.image_vae import NUM_RES_BLOCKS, ImageVAE
from cvvae.image_vae_checkpoint import LoadedImageVAE
from cvvae.layers import (
    NamedSequence,
    NormSilu,
    Resample,
    ResBlock,
    SpatialAttention,
    SpatioTemporalAttention,
    batch_to_frames,
    frames_to_batch,
)
from cvvae.regularization import choose_frames, decode_images, encode_images, map_frames

_LAST, _CENTRE = 2, 1
_CALIBRATION_LATENTS = (8, 32)
"""How many latents of what side the temporal attention is fitted on: 8192 positions."""
_RIDGE = 1e-6


def inflate(image: LoadedImageVAE, spec: CVVAESpec, *, frames_NCHW: Tensor | None = None) -> CVVAE:
    """A CV-VAE of `spec` whose encoder and decoder start as the image VAE's, on the CPU in fp32, eval mode.

    z = 4's attention over time is fitted to the latents of `frames_NCHW`, in [-1, 1]; None: to draws from N(0, 1) in
    the normalised latent space, always the same. Nothing else depends on data or chance.
    ValueError listing every fact in which the image VAE is not the spec's.
    """
    check_image_vae(image, spec)
    vae = CVVAE(spec)
    source = fold_quant_convs(image.vae)
    with torch.no_grad():
        _inflate_half(vae.encoder, source.encoder, time_slice=_LAST)
        _inflate_half(vae.decoder, source.decoder, time_slice=_CENTRE)
        for path, block in zip(vae.decoder.order, source.decoder.order, strict=True):
            attention = vae.decoder.get_submodule(path)
            if isinstance(attention, SpatioTemporalAttention):
                latents_NChw = _calibration_latents(image, frames_NCHW)
                _fit_time_attention(attention, _attention_outputs(source, block, latents_NChw))
    return vae.use_memory_format(torch.channels_last_3d).eval()


def check_image_vae(image: LoadedImageVAE, spec: CVVAESpec) -> None:
    """ValueError if a CV-VAE of `spec` cannot live in the image VAE's latent space or take its weights."""
    got = {
        "in_channels": image.vae.in_channels,
        "latent_channels": image.vae.latent_channels,
        "widths": image.vae.widths,
        "num_res_blocks": NUM_RES_BLOCKS,
        "norm_groups": image.vae.norm_groups,
        "scaling_factor": image.scaling_factor,
        "shift_factor": image.shift_factor,
    }
    wrong = [
        f"{field}: expected {getattr(spec, field)}, got {value}"
        for field, value in got.items()
        if getattr(spec, field) != value
    ]
    if wrong:
        raise ValueError(f"image VAE for spec {spec.name!r}: " + "; ".join(wrong))


@torch.no_grad()
def fold_quant_convs(image_vae: ImageVAE) -> ImageVAE:
    """A copy whose quant convolutions are the identity, folded into their neighbours: CV-VAE has none.

    Encoding is the same to rounding; decoding too if post_quant_conv has no bias, else everywhere but in the border
    of the latent that the first convolution pads with zeros.
    """
    folded = copy.deepcopy(image_vae)
    conv_out, conv_in = (
        folded.encoder.get_submodule("conv_out"),
        folded.decoder.get_submodule("conv_in"),
    )
    assert isinstance(conv_out, nn.Conv2d)
    assert isinstance(conv_in, nn.Conv2d)
    quant, quant_bias = _as_matrix(folded.quant_conv)
    out_weight, out_bias = _in_double(conv_out)
    _set(conv_out, torch.einsum("oc,cikl->oikl", quant, out_weight), quant @ out_bias + quant_bias)
    post, post_bias = _as_matrix(folded.post_quant_conv)
    in_weight, in_bias = _in_double(conv_in)
    _set(conv_in, torch.einsum("ockl,ci->oikl", in_weight, post), in_bias + in_weight.sum(dim=(2, 3)) @ post_bias)
    for conv in (folded.quant_conv, folded.post_quant_conv):
        _set(conv, torch.eye(conv.in_channels)[..., None, None], torch.zeros(conv.in_channels))
    return folded


def _in_double(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    assert conv.bias is not None
    return conv.weight.double(), conv.bias.double()


def _as_matrix(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    weight, bias = _in_double(conv)
    return weight.flatten(1), bias


def _set(module: nn.Module, weight: Tensor, bias: Tensor) -> None:
    module.get_parameter("weight").copy_(weight)
    module.get_parameter("bias").copy_(bias)


# --- block by block: both networks list the same blocks in the same order ------------------------------------------


def _inflate_half(video: NamedSequence, image: NamedSequence, *, time_slice: int) -> None:
    for video_path, image_path in zip(video.order, image.order, strict=True):
        _inflate_block(video.get_submodule(video_path), image.get_submodule(image_path), time_slice)


def _inflate_block(video: nn.Module, image: nn.Module, time_slice: int) -> None:
    if isinstance(video, ResBlock):
        assert isinstance(image, ResBlock)
        for name in ("norm1", "conv1", "norm2", "conv2"):
            _inflate_block(video.get_submodule(name), image.get_submodule(name), time_slice)
        if video.shortcut_name in dict(video.named_children()):
            shortcuts = video.get_submodule(video.shortcut_name), image.get_submodule(image.shortcut_name)
            _inflate_block(*shortcuts, time_slice)
    elif isinstance(video, SpatialAttention):
        assert isinstance(image, SpatialAttention)
        for part in ("norm", "query", "key", "value", "out"):
            source = image.get_submodule(getattr(image.names, part))
            target = video.get_submodule(getattr(video.names, part))
            weight = source.get_parameter("weight")
            _set(target, weight.view_as(target.get_parameter("weight")), source.get_parameter("bias"))
    elif isinstance(video, Resample):
        _inflate_block(video.conv, image.get_submodule("conv"), time_slice)
    else:
        _inflate_leaf(video, image, time_slice)


def _inflate_leaf(video: nn.Module, image: nn.Module, time_slice: int) -> None:
    """A norm, or a convolution; one that doubles time has twice the channels, a set for each of two frames."""
    target = video.get_parameter("weight")
    weight, bias = image.get_parameter("weight").detach(), image.get_parameter("bias").detach()
    copies = len(target) // len(weight)
    weight, bias = torch.cat([weight] * copies), torch.cat([bias] * copies)
    if target.ndim == 5:
        kernel = torch.zeros_like(target)
        kernel[:, :, time_slice if target.shape[2] > 1 else 0] = weight
        weight = kernel
    _set(video, weight, bias)


# --- z = 4's attention over time -----------------------------------------------------------------------------------


def _calibration_latents(image: LoadedImageVAE, frames_NCHW: Tensor | None) -> Tensor:
    if frames_NCHW is not None:
        return image.vae.encode(frames_NCHW)[:, : image.vae.latent_channels]
    count, side = _CALIBRATION_LATENTS
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, image.vae.latent_channels, side, side, generator=generator)
    return latents / image.scaling_factor + image.shift_factor


def _attention_outputs(source: ImageVAE, attention_path: str, latents_NChw: Tensor) -> Tensor:
    """(N, C): what the attention branch of the image decoder answers at each position, for raw latents."""
    x = latents_NChw
    for path in source.decoder.order:
        block = source.decoder.get_submodule(path)
        if path == attention_path:
            assert isinstance(block, SpatialAttention)
            return block.attend(x.unsqueeze(2)).movedim(1, -1).flatten(0, -2)
        x = block(x)
    raise AssertionError(f"{attention_path} is a block of the decoder")


def _fit_time_attention(attention: SpatioTemporalAttention, outputs_NC: Tensor) -> None:
    """Queries, keys and values start as the normed tokens, so that a frame attends to frames like itself; the last
    layer as the least-squares map from there back to the spatial attention's own output."""
    channels = outputs_NC.shape[1]
    nn.init.ones_(attention.norm_t.weight)
    nn.init.zeros_(attention.norm_t.bias)
    for layer in (attention.q_t, attention.k_t, attention.v_t):
        _set(layer, torch.eye(channels), torch.zeros(channels))
    normed, wanted = attention.norm_t(outputs_NC).double(), outputs_NC.double()
    centred, wanted_centred = normed - normed.mean(0), wanted - wanted.mean(0)
    gram = centred.T @ centred / len(normed)
    # normed tokens have no mean over channels: one direction is empty, and the ridge keeps it so
    ridge = _RIDGE * torch.eye(channels, dtype=torch.float64)
    weight = torch.linalg.solve(gram + ridge, centred.T @ wanted_centred / len(normed)).T
    _set(attention.proj_out_t, weight, wanted.mean(0) - weight @ normed.mean(0))


# --- how far from the image VAE ------------------------------------------------------------------------------------


class FrameNormSilu(NormSilu):
    """`NormSilu` with the statistics of each frame by itself, as an image VAE has it."""

    def forward(self, input: Tensor) -> Tensor:
        return batch_to_frames(super().forward(frames_to_batch(input)), num_clips=input.shape[0])


def frame_by_frame(vae: CVVAE, *, eps: float, attends_over_time: bool) -> CVVAE:
    """A copy with norms of one frame at a time and epsilon `eps`, with or without attention over time.

    What inflation makes exact, and no model to train: its numbers are not those of CV-VAE.
    """
    twin = copy.deepcopy(vae)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NormSilu):
                norm = FrameNormSilu(child.num_groups, child.num_channels)
                norm.weight, norm.bias = child.weight, child.bias
                parent.add_module(name, norm)
            elif isinstance(child, SpatioTemporalAttention) and not attends_over_time:
                parent.add_module(name, _without_time(child))
    for module in twin.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = eps
    return twin


def _without_time(attention: SpatioTemporalAttention) -> SpatialAttention:
    norm = attention.get_submodule(attention.names.norm)
    assert isinstance(norm, nn.GroupNorm)
    spatial = SpatialAttention(norm.num_channels, names=attention.names, groups=norm.num_groups, eps=norm.eps)
    spatial.load_state_dict({key: value for key, value in attention.state_dict().items() if "_t." not in key})
    return spatial


@dataclass(frozen=True, slots=True)
class Deviation:
    """Root of the mean squared difference to the image VAE's numbers, divided by their own root mean square."""

    latents: float
    """E_v(X) against E_i of the last frame of each group: means."""
    pixels: float
    """D_v against D_i of those image latents, the image repeated for each frame of its group."""


@torch.inference_mode()
def deviations(vae: CVVAE, image_vae: ImageVAE, video_BCTHW: Tensor) -> dict[str, Deviation]:
    """How far an inflated model is from its image VAE on clips in [-1, 1], as it is and without what keeps it away:
    "as inflated", "norms per frame" (with the image VAE's epsilon) and "norms per frame, no attention over time".
    """
    eps = next(module.eps for module in image_vae.modules() if isinstance(module, nn.GroupNorm))
    return {
        "as inflated": _deviation(vae, image_vae, video_BCTHW),
        "norms per frame": _deviation(frame_by_frame(vae, eps=eps, attends_over_time=True), image_vae, video_BCTHW),
        "norms per frame, no attention over time": _deviation(
            frame_by_frame(vae, eps=eps, attends_over_time=False), image_vae, video_BCTHW
        ),
    }


def _deviation(vae: CVVAE, image_vae: ImageVAE, video_BCTHW: Tensor) -> Deviation:
    spec, num_frames = vae.spec, video_BCTHW.shape[2]
    latent = encode_images(image_vae, map_frames(video_BCTHW, choose_frames(spec, num_frames, "slice"))).mean
    spans = [spec.frame_span(frame) for frame in range(latent.shape[2])]
    lengths = torch.tensor([stop - start for start, stop in spans], device=latent.device)
    images = decode_images(image_vae, latent).repeat_interleave(lengths, dim=2)
    return Deviation(
        latents=_relative_rms(vae.encode(video_BCTHW).mean, latent),
        pixels=_relative_rms(vae.decode(latent), images),
    )


def _relative_rms(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())
