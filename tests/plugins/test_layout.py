"""frag16: round trips, and every lane reads what the MMA expects of it (PTX fragment maps, emulated)."""

import numpy as np
import pytest

from instantrt.plugins.weight_only_gemm import layout

LANES = [(lane // 4, lane % 4) for lane in range(32)]


def codes(n: int, k: int, bits: int) -> np.ndarray:
    return np.random.default_rng(n * k + bits).integers(0, 2**bits, (n, k), np.uint8)


def words(packed: np.ndarray, bits: int, n: int, k: int) -> dict[tuple[int, int], np.ndarray]:
    """(strip, block) -> [32 lanes, 4 words], by the address formula that the kernels use."""
    flat, blocks, out = packed.reshape(-1).view("<u4").reshape(-1, 32, 4), -(-k // layout.block_k(bits)), {}
    for strip in range(n // 16):
        tile, inside = divmod(strip, 8)
        strips = min(8, n // 16 - 8 * tile)
        for block in range(blocks):
            out[strip, block] = flat[tile * 8 * blocks + block * strips + inside]
    return out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (48, 64), (128, 96), (144, 192), (272, 4096)])
def test_round_trip(n: int, k: int, bits: int) -> None:
    w = codes(n, k, bits)
    packed = layout.pack(w, bits)
    assert packed.dtype == np.int8
    assert packed.shape == layout.packed_shape(n, k, bits)
    assert np.array_equal(layout.unpack(packed, bits, k), w)


def test_tiles_stream_to_the_same_bytes() -> None:
    w = codes(272, 96, 4)
    assert b"".join(layout.pack_tiles((w[i : i + 128] for i in (0, 128, 256)), 4)) == layout.pack(w, 4).tobytes()


@pytest.mark.parametrize(("shape", "bits"), [((24, 64), 4), ((16, 40), 8), ((16, 32), 5)])
def test_refuses(shape: tuple[int, int], bits: int) -> None:
    with pytest.raises(ValueError, match="frag16 takes"):
        layout.pack(np.zeros(shape, np.uint8), bits)
    with pytest.raises(ValueError, match="frag16 takes"):
        layout.pack(np.full((16, 32), 16, np.uint8), 4)


def mma_m16n8k16_a(w: np.ndarray, g: int, t: int) -> list[tuple[int, int]]:
    """The PTX map of the f16 A fragment: four registers of two consecutive k each."""
    rows_k = [(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]
    return [(int(w[r, k]), int(w[r, k + 1])) for r, k in rows_k]


@pytest.mark.parametrize("n", [48, 144])
def test_int4_words_are_the_f16_and_bf16_fragments(n: int) -> None:
    k, w = 128, codes(n, 128, 4)
    for (strip, block), lanes in words(layout.pack(w, 4), 4, n, k).items():
        for (g, t), word in zip(LANES, lanes, strict=True):
            for j in range(4):
                tile = w[16 * strip : 16 * strip + 16, 64 * block + 16 * j : 64 * block + 16 * j + 16]
                halves = [(int(word[j]) >> 4 * r) & 0x000F000F for r in range(4)]
                assert [(h & 0xFFFF, h >> 16) for h in halves] == mma_m16n8k16_a(tile, g, t)


@pytest.mark.parametrize("n", [48, 144])
def test_int8_words_are_the_f16_and_bf16_fragments(n: int) -> None:
    k, w = 96, codes(n, 96, 8)
    for (strip, block), lanes in words(layout.pack(w, 8), 8, n, k).items():
        for (g, t), word in zip(LANES, lanes, strict=True):
            for j in range(2):
                tile = w[16 * strip : 16 * strip + 16, 32 * block + 16 * j : 32 * block + 16 * j + 16]
                b = [[(int(word[2 * j + h]) >> 8 * i) & 0xFF for i in range(4)] for h in (0, 1)]
                # bytes 0 and 2 are k 2t, 2t+1; bytes 1 and 3 are k 2t+8, 2t+9
                registers = [(b[0][0], b[0][2]), (b[1][0], b[1][2]), (b[0][1], b[0][3]), (b[1][1], b[1][3])]
                assert registers == mma_m16n8k16_a(tile, g, t)


def int8_mma(a: np.ndarray, b: np.ndarray, k_of_register: list[int]) -> np.ndarray:
    """Sum over lanes of one int8 MMA: both operands hold four k in each register, rows by g; returns [16, 8]."""
    out = np.zeros((16, 8), np.int64)
    for register, _ in enumerate(k_of_register):
        for t in range(4):
            for i in range(4):
                for row in range(16):
                    ga, h = row % 8, row // 8
                    out[row] += a[4 * ga + t, register, h, i] * b[:, t, register, i]
    return out


def integer_fragments(packed: np.ndarray, bits: int) -> np.ndarray:
    """A registers of 32 k as decode.h makes them of a block's words -> [32 lanes, k16 step, row g + 8 h, byte]."""
    (lanes,) = words(packed, bits, 16, 32).values()
    if bits == 4:
        lanes = np.stack([lanes[:, j] >> 4 * h & 0x0F0F0F0F for j in (0, 1) for h in (0, 1)], axis=1)
    return np.ascontiguousarray(lanes).view(np.uint8).reshape(32, 2, 2, 4).astype(np.int64)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_the_integer_fragments_with_permuted_activations(bits: int) -> None:
    """m16n8k32 (registers 2j + h) and, pairwise, m8n8k16 (registers 2j + h for rows 8h..); 4 bits are masked."""
    w, x = codes(16, 32, bits).astype(np.int64), np.random.default_rng(1).integers(-127, 128, (8, 32))
    a = integer_fragments(layout.pack(w.astype(np.uint8), bits), bits)
    stored = x.reshape(8, 2, 16)[:, :, layout.ACTIVATION_ORDER]  # what the quantize kernel writes
    b = stored.reshape(8, 2, 4, 4).transpose(0, 2, 1, 3)  # row m = lane g, t, register j, byte
    assert np.array_equal(int8_mma(a, b, [0, 1]), w @ x.T)


def mma_m8n8k4(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Four products, one for each quad pair: [32 lanes, 4 k] operands -> [quad pair, 8 rows of a, 8 rows of b].

    Lane 4 q + i has row i of quad pair q, lane 16 + 4 q + i row 4 + i: of either operand, as the PTX manual draws them.
    """
    a, b = (operand.reshape(2, 4, 4, 4).transpose(1, 0, 2, 3).reshape(4, 8, 4) for operand in (a, b))
    return np.einsum("qik,qjk->qij", a, b)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_fragments_of_volta_when_read_by_other_lanes(bits: int) -> None:
    """m8n8k4 wants four k of one row from a lane, and does not care which: the labels need only agree with x."""
    k, w, x = 16, codes(16, 32, bits).astype(np.int64), np.random.default_rng(2).integers(-9, 9, (8, 32))
    ((block,),) = (words(layout.pack(w.astype(np.uint8), bits), bits, 16, 32).values(),)
    lanes = np.arange(32)
    rows, quads = lanes % 4 + lanes // 16 * 4, lanes % 16 // 4
    mine = block[4 * rows + quads]  # still one coalesced block of 512 bytes
    total = np.zeros((4, 16, 8), np.int64)
    for step in range(2):
        labels = k * step + np.stack([2 * quads, 2 * quads + 1, 2 * quads + 8, 2 * quads + 9], axis=1)
        for h in (0, 1):
            if bits == 4:
                a = np.stack([mine[:, step] >> 4 * (4 * e + 2 * h8 + h) & 15 for h8 in (0, 1) for e in (0, 1)], axis=1)
            else:
                a = np.stack([mine[:, 2 * step + h] >> 8 * (2 * e + h8) & 255 for h8 in (0, 1) for e in (0, 1)], axis=1)
            total[:, 8 * h : 8 * h + 8] += mma_m8n8k4(a.astype(np.int64), x[rows[:, None], labels])
    assert np.array_equal(total.sum(axis=0), w @ x.T), "the quad pairs hold parts of one sum"
    assert not np.array_equal(total[0], w @ x.T)
