// Sixteen floats in one register, or wherever the compiler keeps them: compilers' own vectors.
#pragma once

#include <cstdint>

namespace cpu {
namespace {  // each file has its own, with its own instructions

typedef float V __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

inline V load(float const* p) { return *reinterpret_cast<V const*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<V*>(p) = v; }
inline V spread(float f) { return V{} + f; }
inline V largest(V a, V b) { return a > b ? a : b; }
inline V smallest(V a, V b) { return a < b ? a : b; }
inline V where_below(V x, float limit, V then, V other) { return x < limit ? then : other; }
inline Eight low(V v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
inline Eight high(V v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }

// 2^n of whole numbers from -126 to 127.
inline V power_of_two(V n) {
    typedef int32_t W __attribute__((vector_size(64)));
    W const bits = (__builtin_convertvector(n, W) + 127) << 23;
    return reinterpret_cast<V const&>(bits);
}

// Rows become columns. An element's row and column are eight bits; each pass moves them on by one.
inline void transpose(V (&v)[16]) {
    for (int pass = 0; pass < 4; ++pass) {
        V w[16];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            V const a = v[i], b = v[i + 8];
            w[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            w[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            v[i] = w[i];
        }
    }
}

// Lane i is the sum of the lanes of v[i]; halves, quarters and so on are added side by side.
inline V sums_of(V (&v)[16]) {
    for (int i = 0; i < 8; ++i) {
        v[i] = __builtin_shufflevector(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int i = 0; i < 4; ++i) {
        v[i] = __builtin_shufflevector(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               __builtin_shufflevector(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
    for (int i = 0; i < 2; ++i) {
        v[i] = __builtin_shufflevector(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    return __builtin_shufflevector(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           __builtin_shufflevector(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// All lanes by one operation of two, halves first. The largest of some with NaN is any of them.
template <typename Join>
inline float folded(V v, Join join) {
    v = join(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = join(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = join(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    v = join(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return v[0];
}

inline float sum(V v) {
    return folded(v, [](V a, V b) { return a + b; });
}

inline float largest(V v) {
    return folded(v, [](V a, V b) { return largest(a, b); });
}

}  // namespace
}  // namespace cpu
