"""The finetune job: shipped configs, the image VAE and what is inflated from it, Ray Train, a cluster's job API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cvvae import load_vae
from cvvae.image_vae_checkpoint import load_image_vae
from jobs.config import load_config
from jobs.finetune_config import FinetuneConfig
from jobs.finetune_vae import run_finetune
from pipeline.errors import ConfigError
from pipeline.training.batches import held_out_frames, to_video

PROJECT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((PROJECT / "configs" / "finetune").glob("*.yaml"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clips(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "tars"
    v2d_shards(folder, num_shards=2, good=2, failed=1, broken=1)
    return folder


def config_file(folder: Path, clips: Path, **sections: Any) -> Path:
    """A run of seconds, as YAML."""
    source = {"name": "clips", "urls": str(clips), "frames": 5, "size": [16, 16], "short_side": 24, "batch_size": 2}
    plain: dict[str, Any] = {
        "model": {"spec": "cvvae-sd21-tiny", "widths": [32, 32, 32, 32], "seed": 1},
        "data": {"sources": [source], "held_out": {**source, "name": "held_out"}, "lanes": 2, "decode_children": 1},
        "loop": {"steps": 2},
        "loss": {"perceptual": 0, "adversarial": 0, "kl": 1e-6},
        "output": {"url": str(folder / "run")},
        "workers": {"count": 0, "threads": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(plain | sections))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    config = load_config(FinetuneConfig, path)
    assert config.run_settings().loop.steps >= 1


def test_the_sd3_recipe_is_the_published_one() -> None:
    config = load_config(FinetuneConfig, PROJECT / "configs" / "finetune" / "cvvae_sd3.yaml")
    generator, judge = config.generator, config.discriminator
    assert (generator.lr, generator.betas, generator.eps, generator.weight_decay) == (4e-5, (0.9, 0.98), 1e-4, 0.01)
    assert (generator.warmup_steps, generator.schedule_steps, generator.floor) == (1000, 60000, 0.005)
    assert (judge.lr, judge.schedule) == (2e-5, "constant")
    images, clips = config.data.sources
    assert (images.batch_size, clips.batch_size) == (8 * 8, 8 * 1)
    assert (images.weight, clips.weight, clips.frames, clips.size) == (0.5, 0.5, 17, (256, 256))
    assert (clips.frame_stride, clips.short_sides, images.short_sides) == ((1, 8), (512, 512), (320, 320))
    weights = config.loss.weights()
    assert (weights.perceptual, weights.kl, weights.adversarial, weights.adversarial_start) == (0.5, 1.0, 0.5, 1)


def test_an_image_vae_and_the_video_vae_inflated_from_it(clips: Path, tmp_path: Path) -> None:
    stills = {"name": "stills", "urls": str(clips), "size": [16, 16], "batch_size": 2, "max_start": 20}
    image_data = {"sources": [stills], "held_out": {**stills, "name": "held_out"}, "decode_children": 1}
    image_model = {"kind": "image", "seed": 0, "widths": [32, 32, 32, 32], "scaling_factor": 0.18215}
    (tmp_path / "image").mkdir()
    first = config_file(tmp_path / "image", clips, model=image_model, data=image_data)
    run_finetune(load_config(FinetuneConfig, first, ["keep.standardize_latents=true"]))
    export = tmp_path / "image" / "run" / "export"
    image_vae = load_image_vae(export)
    assert image_vae.scaling_factor == 0.18215
    held_out = load_config(FinetuneConfig, first).data.held_out
    assert held_out is not None
    judged = held_out_frames(held_out, 16, rank=0, num_workers=1)
    frames = torch.cat([to_video(frames_THWC[None])[:, :, 0] for _, frames_THWC in judged])
    means = image_vae.vae.encode(frames)[:, :4].transpose(0, 1).flatten(1)
    torch.testing.assert_close(means.std(1, correction=0), torch.full((4,), 1 / 0.18215), rtol=1e-3, atol=0)

    (tmp_path / "video").mkdir()
    spec = {"spec": "cvvae-sd21-tiny", "widths": [32, 32, 32, 32]}
    regularization = {"image_vae": str(export)}
    video = config_file(
        tmp_path / "video", clips, model={**spec, "image_vae": str(export)}, regularization=regularization
    )
    end = run_finetune(load_config(FinetuneConfig, video, ["loop.steps=1", "keep.export_dtype=float16"]))
    assert end["figures"]["decoder_side"] > 0
    vae = load_vae(tmp_path / "video" / "run" / "export")
    assert vae.spec.latent_channels == 4
    card = (tmp_path / "video" / "run" / "export" / "README.md").read_text()
    assert load_image_vae(export).weights_sha256 in card

    wide = config_file(tmp_path, clips, model={"spec": "cvvae-sd21-tiny", "image_vae": str(export)})
    with pytest.raises(ConfigError, match=r"widths: expected \(32, 64, 128, 128\), got \(32, 32, 32, 32\)"):
        run_finetune(load_config(FinetuneConfig, wide, [f"output.url={tmp_path / 'wide'}"]))
    other = {"spec": "cvvae-sd3-tiny", "seed": 0}
    deep = config_file(tmp_path, clips, model=other, regularization=regularization)
    with pytest.raises(ConfigError, match=r"latent channels: expected 16, got 4; scaling_factor: expected 1\.5305"):
        run_finetune(load_config(FinetuneConfig, deep, [f"output.url={tmp_path / 'deep'}"]))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_workers_on_ray_train(clips: Path, tmp_path: Path, ray_cluster: str) -> None:
    """The run of one process, by two workers that Ray Train joins."""
    smooth = {"loss": {"perceptual": 0, "adversarial": 0, "kl": 1e-6, "pixel_error": "squared"}}
    (tmp_path / "alone").mkdir()
    (tmp_path / "shared").mkdir()
    alone = run_finetune(load_config(FinetuneConfig, config_file(tmp_path / "alone", clips, **smooth)))
    path = config_file(tmp_path / "shared", clips, **smooth)
    shared = run_finetune(load_config(FinetuneConfig, path, ["workers.count=2", "workers.cpus=1"]))
    assert shared["steps"] == alone["steps"] == 2
    assert shared["figures"]["held_out_psnr"] == pytest.approx(alone["figures"]["held_out_psnr"], abs=0.01)
    load_vae(tmp_path / "shared" / "run" / "export")
    with pytest.raises(Exception, match="other settings"):
        run_finetune(load_config(FinetuneConfig, path, ["workers.count=2", "workers.cpus=1", "loop.seed=9"]))
