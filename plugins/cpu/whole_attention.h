// Attention without a cache, of one head at a time: its keys and values are packed, then met by blocks of queries.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernel.h"
#include "vectors.h"

namespace cpu {

constexpr float kHidden = -1e38f;  // of a score: float32's lowest number is what many masks hide keys with

template <typename Isa>  // whose functions are then of one file alone
struct WholeAttention {
    static constexpr int kQueries = Isa::kPairs ? 8 : 4;  // with two vectors of each, 18 registers of 32, or 6 of 16
    static constexpr int kTiles = Isa::kPairs ? 2 : 1;
    static constexpr int64_t kAhead = 32;  // rows of keys that are asked for

    // Queries [first, first + count) of one head; `memory`: WholeCall::memory() floats.
    static void attend(WholeCall const& c, int64_t row, int64_t head, int64_t first, int64_t count, float* memory) {
        int64_t const padded = c.padded_keys(), kv_head = head / (c.heads / c.kv_heads);
        float* const keys = memory;
        float* const values = keys + padded * c.size;
        float* const own_mask = values + padded * c.size;
        float* const weights = own_mask + kQueries * padded;
        float const* mask = nullptr;
        float const* const k = c.key + row * c.keys * c.key_width + kv_head * c.size;
        float const* const v = c.value + row * c.keys * c.value_width + kv_head * c.size;
        for (int64_t t = 0; t < c.keys; t += kLanes) {
            pack(k, v, c, t, keys + t * c.size, values + t * c.size);
        }
        if (c.mask_query == 0) {
            mask = mask_of(c, row, head, first, own_mask);
        }
        for (int64_t q = first; q < first + count; q += kQueries) {
            float const *queries[kQueries], *masks[kQueries];
            for (int r = 0; r < kQueries; ++r) {
                int64_t const at = std::min(q + r, first + count - 1);
                queries[r] = c.query + (row * c.queries + at) * c.query_width + head * c.size;
                for (int64_t i = 0; i < c.size; i += kLanes) {
                    __builtin_prefetch(queries[r] + kAhead * c.query_width + i);
                }
                masks[r] = c.mask_query == 0 ? mask : mask_of(c, row, head, at, own_mask + r * padded);
            }
            float shares[kQueries];
            weigh(keys, c.size, padded, queries, masks, weights, shares);
            float* y[kQueries];
            for (int r = 0; r < kQueries; ++r) {
                int64_t const at = std::min(q + r, first + count - 1);
                y[r] = c.y + ((row * c.queries + at) * c.heads + head) * c.size;
            }
            int64_t i = 0;
            for (; i + kTiles * kLanes <= c.size; i += kTiles * kLanes) {
                sum_values<kTiles>(values + i, c.keys, c.size, weights, padded, shares, y, i);
            }
            for (; i < c.size; i += kLanes) {
                sum_values<1>(values + i, c.keys, c.size, weights, padded, shares, y, i);
            }
        }
    }

    // Sixteen keys, scaled, [size][16], and values [16][size]: zeros behind the last.
    static void pack(float const* k, float const* v, WholeCall const& c, int64_t first, float* keys, float* values) {
        int64_t const count = std::min<int64_t>(kLanes, c.keys - first);
        for (int64_t i = 0; i < c.size; i += kLanes) {
            V key[kLanes];
#pragma GCC unroll 16
            for (int64_t t = 0; t < kLanes; ++t) {
                int64_t const at = first + t;
                key[t] = t < count ? load(k + at * c.key_width + i) * c.scale : V{};
                store(values + t * c.size + i, t < count ? load(v + at * c.value_width + i) : V{});
                __builtin_prefetch(k + (at + kAhead) * c.key_width + i);  // rows lie too far apart for a core to see it
                __builtin_prefetch(v + (at + kAhead) * c.value_width + i);
            }
            transpose(key);
#pragma GCC unroll 16
            for (int t = 0; t < kLanes; ++t) {
                store(keys + (i + t) * kLanes, key[t]);
            }
        }
    }

    // What is added to a query's scores, as it is or in `into`; nothing is seen behind the last key.
    static float const* mask_of(WholeCall const& c, int64_t row, int64_t head, int64_t query, float* into) {
        int64_t const at = row * c.mask_row + head * c.mask_head + query * c.mask_query;
        if (c.mask == nullptr) {
            std::fill_n(into, c.keys, 0.0f);
        } else if (c.seen) {
            uint8_t const* const seen = static_cast<uint8_t const*>(c.mask) + at;
            for (int64_t t = 0; t < c.keys; ++t) {
                into[t] = seen[t] ? 0 : -INFINITY;
            }
        } else if (c.keys == c.padded_keys()) {
            return static_cast<float const*>(c.mask) + at;
        } else {
            std::copy_n(static_cast<float const*>(c.mask) + at, c.keys, into);
        }
        std::fill(into + c.keys, into + c.padded_keys(), -INFINITY);
        return into;
    }

    // Weights of a block, [query][padded], and one over the sum of each; 0 for one that sees nothing.
    static void weigh(float const* keys, int64_t size, int64_t padded, float const* const (&q)[kQueries],
                      float const* const (&mask)[kQueries], float* weights, float (&shares)[kQueries]) {
        V most[kQueries];
        for (V& each : most) {
            each = spread(-INFINITY);
        }
        int64_t t = 0;
        for (; t + kTiles * kLanes <= padded; t += kTiles * kLanes) {
            scores<kTiles>(keys + t * size, size, t, padded, q, mask, weights, most);
        }
        for (; t < padded; t += kLanes) {
            scores<1>(keys + t * size, size, t, padded, q, mask, weights, most);
        }
        for (int r = 0; r < kQueries; ++r) {
            float const top = largest(most[r]), base = top < kHidden ? 0 : top;
            V all{};
            for (int64_t k = 0; k < padded; k += kLanes) {
                V const weight = exponential(load(weights + r * padded + k) - base);
                store(weights + r * padded + k, weight);
                all += weight;
            }
            float const total = sum(all);
            shares[r] = total == 0 ? 0 : 1 / total;
        }
    }

    // Not inlined, as the next: in a function of its own all sums stay in registers.
    template <int Tiles>
    [[gnu::noinline]] static void scores(float const* keys, int64_t size, int64_t t, int64_t padded,
                                         float const* const (&q)[kQueries], float const* const (&mask)[kQueries],
                                         float* weights, V (&most)[kQueries]) {
        V sums[kQueries][Tiles]{};
        for (int64_t i = 0; i < size; ++i) {
            V key[Tiles];
#pragma GCC unroll 2
            for (int w = 0; w < Tiles; ++w) {
                key[w] = load(keys + (w * size + i) * kLanes);
            }
#pragma GCC unroll 8
            for (int r = 0; r < kQueries; ++r) {
#pragma GCC unroll 2
                for (int w = 0; w < Tiles; ++w) {
                    sums[r][w] += key[w] * q[r][i];
                }
            }
        }
        for (int r = 0; r < kQueries; ++r) {
            for (int w = 0; w < Tiles; ++w) {
                V const score = sums[r][w] + load(mask[r] + t + w * kLanes);
                store(weights + r * padded + t + w * kLanes, score);
                most[r] = largest(most[r], score);
            }
        }
    }

    template <int Width>
    [[gnu::noinline]] static void sum_values(float const* values, int64_t keys, int64_t size, float const* weights,
                                             int64_t padded, float const (&shares)[kQueries],
                                             float* const (&y)[kQueries], int64_t i) {
        V all[kQueries][Width]{};
        for (int64_t t = 0; t < keys; ++t) {
            V value[Width];
#pragma GCC unroll 2
            for (int w = 0; w < Width; ++w) {
                value[w] = load(values + t * size + w * kLanes);
            }
#pragma GCC unroll 8
            for (int r = 0; r < kQueries; ++r) {
                float const weight = weights[r * padded + t];
#pragma GCC unroll 2
                for (int w = 0; w < Width; ++w) {
                    all[r][w] += value[w] * weight;
                }
            }
        }
        for (int r = 0; r < kQueries; ++r) {
            for (int w = 0; w < Width; ++w) {
                store(y[r] + i + w * kLanes, all[r][w] * shares[r]);
            }
        }
    }
};

}  // namespace cpu
