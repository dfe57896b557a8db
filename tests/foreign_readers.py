"""Readers that people have and that cannot be installed beside this project's own packages, in a folder of their own.

mosaicml-streaming demands an old numpy, torchvision and transformers, none of which its reader needs; Energon and
LitData are here for a small folder's sake. pip installs them without their dependencies but those that are listed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

from filelock import FileLock

from jobs.real_clips import cache_folder

PROJECT = Path(__file__).parents[1]
PACKAGES = (
    "mosaicml-streaming==0.13.0",
    "Brotli==1.2.1",
    "catalogue==2.0.10",
    "cramjam==2.14.0",
    "python-snappy==0.7.3",
    "zstd==1.5.7.2",
    "litdata==0.2.76",
    "boto3==1.43.127",
    "lightning-utilities==0.15.3",
    "obstore==0.12.1",
    "s3transfer==0.19.3",
    "tifffile==2026.3.3",
    "megatron-energon==7.4.1",
    "bracex==3.2.2",
    "deprecation==2.1.0",
    "filetype==1.2.0",
    "lark==1.3.1",
    "mfusepy==3.1.1",
    "multi-storage-client==1.3.1",
    "rapidyaml==0.15.2",
    "wcmatch==12.0.1",
    "xattr==1.3.0",
)
STREAMING = """
from tests.foreign_readers import bare_streaming
bare_streaming()
"""
"""To be run before `from streaming.base.dataset import StreamingDataset`."""


def bare_streaming() -> None:
    """Make the modules of MosaicML Streaming importable one by one.

    The __init__ files of its packages import what only its vision and text examples need.
    """
    for name in ("streaming", "streaming.base"):
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[name] = package


def reader_packages() -> Path:
    """The folder; made on first use (70 MB)."""
    name = hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:12]
    folder = cache_folder() / f"readers-{name}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
            subprocess.run([*command, "--target", str(folder), *PACKAGES], check=True)
            (folder / "done").touch()
    return folder


def run_reader(code: str, *arguments: str, folder: Path) -> str:
    """What `code` prints, run by a Python that finds the readers too; `folder` holds whatever they leave behind."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(reader_packages()), str(PROJECT)]),
        "TMPDIR": str(folder),
        "HOME": str(folder),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
