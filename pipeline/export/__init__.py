"""A dataset in the formats of other projects' readers. docs/export.md says what each has, and what it cannot have.

    EXPORTS[name].check(identity, with_logvar)      refuses what the format cannot hold
    EXPORTS[name].write(folder, stem, latents)      one bucket of one shard as files
    EXPORTS[name].read(path)                        and back, which is how every file is checked
    export_dataset(source, target, settings)        all of it: resumable, verified

A new format is a file with a class that follows `ExportFormat` and one line in EXPORTS.
"""

from __future__ import annotations

from pipeline.export.contract import ExportedFile, ExportFormat, ReadBack
from pipeline.export.fastvideo import FastVideoExport
from pipeline.export.mds import MDSExport
from pipeline.export.run import EXPORTS, ExportReport, ExportSettings, export_dataset

__all__ = [
    "EXPORTS",
    "ExportFormat",
    "ExportReport",
    "ExportSettings",
    "ExportedFile",
    "FastVideoExport",
    "MDSExport",
    "ReadBack",
    "export_dataset",
]
