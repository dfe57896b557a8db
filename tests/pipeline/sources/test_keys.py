"""Which keys may become names: an enumeration of what must not, and that a safe key survives as a file name."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ClipError, RejectionClass
from pipeline.records import printable
from pipeline.sources.keys import MAX_KEY_BYTES, require_safe_key

UNSAFE = [
    ("", "empty"),
    (".", "empty"),
    ("..", "empty"),
    ("../up", "empty"),
    ("a/../b", "empty"),
    ("a/./b", "empty"),
    ("a//b", "empty"),
    ("/absolute", "empty"),
    ("a/", "empty"),
    ("dotted.key", "dot"),
    ("a/dotted.key", "dot"),
    (".hidden", "dot"),
    ("back\\slash", "backslash"),
    ("c:\\windows", "backslash"),
    ("new\nline", "control"),
    ("nul\0", "control"),
    ("bell\x07", "control"),
    ("delete\x7f", "control"),
    ("c1\x85", "control"),
    ("half a pair \udc80", "UTF-8"),
    ("half a pair \ud83d", "UTF-8"),
    ("x" * (MAX_KEY_BYTES + 1), "bytes"),
    ("é" * (MAX_KEY_BYTES // 2 + 1), "bytes"),
]


@pytest.mark.parametrize(("key", "reason"), UNSAFE)
def test_unsafe_keys_are_refused_with_their_reason(key: str, reason: str) -> None:
    with pytest.raises(ClipError, match=reason) as caught:
        require_safe_key(key)
    assert caught.value.error_class is RejectionClass.UNSAFE_KEY
    caught.value.message.encode("utf-8")  # it is stored


@pytest.mark.parametrize(
    "key",
    ["000000012", "000000012_00003", "a/b/c", "v1.2/clip", "ключ", "日本", "a b", "x" * MAX_KEY_BYTES, "-", "a'b"],
)
def test_ordinary_keys_pass(key: str) -> None:
    require_safe_key(key)


@given(st.text(alphabet=st.characters(), max_size=30) | st.text(alphabet="a./\\", max_size=8))
def test_a_key_that_passes_stays_below_its_folder_and_is_cut_nowhere(key: str) -> None:
    try:
        require_safe_key(key)
    except ClipError:
        return
    name = PurePosixPath(f"{key}_00000.latent.npy")
    assert not name.is_absolute()
    assert ".." not in name.parts
    assert str(name) == f"{key}_00000.latent.npy", "no part of it is normalized away"
    assert name.name.partition(".")[0] == f"{key.rpartition('/')[2]}_00000"
    assert key.encode("utf-8").decode("utf-8") == key


@given(st.binary(max_size=40))
def test_printable_can_be_stored_and_tells_names_apart(raw: bytes) -> None:
    name = raw.decode("utf-8", "surrogateescape")
    shown = printable(name)
    shown.encode("utf-8")
    if any("\udc80" <= character <= "\udcff" for character in name):
        assert "\\x" in shown
    else:
        assert shown == name
