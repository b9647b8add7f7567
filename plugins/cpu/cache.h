// How keys and values lie in a cache, and are written and read: as floats, float16, steps of int8, or in four bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernel.h"
#include "vectors.h"

namespace cpu {

using Half = uint16_t;
struct Nibbles {};  // two share a byte, the first its low bits

constexpr float kLargestHalf = 65504;

// Tokens of a head. `place` is the first one's in all of the cache.
template <typename Isa, typename T>
struct Tile {
    Tile(CachePart const& part, int64_t place, int64_t size, int64_t)
        : first(static_cast<T const*>(part.data) + place * size), size(size) {}

    // Sixteen channels of a token, from `i` on. Of int8 they are steps: what they are multiplied with has their scales.
    V at(int64_t token, int64_t i) const { return read(first + token * size + i); }

    static V read(float const* p) { return load(p); }
    static V read(Half const* p) { return std::bit_cast<V>(Isa::from_f16(p)); }
    static V read(int8_t const* p) { return std::bit_cast<V>(Isa::from_i8(p)); }

    T const* first;
    int64_t size;
};

// Up to sixteen tokens, whose scales and zero points are made floats at once.
template <typename Isa>
struct Tile<Isa, Nibbles> {
    Tile(CachePart const& part, int64_t place, int64_t size, int64_t count)
        : codes(static_cast<uint8_t const*>(part.data) + place * size / 2),
          size(size),
          groups(part.groups),
          reciprocal(65536 * part.groups / (size / kLanes) + 1) {
        Half const* const scale = part.steps + place * groups;
        uint8_t const* const zero = part.zeros + place * groups;
        int64_t i = 0;
        for (; i + kLanes <= count * groups; i += kLanes) {
            widen(scale + i, zero + i, i);
        }
        if (int64_t const rest = count * groups - i; rest > 0) {  // nothing is read behind the cache
            Half scales[kLanes]{};
            uint8_t zeros[kLanes]{};
            std::copy_n(scale + i, rest, scales);
            std::copy_n(zero + i, rest, zeros);
            widen(scales, zeros, i);
        }
    }

    void widen(Half const* scale, uint8_t const* zero, int64_t i) {
        V const step = std::bit_cast<V>(Isa::from_f16(scale));
        store(steps + i, step);
        store(least + i, -(std::bit_cast<V>(Isa::from_u8(zero)) * step));  // exact: 11 bits times 4
    }

    V at(int64_t token, int64_t i) const {
        int64_t const group = token * groups + (i / kLanes * reciprocal >> 16);
        V const code = std::bit_cast<V>(Isa::from_u4(codes + (token * size + i) / 2));
        return code * spread(steps[group]) + spread(least[group]);
    }

    uint8_t const* codes;
    int64_t size, groups, reciprocal;  // of sixteens in a group, times 2^16
    float steps[kLanes * kMostGroups], least[kLanes * kMostGroups];
};

template <typename Isa, typename T>
struct Keep {
    // One token of a head into its place.
    static void token(float const* x, CachePart const& part, int64_t head, int64_t place, int64_t size) {
        for (int64_t i = 0; i < size; i += kLanes) {
            write(load(x + i), part.scales + head * size + i, static_cast<T*>(part.data) + place * size + i);
        }
    }

    static void write(V v, float const*, float* p) { store(p, v); }
    static void write(V v, float const*, Half* p) { Isa::to_f16(p, std::bit_cast<typename Isa::F>(as_half(v))); }
    static void write(V v, float const* scales, int8_t* p) {
        V const steps = v / load(scales);
        Isa::to_i8(p, std::bit_cast<typename Isa::F>(largest(smallest(spread(127), steps), spread(-128))));
    }

    // Finite stays finite.
    static V as_half(V v) {
        V const most = spread(kLargestHalf);
        return smallest(most, largest(-most, v));
    }
};

// InstantQuant's formula, for each group of a token's channels: `quantize_cache_by_token.py` says the same.
template <typename Isa>
struct Keep<Isa, Nibbles> {
    static void token(float const* x, CachePart const& part, int64_t, int64_t place, int64_t size) {
        int64_t const group = size / part.groups;
        uint8_t* const codes = static_cast<uint8_t*>(part.data) + place * size / 2;
        for (int64_t g = 0; g < part.groups; ++g) {
            float const* const in = x + g * group;
            V low{}, high{}, bad{};
            for (int64_t i = 0; i < group; i += kLanes) {
                V const v = load(in + i);
                low = smallest(low, v);
                high = largest(high, v);
                bad += v * 0.0f;  // NaN if one is, or is infinite
            }
            float const lowest = -largest(-low), range = largest(high) - lowest;
            Half halves[kLanes];
            V const wanted = Keep<Isa, Half>::as_half(spread(range / 15 + sum(bad)));
            Isa::to_f16(halves, std::bit_cast<typename Isa::F>(wanted));
            float step[kLanes];
            store(step, std::bit_cast<V>(Isa::from_f16(halves)));
            if (step[0] == 0) {
                Isa::to_f16(halves, Isa::set(step[0] = 1));
            }
            float const zero = std::clamp(std::nearbyint(-lowest / step[0]), 0.0f, 15.0f);
            part.steps[place * part.groups + g] = halves[0];
            part.zeros[place * part.groups + g] = zero > 0 ? static_cast<uint8_t>(zero) : 0;  // NaN: 0
            for (int64_t i = 0; i < group; i += kLanes) {
                int8_t code[kLanes];
                V const steps = whole(load(in + i) / spread(step[0])) + zero;
                Isa::to_i8(code, std::bit_cast<typename Isa::F>(largest(smallest(spread(15), steps), V{})));
                for (int64_t k = 0; k < kLanes; k += 2) {
                    codes[(g * group + i + k) / 2] = static_cast<uint8_t>((code[k] & 15) | (code[k + 1] & 15) << 4);
                }
            }
        }
    }

    // Half to even, below 2^22.
    static V whole(V v) {
        V const far = spread(0x1.8p23f), most = spread(64);
        return (largest(-most, smallest(most, v)) + far) - far;
    }
};

namespace {  // each file has its own, with its own instructions

// Sylvester's matrix of order 16.
struct Signs {
    constexpr Signs() {
        for (unsigned row = 0; row < kLanes; ++row) {
            for (unsigned column = 0; column < kLanes; ++column) {
                of[row][column] = std::popcount(row & column) % 2 ? -1 : 1;
            }
        }
    }
    float of[kLanes][kLanes]{};
};
constexpr Signs kSigns;

// x [size] times Sylvester's matrix of the largest power of two that divides `size`, which is 16 or more, over the root
// of its order; or times several of them beside one another. One of twice the order is four of it, the last with the
// other sign: sixteen channels are products, and what is left are sums and differences of vectors.
inline void turn(float* x, int64_t size) {
    int64_t const order = size & -size;
    float const by = 1 / std::sqrt(static_cast<float>(order));
    for (int64_t i = 0; i < size; i += kLanes) {
        V all{};
        for (int64_t k = 0; k < kLanes; ++k) {
            all += load(kSigns.of[k]) * spread(x[i + k]);
        }
        store(x + i, all * spread(by));
    }
    for (int64_t half = kLanes; half < order; half *= 2) {
        for (int64_t first = 0; first < size; first += 2 * half) {
            for (int64_t i = first; i < first + half; i += kLanes) {
                V const a = load(x + i), b = load(x + i + half);
                store(x + i, a + b);
                store(x + i + half, a - b);
            }
        }
    }
}

}  // namespace
}  // namespace cpu
