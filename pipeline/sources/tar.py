"""WebDataset tars: planned from a listing, read with one sequential pass.

Members are streamed; only one clip's bytes are in hand at a time, in a Blob. A tar that ends or breaks in the
middle gives its whole samples and then a Rejection of scope "shard"; if its video2dataset sidecar (a Parquet file
of the same stem, one row per sample) is there, each sample it names that never came is rejected by its key.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import braceexpand

from pipeline.decode.blob import Blob
from pipeline.errors import ClipError, ConfigError, RejectionClass, SourceChanged, SourceError
from pipeline.records import Clip, Rejection, VideoShard
from pipeline.sources.digest import SourceDigest
from pipeline.sources.forward import ForwardReader
from pipeline.sources.keys import require_safe_key
from pipeline.sources.metadata import plain_json
from pipeline.sources.sidecar import sidecar_keys, sidecar_num_rows
from pipeline.sources.spec import WebDatasetSource
from pipeline.storage import ObjectInfo, glob_objects, list_folder, object_info, open_seekable_url, open_stream

MAX_TEXT_BYTES = 16 << 20
WORTH_LISTING = 64
"""Tars of one folder from which a listing (a request per 1,000 objects) is less than a request for each."""
LOOKUPS_AT_ONCE = 32
MAX_COUNTED_SIDECARS = 2000
_CHUNK = 1 << 20
_TEXT_CLASSES = {"json": RejectionClass.BAD_METADATA, "txt": RejectionClass.BAD_CAPTION}
_MEMBER_KINDS = {  # what may stand where a sample's file should; folders are none of its business
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a FIFO",
}
_BROKEN_TAR = (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError)
"""What tarfile raises for damaged headers; OSError and our StorageError are faults of the store and pass."""


@dataclass(slots=True)
class _Sample:
    """The members of one key, as they come."""

    key: str
    texts: dict[str, bytes] = field(default_factory=dict)
    video: Blob | None = None
    video_name: str = ""
    video_sha256: str = ""
    extensions: set[str] = field(default_factory=set)
    error: ClipError | None = None
    """Set when the sample is refused already; the rest of its members are skipped."""

    def close(self) -> None:
        if self.video is not None:
            self.video.close()


def plan_tars(spec: WebDatasetSource) -> tuple[VideoShard, ...]:
    """One VideoShard per tar, sorted by id. SourceError if a pattern matches nothing or two tars share a stem."""
    patterns = [spec.urls] if isinstance(spec.urls, str) else list(spec.urls)
    found: dict[str, ObjectInfo] = {}
    for pattern in patterns:
        for info in _expand(pattern, spec.options):
            found[info.url] = info
    by_id: dict[str, ObjectInfo] = {}
    for info in found.values():
        shard_id = PurePosixPath(info.url).stem
        if shard_id in by_id:
            raise SourceError(
                f"two source shards have the id {shard_id!r} (their file stem): "
                f"{by_id[shard_id].url} and {info.url}; output shards take their input's id, so stems must differ"
            )
        by_id[shard_id] = info
    return tuple(
        VideoShard(id=shard_id, kind="webdataset", url=info.url, size=info.size, etag=info.etag)
        for shard_id, info in sorted(by_id.items())
    )


def _expand(pattern: str, options: dict[str, Any]) -> list[ObjectInfo]:
    try:
        urls = list(braceexpand.braceexpand(pattern))
    except ValueError as error:  # UnbalancedBracesError
        raise ConfigError(f"source.urls: {pattern!r}: {error}") from error
    listed, others = _listed(urls, options)
    with ThreadPoolExecutor(LOOKUPS_AT_ONCE, thread_name_prefix="plan") as pool:
        found = [info for infos in pool.map(lambda url: _expand_one(url, options), others) for info in infos]
    found += listed
    tars = [info for info in found if info.url.endswith(".tar")]
    if not tars:
        raise SourceError(f"source.urls: no .tar found for {pattern!r} ({len(found)} other objects there)")
    return tars


def _listed(urls: list[str], options: dict[str, Any]) -> tuple[list[ObjectInfo], list[str]]:
    """Tars that a brace pattern names by the hundred, from one listing of their folder; and the URLs left to ask for
    one by one, among them those that are not in the listing."""
    by_folder: dict[str, list[str]] = {}
    for url in urls:
        if url.endswith(".tar") and not any(character in url for character in "*?["):
            by_folder.setdefault(url.rpartition("/")[0], []).append(url)
    listed: dict[str, ObjectInfo] = {}
    for folder, wanted in by_folder.items():
        if folder and len(wanted) >= WORTH_LISTING:
            there = {info.url.rpartition("/")[2]: info for info in _expand_one(folder, options)}
            names = {url: there.get(url.rpartition("/")[2]) for url in wanted}
            listed |= {url: ObjectInfo(url, info.size, info.etag) for url, info in names.items() if info is not None}
    return list(listed.values()), [url for url in urls if url not in listed]


def _expand_one(url: str, options: dict[str, Any]) -> list[ObjectInfo]:
    try:
        if any(character in url for character in "*?["):
            return glob_objects(url, options)
        if url.endswith(".tar"):
            return [object_info(url, options)]
        return list_folder(url, options)
    except FileNotFoundError as error:
        raise SourceError(f"source.urls: {url} does not exist") from error
    except (ValueError, TypeError) as error:  # fsspec knows no such protocol, or its client no such option
        raise ConfigError(f"source.urls, source.options: {url!r}: {error}") from error


def count_tar_samples(shards: Sequence[VideoShard], spec: WebDatasetSource) -> int | None:
    """Samples of all the tars according to their sidecars' footers, without reading a tar; None if one is missing.

    One small request per tar, so it is asked for few of them only.
    """
    if len(shards) > MAX_COUNTED_SIDECARS:
        return None
    total = 0
    with ThreadPoolExecutor(LOOKUPS_AT_ONCE, thread_name_prefix="plan") as pool:
        for number in pool.map(lambda shard: sidecar_num_rows(shard.url, spec.options), shards):
            if number is None:
                return None
            total += number
    return total


def count_tar_keys(shard: VideoShard, spec: WebDatasetSource) -> int:
    """Samples of a tar by its headers, up to where it breaks. Their contents are passed over, not read, where the
    store can seek."""
    count, last = 0, None
    with open_seekable_url(shard.url, spec.options) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
                while (member := tar.next()) is not None and member.size >= 0:
                    tar.members.clear()  # type: ignore[attr-defined] - tarfile would keep every header it has seen
                    name = _split_name(member)
                    if name is not None and name[0] != last:
                        count, last = count + 1, name[0]
        except _BROKEN_TAR:
            return count
    return count


def read_tar_shard(
    shard: VideoShard, spec: WebDatasetSource, *, max_clip_bytes: int, digest: SourceDigest
) -> Iterator[Clip | Rejection]:
    """Every sample of a tar in member order. The consumer closes each Clip's Blob."""
    seen: set[str] = set()
    with open_stream(shard.url, spec.options, shard.etag) as stream:
        reader = ForwardReader(stream)
        last, broken = yield from _read_members(shard, spec, reader, seen, max_clip_bytes)
        end = reader.tell()
        left, only_zeros = reader.drain()
        digest.sha256 = reader.sha256
    if shard.size not in (None, reader.tell()):
        raise SourceChanged(f"{shard.url}: it had {shard.size} bytes when the run was planned, now {reader.tell()}")
    if broken is None and not only_zeros:
        broken = f"the header at byte {end} is damaged: the last {left} bytes cannot be read"
    elif broken is None and left == 0:
        broken = f"no end-of-archive marker at byte {end}: the file was cut, or its writer was killed"
    if last is not None:
        if broken is not None and last.error is None:
            # a member of it may be among what was lost: its caption, or its video
            last.error = ClipError(RejectionClass.TRUNCATED_SHARD, "read", broken)
        yield _finish(last, shard, spec, seen)
    if broken is not None:
        yield _shard_rejection(shard, broken)
        yield from _samples_that_never_came(shard, spec, seen)


def _read_members(
    shard: VideoShard, spec: WebDatasetSource, reader: ForwardReader, seen: set[str], max_clip_bytes: int
) -> Generator[Clip | Rejection, None, tuple[_Sample | None, str | None]]:
    """Yield samples but the last; return that one, and what broke the tar or None.

    Leaves the reader where tarfile stopped: whether the tar ended well is seen from what follows.
    """
    sample: _Sample | None = None
    broken: str | None = None
    try:
        tar = tarfile.open(fileobj=reader, mode="r:", encoding="utf-8")  # noqa: SIM115 - we own the stream
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined] - tarfile would keep every header it has seen
            if member.size < 0 or tar.offset < member.offset_data:
                raise tarfile.ReadError(f"{member.name!r} has size {member.size}")  # tarfile would go back for ever
            name = _split_name(member)
            if name is None:
                continue
            key, extension = name
            if sample is None or sample.key != key or extension in sample.extensions:
                if sample is not None:
                    finished, sample = sample, None
                    yield _finish(finished, shard, spec, seen)
                sample = _Sample(key)
            _take_member(sample, extension, member, tar, spec, max_clip_bytes)
        reader.seek(tar.offset)
    except _BROKEN_TAR as error:
        broken = f"broke at byte {reader.tell()}: {error}"
    return sample, broken


def _split_name(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """(key, extension) by WebDataset's rule, the base name cut at its first dot; None for what is no sample."""
    folder, slash, base = member.name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    if not (member.isreg() or member.type in _MEMBER_KINDS) or not stem or not dot:
        return None
    return f"{folder}{slash}{stem}", extension.lower()


def _take_member(
    sample: _Sample,
    extension: str,
    member: tarfile.TarInfo,
    tar: tarfile.TarFile,
    spec: WebDatasetSource,
    max_clip_bytes: int,
) -> None:
    """Read one member into the sample, or note why it was not read."""
    sample.extensions.add(extension)
    is_video = extension in spec.video_extensions
    if sample.error is not None or not (is_video or extension in ("txt", "json")):
        return
    if is_video and sample.video is not None:
        return  # a second rendition of the same clip: the first one in the tar counts
    sample.error = _member_problem(member, extension, is_video, max_clip_bytes)
    if sample.error is not None:
        return
    content = tar.extractfile(member)
    assert content is not None, "isreg() members have content"
    if not is_video:
        sample.texts[extension] = content.read(member.size)
        return
    digest = hashlib.sha256()
    with ExitStack() as on_failure:
        blob = on_failure.enter_context(Blob.create())
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
            blob.write(chunk)
        on_failure.pop_all()
    sample.video, sample.video_name, sample.video_sha256 = blob, member.name, digest.hexdigest()


def _member_problem(member: tarfile.TarInfo, extension: str, is_video: bool, max_clip_bytes: int) -> ClipError | None:
    """Why a member is not read. A link or a device has no bytes in the tar, and following one is not for us."""
    if not member.isreg():
        error_class = RejectionClass.NO_VIDEO if is_video else _TEXT_CLASSES[extension]
        target = f" to {member.linkname!r}" if member.linkname else ""
        message = f"{member.name!r}: expected a file, got {_MEMBER_KINDS[member.type]}{target}"
        return ClipError(error_class, "read", message)
    limit = max_clip_bytes if is_video else MAX_TEXT_BYTES
    if member.size > limit:
        error_class = RejectionClass.TOO_LARGE if is_video else _TEXT_CLASSES[extension]
        return ClipError(error_class, "read", f"{member.name!r} has {member.size} bytes, limit {limit}")
    return None


def _finish(sample: _Sample, shard: VideoShard, spec: WebDatasetSource, seen: set[str]) -> Clip | Rejection:
    """A Clip that owns the sample's Blob, or the Rejection that says why not."""
    try:
        return _to_clip(sample, shard, spec, seen)
    except ClipError as error:
        sample.close()
        return Rejection.from_error(error, key=sample.key, shard_id=shard.id)


def _to_clip(sample: _Sample, shard: VideoShard, spec: WebDatasetSource, seen: set[str]) -> Clip:
    if sample.key in seen:
        raise ClipError(RejectionClass.DUPLICATE_KEY, "read", f"{sample.key!r} was seen before in this shard")
    seen.add(sample.key)
    require_safe_key(sample.key)
    if sample.error is not None:
        raise sample.error
    metadata = _parse_metadata(sample.texts.get("json"))
    status = metadata.get("status")
    if status is not None and status != "success":
        message = f"status {status!r}: {metadata.get('error_message')!r}"
        raise ClipError(RejectionClass.UPSTREAM_FAILED, "read", message)
    if sample.video is None:
        members = ", ".join(sorted(sample.extensions))
        raise ClipError(RejectionClass.NO_VIDEO, "read", f"no video among its members ({members})")
    return Clip(
        key=sample.key,
        shard_id=shard.id,
        video=sample.video,
        video_sha256=sample.video_sha256,
        file_name=sample.video_name,
        caption=_caption(sample.texts.get("txt"), metadata, spec.caption_keys),
        metadata=metadata,
    )


def _parse_metadata(raw: bytes | None) -> dict[str, Any]:
    if raw is None:
        return {}
    try:
        metadata = plain_json(raw)
    except (ValueError, RecursionError) as error:
        raise ClipError(RejectionClass.BAD_METADATA, "read", f"json member: {error}") from error
    if not isinstance(metadata, dict):
        raise ClipError(
            RejectionClass.BAD_METADATA, "read", f"json member: expected an object, got {type(metadata).__name__}"
        )
    return metadata


def _caption(raw: bytes | None, metadata: dict[str, Any], caption_keys: tuple[str, ...]) -> str:
    if raw is not None:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ClipError(RejectionClass.BAD_CAPTION, "read", f"txt member is not UTF-8: {error}") from error
    for name in caption_keys:
        value = metadata.get(name)
        if isinstance(value, str):
            return value
    return ""


def _shard_rejection(shard: VideoShard, message: str) -> Rejection:
    error = ClipError(RejectionClass.TRUNCATED_SHARD, "read", message)
    return Rejection.from_error(error, key="", shard_id=shard.id, scope="shard")


def _samples_that_never_came(shard: VideoShard, spec: WebDatasetSource, seen: set[str]) -> Iterator[Rejection]:
    """A Rejection for each key of the sidecar that a broken tar did not deliver; none without a sidecar."""
    for key in sidecar_keys(shard.url, spec.options):
        if key not in seen:
            seen.add(key)
            error = ClipError(RejectionClass.TRUNCATED_SHARD, "read", "named by the sidecar, lost with the tar's end")
            yield Rejection.from_error(error, key=key, shard_id=shard.id)
