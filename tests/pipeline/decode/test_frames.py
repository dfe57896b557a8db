"""The right frames at the right times, by what the pictures show; or a refusal of the right class."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.decode.frames import SourceFrame, decoder_name, open_frames
from pipeline.decode.pyav_backend import MAX_FRAME_PIXELS, Orientation
from pipeline.errors import ClipError, RejectionClass
from pipeline.policies import BackendName
from pipeline.records import SourceVideo
from tests.awkward_clips import ClipMaker, read_code

BACKENDS: tuple[BackendName, ...] = ("pyav", "decord")


def read(path: Path, backend: BackendName = "pyav", threads: int = 1) -> tuple[SourceVideo, list[SourceFrame]]:
    """Everything, opened the way the child does: by a descriptor."""
    with path.open("rb") as file, open_frames(f"/dev/fd/{file.fileno()}", backend, threads=threads) as source:
        return source.video, list(source)


def refusal(path: Path, backend: BackendName = "pyav") -> ClipError:
    with pytest.raises(ClipError) as caught:
        read(path, backend)
    return caught.value


def codes(frames: list[SourceFrame]) -> list[int]:
    return [read_code(frame.rgb()) for frame in frames]


@pytest.fixture(scope="module")
def coded(maker: ClipMaker) -> Path:
    return maker.coded(
        60, "coded.mp4", "-c:v", "libx264", "-g", "12", "-bf", "2", "-crf", "12", "-pix_fmt", "yuv420p"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_frame_in_presentation_order(coded: Path, backend: BackendName) -> None:
    video, frames = read(coded, backend)
    assert codes(frames) == list(range(60))
    assert [frame.number for frame in frames] == list(range(60))
    assert [frame.time for frame in frames] == pytest.approx([n / 25 for n in range(60)], abs=1e-9)
    assert (video.width, video.height, video.fps, video.codec, video.rotation) == (160, 96, 25.0, "h264", 0)
    assert video.sample_aspect_ratio == 1.0
    assert video.duration == pytest.approx(2.4)
    assert video.decoder == decoder_name(backend)


ORDINARY = {
    "coded.mov": ("-c:v", "libx264", "-pix_fmt", "yuv444p"),
    "hevc.mp4": ("-c:v", "libx265", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p"),
    "vp9.webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-pix_fmt", "yuv420p"),
    "h264.mkv": ("-c:v", "libx264", "-pix_fmt", "yuv420p"),
    "mpeg4.avi": ("-c:v", "mpeg4", "-q:v", "2"),
    "mpeg2.mpg": ("-c:v", "mpeg2video", "-q:v", "2"),
    "flash.flv": ("-c:v", "flv", "-q:v", "2"),
    "windows.wmv": ("-c:v", "wmv2", "-q:v", "2"),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_backends_agree_on_every_container(maker: ClipMaker, name: str) -> None:
    path = maker.coded(30, name, *ORDINARY[name])
    (video, frames), (other_video, other_frames) = read(path, "pyav"), read(path, "decord")
    assert codes(frames) == list(range(30))
    assert [frame.time for frame in frames] == [frame.time for frame in other_frames]
    assert all(np.array_equal(a.rgb(), b.rgb()) for a, b in zip(frames, other_frames, strict=True))
    assert video == SourceVideo(**{k: getattr(other_video, k) for k in video.__slots__} | {"decoder": video.decoder})


@pytest.mark.parametrize(
    ("name", "count", "last_time"),
    [
        ("carphone_pristine.mp4", 120, 119 * 1001 / 30000),
        ("no_face.mp4", 95, 48128 / 12288),  # three more packets are hidden by an edit list
        ("face_noface.mov", 169, 97695 / 15360),  # HEVC at a variable rate
    ],
)
def test_backends_agree_on_real_clips(real_clips: dict[str, Path], name: str, count: int, last_time: float) -> None:
    frames = {backend: read(real_clips[name], backend)[1] for backend in BACKENDS}
    for read_frames in frames.values():
        assert len(read_frames) == count
        assert read_frames[-1].time == pytest.approx(last_time, abs=1e-6)
    for a, b in list(zip(frames["pyav"], frames["decord"], strict=True))[:: count // 10]:
        assert a.time == b.time
        assert np.array_equal(a.rgb(), b.rgb())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied_and_recorded(maker: ClipMaker, backend: BackendName, degrees: int) -> None:
    stored = maker.coded(5, f"turned{degrees}.mp4", quarter_turns=-degrees // 90 % 4)
    tagged = maker.convert(stored, f"tagged{degrees}.mp4", "-c", "copy", before=("-display_rotation", str(degrees)))
    video, frames = read(tagged, backend)
    assert codes(frames) == list(range(5))
    assert (video.width, video.height) == (160, 96)
    assert video.rotation == 360 - degrees


def test_a_mirrored_video_is_mirrored_back_or_refused(maker: ClipMaker, coded: Path) -> None:
    mirrored = maker.convert(coded, "mirrored.mp4", "-vf", "hflip", "-frames:v", "5")
    tagged = maker.convert(mirrored, "mirrored_tag.mp4", "-c", "copy", before=("-display_hflip",))
    assert codes(read(tagged)[1]) == list(range(5))
    assert refusal(tagged, "decord").error_class is RejectionClass.DECODE_FAILED


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_display_matrices_say_where_each_pixel_goes(turns: int, mirrored: bool) -> None:
    """Against the definition: a matrix moves (x, y) to (a x + c y, b x + d y), then the picture to the origin."""
    orientation = Orientation(turns, mirrored)
    unit = 1 << 16
    a, b, c, d = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)][turns]
    if mirrored:
        a, c = -a, -c
    matrix = tuple(value * unit for value in (a, b, 0, c, d, 0, 0, 0, 1))
    assert Orientation.from_matrix(matrix) == orientation
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    moved = {(a * x + c * y, b * x + d * y): image[y, x] for y in range(2) for x in range(3)}
    left, top = min(x for x, _ in moved), min(y for _, y in moved)
    shown = orientation.apply(image)
    assert all(np.array_equal(shown[y - top, x - left], pixel) for (x, y), pixel in moved.items())


def test_an_odd_angle_is_refused(maker: ClipMaker, coded: Path) -> None:
    tilted = maker.convert(coded, "tilted.mp4", "-c", "copy", before=("-display_rotation", "45"))
    assert refusal(tilted).error_class is RejectionClass.DECODE_FAILED


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_variable_rate_keeps_its_times(maker: ClipMaker, coded: Path, backend: BackendName) -> None:
    path = maker.convert(
        coded, "vfr.mp4", "-vf", "select='not(mod(n,7))+not(mod(n,3))'", "-fps_mode", "vfr", "-bf", "2"
    )
    _, frames = read(path, backend)
    kept = [n for n in range(60) if n % 7 == 0 or n % 3 == 0]
    assert codes(frames) == kept
    assert [frame.time for frame in frames] == pytest.approx([n / 25 for n in kept], abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_edit_list_hides_what_it_hides(maker: ClipMaker, coded: Path, backend: BackendName) -> None:
    """Cut in the middle of a group of pictures: the packets from its keyframe on are there, but not shown."""
    path = maker.convert(coded, "edited.mp4", "-c", "copy", before=("-ss", "0.72"))
    _, frames = read(path, backend)
    assert codes(frames) == list(range(18, 60))
    assert [frame.time for frame in frames] == pytest.approx([n / 25 for n in range(42)], abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_aspect_ratio_turns_with_the_picture(maker: ClipMaker, backend: BackendName) -> None:
    wide = maker.coded(3, "wide.mp4", "-vf", "setsar=4/3", "-c:v", "libx264", "-pix_fmt", "yuv420p")
    turned = maker.convert(wide, "wide90.mp4", "-c", "copy", before=("-display_rotation", "90"))
    assert read(wide, backend)[0].sample_aspect_ratio == pytest.approx(4 / 3)
    video, _ = read(turned, backend)
    assert (video.width, video.height) == (96, 160)
    assert video.sample_aspect_ratio == pytest.approx(3 / 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(maker: ClipMaker, real_clips: dict[str, Path], backend: BackendName) -> None:
    options = ("-vf", "scale=641:359", "-c:v", "libx264", "-pix_fmt", "yuv444p", "-frames:v", "3", "-an")
    video, frames = read(maker.convert(real_clips["bikes.mp4"], "odd.mp4", *options), backend)
    assert (video.width, video.height) == (641, 359)
    assert frames[0].rgb().shape == (359, 641, 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ten_bit.mp4", ("-c:v", "libx265", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p10le")),
        ("av1.mp4", ("-c:v", "libsvtav1", "-preset", "10", "-crf", "10", "-pix_fmt", "yuv420p")),
        ("theora.ogv", ("-c:v", "libtheora", "-q:v", "10", "-pix_fmt", "yuv420p")),
    ],
)
def test_pyav_reads_what_decord_cannot(maker: ClipMaker, name: str, options: tuple[str, ...]) -> None:
    video, frames = read(maker.coded(20, name, *options))
    assert codes(frames) == list(range(20))
    assert video.fps == 25.0


def test_decord_refuses_av1(maker: ClipMaker) -> None:
    path = maker.coded(
        5, "av1_for_decord.mp4", "-c:v", "libsvtav1", "-preset", "10", "-crf", "10", "-pix_fmt", "yuv420p"
    )
    error = refusal(path, "decord")
    assert error.error_class is RejectionClass.DECODE_FAILED
    assert "cannot find video stream" in error.message
    assert "/dev/fd" not in error.message
    assert ".cc" not in error.message


def test_an_empty_theora_packet_keeps_the_picture_on_screen(maker: ClipMaker, coded: Path) -> None:
    """libav itself stops there with "invalid argument"."""
    path = maker.convert(
        coded, "still.ogv", "-vf", "select='lt(n,20)',loop=4:1:10", "-c:v", "libtheora", "-q:v", "10"
    )
    _, frames = read(path)
    shown = codes(frames)
    assert sorted(set(shown)) == list(range(20))
    assert len(shown) < 24
    assert frames[-1].time == pytest.approx(23 / 25)


def test_times_that_go_backwards_are_refused_by_pyav_and_sorted_for_decord(maker: ClipMaker) -> None:
    """AVI stores no presentation times: H.264 with B-frames comes with those of decoding."""
    path = maker.coded(20, "backwards.avi", "-c:v", "libx264", "-bf", "2", "-crf", "12", "-pix_fmt", "yuv420p")
    error = refusal(path)
    assert error.error_class is RejectionClass.DECODE_FAILED
    assert "before frame" in error.message
    _, frames = read(path, "decord")
    assert codes(frames) == list(range(20))
    assert [frame.time for frame in frames] == pytest.approx([n / 25 for n in range(20)])


def test_cover_art_is_not_the_video(maker: ClipMaker, coded: Path) -> None:
    cover = maker.convert(coded, "cover.jpg", "-frames:v", "1", "-vf", "scale=64:64")
    maker.run(
        *("-i", cover, "-i", coded, "-map", "0", "-map", "1", "-c", "copy"),
        *("-disposition:v:0", "attached_pic", maker.folder / "cover.mp4"),
    )
    video, frames = read(maker.folder / "cover.mp4")
    assert (video.width, video.height, len(frames)) == (160, 96, 60)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("matrix", "limits", "tag"),
    [("bt709", "tv", "bt709"), ("bt601", "tv", "smpte170m"), ("bt709", "pc", "bt709"), ("bt2020", "tv", "bt2020nc")],
)
def test_colours_follow_the_files_own_tags(
    maker: ClipMaker, backend: BackendName, matrix: str, limits: str, tag: str
) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 120, 40], [30, 180, 220], [0, 0, 0]], np.uint8)
    picture = np.repeat(np.repeat(colours[None], 32, axis=0), 32, axis=1)
    scale = f"scale=out_color_matrix={matrix}:out_range={limits},format=yuv444p"
    options = ("-vf", f"{scale},setparams=colorspace={tag}:range={limits}", "-c:v", "libx264", "-qp", "0")
    path = maker.raw([picture] * 2, f"{matrix}_{limits}.mp4", *options)
    middle = read(path, backend)[1][0].rgb()[16, 16::32]
    assert np.abs(middle.astype(int) - colours).max() <= 2


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], RejectionClass]] = {
    "moov.mp4": (half, RejectionClass.UNSUPPORTED_CONTAINER),  # the index, at the end, is gone
    "faststart.mp4": (half, RejectionClass.CORRUPT_FRAMES),
    "cut.mkv": (half, RejectionClass.CORRUPT_FRAMES),
    "cut.webm": (half, RejectionClass.CORRUPT_FRAMES),
    "cut.avi": (half, RejectionClass.CORRUPT_FRAMES),
    "cut.flv": (half, RejectionClass.CORRUPT_FRAMES),
    "cut.ts": (half, RejectionClass.CORRUPT_FRAMES),
    "noise.mp4": (lambda data: random.Random(1).randbytes(len(data)), RejectionClass.UNSUPPORTED_CONTAINER),
}
WHOLE = {
    "moov.mp4": ("-c", "copy"),
    "faststart.mp4": ("-c", "copy", "-movflags", "faststart"),
    "cut.mkv": ("-c", "copy"),
    "cut.webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"),
    "cut.avi": ("-c:v", "mpeg4"),
    "cut.flv": ("-c:v", "flv"),
    "cut.ts": ("-c", "copy"),
    "noise.mp4": ("-c", "copy"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_found(maker: ClipMaker, real_clips: dict[str, Path], name: str) -> None:
    whole = maker.convert(real_clips["bikes.mp4"], f"whole_{name}", *WHOLE[name], "-frames:v", "40")
    read(whole)
    damage, expected = DAMAGED[name]
    error = refusal(maker.damaged(whole, name, damage(whole.read_bytes())))
    assert error.error_class is expected
    assert str(maker.folder) not in error.message


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["bikes.mp4", "noface_face.mov"])
def test_flipped_bits_are_found(maker: ClipMaker, real_clips: dict[str, Path], name: str, threads: int) -> None:
    """Twenty flips: one of them is noticed by the codec, and the clip is refused, not repaired."""
    data = bytearray(real_clips[name].read_bytes())
    box = data.find(b"mdat")
    size = int.from_bytes(data[box - 4 : box], "big")
    chance = random.Random(5)
    for _ in range(20):
        data[chance.randrange(box + 4, box - 4 + size)] ^= 1 << chance.randrange(8)
    path = maker.damaged(real_clips[name], f"flipped_{name}", bytes(data))
    with pytest.raises(ClipError) as caught:
        read(path, threads=threads)
    assert caught.value.error_class is RejectionClass.CORRUPT_FRAMES


def test_a_frame_size_that_changes_is_refused(maker: ClipMaker, coded: Path) -> None:
    small = maker.convert(coded, "small.ts", "-vf", "scale=80:48", "-c:v", "libx264")
    large = maker.convert(coded, "large.ts", "-c", "copy")
    path = maker.folder / "two_sizes.ts"
    maker.run("-i", f"concat:{large}|{small}", "-c", "copy", path)
    assert refusal(path).error_class is RejectionClass.RESOLUTION_CHANGED


@pytest.mark.parametrize("side", [9_000, 100_000])
def test_a_header_that_claims_a_huge_frame_costs_nothing(maker: ClipMaker, side: int) -> None:
    path = maker.raw([np.zeros((16, 16, 3), np.uint8)] * 2, "huge.avi", "-c:v", "rawvideo", "-pix_fmt", "bgr24")
    data = bytearray(path.read_bytes())
    at = data.find(b"strf") + 8
    data[at + 4 : at + 12] = side.to_bytes(4, "little") * 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refusal(maker.damaged(path, "claims_huge.avi", bytes(data)))
    assert error.error_class is RejectionClass.NO_FRAMES
    assert str(MAX_FRAME_PIXELS) in error.message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("backend", BACKENDS)
def test_playlists_do_not_open_other_files(maker: ClipMaker, coded: Path, backend: BackendName) -> None:
    stream = maker.convert(coded, "secret.ts", "-c", "copy")
    playlists = {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:3,\n{stream}\n#EXT-X-ENDLIST\n",
        "concat.mp4": f"ffconcat version 1.0\nfile {coded}\n",
        "dash.mp4": '<?xml version="1.0"?><MPD></MPD>',
        "text.mp4": "not a video, whatever the name says",
    }
    for name, text in playlists.items():
        (maker.folder / name).write_text(text)
        assert refusal(maker.folder / name, backend).error_class is RejectionClass.UNSUPPORTED_CONTAINER


def test_other_things_that_are_no_video(maker: ClipMaker, coded: Path, real_clips: dict[str, Path]) -> None:
    picture = maker.convert(coded, "picture.jpg", "-frames:v", "1")
    audio = maker.convert(real_clips["bigbuckbunny.mp4"], "audio.mp4", "-vn", "-c", "copy")
    empty = maker.folder / "empty.mp4"
    empty.touch()
    assert refusal(picture.rename(maker.folder / "jpeg.mp4")).error_class is RejectionClass.UNSUPPORTED_CONTAINER
    assert refusal(audio).error_class is RejectionClass.NO_VIDEO_STREAM
    assert refusal(empty).error_class is RejectionClass.UNSUPPORTED_CONTAINER


def test_a_stream_without_frames(maker: ClipMaker, coded: Path) -> None:
    """The first segment of a fragmented MP4: a header that promises frames in segments to come."""
    whole = maker.convert(
        coded, "fragments.mp4", "-c", "copy", "-movflags", "empty_moov+frag_keyframe+default_base_moof"
    )
    data = whole.read_bytes()
    header = maker.damaged(whole, "header_only.mp4", data[: data.find(b"moof") - 4])
    assert len(read(whole)[1]) == 60
    assert refusal(header).error_class is RejectionClass.NO_FRAMES


def test_open_files_are_closed(coded: Path, maker: ClipMaker) -> None:
    broken = maker.damaged(coded, "leak.mp4", half(coded.read_bytes()))
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(5):
        read(coded)
        refusal(broken)
    assert len(list(Path("/dev/fd").iterdir())) == before
