// Sixteen floats, for what needs no instruction of its own.
#pragma once

#if defined(__AVX2__) && !defined(__AVX512F__)
#include "pair.h"
#else
#include "sixteen.h"
#endif

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace cpu {
namespace {  // each file has its own, with its own instructions

// e^x to 2e-7 of itself, at most e^88: 2^n e^r with |r| <= ln 2 / 2, whose series is cut after r^6. NaN stays.
inline V exponential(V x) {
    V const bounded = smallest(spread(88), largest(spread(-150), x));
    V const n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;  // whose last bit is 1
    V const r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;   // ln 2 in two parts, the first exact
    V const series = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
#ifdef __AVX512F__
    return reinterpret_cast<V>(_mm512_scalef_ps(reinterpret_cast<__m512>(series), reinterpret_cast<__m512>(n)));
#else
    return where_below(n, -126, V{}, series * power_of_two(largest(n, spread(-126))));
#endif
}

}  // namespace
}  // namespace cpu
