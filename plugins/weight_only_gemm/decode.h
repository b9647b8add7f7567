// Packed codes to the MMA's A registers: for 16-bit x as exact small integers q - c in T (c = 8 for 4 bits, 128 for
// 8), for int8 x as they are. Not as fp16 subnormals, which one instruction for two codes would make of them: tensor
// cores lose bits of those (docs/facts.md, "What an H200 does").
#pragma once

#include <device.h>

namespace wog {

// Numbers that OR puts codes into: low has its units in bit 0, high, of 4-bit Half, in bit 4. That of 8-bit Bfloat is
// what is subtracted. They are in registers, where a loop that has some to spare may hold them.
struct Carriers {
    uint32_t low, high;
};
template <class T, int Bits>
__device__ constexpr Carriers carriers() {
    if (std::is_same<T, Bfloat>::value) return {0x43004300, Bits == 8 ? 0xc300c300 : 0};  // 128, -128
    return Bits == 4 ? Carriers{0x64006400, 0x54005400} : Carriers{0x64646464, 0};        // 1024, 64; bytes of 1024
}

template <class T>
__device__ __forceinline__ void decode4(uint32_t (&a)[4], uint32_t w, Carriers const& c);
template <>
__device__ __forceinline__ void decode4<Half>(uint32_t (&a)[4], uint32_t w, Carriers const& c) {
    a[0] = add2<Half>(mask_or(w, 0x000f000f, c.low), 0xe408e408);   // - (1024 + 8)
    a[1] = add2<Half>(mask_or(w, 0x00f000f0, c.high), 0xd480d480);  // - (64 + 8)
    a[2] = add2<Half>(mask_or(w >> 8, 0x000f000f, c.low), 0xe408e408);
    a[3] = add2<Half>(mask_or(w >> 8, 0x00f000f0, c.high), 0xd480d480);
}
template <>
__device__ __forceinline__ void decode4<Bfloat>(uint32_t (&a)[4], uint32_t w, Carriers const& c) {
    for (int r = 0; r < 4; r++) a[r] = add2<Bfloat>(mask_or(w >> 4 * r, 0x000f000f, c.low), 0xc308c308);  // - (128 + 8)
}

template <class T>
__device__ __forceinline__ void decode8(uint32_t& low, uint32_t& high, uint32_t w, Carriers const& c);
template <>
__device__ __forceinline__ void decode8<Half>(uint32_t& low, uint32_t& high, uint32_t w, Carriers const& c) {
    low = add2<Half>(pick_bytes(w, c.low, 0x4240), 0xe480e480);  // - (1024 + 128)
    high = add2<Half>(pick_bytes(w, c.low, 0x4341), 0xe480e480);
}
template <>
__device__ __forceinline__ void decode8<Bfloat>(uint32_t& low, uint32_t& high, uint32_t w, Carriers const& c) {
    // bf16 has 8 bits: 128 + (q & 127), minus 128 if q >= 128, else minus 256 (0xc300 and 0xc380 differ in bit 7 only)
    low = add2<Bfloat>(mask_or(w, 0x007f007f, c.low), mask_not_or(w, 0x00800080, c.high));
    w >>= 8;
    high = add2<Bfloat>(mask_or(w, 0x007f007f, c.low), mask_not_or(w, 0x00800080, c.high));
}

// The A fragment of 16-bit x: k16 step `step` of the block, counted from any multiple of its steps
template <class T, int Bits>
__device__ __forceinline__ void decode(uint32_t (&a)[4], uint4 const& w, int step,
                                       Carriers const& c = carriers<T, Bits>()) {
    if constexpr (Bits == 4) {
        decode4<T>(a, step % 4 < 2 ? (step % 2 ? w.y : w.x) : (step % 2 ? w.w : w.z), c);
    } else {
        decode8<T>(a[0], a[2], step % 2 ? w.z : w.x, c);  // row g
        decode8<T>(a[1], a[3], step % 2 ? w.w : w.y, c);  // row g + 8
    }
}

// The A fragment of int8 x: the codes as they are, 32-k unit `unit` of the block
template <int Bits>
__device__ __forceinline__ void unpack(uint32_t (&a)[4], uint4 const& w, int unit) {
    if constexpr (Bits == 8) {
        a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
    } else {
        uint32_t const low = unit % 2 ? w.z : w.x, high = unit % 2 ? w.w : w.y;  // k16 steps
        a[0] = low & 0x0f0f0f0f, a[1] = low >> 4 & 0x0f0f0f0f;
        a[2] = high & 0x0f0f0f0f, a[3] = high >> 4 & 0x0f0f0f0f;
    }
}

// The one or the other: MMA `part` of the block
template <class T, int Bits, bool Int8>
__device__ __forceinline__ void fragment(uint32_t (&a)[4], uint4 const& w, int part,
                                         Carriers const& c = carriers<T, Bits>()) {
    if constexpr (Int8)
        unpack<Bits>(a, w, part);
    else
        decode<T, Bits>(a, w, part, c);
}

// q - 8 as signed bytes, of the low nibbles: 128 + q - 8 borrows from no neighbour
__device__ __forceinline__ uint32_t less_eight(uint32_t w) {
    return (((w & 0x0f0f0f0f) | 0x80808080) - 0x08080808) ^ 0x80808080;
}
// The same as signed bytes q - c
template <int Bits>
__device__ __forceinline__ void decode_signed(uint32_t (&a)[4], uint4 const& w, int unit) {
    if constexpr (Bits == 8) {
        a[0] = w.x ^ 0x80808080, a[1] = w.y ^ 0x80808080, a[2] = w.z ^ 0x80808080, a[3] = w.w ^ 0x80808080;
    } else {
        uint32_t const low = unit % 2 ? w.z : w.x, high = unit % 2 ? w.w : w.y;
        a[0] = less_eight(low), a[1] = less_eight(low >> 4), a[2] = less_eight(high), a[3] = less_eight(high >> 4);
    }
}

}  // namespace wog
