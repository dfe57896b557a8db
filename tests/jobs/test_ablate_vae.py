"""`latents ablate`: shipped configs, a whole small ablation, what is not run again, variants that fail."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

from cvvae import load_vae, save_vae
from cvvae.image_vae import ImageVAE
from cvvae.image_vae_checkpoint import save_image_vae
from jobs.ablate_vae import ablate, chosen, clips_of
from jobs.ablation.config import AblationConfig
from jobs.ablation.runs import VariantRun
from jobs.ablation.table import make_table
from jobs.config import load_config
from pipeline.errors import ConfigError, PipelineError
from pipeline.training.players import build_players
from pipeline.training.settings import TrainSettings

PROJECT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((PROJECT / "configs" / "ablations").glob("*/*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_configs_make_different_runs(path: Path) -> None:
    config = load_config(AblationConfig, path)
    assert config.name == path.stem
    finetunes = config.finetunes()
    identities = {json.dumps(one.run_settings().identity(), sort_keys=True) for one in finetunes.values()}
    assert len(identities) == len(finetunes) >= 2
    for variant, finetune in finetunes.items():
        assert finetune.output.url == f"{config.runs}/{variant}"


def test_both_scales_have_every_table_with_the_same_variants() -> None:
    by_scale: dict[str, dict[str, list[str]]] = {"tiny": {}, "full": {}}
    for path in CONFIGS:
        by_scale[path.parent.name][path.stem] = list(load_config(AblationConfig, path).variants)
    assert by_scale["tiny"] == by_scale["full"]
    assert len(by_scale["tiny"]) == 6


# --- a whole one ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finetune config of seconds beside an image VAE, real clips and the shipped ablation that is run on them."""
    folder = tmp_path_factory.mktemp("ablation")
    v2d_shards(folder / "tars", num_shards=1, good=2, failed=0, broken=0)
    torch.manual_seed(0)
    image = ImageVAE(in_channels=3, latent_channels=4, widths=(32, 32, 32, 32))
    save_image_vae(image, folder / "image", scaling_factor=0.18215)
    source = {"name": "clips", "urls": str(folder / "tars"), "frames": 5, "size": [16, 16], "short_side": 24}
    plain: dict[str, Any] = {
        "model": {"spec": "cvvae-sd21-tiny", "widths": [32, 32, 32, 32], "image_vae": str(folder / "image")},
        "data": {"sources": [source], "decode_children": 1},
        "loop": {"steps": 2},
        "loss": {"perceptual": 0, "adversarial": 0, "kl": 1e-6},
        "regularization": {"image_vae": str(folder / "image")},
        "output": {"url": "given by the ablation"},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(plain))
    return folder


def run(base: Path, out: Path, *sets: str, only: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    """Exit code and table.json of the shipped regularization ablation, made small."""
    small = [
        f"base={base / 'base.yaml'}",
        "overrides=[]",
        f"runs={out / 'runs'}",
        f"report={out / 'report'}",
        f"evaluation={{clips: [{base / 'tars'}], frames: 5, size: [16, 24], metrics: [psnr]}}",
        f"evaluation.image_vae={base / 'image'}",
    ]
    path = PROJECT / "configs" / "ablations" / "tiny" / "regularization.yaml"
    with pytest.raises(typer.Exit) as stop:
        ablate(path, [*small, *sets], list(only), None, 1)
    return stop.value.exit_code, json.loads((out / "report" / "table.json").read_text())


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("done")
    code, _ = run(base, out, only=("none", "both"))
    assert code == 0
    return out


def test_the_table_has_a_row_for_each_variant(done: Path) -> None:
    table = json.loads((done / "report" / "table.json").read_text())
    assert [row["variant"] for row in table["rows"]] == ["none", "both"]
    for row in table["rows"]:
        assert row["steps"] == 2
        assert row["parameters"] > 100_000
        assert {"psnr ↑", "dB below the image VAE ↓", "cosine ↑", "Frechet ↓"} <= set(row)
    first, second = table["rows"]
    assert (first["cosine ↑"], first["psnr ↑"]) != (second["cosine ↑"], second["psnr ↑"])
    assert table["columns"][-1].startswith("paper: COCO")
    assert table["notes"][0] == "5 frames, 16 x 24: 2 windows, the same for all variants"
    text = (done / "report" / "table.md").read_text()
    assert text.startswith("# Which side is regularized (CV-VAE, table 6)\n")
    assert "27.9 / .808 / .150 \\| 27.6 / .795 / .176" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 + 2
    assert (done / "report" / "evaluation" / "index.html").is_file()
    for variant in ("none", "both"):
        load_vae(done / "runs" / variant / "export")


def test_what_is_finished_is_not_run_again_and_what_is_new_is(base: Path, done: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "runs").rglob("*.safetensors")}
    table = (done / "report" / "table.json").read_bytes()
    code, again = run(base, done, only=("none", "both"))
    shown = capsys.readouterr().out
    assert code == 0
    assert shown.count("finished before") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads(table) == again
    code, more = run(base, done, "overrides=[loop.steps=3]", only=("none",))
    assert code == 0
    assert "none: finished before" not in capsys.readouterr().out
    assert [row["steps"] for row in more["rows"]] == [3]


def test_a_variant_that_fails_is_named_and_does_not_stop_the_others(base: Path, tmp_path: Path, capsys) -> None:
    code, table = run(
        base,
        tmp_path,
        "variants={wide: ['model.widths=[32, 64, 64, 64]'], none: [regularization=null]}",
        "published={}",
        "evaluation.image_vae=null",
    )
    assert code == 1
    assert [row.get("psnr ↑") is not None for row in table["rows"]] == [False, True]
    assert table["notes"][1].startswith("wide: model.image_vae: ")
    assert "wide: failed: model.image_vae" in " ".join(capsys.readouterr().out.split())


# --- what is refused before anything runs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["variants={bad: [loop.stepz=3]}", "published={}"],
            "variant bad: .*loop.stepz: unknown setting",
        ),
        (["published={nowhere: '1'}"], "published: expected some of"),
        (["evaluation.image_vae=nowhere/vae"], "nowhere/vae does not exist"),
        (["evaluation.clips=[]"], "evaluation.clips: expected some, since"),
        (["variants={Bad: []}", "published={}"], "variants.Bad"),
    ],
)
def test_settings_that_cannot_be_run_are_one_message(
    base: Path, tmp_path: Path, sets: list[str], message: str, capsys
) -> None:
    with pytest.raises(SystemExit):
        run(base, tmp_path, *sets)
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "runs").exists()


def test_only_some_variants() -> None:
    config = load_config(AblationConfig, CONFIGS[0])
    first, *others = config.variants
    assert list(chosen(config, [first]).variants) == [first]
    assert chosen(config, []) is config
    with pytest.raises(ConfigError, match="--only: expected of"):
        chosen(config, ["nothing"])
    assert others


def test_clips_are_the_held_out_tars_unless_others_are_named(base: Path, tmp_path: Path) -> None:
    held_out = f"data.held_out={{name: held_out, urls: {base / 'tars'}, frames: 5, size: [16, 16]}}"
    sets = [f"base={base / 'base.yaml'}", f"overrides=['{held_out}']", f"runs={tmp_path}"]
    path = PROJECT / "configs" / "ablations" / "tiny" / "mapping.yaml"
    config = load_config(AblationConfig, path, sets)
    (tar,) = clips_of(config, config.finetunes())
    assert tar.endswith("tars/00000.tar")
    named = load_config(AblationConfig, path, [*sets, "evaluation.clips=[clips/*.mp4]"])
    assert clips_of(named, named.finetunes()) == (str(Path.cwd() / "clips/*.mp4"),)


def test_a_table_without_a_single_vae_still_says_why() -> None:
    config = load_config(AblationConfig, PROJECT / "configs" / "ablations" / "tiny" / "mapping.yaml")
    settings = config.finetunes()
    runs = [VariantRun(name, settings[name], failure="no room") for name in config.variants]
    table = make_table(config, runs, {}, None)
    assert table.columns == ("variant", config.published_as)
    assert table.notes == tuple(f"{name}: no room" for name in config.variants)


def test_a_cluster_that_is_silent_for_a_while_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs import submit

    answers: list[Any] = [PipelineError("no answer"), PipelineError("no answer"), submit.JobStatus.SUCCEEDED]

    def status(self: submit.Submission) -> submit.JobStatus:
        answer = answers.pop(0)
        if isinstance(answer, PipelineError):
            raise answer
        return answer

    monkeypatch.setattr(submit, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(submit.Submission, "status", status)
    sent = submit.Submission("a", "a-1", "http://127.0.0.1:1")
    assert sent.wait(patience_seconds=60).value == "SUCCEEDED"
    answers[:] = [PipelineError("no answer")] * 9
    with pytest.raises(PipelineError, match="no answer"):
        sent.wait()


# --- latent channels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "widths"), [("ivvae-z4-tiny", None), ("cvvae-sd21-tiny", [32, 32, 32, 32])])
def test_other_latent_channels_train_and_come_back(spec: str, widths: list[int] | None, tmp_path: Path) -> None:
    model = {"spec": spec, "seed": 0, "latent_channels": 8, "widths": widths}
    players, _ = build_players(settings_of(model), torch.device("cpu"))
    assert (players.model.spec.latent_channels, players.model.spec.scaling_factor) == (8, 1.0)
    save_vae(players.model, tmp_path)
    assert load_vae(tmp_path).spec == players.model.spec


def test_latent_channels_of_other_families_are_their_specs() -> None:
    with pytest.raises(ConfigError, match=r"model\.latent_channels: expected none for spec od-vae-tiny, got 8"):
        build_players(settings_of({"spec": "od-vae-tiny", "seed": 0, "latent_channels": 8}), torch.device("cpu"))


def settings_of(model: dict[str, Any]) -> TrainSettings:
    source = {"name": "clips", "urls": "nowhere", "frames": 5, "size": [16, 16]}
    plain = {"model": model, "data": {"sources": [source]}, "loop": {"steps": 1}, "output": {"url": "nowhere"}}
    return TrainSettings.model_validate(plain | {"loss": {"perceptual": 0, "adversarial": 0, "kl": 1e-6}})
