"""`latents finetune run | submit | follow | resume`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.finetune_vae import ConfigFile, Overrides, finetune
from jobs.messages import report_errors

if TYPE_CHECKING:
    from jobs.submit import Submission

app = typer.Typer(no_args_is_help=True, help="Train a VAE, here or on a cluster.")
app.command("run")(finetune)

Name = Annotated[str, typer.Argument(help="The run's name.")]
Address = Annotated[
    str | None, typer.Option(help="The cluster's job API; else $RAY_API_SERVER_ADDRESS, else the local one.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Show the log and wait; exit code 1 if the job fails.")]


@app.command()
def submit(
    name: Name, config: ConfigFile, overrides: Overrides = None, address: Address = None, wait: Wait = False
) -> None:
    """Send a run to a cluster and print the job's id."""
    from jobs.submit import submit_finetune

    with report_errors():
        _sent(
            submit_finetune(config, name=name, address=address, overrides=overrides or (), working_dir=Path.cwd()),
            wait,
        )


@app.command()
def resume(name: Name, address: Address = None, wait: Wait = False) -> None:
    """Send a run that has ended again; it goes on from its last checkpoint."""
    from jobs.submit import resume as send_again

    with report_errors():
        _sent(send_again(name, address=address, working_dir=Path.cwd()), wait)


@app.command()
def follow(name: Name, address: Address = None) -> None:
    """Show a run's log until it ends; exit code 1 if it fails."""
    from jobs.submit import find

    with report_errors():
        _follow(find(name, address=address))


def _sent(submission: Submission, wait: bool) -> None:
    print(submission.id)
    if wait:
        _follow(submission)


def _follow(submission: Submission) -> None:
    status = submission.follow()
    print(f"job {submission.id}: {status.value}")
    if status.value != "SUCCEEDED":
        sys.exit(1)
