"""Reading latents for training: ours against the readers of other libraries and a plain read of the files.

    python jobs/bench_reader.py

One run, one machine, the same latents: windows of real clips, repeated under keys of their own. Every reader has a
process of its own and reads a whole epoch a round, shuffled, in batches of 64 of one shape. Readers take turns, and
each round begins with a plain sequential read of the tars. A figure is the median of the rounds.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import typer

from jobs.bench_report import BenchTable, machine, mib_text, peak_rss_mib, ratio_text, reset_peak_rss, rss_mib
from jobs.rival_readers import BATCH, READERS, Place, Reader
from pipeline.dataset import DatasetFolder
from pipeline.policies import FormatName
from pipeline.reader import LatentDataset
from pipeline.storage import Store

SIDES = ((160, 376), (192, 320))
SHARDS = 8
MANY_SHARDS = 10_000
STORE = "store"
LIMIT_SECONDS = 120.0
"""For one epoch of one reader."""
_BLOCK = 1 << 20
_COLUMNS = ("samples/s", "MB/s", "of the plain read", "processor s/GB", "first batch s", "half-way s", "memory MiB")


@dataclass(frozen=True, slots=True)
class Round:
    """One epoch of one reader."""

    seconds: float
    """From opening the dataset to the last batch."""
    processor: float
    """Seconds of processor time, of all threads of its process."""
    first: float
    """Seconds to the first batch."""
    halfway: float
    """Seconds to the first batch after half an epoch, from opening."""
    samples: int
    nbytes: int
    """Of the latents that came."""
    memory: float | None
    """MiB, most resident memory above what was there before."""


def bench_reader(
    mebibytes: Annotated[int, typer.Option(min=16, help="Latents in each dataset.")] = 512,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    spec: Annotated[str, typer.Option(help="VAE of the latents, with random weights.")] = "cvvae-sd21-tiny",
    scale: Annotated[int, typer.Option(min=1, help="Windows this many times as wide and high.")] = 1,
    folder: Annotated[Path | None, typer.Option(help="Keep datasets here, and use those that are there.")] = None,
    store: Annotated[bool, typer.Option(help="Read a quarter as much from an S3 server of the tests, too.")] = True,
    latency: Annotated[float, typer.Option(min=0, help="Milliseconds added to each request to it.")] = 20.0,
    reader: Annotated[list[str] | None, typer.Option(help="Only those with this in their name; repeatable.")] = None,
    dropped: Annotated[
        bool, typer.Option(help="Read local files once more, out of the page cache each time.")
    ] = True,
) -> None:
    """Samples per second, time to the first batch, resume, memory: ours and others', local and from a store."""
    readers = [one for one in READERS if not reader or any(part in one.name for part in reader)]
    print(machine())
    with contextlib.ExitStack() as stack:
        base = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-reader-")))
        sizes = {base: mebibytes << 20} | ({base / STORE: mebibytes << 18} if store else {})
        notes = make_datasets(base, sizes, readers, spec, scale)
        print(startup_table(base), flush=True)
        for drop in (False, True) if dropped else (False,):
            print(reading_table(base, readers, notes, rounds, drop=drop), flush=True)
        if store:
            print(store_table(base, readers, notes, latency, rounds), flush=True)


def make_datasets(
    base: Path, sizes: dict[Path, int], readers: Sequence[Reader], spec: str, scale: int
) -> dict[str, str]:
    """A folder per format in each home, of so many bytes; why a format could not be made."""
    ours: tuple[FormatName, ...] = ("webdataset", "parquet")
    wanted: list[tuple[Path, FormatName]] = [
        (home, name) for home in sizes for name in ours if not (home / name / "manifest.json").exists()
    ]
    if wanted:
        from jobs.reader_latents import encode_real, write_repeated  # here: each reader's process imports this file

        sides = [(height * scale, width * scale) for height, width in SIDES]
        real = encode_real(base / "source", vae={"spec": spec, "seed": 0}, sides=sides, logvar=False)
        for home, name in wanted:
            write_repeated(real, home / name, name, num_shards=SHARDS, shard_bytes=sizes[home] // SHARDS)
    notes: dict[str, str] = {}
    for home, reader in itertools.product(sizes, readers):
        target = home / reader.format
        if reader.write is None or target.exists():
            continue
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            try:
                process.submit(_convert, reader.name, home / "parquet", target).result()
            except ImportError as error:
                notes[reader.format] = f"not installed: {error}"
            except Exception as error:  # noqa: BLE001 - whatever a library raises
                notes[reader.format] = f"failed: {type(error).__name__}: {str(error)[:80]}"
    return notes


def _convert(name: str, source: Path, target: Path) -> None:
    reader = _reader(name)
    assert reader.write is not None
    batches = LatentDataset(str(source), BATCH, shuffle=False, tail="pad", latents="raw", dtype=torch.float16)
    rows = (
        {"id": key, "caption": caption, "latent": latent.numpy()}
        for batch in batches
        for key, caption, latent, padding in zip(
            batch.keys, batch.captions, batch.latents_BCTHW, batch.is_padding_B.tolist(), strict=True
        )
        if not padding
    )
    unfinished = target.with_name(f"{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    reader.write(rows, unfinished)
    unfinished.rename(target)


def _reader(name: str) -> Reader:
    return next(reader for reader in READERS if reader.name == name)


# --- start-up -------------------------------------------------------------------------------------------------------


def startup_table(base: Path) -> BenchTable:
    """Opening a dataset of many shards, which reads its manifest and lists nothing."""
    from jobs.reader_latents import write_wide_manifest

    table = BenchTable("opening a dataset", ("shards", "manifest MB", "seconds", "processor s"))
    manifest = DatasetFolder(Store(str(base / "webdataset"))).manifest()
    for number in (SHARDS, MANY_SHARDS):
        with tempfile.TemporaryDirectory(prefix="bench-reader-") as folder:
            write_wide_manifest(manifest, Path(folder), number)
            seconds, processor = [], []
            for _ in range(5):
                started, before = time.perf_counter(), time.process_time()
                LatentDataset(folder, BATCH)
                seconds.append(time.perf_counter() - started)
                processor.append(time.process_time() - before)
            size = (Path(folder) / "manifest.json").stat().st_size
        medians = [f"{statistics.median(times):.2f}" for times in (seconds, processor)]
        table.add(str(number), f"{size / 1e6:.1f}", *medians)
    return table


# --- epochs ---------------------------------------------------------------------------------------------------------


def reading_table(
    base: Path, readers: Sequence[Reader], notes: dict[str, str], rounds: int, *, drop: bool
) -> BenchTable:
    """Every reader in turn, `rounds` times."""
    state = "dropped from the page cache before each read" if drop else "in the page cache"
    if not drop:
        for path in base.rglob("*"):
            if path.is_file():
                path.read_bytes()
    table = BenchTable(f"an epoch from local disk, files {state}", ("reader", *_COLUMNS))
    places = {reader.name: local_place(base, reader.format) for reader in readers if reader.format not in notes}
    results, plain = _in_turns(places, local_place(base, "webdataset"), rounds, drop=drop)
    _fill(table, readers, results, plain, notes)
    return table


def local_place(base: Path, format_name: str) -> Place:
    paths = sorted((base / format_name / "shards").glob("*"))
    return Place(
        url=str(base / format_name),
        scratch=str(base / "scratch"),
        names=tuple(f"shards/{path.name}" for path in paths),
        shards=tuple(map(str, paths)),
    )


def _in_turns(
    places: dict[str, Place], tars: Place, rounds: int, *, drop: bool
) -> tuple[dict[str, list[Round] | str], list[Round]]:
    results: dict[str, list[Round] | str] = {name: [] for name in places}
    plain: list[Round] = []
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for name in places}
        for name, process in processes.items():
            _try(results, name, process, _warm_up, places[name])
        for _ in range(rounds):
            if drop:
                _drop(Path(tars.url))
            plain.append(plain_read(tars))
            for name, process in processes.items():
                if drop:
                    _drop(Path(places[name].url))
                _try(results, name, process, measure, places[name])
    return results, plain


def _try(
    results: dict[str, list[Round] | str],
    name: str,
    process: ProcessPoolExecutor,
    work: Callable[[str, Place], Round | None],
    place: Place,
) -> None:
    """What another library cannot do here is a line of the table, not the end of the benchmark."""
    if isinstance(results[name], str):
        return
    try:
        found = process.submit(work, name, place).result(timeout=LIMIT_SECONDS)
    except Exception as error:
        if name.startswith("ours"):
            raise
        results[name] = f"failed: {type(error).__name__}: {str(error)[:80]}"
        return
    if found is not None:
        cast(list[Round], results[name]).append(found)


def _warm_up(name: str, place: Place) -> None:
    """Imports, and what a library does once a process."""
    torch.set_num_threads(1)
    next(_reader(name).read(place, 0))


def measure(name: str, place: Place) -> Round:
    """An epoch, and the way to the middle of another one, in this process."""
    reader = _reader(name)
    shutil.rmtree(place.scratch, ignore_errors=True)  # what a library has fetched before, as for the warm-up
    before = rss_mib()
    reset_peak_rss()
    started, processor = time.perf_counter(), time.process_time()
    first = samples = nbytes = batches = 0.0
    for latents, captions in reader.read(place, 0):
        first = first or time.perf_counter() - started
        samples, nbytes, batches = samples + len(captions), nbytes + latents.numel() * 2, batches + 1
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    peak = peak_rss_mib()
    shutil.rmtree(place.scratch, ignore_errors=True)
    started = time.perf_counter()
    next(reader.read(place, int(batches) // 2))
    return Round(
        seconds=seconds,
        processor=processor,
        first=first,
        halfway=time.perf_counter() - started,
        samples=int(samples),
        nbytes=int(nbytes),
        memory=None if peak is None or before is None else peak - before,
    )


def plain_read(place: Place) -> Round:
    """The tars from first byte to last, into one block of memory again and again, or one GET each."""
    block, nbytes = bytearray(_BLOCK), 0
    store = Store(place.url, options=place.options)
    started, processor = time.perf_counter(), time.process_time()
    for name in place.names:
        with store.open_stream(name) if place.endpoint else open(store.path(name), "rb", buffering=0) as file:
            while count := file.readinto(block):
                nbytes += count
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    return Round(seconds=seconds, processor=processor, first=0, halfway=0, samples=0, nbytes=nbytes, memory=None)


def _drop(folder: Path) -> None:
    """Out of the page cache, for as far as nobody else uses them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _fill(
    table: BenchTable,
    readers: Sequence[Reader],
    results: dict[str, list[Round] | str],
    plain: Sequence[Round],
    notes: dict[str, str],
) -> None:
    rates = [one.nbytes / one.seconds for one in plain]
    work = statistics.median(one.processor / one.nbytes for one in plain) * 1e9
    blank = ("",) * 3
    table.add("plain read of the tars", "", f"{statistics.median(rates) / 1e6:.0f}", "1", f"{work:.2f}", *blank)
    for reader in readers:
        found = notes.get(reader.format) or results[reader.name]
        if isinstance(found, str):
            table.add(reader.name, found, *[""] * (len(_COLUMNS) - 1))
            continue
        middle = {
            name: statistics.median(getattr(one, name) for one in found)
            for name in ("seconds", "processor", "first", "halfway")
        }
        samples, nbytes = found[0].samples, found[0].nbytes
        speed = ratio_text([one.nbytes / one.seconds for one in found], rates)
        memory = max((one.memory for one in found if one.memory is not None), default=None)
        table.add(
            reader.name,
            f"{samples / middle['seconds']:.0f}",
            f"{nbytes / middle['seconds'] / 1e6:.0f}",
            speed,
            f"{middle['processor'] / nbytes * 1e9:.2f}",
            f"{middle['first']:.2f}",
            f"{middle['halfway']:.2f}" + ("" if reader.resume == "state" else " (reads)"),
            mib_text(memory),
        )


# --- from a store ---------------------------------------------------------------------------------------------------


def store_table(
    base: Path, readers: Sequence[Reader], notes: dict[str, str], latency: float, rounds: int
) -> BenchTable:
    """Every reader in turn from the S3 server of the tests, behind a proxy that waits."""
    table = BenchTable(f"an epoch from an S3 server, {latency:.0f} ms added to each request", ("reader", *_COLUMNS))
    try:
        from tests.s3_server import running_s3
    except ImportError as error:
        table.notes.append(f"not measured: needs the project's folder and its extra dev ({error})")
        return table
    readers = [reader for reader in readers if reader.from_store]
    with running_s3() as server, _late_proxy(server, latency) as endpoint:
        places = _uploaded(base / STORE, server.url, server.options["endpoint_url"], endpoint)
        known = {reader.name: places[reader.format] for reader in readers if reader.format not in notes}
        results, plain = _in_turns(known, places["webdataset"], rounds, drop=False)
    _fill(table, readers, results, plain, notes)
    return table


@contextlib.contextmanager
def _late_proxy(server: Any, latency: float) -> Iterator[str]:
    from tests.s3_server import Fault, proxy_to

    def late(method: str, target: str) -> Fault:
        time.sleep(latency / 1000)
        return Fault()

    with proxy_to(server, late) as proxy:
        yield proxy.options["endpoint_url"]


def _uploaded(home: Path, bucket: str, server: str, endpoint: str) -> dict[str, Place]:
    """The datasets of a folder in a bucket, by format, as they are reached through `endpoint`."""
    from botocore.session import get_session

    client = get_session().create_client("s3", endpoint_url=endpoint, region_name="us-east-1")
    places: dict[str, Place] = {}
    for folder in sorted(path for path in home.iterdir() if path.is_dir()):
        place = local_place(home, folder.name)
        store = Store(f"{bucket}/{folder.name}", options={"endpoint_url": server})
        for path in folder.rglob("*"):
            if path.is_file():
                store.create(path.relative_to(folder).as_posix(), path)
        root = bucket.removeprefix("s3://")
        urls = [f"{store.url}/{name}" for name in place.names]
        if folder.name == "webdataset":  # its reader asks with curl, which has no credentials
            urls = [
                client.generate_presigned_url("get_object", {"Bucket": root, "Key": f"{folder.name}/{name}"})
                for name in place.names
            ]
        places[folder.name] = Place(
            url=store.url,
            scratch=str(home / f"cache-{folder.name}"),
            endpoint=endpoint,
            names=place.names,
            shards=tuple(urls),
        )
    return places


if __name__ == "__main__":
    typer.run(bench_reader)
