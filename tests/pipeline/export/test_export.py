"""Exports: whatever stops them, going on gives the bytes of an undisturbed one; nothing unsound gets through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, DatasetError, IdentityMismatch
from pipeline.export import EXPORTS, ExportReport, ExportSettings, export_dataset
from pipeline.storage import Store
from tests.pipeline.reader.made_datasets import write_dataset
from tests.s3_server import S3Server


def export(source: Path, target: Path, **settings: Any) -> ExportReport:
    return export_dataset(Store(str(source)), Store(str(target)), ExportSettings(**settings))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Stopped(Exception):
    """In place of a kill: nothing in the code under test catches it."""


class StoppedStore(Store):
    """Stops at its n-th write, before the object is there or just after."""

    def __init__(self, url: str, stop_at: int, *, after: bool) -> None:
        super().__init__(url)
        self.left, self.after = stop_at, after

    def create(self, name: str, content: bytes | Path) -> bool:
        return self._counted(super().create, name, content)

    def replace(self, name: str, content: bytes) -> None:
        self._counted(super().replace, name, content)

    def _counted(self, write: Any, name: str, content: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Stopped
        result = write(name, content)
        if self.left == 0:
            raise Stopped
        return result


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", sorted(EXPORTS))
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, name: str, after: bool) -> None:
    write_dataset(tmp_path / "latents", shards=2, small=2, long=1)
    export(tmp_path / "latents", tmp_path / "whole", format=name)
    expected = contents(tmp_path / "whole")
    for stop_at in range(1, len(expected) + 1):
        target = tmp_path / f"stopped-{stop_at}"
        store = StoppedStore(str(target), stop_at, after=after)
        with pytest.raises(Stopped):
            export_dataset(Store(str(tmp_path / "latents")), store, ExportSettings(format=name))
        report = export(tmp_path / "latents", target, format=name)
        assert report.finished
        assert report.shards + report.shards_found_done == 2
        assert contents(target) == expected


def test_a_second_run_finds_nothing_to_do(tmp_path: Path) -> None:
    write_dataset(tmp_path / "latents", shards=2, small=2, long=1)
    first = export(tmp_path / "latents", tmp_path / "out", format="mds")
    again = export(tmp_path / "latents", tmp_path / "out", format="mds")
    assert (first.shards, first.windows, first.shards_found_done) == (2, 7, 0)
    assert (again.shards, again.windows, again.shards_found_done, again.finished) == (0, 0, 2, True)


def test_parts_make_the_whole(tmp_path: Path) -> None:
    write_dataset(tmp_path / "latents", shards=3, small=2, long=1)
    export(tmp_path / "latents", tmp_path / "whole", format="mds")
    finished = [export(tmp_path / "latents", tmp_path / "out", format="mds", part=(i, 2)).finished for i in (2, 1)]
    assert finished == [False, True]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_log_variances_go_into_mds_and_not_unasked_out_of_fastvideo(tmp_path: Path) -> None:
    made = write_dataset(tmp_path / "latents", shards=1, small=2, long=0, dtype="bfloat16", logvar=True)
    export(tmp_path / "latents", tmp_path / "mds", format="mds")
    (path,) = (tmp_path / "mds").rglob("*.zstd")
    for row in EXPORTS["mds"].read(path):
        assert row.logvar_CTHW is not None
        assert (row.logvar_CTHW == made[row.key].logvar_CTHW).all()
    with pytest.raises(ConfigError, match="no column for log variances"):
        export(tmp_path / "latents", tmp_path / "fastvideo", format="fastvideo")
    assert not (tmp_path / "fastvideo").exists()
    assert export(tmp_path / "latents", tmp_path / "fastvideo", format="fastvideo", with_logvar=False).finished
    with pytest.raises(IdentityMismatch, match="logvar: there True, asked for False"):
        export(tmp_path / "latents", tmp_path / "mds", format="mds", with_logvar=False)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path / "latents", shards=2, small=2, long=1)
    path = tmp_path / "latents" / "shards" / "00001.tar"
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"shards/00001\.tar: expected .* bytes with sha256"):
        export(tmp_path / "latents", tmp_path / "out", format="fastvideo")
    assert not (tmp_path / "out" / "export" / "shards" / "00001.json").exists()


def test_what_was_encoded_anew_or_damaged_since_stops_it(tmp_path: Path) -> None:
    write_dataset(tmp_path / "latents", shards=2, small=2, long=1)
    target = tmp_path / "out"
    export(tmp_path / "latents", target, format="fastvideo")
    (file,) = target.glob("00033*/00000.parquet")
    receipt = target / "export" / "shards" / "00000.json"
    text = receipt.read_text()

    file.write_bytes(b"other bytes")
    receipt.unlink()
    with pytest.raises(DatasetError, match=r"00000\.parquet: expected .* found 11"):
        export(tmp_path / "latents", target, format="fastvideo")
    file.unlink()
    receipt.write_text(text)
    with pytest.raises(DatasetError, match="gone now"):
        export(tmp_path / "latents", target, format="fastvideo")
    receipt.unlink()
    assert export(tmp_path / "latents", target, format="fastvideo").shards == 1
    receipt.write_text(text.replace('"source_sha256": "', '"source_sha256": "00'))
    with pytest.raises(DatasetError, match="encoded anew"):
        export(tmp_path / "latents", target, format="fastvideo")


def test_impossible_requests_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    latents = tmp_path / "latents"
    write_dataset(latents, shards=1, small=2, long=1)
    with pytest.raises(ConfigError, match="format: expected one of"):
        export(latents, tmp_path / "out", format="tfrecord")
    with pytest.raises(ConfigError, match="1 <= I <= N, got 3/2"):
        export(latents, tmp_path / "out", format="mds", part=(3, 2))
    with pytest.raises(ConfigError, match="a folder of its own"):
        export(latents, latents, format="mds")
    (latents / "manifest.json").unlink()
    with pytest.raises(DatasetError, match=r"manifest\.json does not exist"):
        export(latents, tmp_path / "out", format="mds")
    assert not (tmp_path / "out").exists()


def test_from_bucket_to_bucket(tmp_path: Path, s3_server: S3Server) -> None:
    write_dataset(tmp_path / "latents", shards=1, small=2, long=1)
    source, target = (Store(f"{s3_server.url}/export-{end}", options=s3_server.options) for end in ("from", "to"))
    for name, data in contents(tmp_path / "latents").items():
        source.replace(name, data)
    assert export_dataset(source, target, ExportSettings(format="mds")).finished
    export(tmp_path / "latents", tmp_path / "local", format="mds")
    for name, data in contents(tmp_path / "local").items():
        assert target.read_bytes(name) == data
