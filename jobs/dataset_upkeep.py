"""Keep a finished dataset whole: encode damaged shards again, try rejections again, remove what nothing names.

    latents repair data/demo/latents
    latents retry data/demo/latents --class timeout --set decode.cpu_seconds=600
    latents gc data/demo/latents --delete

`repair` and `retry` are the encode job with the config that run.json holds, over the shards concerned.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jobs.config import EncodeConfig, validate_config
from jobs.encode_webvid import run_encode
from jobs.messages import report_errors
from pipeline.dataset import DatasetFolder
from pipeline.documents import Manifest
from pipeline.errors import ConfigError
from pipeline.storage import Store
from pipeline.upkeep import (
    KeptShards,
    changed_numerics,
    lost_windows,
    readable_receipts,
    require_finished,
    require_repeatable,
    retried_settings,
    shards_with_rejections,
    take_back,
    unnamed_objects,
    unnamed_shards,
    write_record,
)
from pipeline.verify import VerifyReport, verify_dataset

Encode = Callable[[EncodeConfig], Manifest]
OutputArgument = Annotated[str, typer.Argument(help="The dataset: a folder or any fsspec URL.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting of the recorded config: section.setting=value.")
]
SHOWN = 20


def repair(output: OutputArgument, overrides: SetOption = None) -> None:
    """Encode again what verify finds missing or damaged, and nothing else."""
    with report_errors():
        report = run_repair(output, overrides or ())
    raise typer.Exit(0 if report.good else 1)


def retry(
    output: OutputArgument,
    classes: Annotated[list[str], typer.Option("--class", help="A class of rejection, such as timeout; may repeat.")],
    overrides: SetOption = None,
) -> None:
    """Try the rejections of a class again; shards that hold some are encoded anew."""
    with report_errors():
        run_retry(output, classes, overrides or ())


def gc(
    output: OutputArgument,
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; without it they are only listed.")] = False,
) -> None:
    """List what no receipt names, left by attempts that did not end."""
    with report_errors():
        run_gc(output, delete=delete)


def recorded_config(output: str, overrides: Sequence[str] = ()) -> EncodeConfig:
    """The config in run.json, to encode into `output` wherever that lies now, with what earlier retries set of
    decode.*. ConfigError if it holds none."""
    dataset = DatasetFolder(Store(output))
    recorded = dataset.run_file().config
    if not recorded:
        raise ConfigError(f"{output}: run.json holds no config, so its shards cannot be encoded again from it")
    raw: dict[str, Any] = {**recorded, "output": {**recorded["output"], "url": output}}
    settings = [*retried_settings(dataset), *overrides]
    return validate_config(EncodeConfig, raw, f"config in {output}/run.json", settings)


def run_repair(output: str, overrides: Sequence[str] = (), *, encode: Encode = run_encode) -> VerifyReport:
    """Verify, encode the bad shards again, verify once more. What is wrong and not of a shard is reported."""
    console = Console(highlight=False)
    dataset = DatasetFolder(Store(output))
    config = recorded_config(output, overrides)
    found = verify_dataset(dataset.store)
    if found.good:
        console.print(f"nothing to repair: {found.shards} shards, {found.windows} windows")
        return found
    _print_list(console, "found:", found.problems)
    source_ids = require_repeatable(dataset, config, found.to_encode)
    # what an attempt left that did not end may be damaged, and would stop the run
    again = found.to_encode | (unnamed_shards(dataset) & source_ids)
    before = readable_receipts(dataset, again)
    take_back(dataset, again)
    encode(config)
    now = readable_receipts(dataset, before)
    numerics, lost = changed_numerics(before, now), lost_windows(before, now)
    record = {
        "verb": "repair",
        "shards": sorted(again),
        "problems": found.problems,
        "windows_lost": lost,
        "numerics_changed": numerics,
    }
    name = write_record(dataset, record)
    after = verify_dataset(dataset.store)
    _warn_of_numerics(console, numerics)
    _print_list(console, "[red]fewer windows than before; the receipts say what was rejected:[/]", lost)
    _print_list(console, "left:", after.problems)
    console.print(f"encoded again: {', '.join(sorted(again)) or 'no shard'}; recorded in {output}/{name}")
    return after


def run_retry(
    output: str, classes: Sequence[str], overrides: Sequence[str] = (), *, encode: Encode = run_encode
) -> dict[str, Any]:
    """Encode the shards that hold rejections of these classes anew; returns what is recorded of it."""
    console = Console(highlight=False)
    dataset = DatasetFolder(Store(output))
    config = recorded_config(output, overrides)
    concerned = shards_with_rejections(dataset, classes)
    if not concerned:
        console.print(f"no rejection of class {', '.join(classes)}: nothing to try again")
        return {}
    require_finished(dataset)
    require_repeatable(dataset, config, concerned.keys())
    before = readable_receipts(dataset, concerned)
    with tempfile.TemporaryDirectory(prefix="latents-retry-") as folder:
        kept = KeptShards(dataset, Path(folder))
        kept.keep(before)
        take_back(dataset, concerned.keys())
        encode(config)
        changes = kept.changes()
    after = readable_receipts(dataset, concerned)
    left = {shard_id: {one.key: one.error_class for one in receipt.rejections} for shard_id, receipt in after.items()}
    tried = {key: left[shard_id].get(key, "encoded") for shard_id, keys in concerned.items() for key in keys}
    record: dict[str, Any] = {
        "verb": "retry",
        "classes": sorted(classes),
        "overrides": list(overrides),
        "shards": sorted(concerned),
        "outcome": tried,
        "windows_gained": len(changes.gained),
        "windows_lost": changes.lost,
        "windows_kept": changes.numbers.windows,
        "windows_kept_and_equal": changes.numbers.equal,
        "largest_difference": changes.numbers.largest,
        "numerics_changed": changed_numerics(before, after),
    }
    name = write_record(dataset, record)
    encoded = sum(outcome == "encoded" for outcome in tried.values())
    console.print(f"tried again: {len(tried)} in {len(concerned)} shards; encoded now: {encoded}")
    for key, outcome in list(tried.items())[:SHOWN]:
        console.print(f"  {key or '(shard)'}: {outcome}", markup=False)
    _warn_of_changes(console, record)
    console.print(f"recorded in {output}/{name}")
    return record


def run_gc(output: str, *, delete: bool) -> list[str]:
    """List, and remove if asked, what no receipt names. Returns the names."""
    console = Console(highlight=False)
    dataset = DatasetFolder(Store(output))
    found = list(unnamed_objects(dataset))
    for name, size in found:
        console.print(f"{name}  {size or 0:,} bytes", markup=False)
    total = sum(size or 0 for _, size in found)
    if delete and found:
        require_finished(dataset)
        for name, _ in found:
            dataset.store.remove(name)
    verb = "removed" if delete else "no receipt names"
    console.print(
        f"{verb} {len(found)} objects, {total:,} bytes" + ("" if delete or not found else "; --delete removes")
    )
    return [name for name, _ in found]


def _warn_of_changes(console: Console, record: dict[str, Any]) -> None:
    kept, equal = record["windows_kept"], record["windows_kept_and_equal"]
    console.print(f"other windows: {equal} of {kept} as they were, bit for bit")
    if equal < kept:
        console.print(
            f"[yellow]{kept - equal} changed, by {record['largest_difference']:.2g} at most: other tiles share their "
            "batches now, or the numerics below differ[/]",
            soft_wrap=True,
        )
    if record["windows_lost"]:
        console.print(f"[red]lost: {', '.join(record['windows_lost'][:SHOWN])}[/]", soft_wrap=True)
    _warn_of_numerics(console, record["numerics_changed"])


def _warn_of_numerics(console: Console, lines: Sequence[str]) -> None:
    """Bytes are only those of an unharmed run if what decides last bits is what it was."""
    if lines:
        _print_list(console, "encoded under other numerics, so last bits may differ:", lines)


def _print_list(console: Console, title: str, lines: Sequence[str]) -> None:
    if lines:
        console.print(title)
    for line in lines[:SHOWN]:
        console.print(f"  {line}", markup=False, soft_wrap=True)
    if len(lines) > SHOWN:
        console.print(f"  ... and {len(lines) - SHOWN} more")
