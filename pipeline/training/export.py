"""The trained VAE as others load it: the authors' files, and a model card that says what it came from."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cvvae import VideoVAE, save_vae
from cvvae.image_vae_checkpoint import save_image_vae
from cvvae.latent_scale import standardize_latents
from cvvae.layers import frames_to_batch
from pipeline.formats.tensors import TORCH_DTYPES
from pipeline.storage import Store
from pipeline.training.frame_vae import FrameVAE
from pipeline.training.settings import SampleSource, TrainSettings, portable

FOLDER = "export"
CARD_NAME = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFacts:
    """What the card says."""

    settings: TrainSettings
    steps: int
    figures: dict[str, float]
    first_score: float | None
    """PSNR of the held-out samples before the first step."""
    skipped: dict[str, int]
    provenance: dict[str, str]


def export_model(store: Store, model: VideoVAE, facts: ExportFacts, held_out: Iterable[Tensor] = ()) -> None:
    """Write config.json, the weights and README.md under export/, the config last of the two that are loaded.

    `held_out` are the clips (B, 3, T, H, W) that `keep.standardize_latents` measures.
    """
    keep = facts.settings.keep
    with tempfile.TemporaryDirectory(prefix="export-") as scratch:
        folder = Path(scratch)
        model = copy.deepcopy(model)
        if isinstance(model, FrameVAE):
            scale, shift = model.spec.scaling_factor, model.spec.shift_factor
            assert isinstance(scale, float)
            assert isinstance(shift, float)
            if keep.standardize_latents:
                frames = (frames_to_batch(clip) for clip in held_out)
                standardize_latents(model.image_vae, frames, scaling_factor=scale, shift_factor=shift)
            model = model.to(TORCH_DTYPES[keep.export_dtype])
            save_image_vae(model.image_vae, folder, scaling_factor=scale, shift_factor=shift)
        else:
            model = model.to(TORCH_DTYPES[keep.export_dtype])
            save_vae(model, folder)
        weights = next(folder.glob("*.safetensors"))
        data = weights.read_bytes()
        store.replace(f"{FOLDER}/{weights.name}", data)
        card = model_card(facts, weights.name, hashlib.sha256(data).hexdigest(), _count(model))
        store.replace(f"{FOLDER}/{CARD_NAME}", card.encode())
        store.replace(f"{FOLDER}/config.json", (folder / "config.json").read_bytes())


def _count(model: VideoVAE) -> int:
    return sum(value.numel() for value in model.parameters())


def model_card(facts: ExportFacts, weights_name: str, sha256: str, num_parameters: int) -> str:
    """Markdown, with the metadata that model hubs read."""
    settings = facts.settings
    what = "image VAE" if settings.model.kind == "image" else f"video VAE ({settings.model.spec or 'continued'})"
    lines = [
        "---",
        "library_name: cvvae-latents",
        f"tags: [vae, {settings.model.kind}]",
        "---",
        f"# {what.capitalize()}",
        "",
        f"{num_parameters:,} parameters. `{weights_name}` has sha256 `{sha256}`.",
        "",
        "## From",
        "",
        *(f"- {name}: {value}" for name, value in facts.provenance.items()),
        f"- {facts.steps:,} steps, seed {settings.loop.seed}, {settings.loop.precision}"
        + (f", moving average of the weights (decay {settings.loop.ema_decay})" if settings.loop.ema_decay else ""),
        "",
        "## Data",
        "",
        *_data_lines(facts),
        "",
        "## Figures",
        "",
        *_figure_lines(facts),
        "",
        "## Settings",
        "",
        "```json",
        json.dumps(portable(settings.model_dump(mode="json", exclude={"output"})), indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)


def _data_lines(facts: ExportFacts) -> list[str]:
    lines = [_source_line(source) for source in facts.settings.data.sources]
    if facts.skipped:
        lines.append(
            "- skipped as unusable: " + ", ".join(f"{name} {count}" for name, count in sorted(facts.skipped.items()))
        )
    return lines


def _source_line(source: SampleSource) -> str:
    height, width = source.size
    return (
        f"- {source.name}: {source.media}, {source.frames} x {height} x {width}, weight {source.weight:g}, "
        f"{source.batch_size} a step, frame stride {source.frame_stride[0]} to {source.frame_stride[1]}"
    )


def _figure_lines(facts: ExportFacts) -> list[str]:
    held_out = facts.settings.data.held_out
    lines = [f"| figure | value |\n|---|---|\n| steps | {facts.steps} |"]
    if held_out is not None and facts.first_score is not None:
        lines.append(f"| held-out PSNR before the first step | {facts.first_score:.2f} dB |")
        lines.append(
            f"| held-out PSNR, {int(facts.figures['held_out_samples'])} samples of {held_out.frames} x "
            f"{held_out.size[0]} x {held_out.size[1]} | {facts.figures['held_out_psnr']:.2f} dB |"
        )
    lines += [
        f"| {name}, mean over the last logged steps | {facts.figures[name]:.5g} |"
        for name in ("l1", "reconstruction", "decoder_side", "kl")
        if name in facts.figures
    ]
    return lines
