"""Bad input made by hand, through the whole job with Ray: each sample comes to its end, and the rest is encoded."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jobs.config import EncodeConfig
from jobs.encode_webvid import run_encode
from pipeline.dataset import DatasetFolder
from pipeline.documents import RejectionRecord, ShardReceipt
from pipeline.errors import RejectionClass
from pipeline.formats import read_index
from pipeline.storage import Store
from tests.fuzz.local_run import assert_verified
from tests.fuzz.made_bad_input import (
    CHILD_MEMORY_MB,
    ENCODED,
    LARGEST_CLIP,
    TABLE_ROWS,
    BadInput,
    Expected,
    made_bad_input,
    write_table,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")

ELSEWHERE = {
    RejectionClass.TIMEOUT: "tests/pipeline/decode/test_pool.py",
    RejectionClass.DECODER_CRASHED: "tests/pipeline/decode/test_pool.py",
    RejectionClass.NON_FINITE: "tests/pipeline/test_shard.py",
}
"""Classes that no input causes by itself, and where they are tested."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ffmpeg: str) -> BadInput:
    return made_bad_input(tmp_path_factory.mktemp("bad"), ffmpeg)


def config_for(source: dict[str, Any], output: Path) -> EncodeConfig:
    return EncodeConfig.model_validate(
        {
            "source": source,
            "output": {"url": str(output)},
            "vae": {"spec": "cvvae-sd21-tiny", "seed": 3},
            "windows": {"frames": 9, "max_windows": 2},
            "resize": {"buckets": [[32, 32]], "upscale": "reject"},
            "decode": {"max_clip_bytes": LARGEST_CLIP, "memory_mb": CHILD_MEMORY_MB},
            "encode": {"batch_pixels": 4 * 9 * 32 * 32, "threads": 1},
            "cluster": {"num_actors": 1, "decode_children": 2},
        }
    )


def ends_of(receipt: ShardReceipt, output: Path) -> dict[str, list[str]]:
    """Key -> how its samples ended: a rejection's class and message, or ENCODED."""
    ends: dict[str, list[str]] = {}
    for key in dict.fromkeys(row.row.clip_key for row in read_index(output / receipt.index.path).rows):
        ends.setdefault(key, []).append(ENCODED)
    for rejection in receipt.rejections:
        if rejection.scope == "clip":
            ends.setdefault(rejection.key, []).append(f"{rejection.error_class}: {rejection.message}")
    return ends


def assert_ends(receipt: ShardReceipt, output: Path, expected: list[tuple[str, Expected]]) -> None:
    """Each key ends as it should, once for each time it came, and no other key has an end."""
    ends = ends_of(receipt, output)
    assert Counter(key for key, _ in expected) == Counter({key: len(some) for key, some in ends.items()})
    for key, wanted in expected:
        found = [end for end in ends[key] if end.partition(":")[0] == wanted.end and wanted.words in end]
        assert found, f"{receipt.shard_id}: {key!r} should end as {wanted}, it ended as {ends[key]}"
    counts = receipt.counts
    assert counts.samples == len(expected)
    assert counts.clips_encoded == sum(wanted.end == ENCODED for _, wanted in expected)


def shard_rejections(receipt: ShardReceipt) -> list[RejectionRecord]:
    return [rejection for rejection in receipt.rejections if rejection.scope == "shard"]


def test_a_folder_of_bad_tars(made: BadInput, tmp_path: Path) -> None:
    """A tar of no bytes is a shard, too: committed, without a window, its loss recorded."""
    output = tmp_path / "out"
    config = config_for({"kind": "webdataset", "urls": str(made.tars)}, output)
    manifest = run_encode(config)
    folder = DatasetFolder(Store(str(output)))
    assert folder.receipt_ids() == sorted(path.stem for path in made.tars.glob("*.tar"))
    for shard in folder.receipt_ids():
        receipt = folder.receipt(shard)
        assert_ends(receipt, output, [(key, wanted) for at, key, wanted in made.samples if at == shard])
        said = [rejection.message for rejection in shard_rejections(receipt)]
        assert len(said) == (shard in made.broken), said
        assert all(made.broken[shard] in message for message in said)
    ends = Counter(wanted.end for _, _, wanted in made.samples)
    ends["truncated_shard"] += len(made.broken)
    assert manifest.rejections == {end: count for end, count in ends.items() if end != ENCODED}
    assert manifest.counts.samples == len(made.samples)
    assert_verified(config)
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(output)]
    assert outside == [], "no key led out of the dataset"


def test_a_table_with_bad_rows(made: BadInput, tmp_path: Path) -> None:
    source = {"kind": "table", "url": str(write_table(made)), "key": "{id}", "rows_per_shard": 100}
    output = tmp_path / "out"
    config = config_for(source, output)
    manifest = run_encode(config)
    receipt = DatasetFolder(Store(str(output))).receipt("table-00000")
    assert_ends(receipt, output, [(key, wanted) for _, key, _, wanted in TABLE_ROWS])
    assert manifest.counts.samples == len(TABLE_ROWS)
    assert_verified(config)


def test_every_class_is_caused_or_tested_elsewhere(made: BadInput) -> None:
    caused = {wanted.end for _, _, wanted in made.samples} | {wanted.end for *_, wanted in TABLE_ROWS}
    assert caused - {ENCODED} | {one.value for one in ELSEWHERE} == {one.value for one in RejectionClass}
    for one, path in ELSEWHERE.items():
        assert one.value in (Path(__file__).resolve().parents[2] / path).read_text()


def test_the_documentation_names_every_class() -> None:
    """docs/rejections.md: a row per class, in the order of the code."""
    text = (Path(__file__).resolve().parents[2] / "docs/rejections.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == [one.value for one in RejectionClass]
    assert all(len(cause) > 10 and len(remedy) > 10 for _, cause, remedy in rows)
