"""The 3-D discriminator against the authors' numbers, key table and parameter counts."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from cvvae.discriminator import CHECKPOINT_PREFIX, PatchDiscriminator3d

GOLDEN = Path(__file__).parents[1] / "golden"
DESCRIPTION = json.loads((GOLDEN / "discriminator_ndf32.json").read_text())


def golden_weights(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """The rule by which the reference weights were made: from the key and the seed alone."""
    weights = {}
    for key, like in module.state_dict().items():
        normal = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32).standard_normal(tuple(like.shape))
        if key.endswith(".bias"):
            values = 0.05 * normal
        elif like.ndim == 1:
            values = 1.0 + 0.1 * normal
        else:
            values = normal / np.sqrt(np.prod(like.shape[1:]))
        weights[key] = torch.from_numpy(values.astype(np.float32))
    return weights


@pytest.fixture(scope="module")
def discriminator():
    module = PatchDiscriminator3d(width=32)
    module.load_checkpoint(golden_weights(module, DESCRIPTION["weights_seed"]), where="golden")
    return module


@pytest.mark.parametrize("case", DESCRIPTION["cases"])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_logits_are_the_authors(case, with_gradients, discriminator):
    with np.load(GOLDEN / "discriminator_ndf32.npz") as arrays:
        video, logits = (torch.from_numpy(arrays[f"{case}/{name}"]) for name in ("video", "logits"))
    with torch.set_grad_enabled(with_gradients):
        got = discriminator(video).detach()
    assert got.shape == logits.shape
    difference = got - logits
    assert difference.abs().max() <= 1e-3
    assert difference.square().mean().sqrt() <= 5e-5 * logits.square().mean().sqrt()


def test_keys_and_shapes_are_the_checkpoints():
    table = json.loads((GOLDEN / "discriminator_state_dict_keys.json").read_text())["discriminator3d"]
    with torch.device("meta"):
        module = PatchDiscriminator3d()
    assert {key: list(value.shape) for key, value in module.state_dict().items()} == table


@pytest.mark.parametrize(("half_3d", "expected"), [(False, 29_015_041), (True, 18_103_297)])
def test_parameter_counts_are_the_authors(half_3d, expected):
    with torch.device("meta"):
        module = PatchDiscriminator3d(half_3d=half_3d)
    assert sum(p.numel() for p in module.parameters()) == expected


def test_every_trained_weight_gets_a_gradient(discriminator, video):
    discriminator(video(1, 5, 32, 32)).sum().backward()
    without = {name for name, p in discriminator.named_parameters() if p.grad is None}
    discriminator.zero_grad()
    assert without == {name for name, p in discriminator.named_parameters() if not p.requires_grad}
    assert all("temb_proj" in name for name in without)


def test_initialisation_is_narrow_and_follows_the_generator():
    modules = [PatchDiscriminator3d(width=32) for _ in range(2)]
    for module in modules:
        module.initialise(torch.Generator().manual_seed(3))
    kernels = [[p for name, p in m.named_parameters() if p.ndim == 5] for m in modules]
    assert all(torch.equal(a, b) for a, b in zip(*kernels, strict=True))
    assert torch.cat([p.flatten() for p in kernels[0]]).std().item() == pytest.approx(0.02, rel=0.01)


def test_a_training_states_discriminator_is_loaded_and_a_wrong_one_refused(discriminator):
    state = {CHECKPOINT_PREFIX + key: value for key, value in discriminator.state_dict().items()}
    other = PatchDiscriminator3d(width=32)
    other.load_checkpoint({**state, "encoder.conv_in.weight": torch.zeros(1)}, where="state.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), discriminator.parameters(), strict=True))
    del state[CHECKPOINT_PREFIX + "main.0.bias"]
    with pytest.raises(
        ValueError, match=r"state\.ckpt: expected the 58 keys of the model, got\n  1 missing: main\.0"
    ):
        other.load_checkpoint(state, where="state.ckpt")
    with pytest.raises(ValueError, match="width: expected a positive multiple of 32, got 48"):
        PatchDiscriminator3d(width=48)
