"""CV-VAE's promise at small scale: what a model that learned image latents gains on latents that are like them.

    python examples/headline_experiments.py frames   --out OUT
    python examples/headline_experiments.py converge --out OUT --plain-vae P
    python examples/headline_experiments.py fvd      --run OUT/output

frames    a latent model learns the image VAE's latents of every fourth frame; then only its output layer is finetuned
          on the video VAE's latents of all frames, beside finetuning nothing, everything, and learning from nothing
          for as many steps. OUT/output/samples-*.gif has the full frame rate: the video VAE decodes it.
converge  from the same start, everything is finetuned on latents of the regularized VAE and of its unregularized
          twin: loss against steps.
fvd       FVD of what a run draws against the latents it learned, both decoded, with the network and the distance of
          `latents evaluate`.

The VAEs are the shipped ones if --image-vae and --video-vae name no others. The loss is the mean squared error of the
velocity over that of predicting 0, on fixed noise and all windows: latent spaces of other scales can be compared.
Each run is made once; OUT/*.json has the figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cvvae.frechet import FeatureStatistics, frechet_distance
from cvvae.i3d import I3D, fvd_input
from examples.train_latent_diffusion import LatentTransformer, Settings, draw, on_path, open_vae, train
from jobs.metric_weights import find_i3d
from pipeline.reader import LatentDataset

CONFIG = "configs/encode/headline.yaml"
EVERY_FOURTH = ("windows.frames=5", "windows.frame_stride=4", "windows.window_stride=4")
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
app = typer.Typer(add_completion=False, help=__doc__)


def encode(vae: str, output: Path, overrides: Iterable[str] = ()) -> str:
    """The dataset of a VAE's latents; made if it is not there."""
    settings = [f"vae.checkpoint={vae}", f"output.url={output}", *overrides]
    options = [part for setting in settings for part in ("--set", setting)]
    subprocess.run([sys.executable, "-m", "jobs.cli", "encode", CONFIG, *options], check=True)
    return str(output)


@torch.no_grad()
def relative_loss(settings: Settings) -> float:
    """Of the averaged model in settings.out on all windows of settings.data: 1 is what predicting 0 gives."""
    dataset = LatentDataset(settings.data, settings.batch_size, tail="pad", shuffle=False, rank=0, world_size=1)
    model = average_of(settings, dataset)
    error = size = 0.0
    for batch in dataset:
        clean = batch.latents_BCTHW[~batch.is_padding_B]
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(batch.number))
        for time in TIMES:
            time_B = torch.full((len(clean),), time)
            x, velocity = on_path(settings.objective, clean, noise, time_B)
            error += (model(x, time_B, [""] * len(clean)) - velocity).square().sum().item()
            size += velocity.square().sum().item()
    return error / size


def average_of(settings: Settings, dataset: LatentDataset) -> LatentTransformer:
    model = LatentTransformer(dataset.catalog.spec.latent_channels, settings).eval()
    saved = torch.load(Path(settings.out) / "checkpoint.pt", weights_only=True, map_location="cpu")
    model.load_state_dict(saved["average"])
    return model


def compare_finetuning(image: Settings, video: Settings, out: Path, steps: int) -> dict[str, float]:
    """Relative loss on video latents by way of finetuning. `image`: the run that learns image latents."""
    train(image)
    start = str(Path(image.out) / "checkpoint.pt")
    results = {"nothing finetuned": relative_loss(replace(video, out=image.out))}
    for name, options in {
        "output": {"start_from": start, "train_only": "output"},
        "everything": {"start_from": start},
        "from nothing": {},
    }.items():
        run = replace(video, out=str(out / name.replace(" ", "-")), steps=steps, **options)
        train(run)
        results[name] = relative_loss(run)
    return results


def compare_convergence(
    image: Settings, runs: dict[str, Settings], marks: Sequence[int]
) -> dict[str, list[tuple[int, float]]]:
    """Relative loss at `marks` of finetuning everything from the run on image latents, for each of `runs`."""
    train(image)
    start = str(Path(image.out) / "checkpoint.pt")
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, settings in runs.items():
        curves[name] = [(0, relative_loss(replace(settings, out=image.out)))]
        for mark in marks:
            run = replace(settings, start_from=start, steps=mark)
            train(run)
            curves[name].append((mark, relative_loss(run)))
    return curves


@torch.no_grad()
def fvd_of_samples(settings: Settings, i3d: I3D) -> dict[str, float]:
    """FVD of as many drawn clips as the dataset has against those, both decoded; and how many that is."""
    dataset = LatentDataset(settings.data, settings.batch_size, tail="pad", shuffle=False, rank=0, world_size=1)
    vae, model = open_vae(settings.vae), average_of(settings, dataset)
    real, drawn = (FeatureStatistics.empty(i3d.Logits.out_channels) for _ in range(2))
    for batch in dataset:
        clean = batch.latents_BCTHW[~batch.is_padding_B]
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(batch.number))
        samples = draw(model, noise, [""] * len(clean), settings)
        for statistics, latents_BCTHW in ((real, clean), (drawn, samples)):
            video_BCTHW = vae.decode(vae.denormalize(latents_BCTHW)).clamp(-1, 1)
            statistics.add(i3d(fvd_input((video_BCTHW + 1) / 2)))
    return {"fvd": frechet_distance(real, drawn), "clips": real.count}


Out = Annotated[Path, typer.Option(help="A folder for datasets, runs and figures.")]
Checkpoint = Annotated[str, typer.Option(help="What load_vae reads.")]


@app.command()
def frames(
    out: Out,
    image_vae: Checkpoint = "shipped://tiny-image-vae",
    video_vae: Checkpoint = "shipped://tiny-cvvae",
    base_steps: int = 3000,
    steps: int = 300,
) -> None:
    """Four times the frames by finetuning the output layer."""
    image, video = _image_and_video(image_vae, video_vae, out, base_steps)
    _report(out / "frames.json", compare_finetuning(image, video, out, steps))


@app.command()
def converge(
    out: Out,
    plain_vae: Checkpoint,
    image_vae: Checkpoint = "shipped://tiny-image-vae",
    video_vae: Checkpoint = "shipped://tiny-cvvae",
    base_steps: int = 3000,
) -> None:
    """Do regularized latents converge faster from a model of image latents?"""
    image, video = _image_and_video(image_vae, video_vae, out, base_steps)
    plain = replace(video, data=encode(plain_vae, out / "latents-plain"), vae=plain_vae)
    runs = {
        "regularized": replace(video, out=str(out / "from-regularized")),
        "unregularized": replace(plain, out=str(out / "from-unregularized")),
    }
    _report(out / "converge.json", compare_convergence(image, runs, marks=(50, 100, 200, 400, 800)))


@app.command()
def fvd(run: Annotated[Path, typer.Option(help="A run of train_latent_diffusion.py.")]) -> None:
    """FVD of a run's samples."""
    saved = torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu")
    _report(run / "fvd.json", fvd_of_samples(Settings(**saved["settings"]), find_i3d()))


def _image_and_video(image_vae: str, video_vae: str, out: Path, base_steps: int) -> tuple[Settings, Settings]:
    """The run on image latents, and what the runs on video latents share."""
    shared = Settings(batch_size=16, checkpoint_every=50, sample_every=1000)
    images = encode(image_vae, out / "latents-image", EVERY_FOURTH)
    image = replace(shared, data=images, vae=image_vae, out=str(out / "image"), steps=base_steps)
    return image, replace(shared, data=encode(video_vae, out / "latents-video"), vae=video_vae)


def _report(path: Path, results: object) -> None:
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{path}\n{path.read_text()}", end="")


if __name__ == "__main__":
    app()
