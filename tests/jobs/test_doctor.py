"""`latents doctor`: what is fit is said to be, what would stop a run is named and sets the exit code."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from jobs import doctor_checks as checks
from jobs.config import EncodeConfig
from jobs.doctor import doctor
from jobs.doctor_checks import Finding, guarded
from tests.s3_server import S3Server


def config_for(source: Path, url: str, **changes: Any) -> dict[str, Any]:
    return {
        "source": {"kind": "webdataset", "urls": str(source)},
        "output": {"url": url, **changes.pop("output", {})},
        "vae": {"spec": "cvvae-sd21-tiny"},
        "windows": {"max_windows": 1},
        "resize": {"buckets": [[32, 32]]},
        **changes,
    }


def found(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


@pytest.fixture(scope="module")
def source(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor") / "source"
    v2d_shards(folder, num_shards=1, good=1, failed=1, broken=0)
    return folder


def typed(config: dict[str, Any], path: Path) -> tuple[int, str]:
    import typer

    path.write_text(yaml.safe_dump(config))
    app = typer.Typer(add_completion=False)
    app.command()(doctor)
    result = CliRunner().invoke(app, [str(path)], env={"COLUMNS": "300", "RAY_ADDRESS": ""})
    return result.exit_code, result.output


def test_a_fit_environment(source: Path, tmp_path: Path) -> None:
    code, text = typed(config_for(source, str(tmp_path / "out")), tmp_path / "config.yaml")
    assert code == 0, text
    for part in (
        "conv3d: float32 on",
        "pyav-",
        "decord-",
        "of 8 writers at once won",
        "write, read and list",
        "clock",
    ):
        assert part in text
    assert "encode actors: " in text
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [], "it cleans up after itself"


def test_what_would_stop_a_run(source: Path, tmp_path: Path) -> None:
    broken = config_for(tmp_path / "nowhere", "memory://out", windows={"frames": 16})
    code, text = typed(broken, tmp_path / "config.yaml")
    assert code == 1
    assert "bad  VAE: ConfigError: windows.frames" in text
    assert "bad  source: SourceError" in text
    assert "does not exist" in text
    assert "bad  output: StorageError" in text
    assert "no conditional write" in text
    assert "3 would stop a run" in text


def test_a_store_that_overwrites_is_found(source: Path) -> None:
    """Of a store without conditional writes several may win; the config's promise makes that a note."""
    config = EncodeConfig.model_validate(config_for(source, "memory://out", output={"single_driver": True}))
    store = checks.Store("memory://out", single_driver=True)

    class Overwriting(checks.Store):
        def create(self, name: str, content: bytes | Path) -> bool:
            assert isinstance(content, bytes)
            self.replace(name, content)
            return True

    assert found(checks.output(config))["conditional writes"].verdict in ("good", "note")
    assert store.info("run.json") is None
    (finding,) = checks.conditional_writes(
        Overwriting("memory://other", single_driver=True), "a", single_driver=False
    )
    assert finding.verdict == "bad"
    assert "8 of 8 writers at once won" in finding.text


def test_a_clip_that_no_decoder_reads(source: Path, tmp_path: Path, v2d_shards: Callable[..., list[Path]]) -> None:
    v2d_shards(tmp_path / "source", num_shards=1, good=0, failed=0, broken=1)
    config = EncodeConfig.model_validate(config_for(tmp_path / "source", str(tmp_path / "out")))
    findings = found(checks.source(config))
    assert findings["decoder pyav"].verdict == "bad"
    assert "decodes none of the first clips" in findings["decoder pyav"].text


def test_an_error_of_a_check_is_its_finding() -> None:
    def failing() -> Iterator[Finding]:
        yield Finding("a", "good", "first")
        raise OSError("no such thing")

    assert [finding.verdict for finding in guarded("what", failing)] == ["good", "bad"]


def test_rights_and_clock_on_s3(source: Path, s3_server: S3Server) -> None:
    url = f"{s3_server.url}/doctor-{secrets.token_hex(4)}"
    config = EncodeConfig.model_validate(config_for(source, url, output={"options": s3_server.options}))
    findings = found(checks.output(config))
    assert {finding.verdict for finding in findings.values()} == {"good"}
    assert set(findings) == {"output", "conditional writes", "clock"}
