"""The start as a box filter: pictures come back as their blocks' averages, and every weight can still learn."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from cvvae.image_vae import ImageVAE
from cvvae.image_vae_start import start_as_box_filter


def test_it_shrinks_and_enlarges() -> None:
    torch.manual_seed(0)
    vae = ImageVAE(in_channels=3, latent_channels=4, widths=(32, 32, 64, 64), norm_groups=8)
    start_as_box_filter(vae)
    small = torch.rand(2, 3, 6, 8) * 1.6 - 0.8
    frames = F.interpolate(small, scale_factor=8.0, mode="nearest") + 0.1 * torch.randn(2, 3, 48, 64)
    averages = F.avg_pool2d(frames, 8)
    with torch.no_grad():
        mean, logvar = vae.encode(frames).chunk(2, dim=1)
        decoded = vae.decode(mean)
    torch.testing.assert_close(mean[:, :3], averages, atol=0.05, rtol=0)
    torch.testing.assert_close(logvar.exp().sqrt(), torch.full_like(logvar, 0.05))
    torch.testing.assert_close(decoded, F.interpolate(averages, scale_factor=8.0, mode="nearest"), atol=0.05, rtol=0)


def test_every_block_learns() -> None:
    torch.manual_seed(0)
    vae = ImageVAE(in_channels=3, latent_channels=4, widths=(32, 32), norm_groups=8)
    start_as_box_filter(vae)
    optimizer = torch.optim.Adam(vae.parameters(), 1e-3)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    frames = torch.rand(1, 3, 16, 16) * 2 - 1
    for _ in range(3):  # what was silenced hides what is before it for a step or two
        loss = (vae.decode(vae.encode(frames)[:, :4]) - frames).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    still = {name for name, value in vae.state_dict().items() if torch.equal(value, before[name])}
    assert not {name for name in still if "conv" in name and "quant" not in name}


def test_too_few_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="norm groups of 4 channels"):
        start_as_box_filter(ImageVAE(in_channels=3, latent_channels=4, widths=(32, 32), norm_groups=32))
