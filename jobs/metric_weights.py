"""Where the metrics' networks lie on disk, and how they are loaded.

`jobs/convert_metric_weights.py` makes the files, once per machine; nothing is downloaded while something is measured.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from cvvae.i3d import I3D, load_i3d
from cvvae.lpips import LPIPS, Averaging, Backbone, load_lpips
from pipeline.checkpoints import cache_folder
from pipeline.errors import ConfigError

FOLDER_VARIABLE = "LATENTS_METRIC_WEIGHTS"
MetricNetwork = Literal["lpips-alex", "lpips-vgg", "i3d"]
FILES: dict[MetricNetwork, str] = {
    "lpips-alex": "lpips-alex-v0.1.safetensors",
    "lpips-vgg": "lpips-vgg-v0.1.safetensors",
    "i3d": "i3d-kinetics-400.safetensors",
}


def weights_folder() -> Path:
    """$LATENTS_METRIC_WEIGHTS, else metric-weights in the folder of downloaded checkpoints."""
    configured = os.environ.get(FOLDER_VARIABLE)
    return Path(configured).expanduser() if configured else cache_folder() / "metric-weights"


def weights_file(network: MetricNetwork, folder: Path | None = None) -> Path:
    """ConfigError with the command that makes the file, if it is not there."""
    path = (folder or weights_folder()) / FILES[network]
    if not path.is_file():
        raise ConfigError(
            f"the weights of {network} are not in {path.parent}.\n"
            f"  make them once (downloads 50 to 65 MB): python jobs/convert_metric_weights.py {network}\n"
            f"  or set {FOLDER_VARIABLE} to a folder that has {path.name}, or measure without: --metric psnr "
            "--metric ssim"
        )
    return path


def find_lpips(backbone: Backbone, *, averaging: Averaging) -> LPIPS:
    """ConfigError if the file is missing or not what it should be."""
    path = weights_file("lpips-alex" if backbone == "alex" else "lpips-vgg")
    try:
        return load_lpips(path, backbone, averaging=averaging)
    except (ValueError, SafetensorError) as error:
        raise ConfigError(f"{path} is damaged; delete it and convert again: {error}") from error


def find_i3d() -> I3D:
    """ConfigError if the file is missing or not what it should be."""
    path = weights_file("i3d")
    try:
        return load_i3d(path)
    except (ValueError, SafetensorError) as error:
        raise ConfigError(f"{path} is damaged; delete it and convert again: {error}") from error
