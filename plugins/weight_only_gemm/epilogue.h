// What all kernels do with finished sums: bias, activation, gate times up, one rounding, one store.
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

// One branch for all values, not one for each
template <int Count>
__device__ __forceinline__ void activate(float (&v)[Count], int activation) {
    if (activation == WOG_SILU) {
#pragma unroll
        for (float& f : v) f = f / (1.0f + expf(-f));
    } else if (activation == WOG_GELU) {
#pragma unroll
        for (float& f : v) f = 0.5f * f * (1.0f + erff(f * 0.70710678118654752f));
    } else if (activation == WOG_GELU_TANH) {
#pragma unroll
        for (float& f : v) f = 0.5f * f * (1.0f + tanhf(0.79788456080286536f * (f + 0.044715f * f * f * f)));
    }
}

template <class T>
__device__ __forceinline__ float biased(Output const& out, float v, int n) {
    return out.bias ? v + to_float<T>(out.bias[n]) : v;
}

template <class T>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
    return from_float<T>(low) | uint32_t(from_float<T>(high)) << 16;
}

// Columns first .. first + 7 of row m of y
template <class T>
__device__ __forceinline__ void store_eight(Output const& out, float const* v, int64_t m, int first) {
    int64_t const at = m * (out.gated ? out.n / 2 : out.n) + first;
    if (out.wide) {
        auto* const y = reinterpret_cast<float4*>(static_cast<float*>(out.y) + at);
        y[0] = {v[0], v[1], v[2], v[3]};
        y[1] = {v[4], v[5], v[6], v[7]};
    } else {
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(out.y) + at) = {
            round_pair<T>(v[0], v[1]), round_pair<T>(v[2], v[3]), round_pair<T>(v[4], v[5]), round_pair<T>(v[6], v[7])};
    }
}

// v: the sums of row m, columns n0 .. n0 + 15, n0 a multiple of 16
template <class T>
__device__ __forceinline__ void finish(Output const& out, float (&v)[16], int64_t m, int n0) {
#pragma unroll
    for (int i = 0; i < 16; i++) v[i] = biased<T>(out, v[i], n0 + i);
    if (out.gated) {
        float gate[8];
#pragma unroll
        for (int i = 0; i < 8; i++) gate[i] = v[i];
        activate(gate, out.activation);
#pragma unroll
        for (int i = 0; i < 8; i++) gate[i] *= v[8 + i];
        store_eight<T>(out, gate, m, n0 / 2);
        return;
    }
    activate(v, out.activation);
    store_eight<T>(out, v, m, n0);
    store_eight<T>(out, v + 8, m, n0 + 8);
}

// Where the i-th four outputs of a row begin, or the i-th four gates, in its columns of sums
__device__ __forceinline__ int column_of_four(int i, bool gated) { return gated ? i / 2 * 16 + i % 2 * 4 : i * 4; }

// Four outputs of row m: the sums of columns n .. n + 3, or of the gates there and the `up`s eight columns on
template <class T>
__device__ __forceinline__ void finish_four(Output const& out, float4 sums, float4 ups, int64_t m, int n) {
    float v[4] = {sums.x, sums.y, sums.z, sums.w}, up[4] = {ups.x, ups.y, ups.z, ups.w};
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = biased<T>(out, v[i], n + i);
    activate(v, out.activation);
    int column = n;
    if (out.gated) {
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] *= biased<T>(out, up[i], n + 8 + i);
        column = n / 16 * 8 + n % 8;
    }
    int64_t const at = m * (out.gated ? out.n / 2 : out.n) + column;
    if (out.wide)
        *reinterpret_cast<float4*>(static_cast<float*>(out.y) + at) = {v[0], v[1], v[2], v[3]};
    else
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(out.y) + at) = {round_pair<T>(v[0], v[1]),
                                                                         round_pair<T>(v[2], v[3])};
}

// One output of row m: the sum of column n, or of the gate in column n and the `up` eight columns on
template <class T>
__device__ __forceinline__ void finish_one(Output const& out, float sum, float up, int64_t m, int n) {
    float v[1] = {biased<T>(out, sum, n)};
    activate(v, out.activation);
    int column = n;
    if (out.gated) v[0] *= biased<T>(out, up, n + 8), column = n / 16 * 8 + n % 8;
    int64_t const at = m * (out.gated ? out.n / 2 : out.n) + column;
    if (out.wide)
        static_cast<float*>(out.y)[at] = v[0];
    else
        static_cast<uint16_t*>(out.y)[at] = from_float<T>(v[0]);
}

#endif

}  // namespace wog
