// Activations of a few floats, as loops that compilers make vectors of.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernel.h"

namespace cpu {
namespace {  // each file has its own, with its own instructions

// e^x to 2e-7 of itself: 2^n e^r with |r| <= ln 2 / 2, whose series is cut after r^6.
inline float exponential(float x) {
    float const bounded = std::min(std::max(x, -87.0f), 88.0f);  // what is normal
    float const n = std::nearbyint(bounded * 1.44269504f);
    float const r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, the first exact
    float const series = 1 + r * (1 + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r / 720)))));
    uint32_t const exponent = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &exponent, 4);
    return x != x ? x : series * power;
}

// The error function to 1.5e-7: Abramowitz and Stegun, 7.1.26.
inline float error_function(float x) {
    float const a = std::fabs(x), t = 1 / (1 + 0.3275911f * a);
    float const tail =
        t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return std::copysign(1 - tail * exponential(-a * a), x);
}

inline float silu(float x) { return x / (1 + exponential(-x)); }
inline float gelu(float x) { return x * 0.5f * (1 + error_function(x * 0.707106781f)); }
// 0.5 (1 + tanh z) = 1 / (1 + e^-2z)
inline float gelu_tanh(float x) { return x / (1 + exponential(-1.59576912f * (x + 0.044715f * x * x * x))); }

inline void activate(Activation activation, float* values, int count) {
    auto const each = [&](auto f) {
        for (int i = 0; i < count; ++i) {
            values[i] = f(values[i]);
        }
    };
    switch (activation) {
        case Activation::kSilu:
            return each([](float x) { return silu(x); });
        case Activation::kGelu:
            return each([](float x) { return gelu(x); });
        case Activation::kGeluTanh:
            return each([](float x) { return gelu_tanh(x); });
        case Activation::kNone:
            return;
    }
}

}  // namespace
}  // namespace cpu
