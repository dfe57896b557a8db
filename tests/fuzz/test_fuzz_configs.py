"""Mutated configs: a ConfigError with a message, or a config; never a traceback, never more than a moment."""

from __future__ import annotations

import copy
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cvvae import SPECS
from jobs.config import EncodeConfig, load_config
from pipeline.errors import ConfigError, PipelineError
from pipeline.run import check_geometry
from pipeline.sources import plan_source
from tests.fuzz.mutations import mutate, seeds, tell

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs/encode").glob("*.yaml"))
BASE: dict[str, Any] = {
    "source": {"kind": "webdataset", "urls": ["shards", "more/{00..03}.tar"], "options": {"anon": True}},
    "output": {"url": "out", "format": "webdataset", "options": {}},
    "vae": {"spec": "cvvae-sd21-tiny", "seed": 0},
    "windows": {"frames": 17, "fps": 8, "max_windows": 2, "tail": "trim", "min_tail_frames": 5},
    "resize": {"buckets": [[128, 128], [112, 144]], "filter": "bicubic"},
    "decode": {"backends": ["pyav", "decord"], "cpu_seconds": 60},
    "encode": {"dtype": "float32", "batch_pixels": 557056, "logvar": False},
    "cluster": {"num_actors": 2, "on_poison_shard": "stop"},
}
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def load(path: Path, text: bytes) -> str:
    """How it ended. A config that loads must have been understood: it can be written down and read again."""
    path.write_bytes(text)
    started = time.process_time()
    try:
        config = load_config(EncodeConfig, path)
    except ConfigError:
        return "refused"
    finally:
        assert time.process_time() - started < 20
    assert EncodeConfig.model_validate(config.model_dump(mode="json")) == config
    return "loaded"


def sweep(path: Path, numbers: list[int]) -> None:
    texts = [shipped.read_bytes() for shipped in SHIPPED] + [yaml.safe_dump(BASE).encode()]
    ends: Counter[str] = Counter()
    for seed in numbers:
        draw = random.Random(f"config {seed}")
        try:
            ends[load(path, mutate(draw.choice(texts), texts, draw))] += 1
        except Exception as error:
            error.add_note(f"{seed=}")
            raise
    tell(numbers, "configs", dict(ends))


def test_mutated_configs(tmp_path: Path) -> None:
    sweep(tmp_path / "config.yaml", seeds(0, 120))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_mutated_configs(tmp_path: Path) -> None:
    """10,000, about four minutes."""
    sweep(tmp_path / "config.yaml", seeds(1_000_000, 10_000))


UNREASONABLE = {
    "a date that is none": "windows: 2001-99-99",
    "a number of 5,000 digits": f"windows: {{frames: {'9' * 5000}}}",
    "a tag that does not fit": "windows: !!int many",
    "a time stamp that is none": "windows: !!timestamp soon",
    "brackets without end": "windows: " + "[" * 5000,
    "an alias that holds itself": "source: &s {kind: webdataset, urls: x, options: {a: &b [1, *b]}}",
    "aliases of aliases": "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'] * 9)}]\n" for n in range(12)
    ),
    "keys that are no text": "1: 2\n2001-01-01: 3\nnull: 4",
    "a key that is a list": "? [a]\n: b",
}


@pytest.mark.parametrize("name", UNREASONABLE)
def test_unreasonable_yaml(tmp_path: Path, name: str) -> None:
    assert load(tmp_path / "config.yaml", UNREASONABLE[name].encode()) == "refused"


@pytest.mark.parametrize("override", ["windows=2001-99-99", "windows=" + "[" * 5000, "windows.frames=" + "9" * 5000])
def test_unreasonable_overrides(tmp_path: Path, override: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(BASE))
    with pytest.raises(ConfigError, match=r"--set windows.*: value is not YAML"):
        load_config(EncodeConfig, tmp_path / "config.yaml", [override])


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from([10**400, "~", "::"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
paths = st.sampled_from(
    [(section,) for section in BASE] + [(section, name) for section, part in BASE.items() for name in part]
)


@FUZZ
@given(changes=st.lists(st.tuples(paths, values), min_size=1, max_size=3))
@example(changes=[(("source", "urls"), "nope://bucket/{0..2}.tar")])
@example(changes=[(("source", "urls"), "a\0b.tar")])
@example(changes=[(("source", "options"), {"auto_mkdir": [1]})])
@example(changes=[(("source",), {"kind": "table", "url": "nope://x.csv"})])
def test_any_value_anywhere(changes: list[tuple[tuple[str, ...], Any]], tmp_path: Path) -> None:
    """What loads is also planned, up to where the store is asked: the errors are the project's own."""
    raw = copy.deepcopy(BASE)
    for path, value in changes:
        place = raw
        for name in path[:-1]:
            place = place[name] if isinstance(place.get(name), dict) else place.setdefault(f"{name}_", {})
        place[path[-1]] = value
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8", errors="surrogatepass")
    try:
        config = load_config(EncodeConfig, file)
        check_geometry(SPECS["cvvae-sd21-tiny"], config)
        if "://" not in str(config.source).replace("nope://", ""):  # no store is asked but the disk
            plan_source(config.source)
    except PipelineError:
        return
