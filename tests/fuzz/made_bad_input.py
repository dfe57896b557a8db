"""Bad input made by hand: a folder of tars and two tables, and what each sample in them must come to."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.awkward_clips import ClipMaker

Member = tuple[str, bytes] | tarfile.TarInfo
ENCODED = "encoded"
LARGEST_CLIP = 200_000
"""Bytes: decode.max_clip_bytes of the runs over this input."""
CHILD_MEMORY_MB = 256


@dataclass(frozen=True)
class Expected:
    """How a sample ends."""

    end: str
    """ENCODED or a rejection class."""
    words: str = ""
    """Part of the rejection's message."""


@dataclass
class BadInput:
    """The folder, and the end of every sample by (shard, key), in order where a key comes twice."""

    folder: Path
    samples: list[tuple[str, str, Expected]] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    """Shards with a rejection of scope "shard", and part of its message."""

    @property
    def tars(self) -> Path:
        return self.folder / "tars"

    def add_tar(self, shard: str, samples: list[tuple[str, list[Member], Expected]]) -> Path:
        members = [member for _, some, _ in samples for member in some]
        path = self.tars / f"{shard}.tar"
        path.write_bytes(tar_bytes(members))
        self.samples += [(shard, key, expected) for key, _, expected in samples]
        return path


def tar_bytes(members: list[Member]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", errors="surrogateescape") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def made_bad_input(folder: Path, ffmpeg: str) -> BadInput:
    """Write it all into an empty folder."""
    made = BadInput(folder)
    made.tars.mkdir()
    (folder / "clips").mkdir()
    maker = ClipMaker(ffmpeg, folder / "clips")
    good = maker.coded(20, "good.mp4", "-c:v", "libx264", "-crf", "30", "-pix_fmt", "yuv420p").read_bytes()
    _add_clips(made, _bad_clips(maker, good))
    _add_keys(made, good)
    _add_members(made, good)
    _add_texts(made, good)
    _add_broken_tars(made, good)
    return made


def _bad_clips(maker: ClipMaker, good: bytes) -> dict[str, tuple[bytes, Expected]]:
    """Key -> the bytes of a file named KEY.mp4 and their end."""
    coded = maker.folder / "good.mp4"
    x264 = ("-c:v", "libx264", "-crf", "30", "-pix_fmt", "yuv420p")
    fast = maker.convert(coded, "fast.mp4", "-c", "copy", "-movflags", "faststart").read_bytes()
    pieces = maker.convert(coded, "pieces.mp4", "-c", "copy", "-movflags", "empty_moov+frag_keyframe").read_bytes()
    webm = maker.coded(20, "good.webm", "-c:v", "libvpx-vp9", "-crf", "40", "-b:v", "0").read_bytes()
    maker.run("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", maker.folder / "audio.mp4")
    sizes = [
        maker.convert(coded, f"{size}.avi", "-s", size, "-c:v", "mjpeg", "-frames:v", "12")
        for size in ("160x96", "96x64")
    ]
    two_sizes = b"".join(path.read_bytes() for path in sizes)
    tilted = maker.convert(coded, "tilted.mp4", "-c", "copy", before=("-display_rotation", "45")).read_bytes()
    tiny = maker.convert(coded, "tiny.mp4", "-s", "24x24", *x264).read_bytes()
    short = maker.convert(coded, "short.mp4", "-frames:v", "5", *x264).read_bytes()
    damaged = bytearray(fast)
    damaged[-600:-100] = bytes(500)
    return {
        "whole": (good, Expected(ENCODED)),
        "webm_named_mp4": (webm, Expected(ENCODED)),
        "truncated": (good[: len(good) // 2], Expected("unsupported_container", "its header is damaged")),
        "truncated_fast": (fast[: len(fast) // 2], Expected("corrupt_frames", "cut short")),
        "damaged": (bytes(damaged), Expected("corrupt_frames", "damaged")),
        "empty": (b"", Expected("unsupported_container", "the file is empty")),
        "text": (b"#EXTM3U\n/etc/passwd\n", Expected("unsupported_container", "the file is text")),
        "noise": (bytes(range(256)) * 20, Expected("unsupported_container", "no video container")),
        "audio": ((maker.folder / "audio.mp4").read_bytes(), Expected("no_video_stream", "no video stream")),
        "no_packets": (pieces[: pieces.index(b"moof") - 4], Expected("no_frames", "holds no frame")),
        "vast": (_vast(maker), Expected("no_frames", "more than 67108864 pixels")),
        "inflates": (_inflating(maker), Expected("out_of_memory", f"more than {CHILD_MEMORY_MB} MB")),
        "two_sizes": (two_sizes, Expected("resolution_changed", "is 96x64, the first 160x96")),
        "tilted": (tilted, Expected("decode_failed", "no quarter turn")),
        "tiny": (tiny, Expected("too_small", "24x24 (pixel aspect 1) is smaller than its bucket 32x32")),
        "short": (short, Expected("too_short", "5 sampled of 5 decoded frames, a window has 9")),
        "long": (good + bytes(LARGEST_CLIP), Expected("too_large", f"limit {LARGEST_CLIP}")),
        "zz_whole": (good, Expected(ENCODED)),
    }


def _vast(maker: ClipMaker) -> bytes:
    """Uncompressed video whose AVI header claims 100000 x 100000 pixels."""
    raw = bytearray(maker.coded(3, "vast.avi", "-c:v", "rawvideo", "-pix_fmt", "bgr24").read_bytes())
    header = struct.pack("<Iii", 40, 160, 96)
    at = raw.index(header) if header in raw else raw.index(struct.pack("<Iii", 40, 160, -96))
    raw[at + 4 : at + 12] = struct.pack("<ii", 100_000, 100_000)
    return bytes(raw[:60_000])


def _inflating(maker: ClipMaker) -> bytes:
    """A few kilobytes that hold a dozen pictures of 6K."""
    path = maker.coded(
        *(14, "inflates.mp4", "-vf", "scale=6144:3456:flags=neighbor", "-c:v", "libx264", "-preset", "ultrafast"),
        *("-crf", "45", "-refs", "6", "-bf", "2", "-pix_fmt", "yuv420p"),
    )
    assert path.stat().st_size < LARGEST_CLIP
    return path.read_bytes()


def _add_clips(made: BadInput, clips: dict[str, tuple[bytes, Expected]]) -> None:
    made.add_tar("clips", [(key, _sample(key, data), expected) for key, (data, expected) in clips.items()])


def _sample(key: str, video: bytes | None, caption: str | bytes = "words", **metadata: object) -> list[Member]:
    members: list[Member] = [(f"{key}.json", json.dumps({"key": key, **metadata}).encode())]
    members += [] if video is None else [(f"{key}.mp4", video)]
    return [*members, (f"{key}.txt", caption if isinstance(caption, bytes) else caption.encode())]


def _add_keys(made: BadInput, good: bytes) -> None:
    unsafe = Expected("unsafe_key", "'..'")
    made.add_tar(
        "keys",
        [
            ("twice", _sample("twice", good, "the first"), Expected(ENCODED)),
            ("twice", _sample("twice", good, "the second"), Expected("duplicate_key", "'twice' was seen before")),
            ("a/b/slashes", _sample("a/b/slashes", good), Expected(ENCODED)),
            ("v1.5/dots", _sample("v1.5/dots", good), Expected(ENCODED)),
            ("name", [("name.with.dots.mp4", good)], Expected("no_video", "(with.dots.mp4)")),
            ("../../etc/x", _sample("../../etc/x", good), unsafe),
            ("/etc/absolute", _sample("/etc/absolute", good), Expected("unsafe_key", "empty")),
            ("a/../b", _sample("a/../b", good), unsafe),
            ("line\nend", _sample("line\nend", good), Expected("unsafe_key", "control character")),
            ("caf\\xe9", [("caf\udce9.mp4", good)], Expected("unsafe_key", "no UTF-8")),
            ("k" * 201, _sample("k" * 201, good), Expected("unsafe_key", "201 bytes of UTF-8, limit 200")),
            ("zz_whole", _sample("zz_whole", good), Expected(ENCODED)),
        ],
    )


def _special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def _add_members(made: BadInput, good: bytes) -> None:
    def refused(what: str) -> Expected:
        return Expected("no_video", f"expected a file, got {what}")

    passwd, whole = "a symbolic link to '/etc/passwd'", "a hard link to 'aa_whole.mp4'"
    made.add_tar(
        "members",
        [
            ("aa_whole", _sample("aa_whole", good), Expected(ENCODED)),
            ("soft", [_special("soft.mp4", tarfile.SYMTYPE, "/etc/passwd")], refused(passwd)),
            (
                "hard",
                [_special("hard.mp4", tarfile.LNKTYPE, "aa_whole.mp4")],
                refused(whole),
            ),
            ("device", [_special("device.mp4", tarfile.CHRTYPE)], refused("a character device")),
            ("pipe", [_special("pipe.mp4", tarfile.FIFOTYPE)], refused("a FIFO")),
            (
                "caption",
                [("caption.mp4", good), _special("caption.txt", tarfile.SYMTYPE, "/etc/passwd")],
                Expected("bad_caption", f"'caption.txt': expected a file, got {passwd}"),
            ),
            ("zz_whole", [_special("zz.d", tarfile.DIRTYPE), *_sample("zz_whole", good)], Expected(ENCODED)),
        ],
    )


def _add_texts(made: BadInput, good: bytes) -> None:
    def told(raw: bytes) -> list[Member]:
        return [("k.json", raw), ("k.mp4", good)]

    def named(key: str, members: list[Member]) -> list[Member]:
        return [(f"{key}{member[0][1:]}", member[1]) for member in members if isinstance(member, tuple)]

    gone = {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
    bad = {
        "cut_json": (b'{"caption": "wor', "Unterminated string"),
        "list_json": (b"[1, 2]", "expected an object, got list"),
        "empty_json": (b"", "Expecting value"),
        "latin_json": (b'{"caption": "caf\xe9"}', "can't decode byte 0xe9"),
        "half_a_pair": (b'{"caption": "\\ud83d"}', "surrogates not allowed"),
        "deep_json": (b'{"a":' * 500 + b"1" + b"}" * 500, "nests more than 100 deep"),
        "long_number": (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
    }
    samples = [(key, named(key, told(raw)), Expected("bad_metadata", words)) for key, (raw, words) in bad.items()]
    made.add_tar(
        "texts",
        [
            *samples,
            ("latin_caption", _sample("latin_caption", good, b"caf\xe9"), Expected("bad_caption", "is not UTF-8")),
            ("gone", _sample("gone", None, **gone), Expected("upstream_failed", "HTTP Error 404: Not Found")),
            ("no_video", _sample("no_video", None), Expected("no_video", "no video among its members (json, txt)")),
            ("nan", named("nan", told(b'{"score": NaN, "big": 1e999}')), Expected(ENCODED)),
        ],
    )


def _add_broken_tars(made: BadInput, good: bytes) -> None:
    lost = Expected("truncated_shard", "named by the sidecar, lost with the tar's end")
    names = ("one", "two", "three")
    path = made.add_tar("cut", [(key, _sample(key, good), Expected(ENCODED)) for key in names])
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"three.mp4") + 1000])
    made.samples[-1] = ("cut", "three", Expected("truncated_shard", "broke at byte"))
    made.samples.append(("cut", "four", lost))
    _write_sidecar(made.tars / "cut.parquet", [*names, "four"])
    made.broken["cut"] = "broke at byte"

    (made.tars / "nothing.tar").touch()
    _write_sidecar(made.tars / "nothing.parquet", ["one", "two"])
    made.samples += [("nothing", key, lost) for key in ("one", "two")]
    made.broken["nothing"] = "broke at byte 0: empty file"

    made.add_tar("disagrees", [(key, _sample(key, good), Expected(ENCODED)) for key in names])
    _write_sidecar(made.tars / "disagrees.parquet", ["other", "names", "and", "more"])
    (made.tars / "garbage.tar").write_bytes(b"garbage " * 200)
    made.broken["garbage"] = "broke at byte 512: invalid header"


def _write_sidecar(path: Path, keys: list[str]) -> None:
    pq.write_table(pa.table({"key": keys}), path)


TABLE_ROWS: list[tuple[str | None, str, float | None, Expected]] = [
    ("clips/good.mp4", "good", 1.0, Expected(ENCODED)),
    ("clips/absent.mp4", "absent", 1.0, Expected("missing_file", "clips/absent.mp4': no such file")),
    ("clips", "folder", 1.0, Expected("missing_file", "clips': no such file")),
    ("nope://bucket/x.mp4", "scheme", 1.0, Expected("missing_file", "'nope://bucket/x.mp4': no such file")),
    (None, "null", 1.0, Expected("no_video", "column 'uri' is empty")),
    ("clips/good.mp4", "nan", float("nan"), Expected("bad_caption", "expected text, got float nan")),
    ("clips/good.mp4", "good", 1.0, Expected("duplicate_key", "'good' was seen before")),
    ("clips/good.mp4", "../up", 1.0, Expected("unsafe_key", "'..'")),
    ("clips/good.mp4", "v1.5", 1.0, Expected("unsafe_key", "a dot in its last part")),
    ("clips/good.mp4", "no_caption", None, Expected(ENCODED)),
    ("clips/audio.mp4", "audio", 1.0, Expected("no_video_stream", "no video stream")),
]


def write_table(made: BadInput) -> Path:
    """A Parquet table over the folder's clips; its captions are numbers, so that one can be NaN."""
    columns = {
        "uri": [row[0] for row in TABLE_ROWS],
        "id": [row[1] for row in TABLE_ROWS],
        "caption": [row[2] for row in TABLE_ROWS],
    }
    path = made.folder / "table.parquet"
    pq.write_table(pa.table(columns), path)
    return path
