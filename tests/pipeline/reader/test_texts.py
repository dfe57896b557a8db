"""Texts of rows: those that Arrow gives, of any part of a column."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline.errors import DatasetError
from pipeline.reader.texts import TextColumn

TEXTS = ["", "ein Bär läuft", "a", "two words", "", "走る犬", "\U0001f43b"]


@pytest.mark.parametrize("array", [pa.array(TEXTS), pa.array(["x", *TEXTS, "y"]).slice(1, len(TEXTS))])
def test_any_rows_of_a_column(array: pa.Array) -> None:
    column = TextColumn.of(pa.chunked_array([array]), "here")
    for first in range(len(TEXTS)):
        for stop in range(first + 1, len(TEXTS) + 1):
            rows = column.rows(first, stop)
            assert rows == TEXTS[first:stop]


def test_a_row_without_a_text_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"^here: rows without"):
        TextColumn.of(pa.chunked_array([pa.array(["a", None])]), "here")
