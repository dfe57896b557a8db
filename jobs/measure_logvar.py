"""How cheaply log variances can be stored: what each way does to the Gaussians that a trainer samples from.

    python jobs/measure_logvar.py                     # real clips, a small VAE with seeded weights
    python jobs/measure_logvar.py /data/latents       # a dataset that was encoded with encode.logvar: true

Each stored log variance is compared with what a cheaper form gives back: the KL divergence between the two Gaussians
(their mean is the same), and the standard deviation that is sampled with, relative to the right one.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import typer
from torch import Tensor

from jobs.bench_report import BenchTable
from jobs.reader_latents import encode_real
from pipeline.dataset import DatasetFolder, shard_name
from pipeline.formats import FORMATS
from pipeline.logvar_code import LOGVAR_LIMITS, logvar_from_int8, logvar_to_int8
from pipeline.storage import Store

SIDES = ((80, 184), (96, 160))
Scheme = Callable[[Tensor], Tensor]


def measure_logvar(
    dataset: Annotated[str | None, typer.Argument(help="Its folder or URL; without one, real clips.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="To look at, from the first on.")] = 64,
    checkpoint: Annotated[str | None, typer.Option(help="VAE to encode the real clips with.")] = None,
    spec: Annotated[
        str, typer.Option(help="Without a checkpoint: this one with random weights.")
    ] = "cvvae-sd21-tiny",
) -> None:
    """What int8 and fewer numbers do to the stored log variances."""
    if dataset is not None:
        found = stored_logvars(dataset, windows)
    else:
        with tempfile.TemporaryDirectory(prefix="measure-logvar-") as folder:
            vae = {"checkpoint": checkpoint} if checkpoint else {"spec": spec, "seed": 0}
            real = encode_real(Path(folder), vae=vae, sides=SIDES, logvar=True)
        found = [logvar_of(latent.logvar_CTHW) for latent in real.latents if latent.logvar_CTHW is not None]
    print(logvar_table(found))


def stored_logvars(url: str, windows: int) -> list[Tensor]:
    """The first log variances of a dataset, float32 (C, T, H, W). SystemExit if it has none."""
    store = Store(url)
    manifest = DatasetFolder(store).manifest()
    if not manifest.identity.logvar:
        raise SystemExit(f"{url}: has no log variances: encode it with encode.logvar: true")
    shard_format = FORMATS[manifest.format]

    def all_of() -> Iterator[Tensor]:
        for shard in manifest.shards:
            with store.open_seekable(shard_name(shard.id, shard_format.suffix)) as file:
                for latent in shard_format.read(file):
                    assert latent.logvar_CTHW is not None, "checked by read"
                    yield logvar_of(latent.logvar_CTHW)

    return [logvar for logvar, _ in zip(all_of(), range(windows), strict=False)]


def logvar_of(stored: Tensor) -> Tensor:
    """float32, from any stored form."""
    return logvar_from_int8(stored) if stored.dtype == torch.int8 else stored.float()


def logvar_table(logvars: Sequence[Tensor]) -> BenchTable:
    """A line for each way to store them."""
    values = torch.cat([logvar.flatten(1) for logvar in logvars], dim=1)
    low, high = (float(value) for value in (values.min(), values.max()))
    outside = ((values < LOGVAR_LIMITS[0]) | (values > LOGVAR_LIMITS[1])).double().mean().item()
    table = BenchTable(
        f"log variances of {len(logvars)} windows, {low:.1f} to {high:.1f} (std {values.std():.2f}), "
        f"{outside:.1%} of them outside of the int8 grid",
        ("stored as", "bytes a number", "KL, mean nats", "KL, largest", "std off by, rms", "std off by, largest"),
    )
    channel_means = values.mean(dim=1)
    schemes: list[tuple[str, float, Scheme]] = [
        ("float16", 2, lambda logvar: logvar.half().float()),
        ("bfloat16", 2, lambda logvar: logvar.bfloat16().float()),
        ("int8, fixed grid of 1/8", 1, lambda logvar: logvar_from_int8(logvar_to_int8(logvar))),
        ("int8, range of each window and channel", 1, _affine),
        ("a scalar for each window and channel", 0, lambda logvar: logvar.mean((1, 2, 3), keepdim=True) + 0 * logvar),
        ("a scalar for each channel", 0, lambda logvar: channel_means.view(-1, 1, 1, 1) + 0 * logvar),
    ]
    for name, nbytes, scheme in schemes:
        error = torch.cat([(logvar - scheme(logvar)).flatten() for logvar in logvars]).double()
        kl, std = gaussian_kl(error), torch.expm1(-0.5 * error).abs()
        table.add(
            name,
            f"{nbytes:.0f}",
            f"{kl.mean():.1e}",
            f"{kl.max():.1e}",
            f"{std.square().mean().sqrt():.2%}",
            f"{std.max():.2%}",
        )
    return table


def gaussian_kl(error: Tensor) -> Tensor:
    """KL divergence in nats of N(m, exp(l)) to N(m, exp(l - error)), element by element."""
    return 0.5 * (torch.expm1(error) - error)


def _affine(logvar_CTHW: Tensor) -> Tensor:
    low, high = (logvar_CTHW.flatten(1).aminmax(dim=1)[at].view(-1, 1, 1, 1) for at in (0, 1))
    step = ((high - low) / 255).clamp(min=1e-12)
    return ((logvar_CTHW - low) / step).round() * step + low


if __name__ == "__main__":
    typer.run(measure_logvar)
