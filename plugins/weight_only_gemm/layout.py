"""frag16: quantized weights in the order in which tensor-core lanes consume them.

W is [N, K] codes, N a multiple of 16, K a multiple of 32. The weights are the MMA's A operand (rows are n), so a lane
(g, t) = (lane // 4, lane % 4) needs rows g and g + 8 of a 16-row strip. A *block* is 512 bytes, 16 bytes for each of 32
lanes, and is read by exactly one warp with one 16-byte load per lane.

    4 bits: block = 16 n x 64 k.  word j (k16 step j) of lane (g, t):

        bit   31..28  27..24  23..20  19..16 | 15..12  11..8   7..4    3..0
        row    g+8     g       g+8     g     |  g+8     g      g+8      g
        k      2t+9    2t+9    2t+1    2t+1  |  2t+8    2t+8   2t       2t          (all plus 16 j)

        so that (w >> {0, 4, 8, 12}) & 0x000f000f are the two halves of A registers 0, 1, 2, 3 of mma.m16n8k16, and
        (w >> {0, 4}) & 0x0f0f0f0f are the A registers 2 (j % 2) + {0, 1} of mma.m16n8k32.u8, as for 8 bits below.

    8 bits: block = 16 n x 32 k.  word 2 j + h of lane (g, t) is row g + 8 h of k16 step j:

        byte   3       2       1       0
        k      2t+9    2t+1    2t+8    2t                                          (all plus 16 j)

        The four words are, unchanged, the A registers of mma.m16n8k32.u8 when the int8 activations are stored in
        ACTIVATION_ORDER.

    Volta's mma.m8n8k4 takes four k of one row from a lane, and which four does not matter as long as x agrees: any
    partition of K sums to the same. So its lanes read the same bytes, exchanged inside the block: lane L, row
    r = L % 4 + 4 (L / 16) of quad pair q = L % 16 / 4, reads what is drawn above for lane (g, t) = (r, q): four k of
    row r, and the same four of row r + 8, for each k16 step. The four quad pairs hold parts of one sum. A layout of its
    own would serve nothing: loads are as wide and as coalesced, and codes decode as everywhere.

    Blocks: [N / 128][K / block k][8 strips][512 bytes]; the last tile has only the strips that exist. K is padded to a
    whole block with code 0; kernels never multiply padding by anything but zero.

Codes travel as INT8 tensors of shape [N / 16, K blocks, 512] (the axes count; the order of bytes is the one above).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

TAG = 16  # "frag16"
VERSION = 1
STRIP, TILE_STRIPS, BLOCK_BYTES = 16, 8, 512

ACTIVATION_ORDER = np.array([2 * (p // 4) + (p % 4 // 2) + 8 * (p % 2) for p in range(16)])
"""int8 activations: position p = 4t+i inside each 16 holds k = ACTIVATION_ORDER[p] = [2t, 2t+8, 2t+1, 2t+9][i]."""


def block_k(bits: int) -> int:
    return 256 // bits


def packed_shape(n: int, k: int, bits: int) -> tuple[int, int, int]:
    return n // STRIP, -(-k // block_k(bits)), BLOCK_BYTES


def _fragment_order(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[strips * 16, blocks * block_k] -> [strip, block, g, t, word, code inside the word], lowest bits first."""
    n, k = codes.shape
    #                      strip        h  g  block    j   h8 t  e        k = block_k * block + 16 j + 8 h8 + 2 t + e
    w = codes.reshape(n // STRIP, 2, 8, k // block_k(bits), block_k(bits) // 16, 2, 4, 2)
    if bits == 4:  # word j; nibble index = 4 e + 2 h8 + h
        return w.transpose(0, 3, 2, 6, 4, 7, 5, 1).reshape(n // STRIP, -1, 8, 4, 4, 8)
    return w.transpose(0, 3, 2, 6, 4, 1, 7, 5).reshape(
        n // STRIP, -1, 8, 4, 4, 4
    )  # word 2 j + h; byte index = 2 e + h8


def _natural_order(fragments: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    strips, blocks = fragments.shape[:2]
    if bits == 4:
        w = fragments.reshape(strips, blocks, 8, 4, 4, 2, 2, 2).transpose(0, 7, 2, 1, 4, 6, 3, 5)
    else:
        w = fragments.reshape(strips, blocks, 8, 4, 2, 2, 2, 2).transpose(0, 5, 2, 1, 4, 7, 3, 6)
    return np.ascontiguousarray(w).reshape(strips * STRIP, blocks * block_k(bits))


def _pack_tile(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """One tile of at most 128 rows -> its bytes, [block, strip, 512]."""
    padding = -codes.shape[1] % block_k(bits)
    f = _fragment_order(np.pad(codes, ((0, 0), (0, padding))), bits)
    if bits == 4:
        f = (f[..., 0::2] | f[..., 1::2] << 4).astype(np.uint8)
    return f.reshape(f.shape[0], f.shape[1], BLOCK_BYTES).transpose(1, 0, 2)


def pack_tiles(tiles: Iterator[NDArray[np.uint8]], bits: int) -> Iterator[bytes]:
    """Stream [128, K] tiles of codes (the last may be shorter) into packed bytes; holds one tile at a time."""
    for tile in tiles:
        yield _pack_tile(tile, bits).tobytes()


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """[N, K] unsigned codes -> INT8 carrier of `packed_shape`."""
    n, k = codes.shape
    if n % STRIP or k % 32 or bits not in (4, 8) or int(codes.max(initial=0)) >> bits:
        raise ValueError(f"frag16 takes codes of 4 or 8 bits, N % 16 == 0, K % 32 == 0; found [{n}, {k}], {bits} bits")
    rows = STRIP * TILE_STRIPS
    data = b"".join(pack_tiles((codes[i : i + rows] for i in range(0, n, rows)), bits))
    return np.frombuffer(data, np.int8).reshape(packed_shape(n, k, bits))


def unpack(packed: NDArray[np.int8], bits: int, k: int) -> NDArray[np.uint8]:
    """The inverse of `pack`: [N, K] codes."""
    strips, blocks, _ = packed.shape
    flat, out, start = packed.reshape(-1).view(np.uint8), [], 0
    for first in range(0, strips, TILE_STRIPS):
        count = min(TILE_STRIPS, strips - first)
        size = blocks * count * BLOCK_BYTES
        f = flat[start : start + size].reshape(blocks, count, 8, 4, 4, 4).transpose(1, 0, 2, 3, 4, 5)
        start += size
        if bits == 4:
            f = np.stack((f & 15, f >> 4), axis=-1).reshape(*f.shape[:-1], 8)
        out.append(_natural_order(f, bits))
    return np.concatenate(out)[:, :k]
