"""A cluster of several raylets on this machine, the encode job run against it, and the means to kill any part of it.

Every node has a temporary folder of its own, as machines have: what an encode actor spools there says which node has
which shard. Victims are processes that this cluster or its driver started, and no others: another Ray may run here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, get_args

import psutil
import pytest

from pipeline.scratch import Scratch

PROJECT = Path(__file__).resolve().parents[2]
HEAD = "127.0.0.2"
DEADLINE_SECONDS = 600.0
POLL_SECONDS = 0.05
STORE_BYTES = 100 << 20
SYSTEM = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3, "worker_niceness": 0}
"""A dead raylet is noticed in about 5 s, not in 20, and encoders are not starved by whatever else runs here."""

SHARDS, NODES = 6, 2

Victim = Literal["actor", "child", "node", "driver"]
VICTIMS: tuple[Victim, ...] = get_args(Victim)
Result = TypeVar("Result")


def require_refusal(run: EncodeRun, *words: str) -> None:
    """It ended with an error, said so in one message of its own, and that has the words."""
    assert run.finish() == 1, run.log.read_text()
    text = run.log.read_text()
    assert "Traceback" not in text, text
    error = text[text.index("error: ") :]
    assert all(word in error for word in words), error


def wait_for(condition: Callable[[], Result], what: str, seconds: float = DEADLINE_SECONDS) -> Result:
    """The condition's first result that is true. AssertionError after a generous while."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(POLL_SECONDS)
    return result


def alive(process: psutil.Process) -> bool:
    """Running: a zombie whose parent has not asked for it yet is dead."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def command_of(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _children(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return process.children()
    return []


@dataclass(slots=True, eq=False)
class FireNode:
    """A raylet and what runs under it."""

    ray_node: Any
    raylet: psutil.Process
    folder: Path
    """Its temporary folder."""
    known: set[psutil.Process] = field(default_factory=set)
    """Encode actors and decode children that were ever seen here."""

    def actors(self) -> list[psutil.Process]:
        """Encode actors, those that are still setting up included."""
        # only the raylet's own children: a decode child bears its parent's title until it has become itself
        found = [process for process in _children(self.raylet) if "EncodeShards" in command_of(process)]
        self.known.update(found)
        return found

    def decode_children(self) -> list[psutil.Process]:
        found = [
            process
            for actor in self.actors()
            for process in _children(actor)
            if "pipeline.decode.child" in command_of(process)
        ]
        self.known.update(found)
        return found

    @property
    def scratch(self) -> Path:
        return self.folder / f"cvvae-latents-{os.getuid()}"

    def shards_begun(self) -> set[str]:
        """Ids of the shards that have a scratch folder here, of dead actors too."""
        return {path.name.rsplit("-", 1)[0] for path in self.scratch.glob("*/*-*")}


class FireCluster:
    """A head without cores for the driver, and nodes of one core, so that each has room for one encode actor."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # not under pytest's tmp_path: a Unix socket's path may have 107 bytes
        self._folder = Path(tempfile.mkdtemp(prefix="ray-fire-"))
        self._count = 0
        self._gone: list[FireNode] = []
        self.nodes: list[FireNode] = []
        self.driver_folder = self._new_folder("head")
        with pytest.MonkeyPatch.context() as environment:
            # Ray's launcher notes the cluster's address in there: where other Rays would look it up is not ours
            environment.setenv("TMPDIR", str(self.driver_folder))
            (self.driver_folder / "ray").mkdir()
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 0,
                    "node_ip_address": HEAD,
                    "include_dashboard": False,
                    "temp_dir": str(self._folder / "s"),
                    "object_store_memory": STORE_BYTES,
                    "_system_config": SYSTEM,
                },
            )
        assert self._cluster.address is not None
        self.address = self._cluster.address

    def add_node(self, *, num_cpus: int = 1, resources: dict[str, float] | None = None) -> FireNode:
        """Start a node and wait until the cluster knows it. Call it from the main thread."""
        self._count += 1
        folder = self._new_folder(f"node-{self._count}")
        node = self._cluster.add_node(
            num_cpus=num_cpus,
            resources=resources or {},
            node_ip_address=f"127.0.0.{10 + self._count % 200}",
            object_store_memory=STORE_BYTES,
            env_vars={"TMPDIR": str(folder)},
        )
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        self.nodes.append(FireNode(node, raylet, folder))
        return self.nodes[-1]

    def _new_folder(self, name: str) -> Path:
        (self._folder / name).mkdir()
        return self._folder / name

    def kill_node(self, node: FireNode) -> None:
        """SIGKILL its raylet, as when the machine goes."""
        node.decode_children()  # from now on nobody can tell whose they were
        node.raylet.kill()
        self.nodes.remove(node)
        self._gone.append(node)
        self._cluster.remove_node(node.ray_node, allow_graceful=False)

    def resize(self, num_nodes: int) -> None:
        """As many living nodes as that, and no encoder of an earlier run on any."""
        while len(self.nodes) > num_nodes:
            self.kill_node(self.nodes[-1])
        while len(self.nodes) < num_nodes:
            self.add_node()
        self.wait_until_idle()

    def encoders(self, kind: Victim) -> list[tuple[FireNode, psutil.Process]]:
        """The encode actors, or the decode children, of all nodes."""
        find = FireNode.actors if kind == "actor" else FireNode.decode_children
        return [(node, process) for node in self.nodes for process in find(node)]

    def wait_until_idle(self) -> None:
        """Wait until no encode actor or decode child that was ever seen lives, on any node, dead ones included."""
        nodes = [*self.nodes, *self._gone]

        def idle() -> bool:
            self.encoders("child")
            return not any(alive(process) for node in nodes for process in node.known) and not self._orphans()

        wait_for(idle, "encode actors and decode children to end")
        self._gone.clear()
        for node in self.nodes:
            node.known.clear()

    def _orphans(self) -> list[psutil.Process]:
        """Decode children of ours, whoever their parent is now. (Ray's workers overwrite their environment.)"""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if "pipeline.decode.child" in command_of(process):
                    folder = process.environ().get("TMPDIR", "")
                    found += [process] if Path(folder).is_relative_to(self._folder) and alive(process) else []
        return found

    def require_no_scratch_left(self) -> None:
        """What killed actors left on a living node goes when the next one starts there."""
        for node in self.nodes:
            Scratch(node.scratch).close()
            assert list(node.scratch.iterdir()) == []

    def close(self) -> None:
        for node in list(self.nodes):
            self.kill_node(node)
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)
        shutil.rmtree(self._folder, ignore_errors=True)


class EncodeRun:
    """The encode job as a process of its own. A context manager: the driver does not outlive it."""

    def __init__(self, cluster: FireCluster, config: dict[str, Any], folder: Path) -> None:
        self.cluster = cluster
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.log")))
        path, self.log = folder / f"{number}.yaml", folder / f"{number}.log"
        path.write_text(json.dumps(config))
        self.output = Path(config["output"]["url"])
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.driver = psutil.Popen(
                [sys.executable, "jobs/encode_webvid.py", str(path)],
                cwd=PROJECT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(cluster.driver_folder)},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self.driver.kill()
        self.driver.wait()

    @property
    def ended(self) -> bool:
        return self.driver.poll() is not None

    @property
    def age(self) -> float:
        """Seconds since the driver's start."""
        return time.monotonic() - self.started

    def node_at_work(self) -> FireNode:
        """The first node where a shard is begun."""
        return self.wait_for(lambda: [node for node in self.cluster.nodes if node.shards_begun()], "a shard begun")[0]

    def kill_at_work(self, kind: Victim) -> None:
        """SIGKILL an encode actor that is in a shard, or a decode child that is in a clip: stopped first, so that it
        still is when it dies."""

        def killed() -> bool:
            for node, process in self.cluster.encoders(kind):
                with suppress(psutil.NoSuchProcess), stopped(process):
                    if node.shards_begun() if kind == "actor" else _holds_a_clip(process):
                        process.kill()
                        return True
            return False

        self.wait_for(killed, f"a working {kind} was killed")

    def receipts(self) -> int:
        return len(list(self.output.glob("receipts/*.json")))

    def wait_for(self, condition: Callable[[], Result], what: str) -> Result:
        """As the function, and the run must not have ended before."""

        def checked() -> Result:
            result = condition()
            assert result or not self.ended, f"the run ended before {what}:\n{self.log.read_text()}"
            return result

        return wait_for(checked, what)

    def finish(self) -> int:
        """Wait for the end of the driver; its exit code."""
        wait_for(lambda: self.ended, f"the end of the run, {self.log}")
        return self.driver.returncode


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """The process stands still meanwhile; it may be killed inside. NoSuchProcess if it is gone."""
    process.suspend()
    wait_for(lambda: process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE), "a process to stop")
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def _holds_a_clip(child: psutil.Process) -> bool:
    """A decode child has memory without a name open only while it is at a clip."""
    with suppress(OSError):
        return any("/memfd:" in str(fd.readlink()) for fd in Path(f"/proc/{child.pid}/fd").iterdir())
    return False


def dataset_bytes(output: Path) -> dict[str, bytes]:
    """Everything that must be equal between two runs over the same input: all files, but for the reports of the runs
    and the config in run.json, which says where the run was to write."""
    files = {path.relative_to(output).as_posix(): path for path in sorted(output.rglob("*")) if path.is_file()}
    found = {name: path.read_bytes() for name, path in files.items() if not name.startswith("runs/")}
    if "run.json" in found:
        run = json.loads(found["run.json"])
        found["run.json"] = json.dumps({name: value for name, value in run.items() if name != "config"}).encode()
    return found


def require_nothing_unnamed(output: Path) -> None:
    """Every file is one of the dataset's documents or named by a receipt."""
    receipts = {f"receipts/{path.name}": json.loads(path.read_bytes()) for path in output.glob("receipts/*.json")}
    named = {receipt[part]["path"] for receipt in receipts.values() for part in ("payload", "index")}
    assert dataset_bytes(output).keys() == {"run.json", "manifest.json", "README.md"} | receipts.keys() | named


def differences(output: Path, reference: dict[str, bytes]) -> list[str]:
    """Names of the files in which a dataset is not the reference."""
    found = dataset_bytes(output)
    return sorted(name for name in found.keys() | reference.keys() if found.get(name) != reference.get(name))


@dataclass(slots=True)
class Fire:
    """The cluster, a source to encode on it, and what an undisturbed run gives."""

    cluster: FireCluster
    source: Path
    reference: dict[str, bytes]
    starting: dict[Victim, float]
    """How long an undisturbed run has such a victim before the first shard is begun, in seconds."""
    working: float
    """How long it takes from there to the end of the last encoder."""

    def run(self, folder: Path, *, num_actors: int = NODES) -> EncodeRun:
        """Start the job, or start it again, with folder/out as its output."""
        return EncodeRun(self.cluster, config_for(self.cluster, self.source, folder / "out", num_actors), folder)

    def require_equal(self, folder: Path) -> None:
        """folder/out is the reference, and nothing else of the run is left."""
        assert differences(folder / "out", self.reference) == []
        self.require_nothing_left()

    def require_nothing_left(self) -> None:
        """No encode actor and no decode child outlives the run, and what killed ones spooled is given back."""
        self.cluster.wait_until_idle()
        self.cluster.require_no_scratch_left()


def undisturbed(cluster: FireCluster, source: Path, folder: Path) -> Fire:
    """A run in which nothing is killed."""
    with EncodeRun(cluster, config_for(cluster, source, folder / "out", NODES), folder) as run:
        seen: dict[Victim, float] = {"driver": 0.0, "node": 0.0}
        for kind in ("actor", "child"):
            run.wait_for(partial(cluster.encoders, kind), f"the first {kind}")
            seen[kind] = run.age
        run.node_at_work()
        begun = ended = run.age
        while not run.ended:
            ended = run.age if cluster.encoders("actor") else ended
            time.sleep(POLL_SECONDS)
        assert run.finish() == 0, run.log.read_text()
    require_nothing_unnamed(run.output)
    return Fire(
        cluster=cluster,
        source=source,
        reference=dataset_bytes(run.output),
        starting={victim: begun - moment for victim, moment in seen.items()},
        working=ended - begun,
    )


def config_for(cluster: FireCluster, source: Path, output: Path, num_actors: int) -> dict[str, Any]:
    """The threads are part of what a receipt records; how many actors there are is not."""
    return {
        "source": {"kind": "webdataset", "urls": str(source)},
        "output": {"url": str(output)},
        "vae": {"spec": "cvvae-sd21-tiny", "seed": 3},
        "windows": {"frames": 17, "tail": "trim", "min_tail_frames": 5},
        "resize": {"buckets": [[32, 32], [24, 48]]},
        "encode": {"batch_pixels": 2 * 17 * 32 * 32, "threads": 1},
        "cluster": {"address": cluster.address, "num_actors": num_actors, "decode_children": 1},
    }
