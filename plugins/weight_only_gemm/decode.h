// Codes to exact small integers q - c in T, c = 8 for 4 bits and 128 for 8: one k16 fragment from the words of a block.
#pragma once

#include <device.h>

namespace wog {

template <int Bits>
constexpr float kCenter = Bits == 4 ? 8.0f : 128.0f;

template <class T>
__device__ __forceinline__ void decode4(uint32_t (&a)[4], uint32_t w);
template <>
__device__ __forceinline__ void decode4<Half>(uint32_t (&a)[4], uint32_t w) {
    // 0x6400 = 1024 has its units in bit 0, 0x5400 = 64 in bit 4: OR puts a nibble there, one add removes bias and c
    a[0] = add2<Half>(mask_or(w, 0x000f000f, 0x64006400), 0xe408e408);  // - (1024 + 8)
    a[1] = add2<Half>(mask_or(w, 0x00f000f0, 0x54005400), 0xd480d480);  // - (64 + 8)
    a[2] = add2<Half>(mask_or(w >> 8, 0x000f000f, 0x64006400), 0xe408e408);
    a[3] = add2<Half>(mask_or(w >> 8, 0x00f000f0, 0x54005400), 0xd480d480);
}
template <>
__device__ __forceinline__ void decode4<Bfloat>(uint32_t (&a)[4], uint32_t w) {
    for (int r = 0; r < 4; r++)  // 0x4300 = 128 has its units in bit 0
        a[r] = add2<Bfloat>(mask_or(w >> 4 * r, 0x000f000f, 0x43004300), 0xc308c308);  // - (128 + 8)
}

template <class T>
__device__ __forceinline__ void decode8(uint32_t& low, uint32_t& high, uint32_t w);
template <>
__device__ __forceinline__ void decode8<Half>(uint32_t& low, uint32_t& high, uint32_t w) {
    low = add2<Half>(pick_bytes(w, 0x64646464, 0x4240), 0xe480e480);  // - (1024 + 128)
    high = add2<Half>(pick_bytes(w, 0x64646464, 0x4341), 0xe480e480);
}
template <>
__device__ __forceinline__ void decode8<Bfloat>(uint32_t& low, uint32_t& high, uint32_t w) {
    // bf16 has 8 bits: 128 + (q & 127), minus 128 if q >= 128, else minus 256 (0xc300 and 0xc380 differ in bit 7 only)
    low = add2<Bfloat>(mask_or(w, 0x007f007f, 0x43004300), mask_or(~w, 0x00800080, 0xc300c300));
    w >>= 8;
    high = add2<Bfloat>(mask_or(w, 0x007f007f, 0x43004300), mask_or(~w, 0x00800080, 0xc300c300));
}

// A fragment of k16 step `step` (0, 1) of 32-k unit `unit` (0, 1) of a stage, from the stage's words of one strip
template <class T, int Bits>
__device__ __forceinline__ void decode(uint32_t (&a)[4], uint4 const (&words)[Bits / 4], int unit, int step) {
    if constexpr (Bits == 4) {
        uint4 const& w = words[0];
        decode4<T>(a, unit == 0 ? (step == 0 ? w.x : w.y) : (step == 0 ? w.z : w.w));
    } else {
        uint4 const& w = words[unit];
        decode8<T>(a[0], a[2], step == 0 ? w.x : w.z);  // row g
        decode8<T>(a[1], a[3], step == 0 ? w.y : w.w);  // row g + 8
    }
}

}  // namespace wog
