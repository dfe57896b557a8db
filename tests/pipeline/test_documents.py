"""The JSON documents: equal content is equal bytes, what was written is read, what is not ours is refused clearly."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.card import dataset_card
from pipeline.documents import (
    FORMAT_VERSION,
    Counts,
    Document,
    Manifest,
    ManifestShard,
    RunFile,
    RunIdentity,
    ShardReceipt,
    canonical_json,
)
from pipeline.errors import DatasetError
from pipeline.manifest import build_manifest
from pipeline.policies import ResizePolicy, WindowPolicy
from pipeline.stats import ChannelStatistics
from tests.pipeline.example_documents import identity, receipt, run_file

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15,
)


def manifest() -> Manifest:
    return build_manifest(run_file(), [receipt("00000"), receipt("00001")], ["00002"])


DOCUMENTS: list[Document] = [identity(), run_file(), receipt(), manifest(), Counts(samples=1, clips_rejected=1)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda one: type(one).__name__)
def test_round_trip(document: Document) -> None:
    data = document.to_bytes()
    again = type(document).from_bytes(data, "here")
    assert again == document
    assert again.to_bytes() == data
    assert data.endswith(b"}\n")
    assert data.decode("utf-8")


@given(json_values)
def test_equal_values_are_equal_bytes(value: Any) -> None:
    """Whatever order the keys were put in; and nothing is lost."""

    def reversed_keys(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {key: reversed_keys(inner[key]) for key in reversed(inner)}
        return [reversed_keys(one) for one in inner] if isinstance(inner, list) else inner

    data = canonical_json(value)
    assert canonical_json(reversed_keys(value)) == data
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_json_does_not_have_is_refused(bad: float) -> None:
    statistics = ChannelStatistics(count=1, mean=(bad,), m2=(0.0,), minimum=(0.0,), maximum=(0.0,))
    for document in (receipt(statistics=statistics), receipt(numerics={"rate": bad}), run_file(config={"a": [bad]})):
        with pytest.raises(ValueError, match="JSON"):
            document.to_bytes()
    text = receipt().to_bytes().decode().replace('"count": 4', f'"count": {json.dumps(bad)}')
    with pytest.raises(DatasetError, match="here: not JSON"):
        ShardReceipt.from_bytes(text.encode(), "here")


@pytest.mark.parametrize("kind", [RunFile, ShardReceipt, Manifest])
def test_a_newer_format_is_refused_first(kind: type[Document]) -> None:
    """Before its unknown fields are complained about."""
    newer = canonical_json({"format_version": FORMAT_VERSION + 1, "unknown": 1})
    with pytest.raises(
        DatasetError, match=r"out/run\.json: expected format_version at most 1, got 2: .*newer release"
    ):
        kind.from_bytes(newer, "out/run.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a valid ShardReceipt"),
        (b"null", "not a valid ShardReceipt"),
        (b"{}", "not a valid ShardReceipt"),
        (receipt().to_bytes().replace(b'"shard_id"', b'"shart_id"'), "shart_id"),
        (receipt().to_bytes()[:-10], "not JSON"),
    ],
)
def test_what_is_no_receipt_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DatasetError, match=r"receipts/0\.json: ") as caught:
        ShardReceipt.from_bytes(data, "receipts/0.json")
    assert message in str(caught.value)


def test_the_fingerprint_is_of_every_field() -> None:
    changes: list[dict[str, Any]] = [
        {"weights_sha256": "00" * 32},
        {"vae": identity().vae | {"shift_factor": 0.1}},
        {"windows": WindowPolicy(frames=33)},
        {"resize": ResizePolicy(buckets=((48, 96), (64, 64)))},
        {"decode_backends": ("decord", "pyav")},
        {"compute_dtype": "bfloat16"},
        {"storage_dtype": "bfloat16"},
        {"logvar": True},
    ]
    assert {name for change in changes for name in change} == set(RunIdentity.model_fields)
    prints = {identity().fingerprint, *(identity(**change).fingerprint for change in changes)}
    assert len(prints) == 1 + len(changes)
    assert identity().fingerprint == RunIdentity.from_bytes(identity().to_bytes(), "").fingerprint


small = st.integers(0, 9)


@given(small, small, small, small, small, small)
def test_counts_must_add_up(
    samples: int, encoded: int, rejected: int, decoded: int, stored: int, windows_rejected: int
) -> None:
    counts = Counts(
        samples=samples,
        clips_encoded=encoded,
        clips_rejected=rejected,
        windows_decoded=decoded,
        windows_stored=stored,
        windows_rejected=windows_rejected,
    )
    if samples == encoded + rejected and decoded == stored + windows_rejected:
        counts.check("shard 0")
    else:
        with pytest.raises(DatasetError, match="shard 0: "):
            counts.check("shard 0")


def test_counts_sum_field_by_field() -> None:
    first = Counts(**{name: number for number, name in enumerate(Counts.model_fields)})
    second = Counts(**{name: 100 * number for number, name in enumerate(Counts.model_fields)})
    total = first.plus(second)
    assert [getattr(total, name) for name in Counts.model_fields] == [
        101 * n for n in range(len(Counts.model_fields))
    ]
    assert Counts().plus(first) == first


def test_the_manifest_totals_its_receipts() -> None:
    one = manifest()
    assert one.shards[1] == ManifestShard(id="00001", size=100, sha256="ef" * 32, rows={"00017x00064x00064": 5})
    assert (one.counts.samples, one.buckets, one.rejections) == (6, {"00017x00064x00064": 10}, {"no_video": 2})
    assert (one.payload_bytes, one.set_aside, one.decoders) == (200, ("00002",), {"pyav-18.1.0": 10})
    assert one.latent_mean == (0.5, -1.0)
    assert one.latent_std == pytest.approx((0.5, math.sqrt(0.5)))
    assert one.fingerprint in dataset_card(one)
    wrong = receipt(counts=Counts(samples=1))
    with pytest.raises(DatasetError, match="receipt of shard 00000: 1 samples"):
        build_manifest(run_file(), [wrong], [])
