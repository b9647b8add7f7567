"""GGUF files that lie: refused by the file's name, without a hang or memory for a number that nobody checked."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantrt.compiler.frontend.gguf.architectures import config_of
from instantrt.compiler.frontend.gguf.file import open_gguf
from instantrt.passes.core.errors import UserError

HUGE = 2**63 - 8
U32, F32, STRING, ARRAY = 4, 6, 8, 9
NUMBER = count()


def text(said: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(said) if length is None else length) + said


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0, ndim: int | None = None) -> bytes:
    numbers = struct.pack(f"<{len(dims)}Q", *dims)
    return (
        text(name) + struct.pack("<I", len(dims) if ndim is None else ndim) + numbers + struct.pack("<IQ", kind, offset)
    )


ARCH = key(b"general.architecture", STRING, text(b"llama"))
LAYERS = key(b"llama.block_count", U32, struct.pack("<I", 1))
TOKENS = key(b"tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 2) + text(b"a") + text(b"b"))
NUMBERS = key(b"numbers", ARRAY, struct.pack("<IQ", F32, 3) + bytes(12))
KEYS = (ARCH, LAYERS, TOKENS, NUMBERS)
TENSORS = (tensor(b"token_embd.weight", (8, 2)), tensor(b"output_norm.weight", (8,), offset=64))


def gguf(
    keys: tuple[bytes, ...] = KEYS, tensors: tuple[bytes, ...] = TENSORS, *, counts: tuple[int, int] | None = None
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(keys)))) + b"".join(keys + tensors)
    return head + bytes(-len(head) % 32) + bytes(96)


def opened(folder: Path, data: bytes) -> None:
    """Opens the file; no more than a little memory is taken, whatever it says."""
    path = folder / f"{next(NUMBER)}.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        file = open_gguf(path)
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        with pytest.raises(UserError, match=r"\.gguf"):  # no whole model
            config_of(file.metadata, shapes, pytest.fail, str(path))
    finally:
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert used < 2**24


def test_the_honest_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf())
    file = open_gguf(tmp_path / "m.gguf")
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    assert file.metadata["numbers"] == [0.0, 0.0, 0.0]
    assert {name: t.shape for name, t in file.tensors.items()} == {
        "token_embd.weight": (2, 8),
        "output_norm.weight": (8,),
    }


LIES = {
    "another magic": b"GGML" + gguf()[4:],
    "a version": gguf()[:4] + struct.pack("<I", 99) + gguf()[8:],
    "more tensors": gguf(counts=(HUGE, 4)),
    "more keys": gguf(counts=(2, HUGE)),
    "a long text": gguf((key(b"general.architecture", STRING, text(b"llama", HUGE)),)),
    "a long name": gguf((text(b"x", HUGE) + bytes(8),)),
    "many numbers": gguf((ARCH, key(b"a", ARRAY, struct.pack("<IQ", F32, HUGE)))),
    "many texts": gguf((ARCH, key(b"a", ARRAY, struct.pack("<IQ", STRING, HUGE)))),
    "a long text in a list": gguf((ARCH, key(b"a", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"a", 2**64 - 8)))),
    "lists of lists": gguf((ARCH, key(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", ARRAY, 1) * 9))),
    "a type of a value": gguf((ARCH, key(b"a", 77, bytes(8)))),
    "a key twice": gguf((ARCH, ARCH, LAYERS)),
    "no UTF-8": gguf((key(b"general.architecture", STRING, text(b"\xff\xfe")),)),
    "an alignment of 0": gguf((*KEYS, key(b"general.alignment", U32, bytes(4)))),
    "a huge alignment": gguf((*KEYS, key(b"general.alignment", U32, struct.pack("<I", 2**31)))),
    "an alignment that is a text": gguf((*KEYS, key(b"general.alignment", STRING, text(b"32")))),
    "a type of a tensor": gguf(tensors=(tensor(b"t", (8,), kind=200),)),
    "a tensor twice": gguf(tensors=(TENSORS[0], tensor(b"token_embd.weight", (8,), offset=64))),
    "tensors in one place": gguf(tensors=(TENSORS[0], tensor(b"output_norm.weight", (8,), offset=32))),
    "a tensor behind the end": gguf(tensors=(tensor(b"t", (8,), offset=96),)),
    "a tensor far behind the end": gguf(tensors=(tensor(b"t", (8,), offset=2**64 - 32),)),
    "sizes that overflow": gguf(tensors=(tensor(b"t", (2**32, 2**32)),)),
    "sizes that overflow to few": gguf(tensors=(tensor(b"t", (2**63, 2, 8)),)),
    "a size of 0": gguf(tensors=(tensor(b"t", (0, 8)),)),
    "no sizes": gguf(tensors=(tensor(b"t", ()),)),
    "five sizes": gguf(tensors=(tensor(b"t", (1, 1, 1, 1, 8)),)),
    "sizes without end": gguf(tensors=(tensor(b"t", (8,), ndim=2**32 - 1),)),
    "half a block": gguf(tensors=(tensor(b"t", (16,), kind=8),)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused(tmp_path: Path, lie: str) -> None:
    with pytest.raises(UserError, match=r"\.gguf"):
        opened(tmp_path, LIES[lie])


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = gguf()
    for end in range(len(whole)):
        (tmp_path / f"{end}.gguf").write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"\.gguf"):
            open_gguf(tmp_path / f"{end}.gguf")


@settings(max_examples=200, deadline=2000)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(gguf()) - 1),
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.sampled_from([2**64 - 1, 2**63, 2**32, 2**31, 0, 1]).map(lambda n: struct.pack("<Q", n)),
            ),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]]
) -> None:
    data = bytearray(gguf())
    for at, put in changes:
        data[at : at + len(put)] = put
    with suppress(UserError):
        opened(tmp_path_factory.getbasetemp(), bytes(data))
