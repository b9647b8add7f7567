// What the tiled kernels share: which of them are generated, filling their rings, handing over their sums.
#pragma once

#include <device.h>

#include <type_traits>

#include "config.h"

namespace wog {

// Is this row's code generated for the SM being compiled? Where the table can choose it, and bf16 starts at sm_80.
template <class T, int I>
constexpr bool kGenerated = kRows[I].min_sm <= DEVICE_SM && DEVICE_SM <= kRows[I].max_sm &&
                            (DEVICE_SM >= 80 || std::is_same<T, Half>::value);

// A stage of x: 128 bytes of each of BlockM rows, zeros where there are none. XOR keeps the eight rows that
// load_matrices reads together in different banks, and is wgmma's own swizzle.
template <int BlockM, int Threads, class Element>
__device__ __forceinline__ void load_rows(unsigned char* slot, Element const* x, int64_t m0, int64_t m, int k,
                                          int stage, int thread) {
    constexpr int kChunk = 16 / sizeof(Element);
#pragma unroll 1  // unrolled, its addresses cost registers that the large tiles do not have
    for (int i = thread; i < BlockM * 8; i += Threads) {
        int const row = i / 8, chunk = i % 8, at = stage * 8 * kChunk + chunk * kChunk;
        bool const valid = m0 + row < m && at < k;
        copy_async(shared_address(slot) + row * 128 + (chunk ^ row % 8) * 16, x + (valid ? (m0 + row) * k + at : 0), valid);
    }
}

// A stage of one warp's weights: for each of S strips from row n0 the `Blocks` blocks of 512 bytes, 16 bytes a lane
template <int Bits, int Blocks, int S>
__device__ __forceinline__ void load_weights(unsigned char* slot, unsigned char const* codes, int n, int k, int n0,
                                             int stage, int lane) {
    int const strips = n / 16, blocks = (k + 256 / Bits - 1) / (256 / Bits);
    for (int s = 0; s < S; s++) {
        int const strip = n0 / 16 + s, tile = strip / 8 * 8, width = strips - tile < 8 ? strips - tile : 8;
        for (int b = 0; b < Blocks; b++) {
            int const block = stage * Blocks + b;
            bool const valid = strip < strips && block < blocks;
            int64_t const at = int64_t(tile) * blocks + int64_t(block) * width + (strip - tile);
            copy_async(shared_address(slot) + (s * Blocks + b) * 512 + lane * 16, codes + (valid ? at * 512 + lane * 16 : 0), valid);
        }
    }
}

// One warp's sums into a tile of `pitch` floats a row: strips from column n, columns of 8 m from row m
template <int S, int C>
__device__ __forceinline__ void store_sums(float* tile, int pitch, float const (&acc)[S][C][4], int m, int n, int g,
                                           int t) {
#pragma unroll
    for (int s = 0; s < S; s++)
#pragma unroll
        for (int j = 0; j < C; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                tile[(m + j * 8 + 2 * t + i % 2) * pitch + n + s * 16 + i / 2 * 8 + g] = acc[s][j][i];
}

}  // namespace wog
