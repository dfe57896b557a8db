"""The dataset card: README.md of a dataset, for people, for the hub, and for `datasets.load_dataset(OUT)`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.documents import Manifest
from pipeline.formats import FORMATS
from pipeline.formats.tensors import file_suffix
from pipeline.policies import FormatName

_EXAMPLES: dict[FormatName, str] = {
    "webdataset": """from datasets import load_dataset

for row in load_dataset("OUT", split="train", streaming=True):
    print(row["__key__"], row["txt"], row["latent.SUFFIX"])
""",
    "parquet": """from datasets import load_dataset

for row in load_dataset("OUT", split="train", streaming=True):
    print(row["id"], row["caption"], row["vae_latent_shape"], len(row["vae_latent_bytes"]))
""",
}


def dataset_card(manifest: Manifest) -> str:
    """README.md of a dataset: a Hugging Face card whose YAML header names the data files."""
    identity, counts, vae = manifest.identity, manifest.counts, manifest.identity.vae
    buckets = "\n".join(f"| {name} | {rows} |" for name, rows in manifest.buckets.items()) or "| none | 0 |"
    rejected = "\n".join(f"| {name} | {number} |" for name, number in manifest.rejections.items()) or "| none | 0 |"
    stored = "raw posterior mean" + (" and log variance" if identity.logvar else "")
    stored += " (int8: (code / 8) - 8)" if identity.logvar == "int8" else ""
    channels = "\n".join(
        f"| {index} | {mean:.5f} | {std:.5f} |"
        for index, (mean, std) in enumerate(zip(manifest.latent_mean, manifest.latent_std, strict=True))
    )
    header = _header(manifest)
    load = _EXAMPLES[manifest.format].replace("SUFFIX", file_suffix(identity.storage_dtype))
    return f"""---
{header}---

# Video latents

{counts.windows_stored} windows of {counts.clips_encoded} clips in {len(manifest.shards)} shards,
{manifest.payload_bytes} bytes, format {manifest.format} version {manifest.format_version}.

- VAE: {vae.get("name")}, weights sha256 `{identity.weights_sha256}`
- identity: `{manifest.fingerprint}`
- stored: {stored}, {identity.storage_dtype}, layout C, T, H, W
- normalize: {_normalization(vae)}

```python
{load}```

The latents are derived from videos and captions whose rights are their owners'.

| bucket (frames x height x width) | windows |
|---|---|
{buckets}

| rejected, by class | samples |
|---|---|
{rejected}

| channel | mean | std |
|---|---|---|
{channels}
"""


def _header(manifest: Manifest) -> str:
    """The YAML that Hugging Face's hub and `datasets` read: which files hold the data, and what to find it by."""
    suffix = FORMATS[manifest.format].suffix
    name = manifest.identity.vae.get("name")
    lines = [
        f"pretty_name: {json.dumps(f'Video latents of {name}')}",  # a JSON string is a YAML string
        "task_categories:",
        "- text-to-video",
        "size_categories:",
        f"- {_size_category(manifest.counts.windows_stored)}",
        "tags:",
        "- video-latents",
        "- webdataset" if manifest.format == "webdataset" else "- parquet",
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - split: train",
        f'    path: "shards/*{suffix}"',
    ]
    return "\n".join(lines) + "\n"


def _size_category(rows: int) -> str:
    """The hub's names for orders of magnitude: 1K<n<10K."""
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")
    limits = [10**power for power in range(3, 10)]
    if rows < limits[0]:
        return "n<1K"
    for number, limit in enumerate(limits[1:], start=1):
        if rows < limit:
            return f"{names[number - 1]}<n<{names[number]}"
    return "n>1B"


def _normalization(vae: Mapping[str, Any]) -> str:
    shift, scale = vae.get("shift_factor"), vae.get("scaling_factor")
    if isinstance(shift, list) or isinstance(scale, list):
        return f"z = (mean - shift) * scale, by channel: shift {shift}, scale {scale}"
    return f"z = (mean - {shift}) * {scale}"
