"""IV-VAE's start from an image VAE (arXiv 2411.06449, section 3.2): the key-frame branch begins as that image VAE.

The image VAE is one of IV-VAE's own layers: the branch-less family on images, with half the latent channels and as
many channels as one branch has. So after inflation the first half of the latent of a group is the image latent of
its first frame (the key frame), and each key frame is decoded as an image: both exactly, since IV-VAE's norms and
attention see one frame at a time.

How the motion branch begins nobody published. Here it begins as the same image VAE, in which the features of each
pair of frames are averaged on the way down and repeated on the way up; no branch reads the other until training lets
it. So a clip in which nothing moves begins with the image VAE's reconstruction at every frame.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from cvvae.iv_vae import IVVAE, IVVAESpec
from cvvae.iv_vae_layers import (
    BranchAttention,
    BranchConv,
    BranchNormSilu,
    BranchPointConv,
    CausalConv,
    Downsample,
    FrameConv,
    GroupCausalConv,
    PyramidHead,
    Resample,
    Upsample,
)
from cvvae.spec import VAESpec

_NUM_VIEWS = len(PyramidHead.DILATIONS)


def image_spec_for(spec: IVVAESpec) -> IVVAESpec:
    """The image VAE that `inflate_keyframes` starts a model of `spec` from. ValueError if it cannot be halved.

    It is a spec of the baseline family, to be trained on images (T = 1), with the encoder's head and attention of
    `spec`. Its scale is not known before it is trained.
    """
    if spec.num_branches != 2 or spec.width % 2 or spec.latent_channels % 2:
        raise ValueError(
            f"spec {spec.name!r}: expected two branches and an even width and number of latent channels, got "
            f"branches={spec.branches!r}, width={spec.width}, latent_channels={spec.latent_channels}"
        )
    return replace(
        spec,
        name=f"{spec.name}-keyframes",
        family="ivvae-baseline",
        branches="one",
        width=spec.width // 2,
        latent_channels=spec.latent_channels // 2,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


@torch.no_grad()
def inflate_keyframes(image_vae: IVVAE, spec: IVVAESpec) -> IVVAE:
    """An IV-VAE of `spec` whose key-frame branch is the image VAE, on the CPU in fp32, eval mode; nothing is random.

    ValueError if the image VAE is not the one `image_spec_for(spec)` describes; its scale may be any.
    """
    _check(image_vae.spec, image_spec_for(spec))
    vae = IVVAE(spec)
    for path, block in vae.named_modules():
        copy_into = _COPIES.get(type(block))
        if copy_into is not None:
            copy_into(block, image_vae.get_submodule(path))
    return vae.use_memory_format(torch.channels_last_3d).eval()


def _check(got: VAESpec, expected: IVVAESpec) -> None:
    fields = ("family", "in_channels", "latent_channels", "width", "encoder_head", "attention", "pixel_range")
    wrong = [
        f"{field}: expected {getattr(expected, field)!r}, got {getattr(got, field, None)!r}"
        for field in fields
        if getattr(got, field, None) != getattr(expected, field)
    ]
    if wrong:
        raise ValueError(f"image VAE for the key frames of {expected.name!r}: " + "; ".join(wrong))


# --- one function for each kind of block: (block of both branches, the image VAE's at the same place) ---------------


def _copy_conv(conv: nn.Module, image: nn.Module) -> None:
    """Members of their own for each branch, or one for both: either way a branch reads its own channels only."""
    assert isinstance(conv, BranchConv)
    assert isinstance(image, BranchConv)
    (source,) = image.children()
    assert isinstance(source, CausalConv | GroupCausalConv | FrameConv)
    kernel, bias = source.kernel_of_first_frame(), source.get_parameter("bias")
    members = list(conv.children())
    reads_pixels = members[0].get_parameter("weight").shape[1] == kernel.shape[1]
    if len(members) == 1:
        _set(members[0], _diagonal(kernel), torch.cat([bias, bias]))
        return
    for branch, member in enumerate(members):
        own = kernel if reads_pixels else _in_branch(kernel, branch)
        _set(member, own, bias)


def _copy_point_conv(conv: nn.Module, image: nn.Module) -> None:
    (source,) = image.children()
    kernel = source.get_parameter("weight").flatten(2).unsqueeze(-1)
    for branch, member in enumerate(conv.children()):
        _set(member, _in_branch(kernel, branch), source.get_parameter("bias"))


def _copy_norm(norm: nn.Module, image: nn.Module) -> None:
    gamma = image.get_parameter("gamma")
    norm.get_parameter("gamma").copy_(torch.cat([gamma, gamma]))


def _copy_attention(attention: nn.Module, image: nn.Module) -> None:
    (source,) = image.children()
    for branch in attention.children():
        branch.load_state_dict(source.state_dict())


def _copy_resample(resample: nn.Module, image: nn.Module) -> None:
    """Space for each branch; over time, the mean of two frames on the way down, twice the same on the way up."""
    assert isinstance(resample, Resample)
    assert isinstance(image, Resample)
    source = image.get_submodule(f"{image.names[0]}.1")
    for name in resample.names:
        resample.get_submodule(f"{name}.1").load_state_dict(source.state_dict())
    if resample.time_conv is not None:
        channels = resample.time_conv.in_channels
        identity = torch.eye(channels)[:, :, None, None, None]
        averages = isinstance(resample, Downsample)
        kernel = identity.expand(-1, -1, 2, -1, -1) / 2 if averages else torch.cat([identity, identity])
        resample.time_conv.weight.copy_(kernel)
        assert resample.time_conv.bias is not None
        resample.time_conv.bias.zero_()


def _copy_pyramid(head: nn.Module, image: nn.Module) -> None:
    """Each view answers for the key frames first, then for the motion; the last convolution joins views of a branch.

    The joined views come as all first halves, then all second ones: for two branches the halves are the branches, in
    an image VAE they are halves of its only one.
    """
    *views, join = head.children()
    *image_views, image_join = image.children()
    for view, source in zip(views, image_views, strict=True):
        target, conv = view.get_submodule("conv"), source.get_submodule("conv")
        bias = conv.get_parameter("bias")
        _set(target, _diagonal(conv.get_parameter("weight")), torch.cat([bias, bias]))
    conv = image_join.get_submodule("conv")
    kernel, bias = conv.get_parameter("weight"), conv.get_parameter("bias")
    # (out, [half, view, channel of a half]) -> (out, [view, half, channel of a half]): a branch's views in order
    per_view = kernel.unflatten(1, (2, _NUM_VIEWS, -1)).transpose(1, 2).flatten(1, 3)
    _set(join.get_submodule("conv"), _diagonal(per_view), torch.cat([bias, bias]))


_COPIES = {
    BranchConv: _copy_conv,
    BranchPointConv: _copy_point_conv,
    BranchNormSilu: _copy_norm,
    BranchAttention: _copy_attention,
    PyramidHead: _copy_pyramid,
    Downsample: _copy_resample,
    Upsample: _copy_resample,
}


# --- kernels -----------------------------------------------------------------------------------------------------


def _in_branch(kernel: Tensor, branch: int) -> Tensor:
    """(out, in, h, w) -> (out, 2 in, h, w) that reads one branch only."""
    parts = [torch.zeros_like(kernel)] * 2
    parts[branch] = kernel
    return torch.cat(parts, dim=1)


def _diagonal(kernel: Tensor) -> Tensor:
    """(out, in, h, w) -> (2 out, 2 in, h, w): each branch on its own."""
    return torch.cat([_in_branch(kernel, 0), _in_branch(kernel, 1)])


def _set(conv: nn.Module, kernel: Tensor, bias: Tensor) -> None:
    """A 2-D kernel into a convolution of frames, or into the slice of a 3-D one that reads the frame itself."""
    weight = conv.get_parameter("weight")
    weight.zero_()
    if weight.ndim == 4:
        weight.copy_(kernel)
    else:
        # causal kernels end at the frame, group causal ones have it in the middle, kernels of 1 are it
        weight[:, :, -1 if isinstance(conv, CausalConv) else weight.shape[2] // 2] = kernel
    conv.get_parameter("bias").copy_(bias)
