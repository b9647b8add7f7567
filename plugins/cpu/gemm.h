// The products of CpuGemm, for any instruction set: `Isa` says what sixteen lanes do (avx512.cpp, avx2.cpp, plain.cpp).
//
// Sixteen columns of y for R rows are held in registers while one strip of codes streams by; a row's products with a
// strip have the same bits whatever R is.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "activations.h"
#include "kernel.h"

namespace cpu {

constexpr int64_t kManyRows = 16;
constexpr int64_t kAhead = 8 << 10;  // bytes of codes: more than a core fetches by itself where each has much to do

template <typename Isa>
struct Gemm {
    using I = typename Isa::I;
    using F = typename Isa::F;

    static F load(uint8_t const* from, Type type) {
        switch (type) {
            case Type::kF16:
                return Isa::from_f16(reinterpret_cast<uint16_t const*>(from));
            case Type::kBF16:
                return Isa::from_bf16(reinterpret_cast<uint16_t const*>(from));
            case Type::kU8:
                return Isa::from_u8(from);
            default:
                return Isa::load(reinterpret_cast<float const*>(from));
        }
    }

    // What a code of 0 stands for, in each column: -zero * scale, or the minimum as it is stored.
    static F minimum(Weight const& w, uint8_t const* zeros, F scale) {
        switch (w.zero_type) {
            case Type::kNone:
                return Isa::mul(scale, Isa::set(-static_cast<float>(1 << (w.bits - 1))));
            case Type::kU8:
                return Isa::sub(Isa::set(0), Isa::mul(load(zeros, w.zero_type), scale));
            default:
                return load(zeros, w.zero_type);
        }
    }

    // y[row .. row + R) of S strips. Bits of a code, limbs of x; Whole: one scale for a row of x, one limb.
    template <int R, int S, int Bits, int Limbs, bool Whole>
    static void tile(Call const& c, int64_t strip, int64_t row) {
        constexpr int kSums = R * S * Limbs, kChains = kSums >= 4 ? 1 : 4 / kSums;  // no product waits for the last
        Weight const& w = *c.weight;
        Shape const shape(w);
        int64_t const groups = w.k / w.group, per_group = w.group / kBlock;
        int64_t const scale_bytes = kLanes * kSizes[static_cast<int>(w.scale_type)];
        uint8_t const *codes[S], *affine[S];
        for (int s = 0; s < S; ++s) {
            codes[s] = w.codes + (strip + s) * stored_blocks(w) * kBlockBytes;
            affine[s] = w.affine + (strip + s) * groups * affine_bytes(w);
        }
        int8_t const* const x = c.x.limbs + row * shape.limbs;
        float const *const scales = c.x.scales + row * shape.scales, *const sums = c.x.sums + row * shape.sums;
        F y[R][S];
        I sum[R][S][Limbs][kChains];
        unrolled<R, S>([&](int r, int s) { y[r][s] = Isa::set(0); });
        for (int64_t group = 0, block = 0; group < groups; ++group) {
            F scale[S];
            for (int s = 0; s < S; ++s) {
                scale[s] = load(affine[s], w.scale_type);
            }
            if constexpr (Whole) {
                clear(sum);
            }
            for (int64_t end = block + per_group; block < end; ++block) {
                if constexpr (!Whole) {
                    clear(sum);
                }
                int64_t const at = (Bits == 8 ? block : block / 2) * kBlockBytes;
                bool const high = Bits == 4 && block % 2;
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v) {
                    I q[S];
                    for (int s = 0; s < S; ++s) {
                        q[s] = Isa::load(codes[s] + at + v * 64);
                        if constexpr (S == 1) {
                            __builtin_prefetch(codes[s] + at + v * 64 + kAhead);
                        }
                        if constexpr (Bits == 4) {
                            q[s] = high ? Isa::high(q[s]) : Isa::low(q[s]);
                        }
                    }
                    unrolled<R, Limbs>([&](int r, int l) {
                        auto const four = Isa::spread(x + r * shape.limbs + (block * Limbs + l) * kBlock + 4 * v);
                        for (int s = 0; s < S; ++s) {
                            I& into = sum[r][s][l][v % kChains];
                            into = Isa::dot(into, q[s], four);
                        }
                    });
                }
                if constexpr (!Whole) {
                    unrolled<R, S>([&](int r, int s) {
                        F const step = Isa::mul(scale[s], Isa::set(scales[r * shape.scales + block]));
                        y[r][s] = Isa::fma(total(sum[r][s]), step, y[r][s]);
                    });
                }
            }
            F least[S];
            for (int s = 0; s < S; ++s) {
                least[s] = minimum(w, affine[s] + scale_bytes, scale[s]);
                affine[s] += affine_bytes(w);
            }
            unrolled<R, S>([&](int r, int s) {
                if constexpr (Whole) {
                    F const step = Isa::mul(scale[s], Isa::set(scales[r]));
                    y[r][s] = Isa::fma(total(sum[r][s]), step, y[r][s]);
                }
                y[r][s] = Isa::fma(least[s], Isa::set(sums[r * shape.sums + group]), y[r][s]);
            });
        }
        unrolled<R, S>([&](int r, int s) {
            if (w.bias != nullptr) {
                y[r][s] = Isa::add(y[r][s], Isa::load(w.bias + (strip + s) * kLanes));
            }
            finish(c, row + r, strip + s, y[r][s]);
        });
    }

    template <int A, int B, typename Body>
    static void unrolled(Body body) {
#pragma GCC unroll 16
        for (int a = 0; a < A; ++a) {
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) {
                body(a, b);
            }
        }
    }

    // Activation, gate and residual of one row of a strip.
    static void finish(Call const& c, int64_t row, int64_t strip, F v) {
        Weight const& w = *c.weight;
        int const count = w.gated ? kLanes / 2 : kLanes;
        int64_t const at = row * width(w) + strip * count;
        V const x = std::bit_cast<V>(v), y = activated(w.activation, x);
        if (!w.gated) {
            return cpu::store(c.y + at, c.residual == nullptr ? y : y + cpu::load(c.residual + at));
        }
        Eight const gated = low(y) * high(x);
        Eight const* const residual = reinterpret_cast<Eight const*>(c.residual + at);
        *reinterpret_cast<Eight*>(c.y + at) = c.residual == nullptr ? gated : gated + *residual;
    }

    template <typename Sums>
    static void clear(Sums& sums) {
        if constexpr (std::is_array_v<Sums>) {
            for (auto& each : sums) {
                clear(each);
            }
        } else {
            sums = Isa::zero();
        }
    }

    // The sum of the chains, limbs joined: below 2^31 in a block of 32 with two limbs.
    template <int Limbs, int Chains>
    static F total(I const (&sum)[Limbs][Chains]) {
        I all = Isa::zero();
        for (int l = 0; l < Limbs; ++l) {
            I limb = sum[l][0];
            for (int i = 1; i < Chains; ++i) {
                limb = Isa::add(limb, sum[l][i]);
            }
            all = l == 0 ? limb : Isa::add(Isa::times256(all), limb);
        }
        return Isa::to_float(all);
    }

    // Rows [row, end) of S strips, R at once; of those that are left, fewer.
    template <int R, int S, int Bits, int Limbs, bool Whole>
    static void rows(Call const& c, int64_t strip, int64_t row, int64_t end) {
        for (; row + R <= end; row += R) {
            tile<R, S, Bits, Limbs, Whole>(c, strip, row);
        }
        if constexpr (R > 1) {
            rows<R / 2, S, Bits, Limbs, Whole>(c, strip, row, end);
        }
    }

    // Of strips [strip, last). Two at once read x half as often, which counts where rows are many; where they are few,
    // memory is what counts, and it is read fastest in one stream.
    template <int Limbs, bool Whole>
    static void strips(Call const& c, int64_t strip, int64_t last, int64_t row, int64_t end) {
        bool const eight = c.weight->bits == 8;
        if constexpr (Isa::kPairs) {
            constexpr int R = Limbs == 2 ? 4 : 6;  // 27 of 32 registers
            for (; end - row >= kManyRows && strip + 2 <= last; strip += 2) {
                eight ? rows<R, 2, 8, Limbs, Whole>(c, strip, row, end)
                      : rows<R, 2, 4, Limbs, Whole>(c, strip, row, end);
            }
        }
        constexpr int R = Isa::kRows;
        for (; strip < last; ++strip) {
            eight ? rows<R, 1, 8, Limbs, Whole>(c, strip, row, end) : rows<R, 1, 4, Limbs, Whole>(c, strip, row, end);
        }
    }

    static void multiply(Call const& c, int64_t strip, int64_t last, int64_t row, int64_t end) {
        switch (c.weight->form) {
            case Form::kInt8Rows:
                return strips<1, true>(c, strip, last, row, end);
            case Form::kInt8Blocks:
                return strips<1, false>(c, strip, last, row, end);
            case Form::kInt16Blocks:
                return strips<2, false>(c, strip, last, row, end);
        }
    }

    // One row of x [k] in limbs, with its scales and the sums of each group of the weight.
    static void quantize(Weight const& w, float const* x, int8_t* limbs, float* scales, float* sums) {
        int64_t const groups = w.k / w.group;
        int const count = w.form == Form::kInt16Blocks ? 2 : 1;
        int32_t const top = w.form == Form::kInt16Blocks ? 127 * 256 : 127;
        Step step{};
        if (w.form == Form::kInt8Rows) {
            step = step_of(x, w.k, top);
            *scales = step.size;
        }
        for (int64_t g = 0, b = 0; g < groups; ++g) {
            float sum = 0;
            for (int64_t end = b + w.group / kBlock; b < end; ++b) {
                if (w.form != Form::kInt8Rows) {
                    step = step_of(x + b * kBlock, kBlock, top);
                    scales[b] = step.size;
                }
                int8_t* const at = limbs + b * kBlock * count;
                sum += step.size * (count == 1 ? round(x + b * kBlock, step.by, at)
                                               : static_cast<float>(round_in_two(x + b * kBlock, step.by, top, at)));
            }
            sums[g] = sum;
        }
    }

    struct Step {
        float size, by;  // x * by, rounded, times size
    };

    // max|x| in `top` steps; NaN where one of x is not finite.
    static Step step_of(float const* x, int64_t count, int32_t top) {
        uint32_t most = 0;
        for (int64_t i = 0; i < count; ++i) {
            uint32_t bits;
            std::memcpy(&bits, x + i, 4);
            most = std::max(most, bits & 0x7fffffffu);  // floats without a sign are in the order of their bits
        }
        if (most >= 0x7f800000u) {
            return {NAN, 0};
        }
        if (most < 0x08800000u) {
            return {1, 0};  // zeros, and what is below 2^-110: too small to divide by
        }
        float value;
        std::memcpy(&value, &most, 4);
        return {value / static_cast<float>(top), static_cast<float>(top) / value};
    }

    // round(x * by) of a block, half to even, |x * by| <= 127; returns the sum, which floats have exactly.
    static float round(float const* x, float by, int8_t* limb) {
        V all{};
        for (int i = 0; i < kBlock; i += kLanes) {
            Isa::to_i8(limb + i, std::bit_cast<F>(cpu::load(x + i) * by));
            all += std::bit_cast<V>(Isa::from_i8(limb + i));
        }
        return sum(all);
    }

    // The same in steps up to `top`: first the high limbs, then the low ones.
    static int32_t round_in_two(float const* x, float by, int32_t top, int8_t* limbs) {
        int32_t sum = 0, q[kBlock];
        for (int i = 0; i < kBlock; ++i) {
            float const limit = static_cast<float>(top);
            q[i] = static_cast<int32_t>(std::min(std::max(-limit, std::nearbyint(x[i] * by)), limit));  // NaN: -top
            sum += q[i];
        }
        for (int i = 0; i < kBlock; ++i) {
            limbs[i] = static_cast<int8_t>((q[i] + 128) >> 8);
            limbs[kBlock + i] = static_cast<int8_t>(q[i]);
        }
        return sum;
    }
};

}  // namespace cpu
