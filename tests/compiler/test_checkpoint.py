"""Hostile and broken checkpoints: refused with where, what and why; never a crash, never a byte outside the folder."""

from __future__ import annotations

import json
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from instantrt.compiler.checkpoint import INDEX, SINGLE, read_checkpoint, read_header
from instantrt.compiler.json_file import read_json
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import View

VALUES = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float16)}


def write_raw(path: Path, header: Any, data: bytes = b"\0" * 64, size: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


def test_tensors_are_found_where_they_are(tmp_path: Path) -> None:
    save_file(VALUES, tmp_path / SINGLE)
    tensors = read_checkpoint(tmp_path)
    for name, values in VALUES.items():
        t = tensors[name]
        assert (View(t, t.shape, t.dtype).load() == values).all()


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    for i, (name, values) in enumerate(VALUES.items()):
        save_file({name: values}, tmp_path / f"model-{i}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(VALUES)}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert set(read_checkpoint(tmp_path)) == set(VALUES)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard model-1.safetensors is missing"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": target}}))
    with pytest.raises(UserError, match="points outside its folder"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": None}])
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a shard index"):
        read_checkpoint(tmp_path)


def test_an_index_that_announces_too_much_is_refused(tmp_path: Path) -> None:
    save_file(VALUES, tmp_path / "m.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "m.safetensors", "c": "m.safetensors"}}))
    with pytest.raises(UserError, match="in no shard"):
        read_checkpoint(tmp_path)


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
LIES = {
    "longer than the file": ({"a": {**GOOD, "shape": [400, 400], "data_offsets": [0, 640000]}}, None),
    "size and shape disagree": ({"a": {**GOOD, "shape": [3, 2]}}, None),
    "sizes that overflow": ({"a": {**GOOD, "shape": [2**62, 2**62]}}, None),
    "negative offsets": ({"a": {**GOOD, "data_offsets": [-16, 0]}}, None),
    "reversed offsets": ({"a": {**GOOD, "data_offsets": [16, 0]}}, None),
    "overlapping tensors": ({"a": GOOD, "b": {**GOOD, "data_offsets": [8, 24]}}, None),
    "unknown type": ({"a": {**GOOD, "dtype": "F31"}}, None),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, None),
    "not an object": ([1, 2], None),
    "not JSON": (b"{" * 100, None),
    "a header of 2^63 bytes": ({"a": GOOD}, 1 << 63),
    "a header longer than the file": ({"a": GOOD}, 10_000),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers_are_refused(tmp_path: Path, lie: str) -> None:
    header, size = LIES[lie]
    write_raw(tmp_path / SINGLE, header, size=size)
    with pytest.raises(UserError) as caught:
        read_checkpoint(tmp_path)
    assert SINGLE in str(caught.value)


@pytest.mark.parametrize("length", [0, 4, 8, 20, 60])
def test_truncated_files_are_refused(tmp_path: Path, length: int) -> None:
    save_file(VALUES, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:length])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_checkpoint(tmp_path)


@given(data=st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("fuzz") / SINGLE
    path.write_bytes(data)
    with suppress(UserError):
        read_header(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(header=st.dictionaries(st.text(max_size=5), json_values, max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_header_is_read_or_refused(header: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("fuzz") / SINGLE
    write_raw(path, header)
    with suppress(UserError):
        read_header(path)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="pickles are never loaded"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UserError, match=rf"name the graph itself to compile that: {tmp_path}/model.onnx"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "[" * 100_000])
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError):
        read_json(tmp_path / "config.json")


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """To open one would wait for somebody to write it."""
    for name in ("config.json", SINGLE):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="not a file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="weights that are no file"):
        read_checkpoint(tmp_path)


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / SINGLE).symlink_to("../blobs/0a1b")
    with pytest.raises(UserError, match=r"a link to \.\./blobs/0a1b, which is not there"):
        read_checkpoint(tmp_path)
