"""Rows between a shard and a batch: what is read of a local file, and files that come and go meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import DatasetError
from pipeline.local_files import LocalFile
from pipeline.reader import LatentDataset
from pipeline.reader.row_bytes import OPEN_FILES, SKIPPED_GAP, FileBytes, OpenFiles, spans
from tests.pipeline.reader.made_datasets import write_dataset


def test_small_gaps_are_read_over_and_large_ones_are_not() -> None:
    assert spans([100, 150, 200], 40) == [(100, 240)]
    far = 40 + 2 * SKIPPED_GAP
    assert spans([0, far, 2 * far], 40) == [(start, start + 40) for start in (0, far, 2 * far)]


def test_means_are_read_without_the_log_variances_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local tars: the bytes that are read are those of the means and their headers."""
    write_dataset(tmp_path, logvar=True)
    dataset = LatentDataset(str(tmp_path), 4, tail="pad", latents="raw")
    read, read_into = [], LocalFile.read_into
    monkeypatch.setattr(
        LocalFile, "read_into", lambda self, into, size, at: read.append(size) or read_into(self, into, size, at)
    )
    numbers = sum(batch.latents_BCTHW.numel() * 2 for batch in dataset)
    assert numbers < sum(read) <= numbers + 128 * len(read)


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    """A file that had to be closed is opened again; rows of the others stay what they are."""
    paths = [tmp_path / str(number) for number in range(OPEN_FILES + 3)]
    for number, path in enumerate(paths):
        path.write_bytes(b"head" + number.to_bytes(2, "little"))
    files = OpenFiles(lambda number: LocalFile(str(paths[number])))
    rows = [
        FileBytes(files.get(number), lambda n=number: files.get(n), [4], b"head", "here")
        for number in range(len(paths))
    ]
    for number, row in [*enumerate(rows), *enumerate(rows)]:
        out = bytearray(2)
        row.copy(0, memoryview(out))
        assert int.from_bytes(out, "little") == number


def test_a_row_that_is_elsewhere_or_cut_is_named(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"head" + bytes(10))
    file = LocalFile(str(path))
    with pytest.raises(DatasetError, match=r"^here: no latent .* begins at byte 5"):
        FileBytes(file, lambda: file, [5], b"head", "here").copy(0, memoryview(bytearray(4)))
    with pytest.raises(DatasetError, match=r"^here: truncated: ends before byte 24"):
        FileBytes(file, lambda: file, [4], b"head", "here").copy(0, memoryview(bytearray(20)))
