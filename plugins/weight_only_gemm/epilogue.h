// What all kernels do with finished sums: bias, activation, gate times up, one rounding, one 16- or 32-byte store.
#pragma once

#include <device.h>

#include "config.h"

namespace wog {

struct Output {
    uint16_t const* bias;
    void* y;
    int64_t m;
    int32_t n, activation, gated, wide;
};

inline Output output(wog_problem const& p, wog_tensors const& t) {
    return {static_cast<uint16_t const*>(t.bias), t.y, p.m, p.n, p.activation, p.gated, p.wide};
}

#ifndef KERNELS_ELSEWHERE

__device__ __forceinline__ float activate(float v, int activation) {
    switch (activation) {
        case WOG_SILU: return v / (1.0f + expf(-v));
        case WOG_GELU: return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
        case WOG_GELU_TANH: return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
        default: return v;
    }
}

// v: the sums of row m, columns n0 .. n0 + 15, n0 a multiple of 16
template <class T>
__device__ __forceinline__ void finish(Output const& out, float (&v)[16], int64_t m, int n0) {
    if (out.bias)
        for (int i = 0; i < 16; i++) v[i] += to_float<T>(out.bias[n0 + i]);
    int count = 16, first = n0;
    int64_t stride = out.n;
    if (out.gated) {
        for (int i = 0; i < 8; i++) v[i] = activate(v[i], out.activation) * v[i + 8];
        count = 8, first = n0 / 2, stride = out.n / 2;
    } else if (out.activation != WOG_NONE) {
        for (int i = 0; i < 16; i++) v[i] = activate(v[i], out.activation);
    }
    int64_t const at = m * stride + first;
    if (out.wide) {
#pragma unroll  // with a fixed count: v must stay in registers
        for (int i = 0; i < 16; i++)
            if (i < count) static_cast<float*>(out.y)[at + i] = v[i];
        return;
    }
    uint4 words[2];
    for (int i = 0; i < 2; i++) {
        float const* f = v + 8 * i;
        words[i] = {from_float<T>(f[0]) | uint32_t(from_float<T>(f[1])) << 16,
                    from_float<T>(f[2]) | uint32_t(from_float<T>(f[3])) << 16,
                    from_float<T>(f[4]) | uint32_t(from_float<T>(f[5])) << 16,
                    from_float<T>(f[6]) | uint32_t(from_float<T>(f[7])) << 16};
    }
    uint4* const y = reinterpret_cast<uint4*>(static_cast<uint16_t*>(out.y) + at);
    y[0] = words[0];
    if (count == 16) y[1] = words[1];
}

#endif

}  // namespace wog
