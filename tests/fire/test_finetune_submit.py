"""`latents finetune` against a running head: submit, a name that is taken, the log, resume by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from cvvae import load_vae
from tests.fire.test_job_submit import PROJECT, Head
from tests.fire.test_job_submit import head as head  # the fixture

DEADLINE = 240


@pytest.fixture
def config(v2d_shards: Callable[..., list[Path]], tmp_path: Path) -> Iterator[str]:
    """A run of seconds; its file lies in the project's folder, which is what is uploaded."""
    v2d_shards(tmp_path / "tars", num_shards=1, good=2, failed=0, broken=1)
    urls = str(tmp_path / "tars")
    source = {"name": "clips", "urls": urls, "frames": 5, "size": [16, 16], "short_side": 24, "batch_size": 1}
    plain = {
        "model": {"spec": "cvvae-sd21-tiny", "widths": [32, 32, 32, 32], "seed": 1},
        "data": {"sources": [source], "decode_children": 1},
        "loop": {"steps": 2},
        "loss": {"perceptual": 0, "adversarial": 0, "kl": 1e-6},
        "keep": {"checkpoint_every": 1},
        "output": {"url": str(tmp_path / "run")},
        "workers": {"count": 0, "threads": 1},
    }
    folder = PROJECT / "configs" / f".test-{tmp_path.name}"
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(plain))
    yield (folder / "run.yaml").relative_to(PROJECT).as_posix()
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(3 * DEADLINE)
def test_a_run_by_name(head: Head, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.submit import find, resume, submit_finetune
    from pipeline.errors import ConfigError

    monkeypatch.chdir(PROJECT)
    for name, value in head.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="no job named 'tiny'"):
        find("tiny", address=head.address)

    # the head's dashboard answers before its agent can take a job: the first submission may have to wait
    head.submit("python", "-c", "pass")
    sent = submit_finetune(config, name="tiny", address=head.address, overrides=["loop.seed=4"])
    assert sent.id == "tiny-1"
    with pytest.raises(ConfigError, match="job tiny-1 is"):
        submit_finetune(config, name="tiny", address=head.address)
    log: list[str] = []
    assert sent.follow(log.append).value == "SUCCEEDED", "".join(log)
    assert "exported:" in "".join(log)
    load_vae(tmp_path / "run" / "export")

    again = resume("tiny", address=head.address)
    assert again.id == "tiny-2"
    assert find("tiny", address=head.address).id == "tiny-2"
    log.clear()
    assert again.follow(log.append).value == "SUCCEEDED", "".join(log)
    assert "resumed after step 2 of 2" in "".join(log)
    assert (tmp_path / "run" / "checkpoints" / "00000002.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3 * DEADLINE)
def test_an_ablation_as_jobs(
    head: Head, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two variants at once; started again, they are not sent again."""
    import typer

    from jobs.ablate_vae import ablate
    from jobs.submit import find

    monkeypatch.chdir(PROJECT)
    for name, value in head.environment.items():
        monkeypatch.setenv(name, value)
    head.submit("python", "-c", "pass")
    plain = {
        "name": "seeds",
        "base": config,
        "variants": {"one": ["loop.seed=1"], "two": ["loop.seed=2"]},
        "runs": str(tmp_path / "runs"),
        "report": str(tmp_path / "report"),
        "evaluation": {"clips": [str(tmp_path / "tars")], "frames": 5, "size": [16, 16], "metrics": ["psnr"]},
    }
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump(plain))
    for sent in (True, False):
        with pytest.raises(typer.Exit) as stop:
            ablate(path, None, None, head.address, 2)
        shown = capsys.readouterr().out
        assert stop.value.exit_code == 0, shown
        assert ("one: job seeds-one-1" in shown) is sent
        assert ("two: finished before" in shown) is not sent
    assert find("seeds-two", address=head.address).id == "seeds-two-1"
    assert (tmp_path / "report" / "table.md").read_text().count("| one |") == 1
