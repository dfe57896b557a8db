"""The sweep: a kill at a moment drawn at random over a whole run, again and again; every dataset is the reference.

`FIRE_SEEDS=0:100` (the default) are a hundred kills, `FIRE_SEEDS=17` is one of them alone. A seed decides the victim
and the moment. Most of so short a run is its start, so the run is drawn in two parts, each uniformly: a kill in four
falls between the first sight of such a victim and the first shard begun, three between that and the end.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.fire.harness import (
    SHARDS,
    VICTIMS,
    EncodeRun,
    Fire,
    FireCluster,
    FireNode,
    Victim,
    differences,
    stopped,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DRAWS = 10
SHARE_AT_WORK = 0.75


def wanted_seeds() -> range:
    first, _, stop = os.environ.get("FIRE_SEEDS", "0:100").partition(":")
    return range(int(first), int(stop or int(first) + 1))


@dataclass(slots=True, kw_only=True)
class Kill:
    """One seed, and what came of it."""

    seed: int
    victim: Victim
    hit: str
    """What the victim was at."""
    unfinished: bool
    """The run did not come to its end by itself: it was started again."""
    equal: bool = False


@pytest.fixture(scope="module")
def kills(request: pytest.FixtureRequest) -> Iterator[list[Kill]]:
    """All kills so far; at the end they are counted on the terminal."""
    done: list[Kill] = []
    yield done
    plugins = request.config.pluginmanager
    terminal, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    assert terminal is not None
    assert capture is not None
    with capture.global_and_fixture_disabled():
        terminal.ensure_newline()
        for line in summary(done):
            terminal.write_line(line)


def summary(kills: list[Kill]) -> Iterator[str]:
    for victim in VICTIMS:
        mine = [kill for kill in kills if kill.victim == victim]
        hits = ", ".join(f"{count} {hit}" for hit, count in sorted(Counter(kill.hit for kill in mine).items()))
        again = sum(kill.unfinished for kill in mine)
        yield (
            f"{victim}: {len(mine)} kills ({hits}), {sum(kill.equal for kill in mine)} equal, "
            f"{again} started again; seeds {' '.join(str(kill.seed) for kill in mine)}"
        )
    yield f"{len(kills)} kills, {sum(kill.equal for kill in kills)} equal"


def strike(fire: Fire, run: EncodeRun, victim: Victim, draw: random.Random) -> str | None:
    """Kill a victim, and say what it was at. None if the run had ended before the moment came."""
    cluster, at_work = fire.cluster, draw.random() < SHARE_AT_WORK
    if at_work:
        run.node_at_work()
    elif victim in ("actor", "child"):
        run.wait_for(lambda: cluster.encoders(victim), f"the first {victim}")
    due = run.age + draw.random() * (fire.working if at_work else fire.starting[victim])
    wait_for(lambda: run.ended or run.age >= due, "the moment")
    while not run.ended:
        with suppress(psutil.NoSuchProcess):  # it went by itself just before
            if (hit := kill_one(cluster, run, victim, draw)) is not None:
                return hit
    fire.working *= 0.8  # the machine is quicker than it was
    return None


def kill_one(cluster: FireCluster, run: EncodeRun, victim: Victim, draw: random.Random) -> str | None:
    """None if there is no such victim now."""
    if victim == "driver":
        hit = phase_of(run, cluster)
        run.kill()
        return hit
    if victim == "node":
        node = draw.choice(cluster.nodes)
        hit = work_of(node)
        cluster.kill_node(node)
        cluster.add_node()
        return hit
    if not (found := cluster.encoders(victim)):
        return None
    node, process = draw.choice(found)
    with stopped(process):  # so that what is said of it is still so when it dies
        hit = work_of(node)
        process.kill()
    return hit


def work_of(node: FireNode) -> str:
    if not node.actors():
        return "without an actor"
    return "in a shard" if node.shards_begun() else "starting or idle"


def phase_of(run: EncodeRun, cluster: FireCluster) -> str:
    if run.receipts():
        return "finishing" if run.receipts() == SHARDS else "between receipts"
    if any(node.shards_begun() for node in cluster.nodes):
        return "before the first receipt"
    return "starting actors" if cluster.encoders("actor") else "planning"


def struck_run(fire: Fire, folder: Path, seed: int, draw: random.Random, kills: list[Kill]) -> Kill:
    """A run with a kill in it, ended. A run that ends before its moment is thrown away, and a new moment is drawn."""
    victim = draw.choice(VICTIMS)
    for _ in range(DRAWS):
        with fire.run(folder) as run:
            hit = strike(fire, run, victim, draw)
            code = run.finish()
        if hit is not None and not (victim == "driver" and code == 0):
            kills.append(Kill(seed=seed, victim=victim, hit=hit, unfinished=code != 0))
            return kills[-1]
        shutil.rmtree(run.output)
    pytest.fail(f"{DRAWS} runs ended before their moment")


@pytest.mark.parametrize("seed", wanted_seeds())
def test_killed_anywhere_the_dataset_is_that_of_an_undisturbed_run(
    seed: int, fire: Fire, kills: list[Kill], tmp_path: Path
) -> None:
    kill = struck_run(fire, tmp_path, seed, random.Random(seed), kills)
    if kill.unfinished:
        with fire.run(tmp_path) as run:
            assert run.finish() == 0, run.log.read_text()
    assert differences(tmp_path / "out", fire.reference) == [], kill
    kill.equal = True
    fire.require_nothing_left()
    assert kill.victim == "driver" or not kill.unfinished, (tmp_path / "0.log").read_text()
