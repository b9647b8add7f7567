// The plain kernel of WeightOnlyGemm: one thread per row and strip of 16 outputs, fp32 sums in the order of k, no
// tensor cores. It reads frag16 by the formula of layout.py and is what the fast kernels are tested against on a GPU.
#pragma once

#include "epilogue.h"
#include "int8.h"

namespace wog {

struct PlainArgs {
    uint16_t const* x;  // null when x is quantized
    Int8Rows rows;
    unsigned char const* codes;
    uint16_t const* affine;
    Output out;
    int32_t k, group, bits;
};

inline PlainArgs plain_args(wog_problem const& p, wog_tensors const& t, Int8Rows const& rows) {
    return {p.activation_bits == 8 ? nullptr : static_cast<uint16_t const*>(t.x),
            rows,
            static_cast<unsigned char const*>(t.codes),
            static_cast<uint16_t const*>(t.affine),
            output(p, t),
            p.k,
            p.group,
            p.bits};
}

#ifndef KERNELS_ELSEWHERE

__device__ inline int code(PlainArgs const& p, int n, int k) {
    int const block_k = 256 / p.bits, strip = n / 16, tile = strip / 8 * 8, strips = p.out.n / 16;
    int const blocks = (p.k + block_k - 1) / block_k, width = strips - tile < 8 ? strips - tile : 8;
    int64_t const block = int64_t(tile) * blocks + int64_t(k / block_k) * width + (strip - tile);
    int const step = k % block_k / 16, h8 = k % 16 / 8, t = k % 8 / 2, e = k % 2, lane = n % 8 * 4 + t, h = n % 16 / 8;
    unsigned char const* const word = p.codes + block * 512 + lane * 16 + (p.bits == 4 ? step : 2 * step + h) * 4;
    if (p.bits == 8) return word[2 * e + h8];
    int const nibble = 4 * e + 2 * h8 + h;
    return word[nibble / 2] >> nibble % 2 * 4 & 15;
}

// Of one thread of blocks of 128
template <class T>
__device__ __forceinline__ void plain_strip(PlainArgs const& p) {
    int const strips = p.out.n / 16;
    int64_t const item = int64_t(blockIdx.x) * 128 + threadIdx.x, m = item / strips;
    int const n0 = int(item % strips) * 16;
    if (m >= p.out.m) return;
    float v[16] = {};
    for (int k = 0; k < p.k; k++) {
        float const x = p.x ? to_float<T>(p.x[m * p.k + k]) : float(p.rows.values[m * p.k + int8_position(k)]);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            uint16_t const* const affine = p.affine + (int64_t(k / p.group) * p.out.n + n0 + i) * 2;
            v[i] += (float(code(p, n0 + i, k)) - to_float<T>(affine[1])) * to_float<T>(affine[0]) * x;
        }
    }
    if (!p.x)
        for (int i = 0; i < 16; i++) v[i] *= p.rows.scales[m];
    finish<T>(p.out, v, m, n0);
}

#endif

}  // namespace wog
