// What rows.cu leaves in the workspace for products: int8 activations, sums of rows.
#pragma once

#include <device.h>

#include "config.h"

namespace wog {

struct Int8Rows {
    int8_t* values;  // [M, K], each 16 in layout.py's ACTIVATION_ORDER
    float* scales;   // [M]
    float* sums;     // [K / group, pitch]: sums of the values of a group, whole numbers
    int64_t pitch;   // padded_rows(M)
};

inline Int8Rows int8_rows(wog_problem const& p, void* workspace) {
    Int8Buffers const at = int8_buffers(p.m, p.k, p.group);
    auto* const base = static_cast<unsigned char*>(workspace);
    return {reinterpret_cast<int8_t*>(base + at.values), reinterpret_cast<float*>(base + at.scales),
            reinterpret_cast<float*>(base + at.sums), padded_rows(p.m)};
}

// x as a product multiplies it: of int8 activations their values
inline unsigned char const* multiplied(wog_problem const& p, wog_tensors const& t) {
    void const* const values = int8_rows(p, t.workspace).values;
    return static_cast<unsigned char const*>(p.activation_bits == 8 ? values : t.x);
}

// Where element k of a row lies: position 4t + i of each 16 holds k = [2t, 2t + 8, 2t + 1, 2t + 9][i].
__device__ __forceinline__ int int8_position(int k) { return (k & ~15) + (k % 8 / 2) * 4 + k % 2 * 2 + k % 16 / 8; }

// If x is to be int8; else nothing is launched
char const* launch_quantize(wog_problem const& p, wog_tensors const& t, void* stream);
// Of 16-bit x: [K / group, padded_rows(M)]
char const* launch_sums(wog_problem const& p, wog_tensors const& t, float* sums, void* stream);

}  // namespace wog
