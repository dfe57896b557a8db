"""The `latents` command: every verb is the function of a script in jobs/."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Video latents for diffusion training.")

OF_EXTRAS = frozenset({"ray", "av", "psutil", "PIL"})
"""Packages that the extras bring and the modules of verbs import."""


def main() -> None:
    """Entry point. Verbs are imported here, so that a missing extra takes away only what needs it."""
    from jobs.show_status import status
    from jobs.verify_dataset import verify

    app.command()(verify)
    app.command()(status)
    try:
        from jobs.doctor import doctor
        from jobs.encode_webvid import encode
        from jobs.finetune_verbs import app as finetune
        from jobs.plan_encode import plan
        from jobs.settings_reference import settings
    except ModuleNotFoundError as error:
        for verb in ("encode", "plan", "doctor"):
            _unavailable(verb, "encode", error)
    else:
        app.command()(encode)
        app.command()(plan)
        app.command()(doctor)
        app.command()(settings)
        app.add_typer(finetune, name="finetune")
    try:
        from jobs.evaluate_vae import evaluate
    except ModuleNotFoundError as error:
        _unavailable("evaluate", "evaluate", error)
    else:
        app.command()(evaluate)
    app()


def _unavailable(verb: str, extra: str, error: ModuleNotFoundError) -> None:
    """A verb that says which extra it needs; anything else that is missing is raised."""
    if error.name not in OF_EXTRAS:
        raise error
    missing = error.name

    def unavailable() -> None:
        typer.echo(
            f"latents {verb} needs the extra '{extra}' (no module {missing}): pip install 'cvvae-latents[{extra}]'",
            err=True,
        )
        raise typer.Exit(1)

    app.command(verb, help=f"Needs the extra '{extra}': pip install 'cvvae-latents[{extra}]'.")(unavailable)


if __name__ == "__main__":
    main()
