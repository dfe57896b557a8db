"""LatentDataset in one process: the stored numbers, from both formats, and what is done to them."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cvvae import SPECS
from pipeline.logvar_code import logvar_from_int8
from pipeline.reader import LatentBatch, LatentDataset, SubWindow
from pipeline.records import Latent
from tests.pipeline.reader.made_datasets import write_dataset

FORMATS = ("webdataset", "parquet")


def rows_of(batches: list[LatentBatch]) -> list[tuple[str, torch.Tensor]]:
    """(key, latent) of every row that is not padding."""
    return [
        (key, latent)
        for batch in batches
        for key, latent, padding in zip(batch.keys, batch.latents_BCTHW, batch.is_padding_B.tolist(), strict=True)
        if not padding
    ]


@pytest.fixture(scope="module", params=list(itertools.product(FORMATS, ("float16", "bfloat16", "float32"))))
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Latent]]:
    folder = tmp_path_factory.mktemp("dataset")
    format_name, dtype = request.param
    return folder, write_dataset(folder, format_name=format_name, dtype=dtype, logvar=dtype != "float32")


@pytest.mark.parametrize("shuffle", [True, False])
def test_all_latents_come_once_and_as_stored(stored: tuple[Path, dict[str, Latent]], shuffle: bool) -> None:
    folder, latents = stored
    dataset = LatentDataset(str(folder), 5, tail="pad", latents="raw", shuffle=shuffle, columns=["frame_times"])
    batches = list(dataset)
    assert len(batches) == dataset.batches_per_epoch
    found = rows_of(batches)
    assert Counter(key for key, _ in found) == Counter(latents.keys())
    for key, latent in found:
        assert torch.equal(latent, latents[key].mean_CTHW.float())
    for batch in batches:
        assert len(set(batch.captions)) >= 1
        for key, caption, shard, times in zip(
            batch.keys, batch.captions, batch.shard_ids, batch.columns["frame_times"], strict=True
        ):
            row = latents[key].row
            assert (caption, shard, tuple(times), batch.bucket) == (
                row.caption,
                row.shard_id,
                row.frame_times,
                row.bucket,
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_raw_latents_in_their_own_dtype_or_another(
    stored: tuple[Path, dict[str, Latent]], dtype: torch.dtype
) -> None:
    folder, latents = stored
    for key, latent in rows_of(list(LatentDataset(str(folder), 4, latents="raw", dtype=dtype))):
        assert torch.equal(latent, latents[key].mean_CTHW.to(dtype))


def test_normalized_by_channel(tmp_path: Path) -> None:
    shift, scale = (0.5, -1.0, 0.25, 0.0), (0.25, 2.0, -0.5, 1.0)
    spec = replace(SPECS["cvvae-sd21"], shift_factor=shift, scaling_factor=scale)
    latents = write_dataset(tmp_path, spec=spec)
    for key, latent in rows_of(list(LatentDataset(str(tmp_path), 4))):
        stored = latents[key].mean_CTHW.float()
        expected = [(stored[channel] - shift[channel]) * scale[channel] for channel in range(4)]
        torch.testing.assert_close(latent, torch.stack(expected))


@pytest.mark.parametrize("format_name", FORMATS)
def test_samples_are_fresh_each_epoch_and_the_same_in_each_run(tmp_path: Path, format_name: str) -> None:
    latents = write_dataset(tmp_path, format_name=format_name, logvar=True)

    def epoch(number: int, seed: int = 0) -> dict[str, torch.Tensor]:
        dataset = LatentDataset(
            str(tmp_path), 5, seed=seed, sample="sample", latents="raw", tail="pad", epochs=number + 1
        )
        dataset.start = number * dataset.batches_per_epoch
        return dict(rows_of(list(dataset)))

    first, again, second = epoch(0), epoch(0), epoch(1)
    noise = []
    for key, latent in latents.items():
        assert torch.equal(first[key], again[key])
        assert not torch.equal(first[key], second[key])
        std = torch.exp(0.5 * latent.logvar_CTHW.float())
        noise += [((one[key] - latent.mean_CTHW.float()) / std).flatten() for one in (first, second)]
    drawn = torch.cat(noise)
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.std()) - 1) < 0.02


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_coded_log_variances_give_the_noise_they_stand_for(tmp_path: Path, format_name: str, dtype: str) -> None:
    """int8 beside a mean in another dtype: the sample is the mean and a draw as wide as the code says."""
    latents = write_dataset(tmp_path, format_name=format_name, dtype=dtype, logvar="int8")
    settings: dict[str, Any] = {"latents": "raw", "tail": "pad"}
    means = dict(rows_of(list(LatentDataset(str(tmp_path), 5, **settings))))
    drawn = []
    for key, sample in rows_of(list(LatentDataset(str(tmp_path), 5, sample="sample", **settings))):
        assert torch.equal(means[key], latents[key].mean_CTHW.float())
        code = latents[key].logvar_CTHW
        assert code is not None
        assert code.dtype == torch.int8
        drawn.append(((sample - means[key]) / torch.exp(0.5 * logvar_from_int8(code))).flatten())
    assert abs(float(torch.cat(drawn).mean())) < 0.02
    assert abs(float(torch.cat(drawn).std()) - 1) < 0.02


def test_a_normalized_sample_is_one_of_the_normalized_posterior(tmp_path: Path) -> None:
    write_dataset(tmp_path, logvar=True)
    settings: dict[str, Any] = {"sample": "sample", "seed": 3}
    raw = dict(rows_of(list(LatentDataset(str(tmp_path), 4, latents="raw", **settings))))
    for key, latent in rows_of(list(LatentDataset(str(tmp_path), 4, **settings))):
        torch.testing.assert_close(latent, raw[key] * 0.18215)


def test_dropped_captions_change_with_the_epoch(tmp_path: Path) -> None:
    latents = write_dataset(tmp_path, shards=8, small=40, long=0)
    dataset = LatentDataset(str(tmp_path), 4, tail="pad", caption_dropout=0.3, epochs=2)
    dropped: list[set[str]] = [set(), set()]
    for batch in dataset:
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            assert caption in ("", latents[key].row.caption)
            if not caption:
                dropped[batch.epoch].add(key)
    assert dropped[0] != dropped[1]
    for keys in dropped:
        assert 0.2 < len(keys) / len(latents) < 0.4


def test_sub_windows_are_prefixes_where_they_are_exact(tmp_path: Path) -> None:
    latents = write_dataset(tmp_path)
    whole = LatentDataset(str(tmp_path), 2, latents="raw", sub_window=SubWindow(frames=17), columns=["frame_times"])
    for batch in whole:
        assert batch.latents_BCTHW.shape[2] == 5
        for key, latent, times in zip(batch.keys, batch.latents_BCTHW, batch.columns["frame_times"], strict=True):
            assert torch.equal(latent, latents[key].mean_CTHW[:, :5].float())
            assert tuple(times) == latents[key].row.frame_times[:17]
    with pytest.raises(ValueError, match=r"sub_window of 13 frames in windows of 17.*exact are \[17\]"):
        LatentDataset(str(tmp_path), 2, sub_window=SubWindow(frames=13))
    with pytest.raises(ValueError, match="got 12"):
        LatentDataset(str(tmp_path), 2, sub_window=SubWindow(frames=12))
    with pytest.raises(ValueError, match="expected start='first', got 'random'"):
        LatentDataset(str(tmp_path), 2, sub_window=SubWindow(frames=17, start="random"))


def test_approximate_sub_windows_start_anywhere_and_say_which_frames(tmp_path: Path) -> None:
    latents = write_dataset(tmp_path, shards=2, small=0, long=40)
    cut = SubWindow(frames=9, start="random", approximate=True)
    starts = Counter()
    for batch in LatentDataset(str(tmp_path), 4, latents="raw", sub_window=cut, columns=["frame_indices"]):
        for key, latent, frames in zip(batch.keys, batch.latents_BCTHW, batch.columns["frame_indices"], strict=True):
            (start,) = [at for at in range(7) if torch.equal(latent, latents[key].mean_CTHW[:, at : at + 3].float())]
            starts[start] += 1
            first = 0 if start == 0 else 4 * start - 3
            assert tuple(frames) == latents[key].row.frame_indices[first : 4 * (start + 2) + 1]
    assert set(starts) == set(range(7))


def test_a_bucket_below_one_batch_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_dataset(tmp_path, shards=1, small=9, long=2)
    dataset = LatentDataset(str(tmp_path), 4)
    assert "less than a batch of 4 rows, which are never read: {'00033x00016x00032': 2}" in caplog.text
    assert dataset.plan.too_small == {"00033x00016x00032": 2}
    assert {batch.bucket for batch in dataset} == {"00017x00016x00016"}
    with pytest.raises(ValueError, match="no bucket has a batch of batch_size=10"):
        LatentDataset(str(tmp_path), 10)
    only = LatentDataset(str(tmp_path), 2, buckets=["00033x00016x00032"])
    assert [batch.bucket for batch in only] == ["00033x00016x00032"]


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"sample": "sample"}, "has no log variances"),
        ({"sample": "mode"}, "sample: expected one of"),
        ({"latents": "scaled"}, "latents: expected one of"),
        ({"columns": ["colour"]}, r"columns: expected some of .* got \['colour'\]"),
        ({"caption_dropout": 1.5}, "caption_dropout: expected 0 to 1, got 1.5"),
        ({"buckets": ["00001x00008x00008"]}, "buckets: expected some of"),
        ({"rank": 1}, "expected both rank and world_size"),
        ({"rank": 0, "world_size": 3}, "multiple of world_size=3"),
        ({"start": -1}, "at least 0 batches, got -1"),
        ({"dtype": torch.int8}, "floating point"),
        ({"on_corrupt": "ignore"}, "on_corrupt: expected"),
        ({"tolerate": ["old"]}, "tolerate: expected"),
    ]
    for settings, message in bad:
        with pytest.raises(ValueError, match=message):
            LatentDataset(str(tmp_path), 4, **settings)
