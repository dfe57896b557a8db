"""From a sample to the whole source: ratios, batches, encoders, intervals."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.plan_encode import decode_advice
from pipeline.planning.census import Census, spread
from pipeline.planning.estimate import EncodePlan, EncoderShape, make_plan, makespan
from pipeline.planning.sample import BatchTime, GroupMeasure, SampleMeasure
from pipeline.records import VideoShard

TILE = (17, 32, 32)
GPU = EncoderShape(decode_children=4, encode_threads=0, cores=5)


def shards(number: int) -> list[VideoShard]:
    return [VideoShard(id=f"{n:05d}", kind="webdataset", url=f"s3://b/{n:05d}.tar", size=1000) for n in range(number)]


def group(
    windows: int, *, samples: int = 4, decode: float = 0.4, encode: float = 0.0, padding: int = 0
) -> GroupMeasure:
    totals = {
        "samples": samples,
        "clips": samples - 1,
        "windows": windows,
        "frames": 17 * windows,
        "frames decoded": 20 * windows,
        "video seconds": 2.0 * samples,
        "payload bytes": 100 * windows,
        "float16 mean": 100 * windows,
        "empty bytes": 7,
        "padding bytes": padding,
        "decode seconds": decode,
        "bucket 00017x00032x00032": windows,
        "rejected timeout": 1,
    }
    return GroupMeasure(
        totals={name: float(value) for name, value in totals.items()},
        tiles={TILE: windows},
        encode_seconds=encode,
        warm=bool(encode),
    )


def sample(*groups: GroupMeasure, batch_size: int = 2, seconds: float = 0.5) -> SampleMeasure:
    batch = BatchTime(batch_size=batch_size, window_frames=17, seconds=(seconds,) * 3)
    return SampleMeasure(fingerprint="f" * 64, device="cpu", groups=list(groups), batches={TILE: batch}, seconds=3.0)


def plan_of(measure: SampleMeasure, num_shards: int, per_shard: int, shape: EncoderShape = GPU) -> EncodePlan:
    census = Census(np.full(num_shards, float(per_shard)), num_shards, 0.0)
    return make_plan(shards(num_shards), census, measure, shape, encoders=(1, 4), price_per_hour=2.0)


def test_a_shard_may_be_padded_or_not() -> None:
    planned = plan_of(sample(*[group(6, padding=50)] * 5), num_shards=10, per_shard=100)
    stored = planned.totals["payload bytes"]
    assert (stored.low, stored.value, stored.high) == (150_070, 150_320, 150_570)


def test_equal_groups_leave_no_doubt() -> None:
    planned = plan_of(sample(*[group(6)] * 5), num_shards=10, per_shard=100)
    for estimate, value in (
        (planned.samples, 1000),
        (planned.totals["clips"], 750),
        (planned.totals["windows"], 1500),
        (planned.totals["video seconds"], 2000),
        (planned.rejections["timeout"], 250),
        (planned.storage_bytes["float16 mean"], 150_000 + 10 * 7),
        (planned.decode_core_seconds, 100),
        # 150 tiles in a shard are 75 batches, and half the time one more half full
        (planned.encode_seconds, 10 * 75.25 * 0.5),
        (planned.decode_cores_per_encoder, 100 / 376.25),
    ):
        assert (estimate.low, estimate.value, estimate.high) == pytest.approx((value,) * 3)
    assert planned.unseen_class_share == pytest.approx(3 / 20)


def test_price_and_wall_follow_the_encoders() -> None:
    one, four = plan_of(sample(*[group(6)] * 5), num_shards=10, per_shard=100).walls
    assert one.seconds.value == pytest.approx(376.25)
    assert four.seconds.value == pytest.approx(3 * 37.625), "ten shards on four encoders are three rounds"
    assert four.encoder_hours.value == pytest.approx(4 * 3 * 37.625 / 3600)
    assert four.price is not None
    assert four.price.value == pytest.approx(2 * four.encoder_hours.value)


def test_too_few_decoders_set_the_time() -> None:
    slow = sample(*[group(6, decode=40.0)] * 5)
    planned = plan_of(slow, num_shards=10, per_shard=100)
    assert planned.work_seconds.value == pytest.approx(10 * 1000 / 4), "four children share a shard's decoding"
    assert planned.decode_cores_per_encoder.value == pytest.approx(10_000 / 376.25)
    shared = EncoderShape(decode_children=100, encode_threads=2, cores=2)
    assert plan_of(slow, 10, 100, shared).work_seconds.value == pytest.approx(10 * (2 * 37.625 + 1000) / 2)


def test_shards_over_ten_minutes_are_named() -> None:
    planned = plan_of(sample(*[group(6)] * 5), num_shards=2, per_shard=3200)  # 4,800 tiles: 2,400 batches
    assert planned.num_slow_shards == 2
    assert dict(planned.slow_shards)["00000"] == pytest.approx(1200, rel=0.01)
    assert planned.longest_shard_seconds == pytest.approx(1200, rel=0.01)


def test_batches_beside_decoding_are_slower() -> None:
    """Six tiles are three batches of 0.5 s alone; they took 3 s while clips were decoded."""
    planned = plan_of(sample(*[group(6, encode=3.0)] * 5), num_shards=10, per_shard=100)
    assert planned.encode_seconds.value == pytest.approx(2 * 376.25)


def test_a_gpu_that_would_wait_for_its_decoders_is_told_what_helps() -> None:
    slow = plan_of(sample(*[group(6, decode=40.0)] * 5), num_shards=10, per_shard=100)
    (line,) = decode_advice(slow.model_copy(update={"device": "NVIDIA H200"}))
    assert line.startswith("An encoder needs 26.6 decode cores and has 4: it will wait for decoding.")
    assert "--set cluster.remote_decoders=23 " in line
    assert decode_advice(slow) == [], "without a GPU, other nodes' cores encode as well as these"
    fast = plan_of(sample(*[group(6)] * 5), num_shards=10, per_shard=100)
    assert decode_advice(fast.model_copy(update={"device": "NVIDIA H200"})) == []


def test_two_groups_are_too_few_for_an_interval() -> None:
    windows = plan_of(sample(group(6), group(6)), num_shards=1, per_shard=100).totals["windows"]
    assert (windows.low, windows.high) == (windows.value / 2, windows.value * 2)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(20):
        groups = [group(int(windows)) for windows in rng.poisson(6, 16)]
        windows = plan_of(sample(*groups), num_shards=100, per_shard=40).totals["windows"]
        inside += windows.low <= 6000 <= windows.high
    assert inside >= 16, "about nine of ten"


def test_a_plan_is_a_document() -> None:
    planned = plan_of(sample(*[group(6)] * 5), num_shards=2, per_shard=3200)
    assert EncodePlan.from_bytes(planned.to_bytes(), "plan.json") == planned


def test_encoders_take_the_next_shard_as_they_become_free() -> None:
    assert makespan(np.array([3.0, 1.0, 1.0, 1.0]), 2) == 3.0
    assert makespan(np.array([1.0, 1.0, 3.0]), 2) == 4.0
    assert makespan(np.array([]), 3) == 0.0


def test_positions_are_spread() -> None:
    assert spread(10, 2) == [2, 7]
    assert spread(3, 8) == [0, 1, 2]
