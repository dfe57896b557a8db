"""The rules that CONTRIBUTING.md names, enforced."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PACKAGES = ("cvvae", "pipeline", "jobs", "examples")
SOURCES = sorted(path for package in PACKAGES for path in (PROJECT / package).rglob("*.py"))

DOORS = {
    "fsspec": {"pipeline/storage.py"},
    "aiobotocore": {"pipeline/s3_client.py"},
    "ray": {
        *("pipeline/dataflow.py", "pipeline/metrics.py", "pipeline/remote_decode.py"),
        *("jobs/cluster.py", "jobs/train_workers.py", "jobs/submit.py", "jobs/bench_remote_decode.py"),
    },
    "tensorboard": set(),  # through torch.utils.tensorboard, in pipeline/training/reports.py
    "av": {
        *("pipeline/decode/container.py", "pipeline/decode/pyav_backend.py"),
        *("jobs/remux.py", "jobs/side_by_side.py", "jobs/make_train_data.py"),
    },
    "cv2": {"jobs/evaluation/motion.py"},
    "decord": {"pipeline/decode/decord_backend.py"},
    "webdataset": {"pipeline/formats/webdataset_format.py", "jobs/v2d_shards.py", "jobs/rival_readers.py"},
    "yaml": {"jobs/config.py"},
    "diffusers": {"cvvae/diffusers_vae.py"},
    "typer": {f"jobs/{path.name}" for path in (PROJECT / "jobs").glob("*.py")} | {"examples/headline_experiments.py"},
}


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def imported_packages(path: Path) -> set[str]:
    packages: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            packages.add(node.module.split(".")[0])
    return packages


@pytest.mark.parametrize("library", sorted(DOORS))
def test_one_door_per_library(library: str) -> None:
    users = {name_of(path) for path in SOURCES if library in imported_packages(path)}
    assert users <= DOORS[library]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno
            assert length <= 60, f"{node.name} has {length} lines"


def test_no_rooms_without_a_name() -> None:
    assert not {path.stem for path in SOURCES} & {"utils", "util", "helpers", "base", "common", "misc"}


def test_nothing_in_jobs_shadows_a_library() -> None:
    import sys

    names = {path.stem for path in (PROJECT / "jobs").glob("*.py")} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)
    installed = {"torch", "ray", "numpy", "yaml", "rich", "typer", "fsspec", "webdataset", "pydantic", "datasets"}
    assert not names & installed


def test_architecture_names_every_file() -> None:
    text = (PROJECT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([\w./-]+\.py)`", text))
    names = {name.rpartition("/")[2] for name in named}
    missing = [name_of(path) for path in SOURCES if path.name != "__init__.py" and path.name not in names]
    assert missing == []
    gone = [name for name in named if not any(path.as_posix().endswith(name) for path in SOURCES)]
    assert gone == []


def test_documents_link_to_files_that_exist() -> None:
    for document in [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md"), *(PROJECT / "infra").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
