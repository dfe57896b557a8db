"""Latents as bytes and back: npy for float16 and float32, safetensors for bfloat16, raw bytes in Parquet.

numpy has no bfloat16, so npy cannot carry it. Nothing here unpickles: an npy header is parsed and checked before
its numbers are taken, and a payload whose header promises other bytes than there are is refused before anything
is allocated. Everything is little-endian, C order; tensors are contiguous, on the CPU, and own their memory.
"""

from __future__ import annotations

import io
import math
import sys
import tokenize
from collections.abc import Sequence

import numpy as np
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
# numpy evaluates the header as a Python literal, and once more through tokenize for Python 2's sake
_BAD_NPY_HEADER = (ValueError, TypeError, SyntaxError, EOFError, RecursionError, MemoryError, tokenize.TokenError)
_NPY_DTYPES = {np.dtype("<f2"): torch.float16, np.dtype("<f4"): torch.float32, np.dtype("i1"): torch.int8}


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
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        if version != (1, 0):
            raise DatasetError(f"{where}: expected npy version 1.0, got {'.'.join(map(str, version))}")
        shape, fortran_order, dtype = npy.read_array_header_1_0(file)
    except _BAD_NPY_HEADER as error:
        raise DatasetError(f"{where}: npy header: {error}") from error
    if dtype not in _NPY_DTYPES or fortran_order:
        order = "Fortran" if fortran_order else "C"
        raise DatasetError(f"{where}: expected dtype <f2, <f4 or |i1 in C order, got {dtype.str} in {order} order")
    return _tensor(memoryview(data)[file.tell() :], _NPY_DTYPES[dtype], shape, where)


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
