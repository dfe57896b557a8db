"""The `latents` command: every verb is the function of a script in jobs/."""

from __future__ import annotations

import importlib

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Video latents for diffusion training.")

OF_EXTRAS = frozenset({"ray", "av", "psutil", "PIL"})
"""Packages that the extras bring and the modules of verbs import."""


VERBS = {
    "verify": ("jobs.verify_dataset", ""),
    "status": ("jobs.show_status", ""),
    "diff": ("jobs.compare_datasets", ""),
    "export": ("jobs.export_dataset", ""),
    "encode": ("jobs.encode_webvid", "encode"),
    "plan": ("jobs.plan_encode", "encode"),
    "doctor": ("jobs.doctor", "encode"),
    "repair": ("jobs.dataset_upkeep", "encode"),
    "retry": ("jobs.dataset_upkeep", "encode"),
    "gc": ("jobs.dataset_upkeep", "encode"),
    "settings": ("jobs.settings_reference", "encode"),
    "finetune": ("jobs.finetune_verbs", "encode"),
    "preview": ("jobs.preview_window", "evaluate"),
    "report": ("jobs.report_dataset", "evaluate"),
    "drift": ("jobs.drift_dataset", "evaluate"),
    "evaluate": ("jobs.evaluate_vae", "evaluate"),
    "ablate": ("jobs.ablate_vae", "evaluate"),
}
"""Each verb's module, which has a function (or a typer.Typer named `app`) for it, and the extra that it needs."""


def main() -> None:
    """Entry point. A missing extra takes away only the verbs that need it."""
    for verb, (module_name, extra) in VERBS.items():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            _unavailable(verb, extra, error)
            continue
        if hasattr(module, verb):
            app.command(verb)(getattr(module, verb))
        else:
            app.add_typer(module.app, name=verb)
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
