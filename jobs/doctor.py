"""Whether this machine, and with a config its source, output, VAE and cluster, are fit for a run.

latents doctor
latents doctor configs/encode/webvid_256.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs import doctor_checks as checks
from jobs.config import EncodeConfig, load_config
from jobs.doctor_checks import Finding, guarded
from jobs.messages import report_errors

MARKS = {"good": "[green]good[/]", "note": "[yellow]note[/]", "bad": "[bold red]bad [/]"}


def doctor(
    config: Annotated[Path | None, typer.Argument(help="A YAML file: its source, output and VAE are tried.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: section.setting=value (YAML).")
    ] = None,
) -> None:
    """Check the environment; exit code 0 means that nothing was found that would stop a run."""
    with report_errors():
        settings = load_config(EncodeConfig, config, overrides or ()) if config is not None else None
    console = Console(highlight=False)
    bad = 0
    for finding in examine(settings):
        console.print(f"{MARKS[finding.verdict]} {finding.what}:", end=" ")
        console.print(finding.text, markup=False, soft_wrap=True)
        bad += finding.verdict == "bad"
    console.print(f"[bold red]{bad} would stop a run[/]" if bad else "[green]fit for a run[/]")
    raise typer.Exit(1 if bad else 0)


def examine(config: EncodeConfig | None) -> Iterator[Finding]:
    """Every finding as it comes. Writes and removes two small objects in the output; nothing else is changed."""
    yield from guarded("versions", checks.versions)
    yield from guarded("GPU", partial(checks.devices, config))
    yield from guarded("conv3d", partial(checks.convolutions, config))
    yield from guarded("machine", checks.machine)
    if config is None:
        yield from guarded("decoders", checks.decoders)
    else:
        yield from guarded("VAE", partial(checks.vae, config))
        yield from guarded("source", partial(checks.source, config))
        yield from guarded("output", partial(checks.output, config))
    yield from guarded("Ray", partial(checks.cluster, config))


if __name__ == "__main__":
    typer.run(doctor)
