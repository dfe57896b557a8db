"""After a finetune: how far are a dataset's latents from what the new VAE would give, and must it be encoded again?

    python jobs/drift_dataset.py data/demo/latents --vae data/runs/tiny-cvvae/export

Reads a seeded sample of windows from the dataset's source again, with the recorded VAE as the control. Exit code 0:
keep the dataset; 1: encode it again, or the control does not give what is stored. `latents drift` is this same
function.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.config import vae_named
from jobs.evaluate_vae import open_device
from jobs.messages import report_errors
from pipeline.checkpoints import load_source
from pipeline.dataset import DatasetFolder
from pipeline.drift import DECODINGS, DriftReport, DriftSample, measure_drift
from pipeline.recorded import recorded_vae
from pipeline.storage import Store

SHOWN_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class DriftLimits:
    """How much drift a dataset may have before it should be encoded again."""

    max_rms: float = 0.05
    """Relative RMS of normalised latents; bfloat16 arithmetic alone makes 0.02."""
    max_loss: float = 0.5
    """dB by which the new decoder may be worse on stored latents than on its own."""

    def reasons(self, report: DriftReport) -> list[str]:
        """Why to encode again; none: keep."""
        reasons = []
        if report.drift.relative_rms > self.max_rms:
            reasons.append(f"relative RMS {report.drift.relative_rms:.4f} is above {self.max_rms:g}")
        if report.decoder_loss > self.max_loss:
            reasons.append(
                f"the new decoder loses {report.decoder_loss:.2f} dB on stored latents, above {self.max_loss:g}"
            )
        return reasons


def drift(
    output: Annotated[str, typer.Argument(help="The dataset: a folder or any fsspec URL.")],
    vae: Annotated[str, typer.Option(help="The new VAE: a checkpoint (path or URL) or a named spec.")],
    recorded: Annotated[
        str | None, typer.Option(help="Where the dataset's own VAE lies now; else where its config says.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows to look at.")] = 32,
    shards: Annotated[int, typer.Option(min=1, help="Shards that they are drawn from.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    max_rms: Annotated[float, typer.Option(min=0, help="Largest relative RMS to keep the dataset.")] = 0.05,
    max_loss: Annotated[float, typer.Option(min=0, help="Largest loss of the new decoder on old latents, dB.")] = 0.5,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    report: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
) -> None:
    """Compare a dataset with what a new VAE would give; exit code 0 means that it can be kept."""
    with report_errors():
        folder = DatasetFolder(Store(output))
        run = folder.run_file()
        old = load_source(vae_named(recorded)) if recorded else recorded_vae(run, option="--recorded")
        found = measure_drift(
            folder,
            old,
            load_source(vae_named(vae)),
            DriftSample(windows=windows, shards=shards, seed=seed),
            device=open_device(device),
        )
        limits = DriftLimits(max_rms, max_loss)
        document = describe(found, limits)
        if report is not None:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        show(found, limits, Console(highlight=False))
    raise typer.Exit(0 if document["keep"] else 1)


def describe(found: DriftReport, limits: DriftLimits) -> dict[str, Any]:
    """The figures and the verdict as JSON types."""
    shift = found.drift.channel_shift
    reasons = limits.reasons(found)
    return {
        "keep": found.control_holds and not reasons,
        "reasons": reasons,
        "limits": {"max_rms": limits.max_rms, "max_loss": limits.max_loss},
        "control": {
            "relative_rms": found.control.relative_rms,
            "limit": found.control_limit,
            "holds": found.control_holds,
        },
        "drift": {
            "relative_rms": found.drift.relative_rms,
            "cosine": found.drift.cosine,
            "frechet": found.drift.frechet,
            "channel_mean_shift": shift.mean.tolist(),
            "channel_std_ratio": shift.std.tolist(),
        },
        "psnr": {name: found.mean_psnr(name) for name in DECODINGS},
        "windows": found.keys,
        "problems": found.problems,
    }


def show(found: DriftReport, limits: DriftLimits, console: Console) -> None:
    """Tables and the verdict on the terminal."""
    table = Table(title=f"latents of {len(found.keys)} windows against what is stored", title_justify="left")
    for name in ("encoded by", "relative RMS", "cosine", "Frechet"):
        table.add_column(name, justify="left" if name == "encoded by" else "right")
    for name, comparison in (("the recorded VAE (control)", found.control), ("the new VAE", found.drift)):
        table.add_row(name, f"{comparison.relative_rms:.5f}", f"{comparison.cosine:.5f}", f"{comparison.frechet:.5f}")
    console.print(table)
    shift = found.drift.channel_shift
    table = Table(title="the new VAE by channel, in stds of what is stored", title_justify="left")
    table.add_column("")
    for channel in range(len(shift.mean)):
        table.add_column(str(channel), justify="right")
    table.add_row("shift of the mean", *(f"{value:+.3f}" for value in shift.mean.tolist()))
    table.add_row("ratio of the std", *(f"{value:.3f}" for value in shift.std.tolist()))
    console.print(table)
    table = Table(title="PSNR against the source", title_justify="left")
    table.add_column("decoded")
    table.add_column("dB", justify="right")
    for decoding, text in DECODINGS.items():
        table.add_row(text, f"{found.mean_psnr(decoding):.2f}")
    console.print(table)
    for problem in found.problems[:SHOWN_PROBLEMS]:
        console.print(f"[yellow]not compared:[/] {problem}", soft_wrap=True)
    if len(found.problems) > SHOWN_PROBLEMS:
        console.print(f"... and {len(found.problems) - SHOWN_PROBLEMS} more")
    console.print(verdict(found, limits), soft_wrap=True)


def verdict(found: DriftReport, limits: DriftLimits) -> str:
    """One line, with rich's markup."""
    if not found.control_holds:
        return (
            f"[bold red]the control fails:[/] the recorded VAE's latents differ from what is stored by "
            f"{found.control.relative_rms:.4f} (relative RMS); at most {found.control_limit:g} is rounding. "
            "Source, decoder or weights are not what they were: try latents verify --source"
        )
    reasons = limits.reasons(found)
    if reasons:
        return f"[bold red]encode again:[/] {'; '.join(reasons)}"
    return (
        f"[green]keep:[/] relative RMS {found.drift.relative_rms:.4f}, the new decoder loses "
        f"{found.decoder_loss:.2f} dB on stored latents"
    )


if __name__ == "__main__":
    typer.run(drift)
