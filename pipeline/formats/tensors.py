"""Latents as bytes and back: npy for float16 and float32, safetensors for bfloat16, raw bytes in Parquet.

numpy has no bfloat16, so npy cannot carry it. Nothing here unpickles: an npy header is parsed and checked before
its numbers are taken, and a payload whose header promises other bytes than there are is refused before anything
is allocated. Everything is little-endian, C order; tensors are contiguous, on the CPU, and own their memory.
"""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Sequence

import safetensors.torch
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError
from torch import Tensor

from pipeline.errors import DatasetError
from pipeline.policies import DTypeName

TORCH_DTYPES: dict[DTypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
STORED_DTYPES: dict[str, torch.dtype] = {**TORCH_DTYPES, "int8": torch.int8}
"""Of the numbers in a shard: int8 is for log variances alone."""
# Version 1.0 as numpy writes it. Not numpy's reader: that one goes through `ast`, which in CPython 3.11 raises
# SystemError now and then when two threads parse at once, and a trainer's batches are read by many threads.
_NPY_HEADER = re.compile(
    rb"\{'descr': '([^']{1,16})', 'fortran_order': (True|False), "
    rb"'shape': \((\d{1,18},|\d{1,18}(?:, \d{1,18}){1,31}|)\), \} *\n"
)
_NPY_MAGIC = npy.magic(1, 0)
_NPY_DTYPES = {"<f2": torch.float16, "<f4": torch.float32, "|i1": torch.int8}


def dtype_name(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def file_suffix(dtype: str) -> str:
    """Extension of a tensor file of that dtype, without a dot."""
    return "safetensors" if dtype == "bfloat16" else "npy"


def tensor_file(tensor: Tensor, name: str) -> bytes:
    """A whole npy or safetensors file; `name` is the tensor's name in a safetensors file."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return safetensors.torch.save({name: tensor})
    assert sys.byteorder == "little", "tensors are stored as they lie in memory"
    file = io.BytesIO()
    npy.write_array(file, tensor.numpy(), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def read_payload(data: bytes, where: str = "payload") -> Tensor:
    """The tensor of an npy or safetensors file: what one range read at an index's offset and length gives.

    DatasetError if it is anything but one float16, float32, bfloat16 or int8 tensor that fills the bytes exactly.
    """
    if data[: len(npy.MAGIC_PREFIX)] == npy.MAGIC_PREFIX:
        return _read_npy(data, where)
    return _read_safetensors(data, where)


def _read_npy(data: bytes, where: str) -> Tensor:
    start = len(_NPY_MAGIC) + 2
    end = start + int.from_bytes(data[len(_NPY_MAGIC) : start], "little")
    if len(data) < end or end == start:
        raise DatasetError(f"{where}: npy header: truncated at byte {len(data)}")
    if not data.startswith(_NPY_MAGIC):
        raise DatasetError(f"{where}: expected npy version 1.0, got {data[6]}.{data[7]}")
    header = _NPY_HEADER.fullmatch(data, start, end)
    if header is None:
        raise DatasetError(f"{where}: npy header: expected descr, order and shape, got {data[start : start + 120]!r}")
    dtype, order = header[1].decode("latin-1"), "Fortran" if header[2] == b"True" else "C"
    if dtype not in _NPY_DTYPES or order == "Fortran":
        raise DatasetError(f"{where}: expected dtype <f2, <f4 or |i1 in C order, got {dtype} in {order} order")
    shape = [int(side) for side in header[3].split(b",") if side]
    return _tensor(memoryview(data)[end:], _NPY_DTYPES[dtype], shape, where)


def _read_safetensors(data: bytes, where: str) -> Tensor:
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a dtype that torch has no name for
        raise DatasetError(f"{where}: neither npy nor safetensors: {error}") from error
    if len(tensors) != 1:
        raise DatasetError(f"{where}: expected one tensor, got {len(tensors)}: {sorted(tensors)[:5]}")
    (tensor,) = tensors.values()
    if tensor.dtype not in TORCH_DTYPES.values():
        raise DatasetError(f"{where}: expected one of {sorted(TORCH_DTYPES)}, got {dtype_name(tensor.dtype)}")
    return tensor


def raw_bytes(tensor: Tensor) -> bytes:
    """The numbers alone, as Parquet stores them."""
    assert sys.byteorder == "little", "tensors are stored as they lie in memory"
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def tensor_from_raw(data: bytes, dtype: str, shape: Sequence[int], where: str = "payload") -> Tensor:
    """Inverse of `raw_bytes`; DatasetError if the bytes are not what dtype and shape need."""
    for name, torch_dtype in STORED_DTYPES.items():
        if name == dtype:
            return _tensor(memoryview(data), torch_dtype, shape, where)
    raise DatasetError(f"{where}: expected one of {sorted(STORED_DTYPES)}, got {dtype}")


def _tensor(data: memoryview, dtype: torch.dtype, shape: Sequence[int], where: str) -> Tensor:
    expected = math.prod(shape) * dtype.itemsize
    if any(side < 1 for side in shape) or len(data) != expected:
        raise DatasetError(
            f"{where}: {dtype_name(dtype)} of shape {tuple(shape)} needs {expected} bytes, got {len(data)}"
        )
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(tuple(shape))
