"""The `latents` command: every verb is the function of a script in jobs/."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Video latents for diffusion training.")

EXTRA_ENCODE = frozenset({"ray", "av", "psutil", "PIL"})


def main() -> None:
    """Entry point. Verbs are imported here, so that a missing extra takes away only what needs it."""
    from jobs.verify_dataset import verify

    app.command()(verify)
    try:
        from jobs.encode_webvid import encode
        from jobs.finetune_verbs import app as finetune
        from jobs.settings_reference import settings
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_ENCODE:
            raise
        missing = error.name

        @app.command("encode", help="Needs the extra 'encode': pip install 'cvvae-latents[encode]'.")
        def encode_unavailable() -> None:
            typer.echo(
                f"latents encode needs the extra 'encode' (no module {missing}): pip install 'cvvae-latents[encode]'",
                err=True,
            )
            raise typer.Exit(1)
    else:
        app.command()(encode)
        app.command()(settings)
        app.add_typer(finetune, name="finetune")
    app()


if __name__ == "__main__":
    main()
