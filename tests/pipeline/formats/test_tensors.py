"""Tensors as bytes and back."""

from __future__ import annotations

import gc
import io
import json
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.errors import DatasetError
from pipeline.formats.tensors import (
    TORCH_DTYPES,
    dtype_name,
    file_suffix,
    raw_bytes,
    read_payload,
    tensor_file,
    tensor_from_raw,
)


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_bit_exact_for_every_bit_pattern(name: str) -> None:
    """All 65,536 patterns of the 16-bit dtypes, NaN payloads and denormals included; as many of float32."""
    patterns = torch.arange(65536, dtype=torch.int32)
    bits = patterns.to(torch.int16) if name != "float32" else patterns * 65537
    tensor = bits.view(TORCH_DTYPES[name]).reshape(4, 16, 32, 32)  # type: ignore[index]
    for copy in (read_payload(tensor_file(tensor, "latent")), tensor_from_raw(raw_bytes(tensor), name, tensor.shape)):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy.view(torch.uint8), tensor.view(torch.uint8))
    assert dtype_name(tensor.dtype) == name


def test_the_file_kinds_are_what_they_claim() -> None:
    half, brain = torch.rand(2, 3).half(), torch.rand(2, 3).bfloat16()
    assert np.load(io.BytesIO(tensor_file(half, "latent")), allow_pickle=False).dtype == np.float16
    assert safetensors.torch.load(tensor_file(brain, "latent"))["latent"].equal(brain)
    assert [file_suffix(name) for name in ("float16", "float32", "bfloat16")] == ["npy", "npy", "safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_own_their_memory(dtype: torch.dtype) -> None:
    data = bytearray(tensor_file(torch.zeros(2, 3, dtype=dtype), "latent"))
    tensor = read_payload(bytes(data))
    tensor += 1
    assert tensor.sum() == 6


def npy_header(descr: str, shape: str, *, version: int = 1, payload: bytes = b"") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(text)) + text + payload


def safetensors_header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "neither npy nor safetensors", id="empty"),
        pytest.param(b"\x93NUMPY", "npy header", id="magic only"),
        pytest.param(npy_header("'|O'", "(1,)", payload=b"\x80\x04N."), r"got \|O", id="pickle"),
        pytest.param(npy_header("[('a', '<f2')]", "(1,)", payload=b"12"), "npy header", id="record"),
        pytest.param(npy_header("'<f2'", "(1000000000000, 4)"), "needs 8000000000000 bytes, got 0", id="huge"),
        pytest.param(npy_header("'<f2'", "(-1, -2)", payload=b"1234"), "npy header", id="negative"),
        pytest.param(npy_header("'<f2'", "(0,)"), "needs 0 bytes", id="no values"),
        pytest.param(npy_header("'<f2'", "(2,)", payload=b"12345"), "needs 4 bytes, got 5", id="trailing"),
        pytest.param(npy_header("'<f2'", "((("), "npy header", id="not a literal"),
        pytest.param(npy_header("__import__('os')", "(1,)"), "npy header", id="code"),
        pytest.param(npy_header("'<f2'", "(1,)", version=3, payload=b"12"), r"version 1\.0, got 3\.0", id="version"),
        pytest.param(safetensors_header(), "expected one tensor, got 0", id="none"),
        pytest.param(
            safetensors.torch.save({"a": torch.zeros(1), "b": torch.zeros(1)}), "expected one tensor, got 2", id="two"
        ),
        pytest.param(safetensors.torch.save({"a": torch.zeros(1, dtype=torch.int64)}), "got int64", id="integers"),
        pytest.param(
            safetensors_header(latent={"dtype": "F16", "shape": [1 << 40], "data_offsets": [0, 1 << 41]}),
            "neither npy nor safetensors",
            id="huge safetensors",
        ),
    ],
)
def test_hostile_payloads(data: bytes, message: str) -> None:
    with pytest.raises(DatasetError, match=f"here: .*{message}"):
        read_payload(data, "here")


class Garbage:
    """A cycle whose finalizer runs Python code, so that the collector gives other threads their turn."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        sum(range(300))


def test_headers_are_read_by_many_threads() -> None:
    """numpy's reader of headers goes through `ast`, which CPython 3.11 lets no second thread enter meanwhile."""

    def shape(data: bytes) -> tuple[int, ...]:
        Garbage()
        return tuple(read_payload(data).shape)

    payloads = [tensor_file(torch.zeros(n + 1, 2, dtype=torch.float16), "latent") for n in range(64)]
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(5)
    try:
        with ThreadPoolExecutor(8) as pool:
            shapes = list(pool.map(shape, payloads * 40))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
    assert shapes == [(n + 1, 2) for n in range(64)] * 40


def test_raw_bytes_of_another_dtype() -> None:
    with pytest.raises(DatasetError, match=r"expected one of .*, got float64"):
        tensor_from_raw(bytes(8), "float64", (1,))
