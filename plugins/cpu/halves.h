// Sixteen bits -> float, where no instruction does it.
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

// float16: its exponent is moved by a product, which is right for its smallest numbers too. None is infinite or NaN.
inline float from_half(uint16_t h) {
    float const magnitude = from_bits((h & 0x7fffu) << 13) * 0x1p112f;
    return h & 0x8000u ? -magnitude : magnitude;
}

}  // namespace
}  // namespace cpu
