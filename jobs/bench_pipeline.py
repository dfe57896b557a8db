"""The pipeline against the bare loop: frames/s in steady state with the same threads and decode children.

    python jobs/bench_pipeline.py
    python jobs/bench_pipeline.py --seconds 30 --case tiny

The pipeline is the encode job itself (jobs/encode_webvid.py as its own process: Ray, actors, files, receipts), with
one encode actor and with two that share the same threads. The bare loop runs before, between and after, so that a
ratio compares with the mean of the runs on both sides of it. Steady state is from the first receipt to the last one;
start-up is what passes before the first shard is begun. The VAE has seeded weights; its width decides how much of
the time is encoding, which the table says.
"""

from __future__ import annotations

import math
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import typer

from jobs.bare_loop import bare_loop
from jobs.bench_report import BenchTable, machine, usable_cores
from jobs.bench_shards import real_shots, write_shards
from jobs.config import EncodeConfig
from jobs.steady_rate import ShardSpan, SteadyRate, spans_of_run

PROJECT = Path(__file__).resolve().parents[1]
CALIBRATION_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is encoded."""

    spec: str
    size: int
    """Height and width of the windows, which have 17 frames."""
    max_windows: int | None
    """Per clip; None is as many as it has."""
    clips_per_shard: int
    tiles_per_batch: int
    dtype: str = "float32"
    share_of_seconds: float = 1.0


CASES = {
    # twelve windows, six full batches to a shard; encoding is nearly all of the work
    "encode": Case(spec="cvvae-sd21-tiny", size=128, max_windows=None, clips_per_shard=5, tiles_per_batch=2),
    # one window of 32 x 32 to a clip: decoding and bookkeeping are much of the work
    "tiny": Case(
        spec="cvvae-sd21-tiny",
        size=32,
        max_windows=1,
        clips_per_shard=40,
        tiles_per_batch=8,
        share_of_seconds=0.1,
    ),
    # what a GPU is for: full width, sixteen tiles to a batch
    "gpu": Case(
        spec="cvvae-sd21", size=256, max_windows=None, clips_per_shard=80, tiles_per_batch=16, dtype="float16"
    ),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of the loop or of the pipeline."""

    rate: SteadyRate
    startup_seconds: float
    num_shards: int


class Bench:
    """One case on this machine: its shards, and runs over them."""

    def __init__(self, case: Case, folder: Path, *, threads: int, children: int) -> None:
        self.case = case
        self._folder = folder
        self._threads = threads
        self._children = children
        self._videos = real_shots()
        self._runs = 0

    def bare(self, seconds: float) -> Measured:
        config = self._config(num_shards=2, num_actors=1)
        begun = time.time()
        threads = None if torch.cuda.is_available() else self._threads
        clock_zero, spans = bare_loop(config, decode_children=self._children, threads=threads, seconds=seconds)
        return _measured(begun, clock_zero, spans)

    def pipeline(self, num_actors: int, num_shards: int) -> Measured:
        config = self._config(num_shards=num_shards, num_actors=num_actors)
        path = self._folder / f"config-{self._runs}.yaml"
        path.write_text(config.model_dump_json())  # JSON is YAML
        begun = time.time()
        self._run_job(path)
        return _measured(begun, *spans_of_run(Path(config.output.url)))

    def _config(self, *, num_shards: int, num_actors: int) -> EncodeConfig:
        case = self.case
        tars = write_shards(
            self._folder / "in", self._videos, num_shards=num_shards, clips_per_shard=case.clips_per_shard
        )
        self._runs += 1
        cluster: dict[str, Any] = {
            "num_actors": num_actors,
            "decode_children": max(1, self._children // num_actors),
            "gpus_per_actor": 1 / num_actors if torch.cuda.is_available() else 0,
        }
        return EncodeConfig.model_validate(
            {
                "source": {"kind": "webdataset", "urls": [str(tar) for tar in tars]},
                "output": {"url": str(self._folder / f"out-{self._runs}")},
                "vae": {"spec": case.spec, "seed": 0},
                "windows": {"frames": 17, "max_windows": case.max_windows},
                "resize": {"buckets": [[case.size, case.size]]},
                "encode": {
                    "dtype": case.dtype,
                    "batch_pixels": case.tiles_per_batch * 17 * case.size**2,
                    "threads": max(1, self._threads // num_actors),
                },
                "cluster": cluster,
            }
        )

    def _run_job(self, config: Path) -> None:
        """SystemExit with the job's last words if it fails."""
        token = self._folder / "token"
        if not token.exists():
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
        # a token of its own keeps Ray from writing one into the home folder
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run(
            [sys.executable, str(PROJECT / "jobs" / "encode_webvid.py"), str(config)],
            cwd=PROJECT,
            env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"the encode job ended with exit code {done.returncode}:\n{done.stdout[-4000:]}")


def _measured(begun: float, clock_zero: float, spans: list[ShardSpan]) -> Measured:
    first = clock_zero + min(span.start for span in spans)
    return Measured(SteadyRate.of(spans), first - begun, len(spans))


def bench_pipeline(
    seconds: Annotated[float, typer.Option(min=1, help="Steady state of each run; of the loops together.")] = 125.0,
    case: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(CASES)}; default: those for this machine.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of all encoders together.")] = None,
    children: Annotated[int | None, typer.Option(min=1, help="Decode processes of all encoders together.")] = None,
) -> None:
    """Frames per second of the pipeline with one and with two actors, and of the bare loop."""
    on_gpu = torch.cuda.is_available()
    threads = threads or usable_cores()
    children = children or (max(2, usable_cores() - 2) if on_gpu else 2)
    print(f"{machine()}; {threads} encode threads, {children} decode children")
    for name in case or (("gpu", "tiny") if on_gpu else ("encode", "tiny")):
        with tempfile.TemporaryDirectory(prefix="bench-pipeline-") as folder:
            bench = Bench(CASES[name], Path(folder), threads=threads, children=children)
            print(measure_case(name, bench, seconds * CASES[name].share_of_seconds), flush=True)


def measure_case(name: str, bench: Bench, seconds: float) -> BenchTable:
    """The loop, one actor, the loop, two actors, the loop: a row each, and the ratios."""
    case = bench.case
    table = BenchTable(
        f"{name}: {case.spec}, windows of 17 x {case.size} x {case.size}, {case.clips_per_shard} clips to a shard",
        ("run", "frames/s", "of the bare loop", "encoder busy", "steady s", "shards", "start-up s"),
    )
    calibration = bench.bare(min(seconds, CALIBRATION_SECONDS))
    num_shards = shards_for(seconds, calibration)
    loops = [bench.bare(seconds / 3)]
    _add(table, "bare loop", loops[0], 1)
    for num_actors in (1, 2):
        run = bench.pipeline(num_actors, num_shards)
        loops.append(bench.bare(seconds / 3))
        around = statistics.mean(loop.rate.per_second for loop in loops[-2:])
        _add(table, f"{num_actors} actor{'s' * (num_actors > 1)}", run, num_actors, run.rate.per_second / around)
        _add(table, "bare loop", loops[-1], 1)
    return table


def shards_for(seconds: float, calibration: Measured) -> int:
    """Shards that last for `seconds` after the first ones end, at the calibrated rate."""
    rate = calibration.rate
    frames_per_shard = rate.frames / (calibration.num_shards - 1)
    # two calls overlap in each of at most two actors: so many may be under way when the first receipt comes
    return math.ceil(seconds * rate.per_second / frames_per_shard) + 4


def _add(table: BenchTable, name: str, run: Measured, num_encoders: int, ratio: float | None = None) -> None:
    rate = run.rate
    table.add(
        name,
        f"{rate.per_second:.1f}",
        "" if ratio is None else f"{ratio:.3f}",
        f"{100 * rate.encode_share(num_encoders):.0f} %",
        f"{rate.seconds:.0f}",
        str(run.num_shards),
        f"{run.startup_seconds:.1f}",
    )


if __name__ == "__main__":
    typer.run(bench_pipeline)
