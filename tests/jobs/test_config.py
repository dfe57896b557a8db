"""Configs: every mistake is named by its place, with what was expected and given; the shipped ones work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from cvvae import SPECS
from jobs.config import EncodeConfig, load_config
from pipeline.errors import ConfigError
from pipeline.run import check_geometry

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs/encode").glob("*.yaml"))
HUSH = "hush-hush"
MINIMAL: dict[str, Any] = {
    "source": {"kind": "webdataset", "urls": "s3://bucket/x"},
    "output": {"url": "s3://bucket/y"},
    "vae": {"spec": "cvvae-sd21-tiny"},
}
TABLE: dict[str, Any] = MINIMAL | {"source": {"kind": "table", "url": "s3://bucket/x.csv"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def load(path: Path, raw: Any, *overrides: str) -> EncodeConfig:
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return load_config(EncodeConfig, path, overrides)


def refusal(path: Path, raw: Any, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, raw, *overrides)
    assert HUSH not in str(caught.value)
    return str(caught.value)


def changed(raw: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    """A copy with one setting of any depth set."""
    first, _, rest = where.partition(".")
    return raw | {first: changed(raw.get(first, {}), rest, value) if rest else value}


# What is shipped


@pytest.mark.parametrize("shipped", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid_and_fit_their_vae(shipped: Path) -> None:
    config = load_config(EncodeConfig, shipped)
    checkpoint = config.vae.checkpoint or ""
    known = {"sd3": "cvvae-sd3", "Wan2.1": "wan21"}
    named = [name for part, name in known.items() if part in checkpoint]
    name = config.vae.spec or (named[0] if named else "cvvae-sd21")
    spec = SPECS[name]
    check_geometry(spec, config)
    assert (config.windows.frames - 1) % 4 == 0
    assert all(side % 8 == 0 for bucket in config.resize.buckets for side in bucket)
    batch = min(height * width for height, width in config.resize.buckets) * 17
    assert config.encode.batch_pixels >= batch, "a batch holds a tile of the smallest bucket"


def test_there_are_shipped_configs() -> None:
    assert len(CONFIGS) >= 3


def test_a_geometry_that_does_not_fit_is_named(path: Path) -> None:
    spec = SPECS["cvvae-sd21"]
    for where, value, message in (
        ("windows.frames", 16, r"windows\.frames: .*16"),
        ("resize.buckets", [[256, 256], [100, 256]], r"resize\.buckets: \[100, 256\]: "),
    ):
        config = load(path, changed(MINIMAL, where, value))
        with pytest.raises(ConfigError, match=message):
            check_geometry(spec, config)


# Unknown settings

SECTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("outpt", MINIMAL, "did you mean 'output'?"),
    ("source.url", MINIMAL, "did you mean 'urls'?"),
    ("source.captionkeys", MINIMAL, "did you mean 'caption_keys'?"),
    ("source.rows_pershard", TABLE, "did you mean 'rows_per_shard'?"),
    ("source.caption_colum", TABLE, "did you mean 'caption_column'?"),
    ("output.formt", MINIMAL, "did you mean 'format'?"),
    ("vae.checkpont", MINIMAL, "did you mean 'checkpoint'?"),
    ("windows.frame", MINIMAL, "did you mean 'frames'?"),
    ("resize.bucket", MINIMAL, "did you mean 'buckets'?"),
    ("decode.thread", MINIMAL, "did you mean 'threads'?"),
    ("encode.storage_type", MINIMAL, "did you mean 'storage_dtype'?"),
    ("cluster.num_actor", MINIMAL, "did you mean 'num_actors'?"),
    ("resize.zzzz", MINIMAL, "known here: buckets, filter, upscale"),
]


@pytest.mark.parametrize(("where", "raw", "hint"), SECTIONS, ids=lambda one: one if isinstance(one, str) else "")
def test_an_unknown_setting_gets_a_hint(path: Path, where: str, raw: dict[str, Any], hint: str) -> None:
    message = refusal(path, changed(raw, where, 1))
    assert f"config {path}:" in message
    assert f"  {where}: unknown setting; {hint}" in message


def setting_names(model: type[BaseModel], raw: dict[str, Any]) -> Iterator[str]:
    """Every setting of the sections in `raw`, and of the sections that have defaults."""
    config = model.model_validate(raw)

    def names(one: BaseModel, prefix: str) -> Iterator[str]:
        for name in type(one).model_fields:
            inner = getattr(one, name)
            if isinstance(inner, BaseModel):
                yield from names(inner, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    yield from names(config, "")


@pytest.mark.parametrize(
    ("raw", "where"),
    [(raw, name) for raw in (MINIMAL, TABLE) for name in setting_names(EncodeConfig, raw) if name != "source.kind"],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_any_setting_misspelt_is_found(path: Path, raw: dict[str, Any], where: str) -> None:
    message = refusal(path, changed(raw, f"{where}_", 1))
    assert f"  {where}_: unknown setting; did you mean {where.rpartition('.')[2]!r}?" in message


# Wrong values

WRONG: list[tuple[str, Any, str]] = [
    ("windows.frames", "many", "windows.frames: Input should be a valid integer.*got 'many'"),
    ("windows.tail", "keep", "windows.tail: Input should be 'drop', 'pad' or 'trim', got 'keep'"),
    ("windows", None, "windows: expected a mapping of settings, got None"),
    ("windows", [1], r"windows: .*got \[1\]"),
    ("resize.buckets", [[1, 2, 3]], r"resize.buckets.0: Tuple should have at most 2 items.*got \[1, 2, 3\]"),
    ("resize.buckets", [[8, 8], [8, "x"]], r"resize.buckets.1.1: .*got 'x'"),
    ("resize.buckets", [[8, 8], [8, 8]], r"resize: buckets must be distinct.*got \(\(8, 8\), \(8, 8\)\)$"),
    ("source.urls", 5, "source.urls: .*got 5"),
    ("resize.buckets", [96, 160], r"resize.buckets.0: expected a list \(a list of lists, .*got 96"),
    ("source", {"kind": "table", "url": "x", "uri": {"pth": None}}, r"source.uri: expected text; .* needs quotes"),
    ("source.urls", ["s3://fine", 5], r"source.urls.1: expected text, got 5"),
    ("source.urls", [], "source.urls: .*at least 1 item"),
    ("source.kind", "webdatset", "source.kind: expected one of .webdataset., .table., got .webdatset."),
    ("source", {"urls": "s3://x"}, "source: Unable to extract tag using discriminator 'kind'"),
    ("source", {"kind": "webdataset"}, "source.urls: must be given"),
    ("output", {}, "output.url: must be given"),
    ("vae", {}, "vae: expected either vae.checkpoint or vae.spec, got neither$"),
    ("vae.checkpoint", "x", "vae: expected either vae.checkpoint or vae.spec, got both"),
    ("vae.spec", "cvvae-sd21-tyni", "vae.spec: expected one of .*got 'cvvae-sd21-tyni'"),
    ("vae.seed", -1, "vae.seed: .*greater than or equal to 0, got -1"),
    ("cluster.gpus_per_actor", -0.5, "cluster.gpus_per_actor: .*got -0.5"),
    ("cluster.decode_children", 0, "cluster.decode_children: 0 needs cluster.remote_decoders, got 0"),
    (
        "cluster.remote_decode_resource",
        "CPU",
        "cluster.remote_decode_resource: .* got Ray's own 'CPU'",
    ),
    ("cluster.remote_decode_resource", "a b", "cluster.remote_decode_resource: .*got 'a b'"),
    ("decode.backends", ["pyav", "ffmpeg"], "decode.backends.1: Input should be 'pyav' or 'decord', got 'ffmpeg'"),
]


@pytest.mark.parametrize(("where", "value", "message"), WRONG, ids=lambda one: str(one)[:40])
def test_a_wrong_value_says_where_expected_and_got(path: Path, where: str, value: Any, message: str) -> None:
    text = refusal(path, changed(MINIMAL, where, value))
    lines = text.splitlines()[1:]
    assert any(re.match(f"  {message}", line) for line in lines), text
    assert not any("function-after" in line or "webdataset." in line for line in lines), (
        "pydantic's own names stay out"
    )


def test_every_problem_is_listed_once(path: Path) -> None:
    raw = changed(changed(changed(MINIMAL, "windows.frames", "x"), "resize.nope", 1), "source.urls", [5])
    assert len(refusal(path, raw).splitlines()) == 1 + 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping of settings, got NoneType"),
        ("- a\n", "expected a mapping of settings, got list"),
        ("a: [1\n", "config .*config.yaml: "),
        ("a: \x01", "config .*config.yaml: "),
        ("source: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_files_that_are_no_config(path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config no\.yaml does not exist .relative paths start at"):
        load_config(EncodeConfig, "no.yaml")
    with pytest.raises(ConfigError, match="config "):
        load_config(EncodeConfig, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml"):
        load_config(EncodeConfig, tmp_path / "latin.yaml")


# Overrides


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("windows.frames=33", lambda c: c.windows.frames, 33),
        ("windows.fps=8", lambda c: c.windows.fps, 8.0),
        ("windows.fps=null", lambda c: c.windows.fps, None),
        ("windows.fps=", lambda c: c.windows.fps, None),
        ("encode.logvar=true", lambda c: c.encode.logvar, True),
        ("resize.buckets=[[64, 96]]", lambda c: c.resize.buckets, ((64, 96),)),
        ("source.urls=s3://b/{00..11}.tar", lambda c: c.source.urls, "s3://b/{00..11}.tar"),
        ("source.urls=[s3://a, s3://b]", lambda c: c.source.urls, ("s3://a", "s3://b")),
        (
            "output.options.endpoint_url=http://h:1/?a=b",
            lambda c: c.output.options,
            {"endpoint_url": "http://h:1/?a=b"},
        ),
        (
            "output.options.client_kwargs.region_name=x",
            lambda c: c.output.options,
            {"client_kwargs": {"region_name": "x"}},
        ),
        ("cluster.num_actors=4", lambda c: c.cluster.num_actors, 4),
        ("vae={spec: cvvae-sd3-tiny, seed: 5}", lambda c: (c.vae.spec, c.vae.seed), ("cvvae-sd3-tiny", 5)),
    ],
)
def test_overrides(path: Path, override: str, read: Any, value: Any) -> None:
    assert read(load(path, MINIMAL, override)) == value


def test_the_last_override_counts_and_an_empty_section_may_be_filled(path: Path) -> None:
    text = yaml.safe_dump(MINIMAL) + "windows:\n  # all by default\n"
    config = load(path, text, "windows.frames=9", "windows.tail=pad", "windows.frames=5")
    assert (config.windows.frames, config.windows.tail) == (5, "pad")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("windows.frames", "--set: expected section.setting=value, got 'windows.frames'"),
        ("=5", "expected section.setting=value"),
        ("windows.=5", "expected section.setting=value"),
        (".frames=5", "expected section.setting=value"),
        ("windows..frames=5", "expected section.setting=value"),
        ("output.url.deeper=5", "--set output.url.deeper: url is a value, not a section"),
        ("resize.buckets=[[64", "--set resize.buckets: value is not YAML"),
        ("windows.frmes=5", "windows.frmes: unknown setting; did you mean 'frames'?"),
        ("windows.frames=x", "windows.frames: .*got 'x'"),
    ],
)
def test_wrong_overrides(path: Path, override: str, message: str) -> None:
    assert re.search(message.replace("?", r"\?"), refusal(path, MINIMAL, override))


# Secrets


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("source.options", {"secret": HUSH}),
        ("output.options", {"client_kwargs": {"aws_secret_access_key": HUSH}}),
        ("vae.options", {"token": HUSH}),
        ("source.urls", f"ftp://user:{HUSH}@host/x"),
        ("source.urls", ["s3://fine", f"ftp://user:{HUSH}@host/x"]),
        ("output.url", f"s3://user:{HUSH}@bucket"),
        ("vae", {"checkpoint": f"https://host/x?sig={HUSH}"}),
    ],
)
def test_secrets_are_refused_and_not_printed(path: Path, where: str, value: Any) -> None:
    message = refusal(path, changed(MINIMAL, where, value))
    assert "the environment" in message
    assert where in message


def test_a_refused_secret_is_in_no_chained_error(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(path, changed(MINIMAL, "source.options", {"secret": HUSH}))
    assert HUSH not in str(caught.value.__cause__)


def test_other_mistakes_do_not_print_secrets_either(path: Path) -> None:
    raw = changed(changed(MINIMAL, "source.options", {"secret": HUSH}), "source.kind", "webdatset")
    assert "source.kind: expected" in refusal(path, raw)
    refusal(path, changed(MINIMAL, "source.urls", [5, f"ftp://user:{HUSH}@host"]))
    refusal(path, changed(MINIMAL, "windows.tail", f"ftp://user:{HUSH}@host"))
