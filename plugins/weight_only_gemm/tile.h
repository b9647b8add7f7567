// What the tiled kernels share: which of them are generated, handing over their sums.
#pragma once

#include <device.h>

#include <type_traits>

#include "config.h"

namespace wog {

// Is this row's code generated for the SM being compiled? Where the table can choose it, and bf16 starts at sm_80.
template <class T, int I>
constexpr bool kGenerated = kRows[I].sms.first <= DEVICE_SM && DEVICE_SM <= kRows[I].sms.last &&
                            (DEVICE_SM >= 80 || std::is_same<T, Half>::value);

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

// A slot of a ring, and the parity of its barriers' phase
template <int Slots>
struct Cursor {
    int slot = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++slot == Slots) slot = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void add(float4& to, float4 const& v) { to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w; }

}  // namespace wog
