// The products of CpuGemm, for any instruction set: `Isa` says what sixteen lanes do (avx512.cpp, avx2.cpp, plain.cpp).
//
// Sixteen columns of y for R rows are held in registers while one strip of codes streams by; a row's products with a
// strip have the same bits whatever R is.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "activations.h"
#include "kernel.h"

namespace cpu_gemm {

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

    // y[row .. row + R) of one strip. Bits of a code, limbs of x; Whole: one scale for a row of x, one limb.
    template <int R, int Bits, int Limbs, bool Whole>
    static void tile(Call const& c, int64_t strip, int64_t row) {
        constexpr int kChains = R == 1 ? 4 : R == 2 ? 2 : 1;  // the next product does not wait for the last
        Weight const& w = *c.weight;
        Shape const shape(w);
        int64_t const groups = w.k / w.group, per_group = w.group / kBlock;
        uint8_t const* codes = w.codes + strip * stored_blocks(w) * kBlockBytes;
        uint8_t const* affine = w.affine + strip * groups * affine_bytes(w);
        int64_t const scale_bytes = kLanes * kSizes[static_cast<int>(w.scale_type)];
        int8_t const* x[R];
        float const *scales[R], *sums[R];
        for (int r = 0; r < R; ++r) {
            x[r] = c.x.limbs + (row + r) * shape.limbs;
            scales[r] = c.x.scales + (row + r) * shape.scales;
            sums[r] = c.x.sums + (row + r) * shape.sums;
        }
        F y[R];
        I sum[R][Limbs][kChains];
        for (int r = 0; r < R; ++r) {
            y[r] = Isa::set(0);
        }
        for (int64_t group = 0, block = 0; group < groups; ++group, affine += affine_bytes(w)) {
            F const scale = load(affine, w.scale_type);
            if constexpr (Whole) {
                clear<R, Limbs, kChains>(sum);
            }
            for (int64_t end = block + per_group; block < end; ++block) {
                if constexpr (!Whole) {
                    clear<R, Limbs, kChains>(sum);
                }
                uint8_t const* from = codes + (Bits == 8 ? block : block / 2) * kBlockBytes;
                int const high = Bits == 4 && block % 2;
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v) {
                    I q = Isa::load(from + v * 64);
                    if constexpr (Bits == 4) {
                        q = high ? Isa::high(q) : Isa::low(q);
                    }
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
                        for (int l = 0; l < Limbs; ++l) {
                            int8_t const* four = x[r] + (block * Limbs + l) * kBlock + 4 * v;
                            sum[r][l][v % kChains] = Isa::dot(sum[r][l][v % kChains], q, four);
                        }
                    }
                }
                if constexpr (!Whole) {
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        y[r] =
                            Isa::fma(total<Limbs, kChains>(sum[r]), Isa::mul(scale, Isa::set(scales[r][block])), y[r]);
                    }
                }
            }
            F const least = minimum(w, affine + scale_bytes, scale);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                if constexpr (Whole) {
                    y[r] = Isa::fma(total<Limbs, kChains>(sum[r]), Isa::mul(scale, Isa::set(*scales[r])), y[r]);
                }
                y[r] = Isa::fma(least, Isa::set(sums[r][group]), y[r]);
            }
        }
        for (int r = 0; r < R; ++r) {
            if (w.bias != nullptr) {
                y[r] = Isa::add(y[r], Isa::load(w.bias + strip * kLanes));
            }
            finish(c, row + r, strip, y[r]);
        }
    }

    // Activation, gate and residual of one row of a strip.
    static void finish(Call const& c, int64_t row, int64_t strip, F v) {
        Weight const& w = *c.weight;
        int const count = w.gated ? kLanes / 2 : kLanes;
        int64_t const at = row * width(w) + strip * count;
        if (w.activation == Activation::kNone && !w.gated) {
            return Isa::store(c.y + at, c.residual == nullptr ? v : Isa::add(v, Isa::load(c.residual + at)));
        }
        float all[kLanes];
        Isa::store(all, v);
        activate(w.activation, all, count);
        for (int i = 0; i < count; ++i) {
            float const gated = w.gated ? all[i] * all[count + i] : all[i];
            c.y[at + i] = c.residual == nullptr ? gated : gated + c.residual[at + i];
        }
    }

    template <int R, int Limbs, int Chains>
    static void clear(I (&sum)[R][Limbs][Chains]) {
        for (auto& row : sum) {
            for (auto& limb : row) {
                for (I& chain : limb) {
                    chain = Isa::zero();
                }
            }
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

    // Rows [row, end) of one strip, R at once; of those that are left, fewer.
    template <int R, int Bits, int Limbs, bool Whole>
    static void rows(Call const& c, int64_t strip, int64_t row, int64_t end) {
        for (; row + R <= end; row += R) {
            tile<R, Bits, Limbs, Whole>(c, strip, row);
        }
        if constexpr (R > 1) {
            rows<R / 2, Bits, Limbs, Whole>(c, strip, row, end);
        }
    }

    static void multiply(Call const& c, int64_t s, int64_t row, int64_t end) {
        constexpr int kRows = Isa::kRows;
        bool const eight = c.weight->bits == 8;
        switch (c.weight->form) {
            case Form::kInt8Rows:
                return eight ? rows<kRows, 8, 1, true>(c, s, row, end) : rows<kRows, 4, 1, true>(c, s, row, end);
            case Form::kInt8Blocks:
                return eight ? rows<kRows, 8, 1, false>(c, s, row, end) : rows<kRows, 4, 1, false>(c, s, row, end);
            case Form::kInt16Blocks:
                return eight ? rows<kRows, 8, 2, false>(c, s, row, end) : rows<kRows, 4, 2, false>(c, s, row, end);
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
                int32_t const steps = round(x + b * kBlock, step.by, top, limbs + b * kBlock * count, count);
                sum += step.size * static_cast<float>(steps);
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

    // round(x * by) of a block, half to even, first its high limb; returns the sum.
    static int32_t round(float const* x, float by, int32_t top, int8_t* limbs, int count) {
        int32_t sum = 0, q[kBlock];
        for (int i = 0; i < kBlock; ++i) {
            float const limit = static_cast<float>(top);
            float const v = std::nearbyint(x[i] * by);
            q[i] = static_cast<int32_t>(std::min(std::max(v, -limit), limit));
            sum += q[i];
        }
        if (count == 1) {
            for (int i = 0; i < kBlock; ++i) {
                limbs[i] = static_cast<int8_t>(q[i]);
            }
        } else {
            for (int i = 0; i < kBlock; ++i) {
                limbs[i] = static_cast<int8_t>((q[i] + 128) >> 8);
                limbs[kBlock + i] = static_cast<int8_t>(q[i]);
            }
        }
        return sum;
    }
};

}  // namespace cpu_gemm
