"""What can be wrong with a machine, a store or a config before a run: each check tries it and says what it found."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cvvae.conv_probe import probe_conv3d
from jobs.cluster import connected, decide_shape, node_resources
from jobs.config import ClusterConfig, EncodeConfig
from pipeline.checkpoints import load_source
from pipeline.decode.pool import DecodePool
from pipeline.errors import PipelineError
from pipeline.formats import TORCH_DTYPES
from pipeline.policies import DecodePolicy, DTypeName
from pipeline.records import Clip
from pipeline.run import check_geometry
from pipeline.sources import SourceDigest, plan_source, read_shard
from pipeline.storage import Store
from pipeline.windows import valid_lengths

Verdict = Literal["good", "note", "bad"]
PACKAGES = (
    "torch",
    "numpy",
    "pyarrow",
    "pydantic",
    "fsspec",
    "s3fs",
    "ray",
    "av",
    "decord",
    "webdataset",
    "diffusers",
)
MAX_SKEW_SECONDS = 60.0
RACERS = 8
MIN_SHM = 256 << 20
MIN_SCRATCH = 2 << 30
CLIPS_TRIED = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `bad` means that a run would fail or could not keep its promises."""

    what: str
    verdict: Verdict
    text: str


def guarded(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; the project's own errors, and those of the machine, are findings too."""
    try:
        yield from check()
    except (PipelineError, OSError, ValueError, RuntimeError) as error:
        yield Finding(what, "bad", f"{type(error).__name__}: {error}")


def versions() -> Iterator[Finding]:
    old = sys.version_info < (3, 11)
    yield Finding("python", "bad" if old else "good", f"{platform.python_version()} on {platform.platform()}")
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    yield Finding("packages", "good", ", ".join(f"{name} {version}" for name, version in found.items()))


def devices(config: EncodeConfig | None) -> Iterator[Finding]:
    """GPUs as PyTorch sees them, and the driver as it says itself."""
    wanted = config is not None and bool(config.cluster.gpus_per_actor)
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        yield Finding("GPU", "bad" if wanted else "note", f"none that PyTorch (built for {built}) can use here")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield Finding("GPU", "good", f"{number}: {properties.name}, {properties.total_memory >> 20} MiB")
    command = shutil.which("nvidia-smi")
    if command:
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
        yield Finding("GPU driver", "good", f"{said.stdout.split()[0] if said.stdout else said.stderr.strip()}")


def convolutions(config: EncodeConfig | None) -> Iterator[Finding]:
    """The probe that every encoder makes as it starts, in the config's dtype or in both half precisions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes: tuple[DTypeName, ...] = (config.encode.dtype,) if config is not None else ("bfloat16", "float16")
    for dtype in dtypes:
        probed = probe_conv3d(TORCH_DTYPES[dtype], device, torch.channels_last_3d)
        text = (
            f"{dtype} on {device.type}: relative error {probed.relative_rms:.2g}, {probed.slowdown:.2g} of its time"
        )
        if probed.is_wrong:
            yield Finding("conv3d", "bad", f"{text}; wrong: update PyTorch or cuDNN, or take float32")
        else:
            yield Finding("conv3d", "note" if probed.is_slow else "good", text)


def machine() -> Iterator[Finding]:
    """Memory that Ray and the spool need."""
    shm = Path("/dev/shm")
    if shm.is_dir():
        free = shutil.disk_usage(shm).free
        small = f"; Ray wants more: start the container with --shm-size, expected over {MIN_SHM >> 20} MiB"
        bad = free < MIN_SHM
        yield Finding("/dev/shm", "note" if bad else "good", f"{free >> 20} MiB free{small if bad else ''}")
    scratch = Path(tempfile.gettempdir())
    free = shutil.disk_usage(scratch).free
    bad = free < MIN_SCRATCH
    text = f"{free >> 20} MiB free in {scratch}" + ("; a shard's latents must fit: set TMPDIR" if bad else "")
    yield Finding("scratch", "note" if bad else "good", text)


def vae(config: EncodeConfig) -> Iterator[Finding]:
    model = load_source(config.vae)
    check_geometry(model.spec, config)
    seeded = "; its weights are random, for trying out" if config.vae.is_seeded else ""
    verdict: Verdict = "note" if seeded else "good"
    yield Finding("VAE", verdict, f"{model.spec.name}, weights {str(model.weights_sha256)[:12]}{seeded}")


def source(config: EncodeConfig) -> Iterator[Finding]:
    """The source can be listed, and a clip of it decoded by each of the config's decoders."""
    shards = plan_source(config.source).shards
    yield Finding("source", "good", f"{len(shards)} shards")
    samples = read_shard(shards[0], config.source, max_clip_bytes=config.decode.max_clip_bytes, digest=SourceDigest())
    with closing(samples):  # type: ignore[type-var]
        clip = next((one for one in itertools.islice(samples, CLIPS_TRIED) if isinstance(one, Clip)), None)
    if clip is None:
        yield Finding("source", "bad", f"none of the first {CLIPS_TRIED} samples of {shards[0].url} is a clip")
        return
    yield Finding("source", "good", f"clip {clip.key!r} of {shards[0].url}: {clip.video.size} bytes")
    clip.video.close()
    for backend in config.decode.backends:
        yield from guarded(f"decoder {backend}", lambda backend=backend: _decoded(config, backend))


def _decoded(config: EncodeConfig, backend: str) -> Iterator[Finding]:
    """The first clips of the source that this backend alone can decode."""
    policy = DecodePolicy.model_validate(config.decode.model_dump() | {"backends": [backend]})
    lengths = valid_lengths(config.windows, load_source(config.vae).spec.is_valid_num_frames)
    shard = plan_source(config.source).shards[0]
    samples = read_shard(shard, config.source, max_clip_bytes=policy.max_clip_bytes, digest=SourceDigest())
    with DecodePool(policy, 1) as pool, closing(samples):  # type: ignore[type-var]
        clips = (one for one in itertools.islice(samples, CLIPS_TRIED) if isinstance(one, Clip))
        said = "nothing"
        with closing(pool.decode(clips, config.windows, config.resize, lengths)) as events:
            for event in events:
                rejection = getattr(event, "rejection", None)
                if rejection is None:
                    yield Finding(f"decoder {backend}", "good", f"{pool.decoders[0]} decodes clip {event.clip.key!r}")
                    return
                said = f"{rejection.error_class}: {rejection.message}"
        yield Finding(f"decoder {backend}", "bad", f"{pool.decoders[0]} decodes none of the first clips; {said}")


def decoders() -> Iterator[Finding]:
    """The decoders that a decode process can import."""
    with DecodePool(DecodePolicy(), 1) as pool:
        yield Finding("decoders", "good", ", ".join(pool.decoders))


def output(config: EncodeConfig) -> Iterator[Finding]:
    """Rights, conditional writes and the clock, on an object of our own that is removed again."""
    spec = config.output
    store = Store(spec.url, options=spec.options, single_driver=spec.single_driver)
    store.require_conditional_writes()
    name = f"runs/doctor-{uuid.uuid4().hex}"
    try:
        if not store.create(name, b"first"):
            yield Finding("output", "bad", f"{store.full_url(name)} exists already, although its name is new")
            return
        asked = time.time()
        readable = store.read_bytes(name) == b"first"
        stamped = store.modified("runs", "").get(name.rpartition("/")[2])
        rights = "write, read and list" if readable and stamped is not None else "writes are not seen by reads"
        yield Finding("output", "good" if readable and stamped else "bad", f"{store.full_url('')}: {rights}")
        yield from conditional_writes(store, name, single_driver=spec.single_driver)
        if stamped is not None and stamped.modified_unix is not None:
            skew = stamped.modified_unix - asked
            off = abs(skew) > MAX_SKEW_SECONDS
            yield Finding("clock", "bad" if off else "good", f"{skew:+.1f} s of the store's against this machine's")
    finally:
        _removed(store, [name, f"{name}-race"])


def conditional_writes(store: Store, name: str, *, single_driver: bool) -> Iterator[Finding]:
    """A second creation must fail, and of several at once one must win."""
    second = store.create(name, b"second") or store.read_bytes(name) != b"first"
    with ThreadPoolExecutor(RACERS) as pool:
        winners = sum(pool.map(lambda number: store.create(f"{name}-race", b"%d" % number), range(RACERS)))
    if second or winners != 1:
        text = f"not honoured: {winners} of {RACERS} writers at once won. Set output.single_driver: true"
        verdict: Verdict = "note" if single_driver else "bad"
        yield Finding("conditional writes", verdict, text + (" (it is)" if single_driver else ""))
    else:
        yield Finding("conditional writes", "good", f"honoured: one of {RACERS} writers at once won")


def _removed(store: Store, names: list[str]) -> None:
    """A run needs no right to delete, so that one may be missing; the objects are small."""
    for name in names:
        try:
            store.remove(name)
        except PipelineError:
            return


def cluster(config: EncodeConfig | None) -> Iterator[Finding]:
    """What Ray has, and the encode actors that fit it; without an address, this machine alone."""
    address = (config.cluster.address if config is not None else None) or os.environ.get("RAY_ADDRESS")
    if address:
        with connected(config.cluster if config is not None else ClusterConfig()):
            nodes = node_resources()
        text = "; ".join(f"{node.get('CPU', 0):g} CPU {node.get('GPU', 0):g} GPU" for node in nodes)
        yield Finding("Ray", "good", f"{len(nodes)} nodes at {address}: {text}")
    else:
        cores = float(os.cpu_count() or 1)
        nodes = [{"CPU": cores, "GPU": float(torch.cuda.device_count())}]
        yield Finding(
            "Ray", "note", f"no cluster: a run would start Ray here, with {cores:g} CPU {nodes[0]['GPU']:g} GPU"
        )
    if config is not None:
        shape = decide_shape(config.cluster, config.encode, nodes, num_shards=1 << 30)
        each = f"{shape.num_cpus:g} CPU, {shape.num_gpus:g} GPU, {shape.decode_children} decode processes"
        each += f" and {shape.remote_decoders} on other nodes" if shape.remote_decoders else ""
        yield Finding("encode actors", "good", f"{shape.num_actors}, each with {each}")
