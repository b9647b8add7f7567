// Sixteen bits -> float and back, where no instruction does it.
#pragma once

#include <cstdint>
#include <cstring>

namespace cpu {
namespace {  // each file has its own, with its own instructions

inline float from_bits(uint32_t word) {
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// float16: its exponent is moved by a product, which is right for its smallest numbers too.
inline float from_half(uint16_t h) {
    uint32_t const bits = (h & 0x7fffu) << 13;
    float const magnitude = bits < 0x0f800000u ? from_bits(bits) * 0x1p112f : from_bits(bits | 0x7f800000u);
    return h & 0x8000u ? -magnitude : magnitude;
}

// Half to even, of what is at most 65504, or NaN.
inline uint16_t to_half(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint32_t const sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: a sum rounds it to a multiple of 2^-24
        float const sum = from_bits(magnitude) + 0.5f;
        std::memcpy(&half, &sum, 4);
        half -= 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    }
    return static_cast<uint16_t>(sign | half);
}

}  // namespace
}  // namespace cpu
