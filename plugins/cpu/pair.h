// Sixteen floats in two registers of AVX2. Compilers keep vectors that are wider than a register in memory.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace cpu {
namespace {  // each file has its own, with its own instructions

typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

struct V {
    Eight a, b;
};

inline V operator+(V x, V y) { return {x.a + y.a, x.b + y.b}; }
inline V operator-(V x, V y) { return {x.a - y.a, x.b - y.b}; }
inline V operator*(V x, V y) { return {x.a * y.a, x.b * y.b}; }
inline V operator/(V x, V y) { return {x.a / y.a, x.b / y.b}; }
inline V operator-(V x) { return {-x.a, -x.b}; }
inline V& operator+=(V& x, V y) { return x = x + y; }
inline V spread(float f) { return {Eight{} + f, Eight{} + f}; }
inline V operator+(V x, float y) { return x + spread(y); }
inline V operator-(V x, float y) { return x - spread(y); }
inline V operator*(V x, float y) { return x * spread(y); }
inline V operator+(float x, V y) { return spread(x) + y; }
inline V operator*(float x, V y) { return spread(x) * y; }
inline V operator/(float x, V y) { return spread(x) / y; }

inline Eight eight(float const* p) { return *reinterpret_cast<Eight const*>(p); }
inline V load(float const* p) { return {eight(p), eight(p + 8)}; }
inline void store(float* p, V v) {
    *reinterpret_cast<Eight*>(p) = v.a;
    *reinterpret_cast<Eight*>(p + 8) = v.b;
}
inline V largest(V x, V y) { return {x.a > y.a ? x.a : y.a, x.b > y.b ? x.b : y.b}; }
inline V smallest(V x, V y) { return {x.a < y.a ? x.a : y.a, x.b < y.b ? x.b : y.b}; }
inline V where_below(V x, float limit, V then, V other) {
    return {x.a < limit ? then.a : other.a, x.b < limit ? then.b : other.b};
}
inline Eight low(V v) { return v.a; }
inline Eight high(V v) { return v.b; }

inline Eight power_of_two(Eight n) {
    typedef int32_t W __attribute__((vector_size(32)));
    W const bits = (__builtin_convertvector(n, W) + 127) << 23;
    return reinterpret_cast<Eight const&>(bits);
}

// 2^n of whole numbers from -126 to 127.
inline V power_of_two(V n) { return {power_of_two(n.a), power_of_two(n.b)}; }

// Rows become columns.
inline void transpose(V (&v)[16]) {
    float rows[16][16], columns[16][16];
    for (int i = 0; i < 16; ++i) {
        store(rows[i], v[i]);
    }
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 16; ++j) {
            columns[j][i] = rows[i][j];
        }
    }
    for (int i = 0; i < 16; ++i) {
        v[i] = load(columns[i]);
    }
}

inline Eight sums_of(V const* v) {
    auto const halves = [v](int i) { return static_cast<__m256>(v[i].a + v[i].b); };
    auto const four = [&](int i) {
        return _mm256_hadd_ps(_mm256_hadd_ps(halves(i), halves(i + 1)), _mm256_hadd_ps(halves(i + 2), halves(i + 3)));
    };
    __m256 const first = four(0), second = four(4);
    return _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31));
}

// Lane i is the sum of the lanes of v[i].
inline V sums_of(V (&v)[16]) { return {sums_of(v + 0), sums_of(v + 8)}; }

// All lanes by one operation of two, halves first. The largest of some with NaN is any of them.
template <typename Join>
inline float folded(Eight v, Join join) {
    v = join(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    v = join(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
    v = join(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
    return v[0];
}

inline float sum(V v) {
    return folded(v.a + v.b, [](Eight a, Eight b) { return a + b; });
}

inline float largest(V v) {
    return folded(v.a > v.b ? v.a : v.b, [](Eight a, Eight b) { return a > b ? a : b; });
}

}  // namespace
}  // namespace cpu
