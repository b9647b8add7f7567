// Norms of rows, for the instructions it is compiled with.
#pragma once

#include <cmath>

#include "kernel.h"
#include "vectors.h"

namespace cpu {

template <typename Isa>  // whose functions are then of one file alone
struct Norm {
    // One row: x less its mean, where that is asked for, over the root of the mean of its squares.
    static void norm(NormCall const& c, int64_t row) {
        float const* const x = c.x + row * c.k;
        float* const y = c.y + row * c.k;
        float const count = static_cast<float>(c.k);
        float const mean = c.centered ? total(x, c.k, [](auto v) { return v; }) / count : 0;
        float const squares = total(x, c.k, [mean](auto v) { return (v - mean) * (v - mean); });
        float const by = 1 / std::sqrt(squares / count + c.epsilon);
        int64_t i = 0;
        for (; i + kLanes <= c.k; i += kLanes) {
            V const scaled = (load(x + i) - mean) * by * load(c.scale + i);
            store(y + i, c.bias == nullptr ? scaled : scaled + load(c.bias + i));
        }
        for (; i < c.k; ++i) {
            float const scaled = (x[i] - mean) * by * c.scale[i];
            y[i] = c.bias == nullptr ? scaled : scaled + c.bias[i];
        }
    }

    // The sum of what `of` makes of each: of 64 beside one another, so that it is as good as wider ones.
    template <typename Of>
    static float total(float const* x, int64_t k, Of of) {
        V sums[4]{};
        int64_t i = 0;
        for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
#pragma GCC unroll 4
            for (int s = 0; s < 4; ++s) {
                sums[s] += of(load(x + i + s * kLanes));
            }
        }
        for (; i + kLanes <= k; i += kLanes) {
            sums[0] += of(load(x + i));
        }
        float rest = 0;
        for (; i < k; ++i) {
            rest += of(x[i]);
        }
        return sum(sums[0] + sums[1] + (sums[2] + sums[3])) + rest;
    }
};

}  // namespace cpu
