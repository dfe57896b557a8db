"""The tar itself: members, metadata, header record, offsets, and tars that are not what they should be."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DatasetError
from pipeline.formats import FORMATS, HEADER_KEY, read_payload
from pipeline.formats.webdataset_format import EMPTY_MEMBER
from tests.pipeline.formats.made_latents import HEADER, make_latent, make_latents, read_bytes, write_shard

Members = list[tuple[str, bytes]]


def members_of(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def pack(members: Members, header: str | None = HEADER.to_json()) -> bytes:
    """A tar by Python's own hand."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", pax_headers={HEADER_KEY: header} if header else {}) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize(("dtype", "suffix"), [("float16", "npy"), ("float32", "npy"), ("bfloat16", "safetensors")])
def test_members_of_a_sample(tmp_path: Path, dtype: str, suffix: str) -> None:
    path, _ = write_shard(tmp_path, "webdataset", [make_latent("a/ключ_00000", dtype=dtype, logvar=True, caption="")])
    members = dict(members_of(path))
    assert list(members) == [
        "a/ключ_00000.json",
        f"a/ключ_00000.latent.{suffix}",
        f"a/ключ_00000.logvar.{suffix}",
        "a/ключ_00000.txt",
    ]
    assert members["a/ключ_00000.txt"] == b""
    text = members["a/ключ_00000.json"]
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")).encode("ascii")


def test_nothing_in_the_tar_depends_on_who_wrote_it(tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path, "webdataset", make_latents(8, logvar=True))
    with tarfile.open(path) as tar:
        assert json.loads(tar.pax_headers[HEADER_KEY]) == json.loads(HEADER.to_json())
        found = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in tar}
    assert found == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}
    assert path.stat().st_size % tarfile.RECORDSIZE == 0


def test_header_comes_first_and_is_a_global_record(tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path, "webdataset", make_latents())
    block = path.read_bytes()[: tarfile.BLOCKSIZE]
    assert block[156:157] == tarfile.XGLTYPE


def test_places_are_where_the_files_are(tmp_path: Path) -> None:
    latents = make_latents(8, logvar=True)
    latents.append(make_latent("z" * 180 + "_00000", logvar=True, size=(33, 24, 16)))  # long names take extra blocks
    path, places = write_shard(tmp_path, "webdataset", latents)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        spans = {member.name: (member.offset_data, member.size) for member in tar}
    for latent, place in zip(latents, places, strict=True):
        assert (place.latent_offset, place.latent_length) == spans[f"{latent.row.key}.latent.npy"]
        assert (place.logvar_offset, place.logvar_length) == spans[f"{latent.row.key}.logvar.npy"]
        assert place.row_group is place.row_in_group is None
        assert place.latent_offset is not None
        assert place.latent_length is not None
        tensor = read_payload(data[place.latent_offset : place.latent_offset + place.latent_length])
        assert tensor.equal(latent.mean_CTHW)


def test_gnu_tar_reads_it(tmp_path: Path) -> None:
    latents = make_latents(8)
    path, _ = write_shard(tmp_path, "webdataset", latents)
    listing = subprocess.run(["tar", "--list", "--file", path], capture_output=True, check=True)
    assert listing.stdout.count(b"\n") == 3 * len(latents)
    assert listing.stderr == b""
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "--extract", "--file", path, "--directory", tmp_path / "out"], check=True)
    captions = sorted(caption.read_text() for caption in (tmp_path / "out").rglob("*.txt"))
    assert captions == sorted(latent.row.caption for latent in latents)


def test_empty_shard_has_one_member_that_is_no_sample(tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path, "webdataset", [])
    assert members_of(path) == [(EMPTY_MEMBER, b"")]


def test_a_tar_of_other_hands_is_read_alike(tmp_path: Path) -> None:
    """The specification is enough: a tar packed by tarfile with the same members gives the same latents."""
    path, _ = write_shard(tmp_path, "webdataset", make_latents(4))
    assert [x.row for x in read_bytes("webdataset", pack(members_of(path)))] == [x.row for x in make_latents(4)]


def replace_member(suffix: str, data: bytes) -> Callable[[Members], Members]:
    return lambda members: [(name, data if name.endswith(suffix) else old) for name, old in members]


def edit_json(**changes: object) -> Callable[[Members], Members]:
    def edit(members: Members) -> Members:
        return [
            (name, json.dumps(json.loads(data) | changes).encode() if name.endswith(".json") else data)
            for name, data in members
        ]

    return edit


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(replace_member("npy", npy(np.array([{"a": 1}], dtype=object))), r"got \|O", id="pickle"),
        pytest.param(
            replace_member("npy", npy(np.zeros((4, 5, 2, 3), np.float16))), r"\[4, 5, 2, 2\], got", id="shape"
        ),
        pytest.param(replace_member("npy", npy(np.zeros((4, 5, 2, 2), np.float32))), "expected float16", id="dtype"),
        pytest.param(replace_member("npy", npy(np.zeros((4, 5, 2, 2), ">f2"))), "got >f2", id="endian"),
        pytest.param(replace_member("npy", b"PK\3\4"), "neither npy nor safetensors", id="zip"),
        pytest.param(replace_member("npy", b""), "neither npy nor safetensors", id="empty"),
        pytest.param(replace_member("json", b"{"), r"json: not JSON", id="json"),
        pytest.param(replace_member("json", b"[" * 100_000), r"json: not JSON", id="deep"),
        pytest.param(replace_member("json", b"[]"), "row: ", id="no object"),
        pytest.param(replace_member("txt", b"another"), "not the caption", id="caption"),
        pytest.param(edit_json(id="other"), "id: expected clip_00000, got other", id="key"),
        pytest.param(edit_json(bucket="00001x00001x00001"), "bucket: expected 00017x00016x00016", id="bucket"),
        pytest.param(edit_json(width="16"), "width: ", id="type"),
        pytest.param(edit_json(fps=float("nan")), "fps: ", id="nan"),
        pytest.param(edit_json(metadata="[1]"), "metadata: expected a JSON object", id="metadata"),
        pytest.param(edit_json(shard_id="00013"), "header says '00012'", id="shard"),
        pytest.param(edit_json(has_logvar=True), "expected files", id="logvar"),
        pytest.param(lambda members: members[:-1], "expected files", id="missing"),
        pytest.param(lambda members: [*members, ("clip_00000.exe", b"")], "expected files", id="surplus"),
        pytest.param(lambda members: [*members, members[-1]], "there twice", id="twice"),
        pytest.param(lambda members: [*members, ("README", b"")], r"README: expected KEY\.EXTENSION", id="no sample"),
        pytest.param(lambda members: members[1:], "no clip_00000.json", id="no json"),
    ],
)
def test_hostile_members(tmp_path: Path, damage: Callable[[Members], Members], message: str) -> None:
    path, _ = write_shard(tmp_path, "webdataset", [make_latent()])
    broken = tmp_path / "broken.tar"
    broken.write_bytes(pack(damage(members_of(path))))
    with broken.open("rb") as file, pytest.raises(DatasetError, match=rf"broken\.tar: (.|\n)*{message}"):
        list(FORMATS["webdataset"].read(file))


@pytest.mark.parametrize("kind", ["link", "sparse"])
def test_only_plain_files(tmp_path: Path, kind: str) -> None:
    """A link points elsewhere; a sparse file may claim terabytes of zeros."""
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", pax_headers={HEADER_KEY: HEADER.to_json()}) as tar:
        member = tarfile.TarInfo("clip_00000.json")
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        else:
            member.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40)}
        tar.addfile(member)
    with path.open("rb") as file, pytest.raises(DatasetError, match=r"odd\.tar: clip_00000\.json: .*plain file"):
        list(FORMATS["webdataset"].read(file))


def test_no_header_is_named(tmp_path: Path) -> None:
    data = pack([("a.json", b"{}")], header=None)
    with pytest.raises(DatasetError, match=r"no CVVAE\.header record"):
        read_bytes("webdataset", data)
    with pytest.raises(DatasetError, match=r"CVVAE\.header: not JSON"):
        read_bytes("webdataset", pack([("a.json", b"{}")], header="{"))


def test_a_cut_between_members_is_noticed(tmp_path: Path) -> None:
    """Python's tarfile takes it for the end of the archive."""
    path, _ = write_shard(tmp_path, "webdataset", make_latents(4))
    with tarfile.open(path) as tar:
        start = tar.getmembers()[3].offset
    data = path.read_bytes()[:start]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert len(tar.getmembers()) == 3
    with pytest.raises(DatasetError, match=f"no end-of-archive marker at byte {start}"):
        read_bytes("webdataset", data)


def test_a_broken_member_header_is_noticed(tmp_path: Path) -> None:
    """So does tarfile with a header whose checksum is wrong: everything after it would vanish."""
    path, _ = write_shard(tmp_path, "webdataset", make_latents(4))
    with tarfile.open(path) as tar:
        start = tar.getmembers()[3].offset
    data = bytearray(path.read_bytes())
    data[start] ^= 0xFF
    with pytest.raises(DatasetError, match="no end-of-archive marker"):
        read_bytes("webdataset", bytes(data))
