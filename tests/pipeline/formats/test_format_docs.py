"""docs/format.md: its code runs, its tables are what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.documents import FORMAT_VERSION
from pipeline.formats import INDEX_SCHEMA, SHARD_SCHEMA, ShardHeader
from pipeline.formats.fields import RowFields
from tests.pipeline.formats.made_latents import HEADER, make_latents, write_dataset

TEXT = (Path(__file__).parents[3] / "docs" / "format.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
ARROW_NAMES = {
    "string": pa.string(),
    "int64": pa.int64(),
    "double": pa.float64(),
    "bool": pa.bool_(),
    "binary": pa.binary(),
    "list of int64": pa.list_(pa.int64()),
    "list of double": pa.list_(pa.float64()),
}


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(text: str) -> dict[str, tuple[str, str]]:
    """name -> (type, meaning); a first cell may name several."""
    rows = [line.strip("|").split(" | ", 2) for line in text.splitlines() if line.startswith("| `")]
    return {name: (row[1].strip(), row[2].strip()) for row in rows for name in re.findall(r"`(\w+)`", row[0])}


def run_block(number: int) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[number], f"docs/format.md, block {number}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _a_dataset_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("OUT"), "webdataset", make_latents(8))
    write_dataset(Path("OUT-bfloat16"), "webdataset", make_latents(8, dtype="bfloat16"))
    write_dataset(Path("OUT-parquet"), "parquet", make_latents(8, dtype="bfloat16"))


def test_there_are_five_blocks() -> None:
    assert len(BLOCKS) == 5


def test_reading_the_header() -> None:
    names = run_block(0)
    assert (names["shift"], names["scale"]) == (0.0, 0.18215)


def test_reading_with_webdataset() -> None:
    names, last = run_block(1), make_latents(8)[-1]
    assert (names["latent_CTHW"] == last.mean_CTHW.float().numpy()).all()
    assert names["caption"] == last.row.caption
    assert names["fields"]["id"] == last.row.key


def test_reading_bfloat16_with_webdataset() -> None:
    assert run_block(2)["latent_CTHW"].equal(make_latents(8, dtype="bfloat16")[-1].mean_CTHW)


def test_reading_with_pyarrow() -> None:
    assert run_block(3)["latent_CTHW"].equal(make_latents(8, dtype="bfloat16")[-1].mean_CTHW)


def test_reading_by_byte_range() -> None:
    names = run_block(4)
    expected = [latent for latent in make_latents(8) if latent.row.bucket == "00017x00016x00032"]
    assert [row["id"] for row in names["rows"]] == [latent.row.key for latent in expected]
    assert len(expected) == 2
    for found, latent in zip(names["latents_BCTHW"], expected, strict=True):
        assert (found == latent.mean_CTHW.numpy()).all()


def test_the_field_table_is_complete() -> None:
    documented = table(section("Fields"))
    assert sorted(documented) == sorted(RowFields.model_fields)
    for name, (kind, _) in documented.items():
        assert ARROW_NAMES[kind.removesuffix(", nullable")] == SHARD_SCHEMA.field(name).type, name
        annotation = RowFields.model_fields[name].annotation
        assert (type(None) in getattr(annotation, "__args__", ())) == kind.endswith(", nullable"), name


def test_the_column_tables_are_complete() -> None:
    fields = set(RowFields.model_fields)
    for title, schema in (("Parquet shards", SHARD_SCHEMA), ("Index", INDEX_SCHEMA)):
        documented = table(section(title))
        assert list(documented) == [name for name in schema.names if name not in fields]
        for name, (kind, _) in documented.items():
            assert ARROW_NAMES[kind.removesuffix(", nullable")] == schema.field(name).type, name


def test_the_header_table_is_complete() -> None:
    assert list(table(section("Header"))) == list(ShardHeader.model_fields)
    assert f"version {FORMAT_VERSION}" in TEXT.splitlines()[0]
    for name in re.findall(r"`(\w+)`", table(section("Header"))["vae"][1]):
        assert name in HEADER.vae
