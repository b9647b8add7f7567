// Attention of queries over a cache: scores, softmax and sums of values, for the instructions it is compiled with.
//
// Queries of one token and of heads that share keys and values are rows beside one another, so that keys and values are
// read once for all of them. Where tokens are many, keys are packed first, sixteen beside one another.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cache.h"

namespace cpu {

constexpr int kWidth = 4;  // vectors of values that are summed at once: 16 sums, 4 values and 4 weights in registers

template <typename Isa>  // whose functions are then of one file alone
struct Attention {
    template <typename Work>
    static void for_type(Cache cache, Work work) {
        switch (cache) {
            case Cache::kF32:
                return work(float{});
            case Cache::kF16:
                return work(Half{});
            case Cache::kI8:
                return work(int8_t{});
            case Cache::kNibbles:
                return work(Nibbles{});
        }
    }

    // Rotates the queries of a token that share a key, scaled, and that key; puts it and its value into the cache.
    static void prepare(AttentionCall const& c, int64_t row, int64_t token, int64_t kv_head) {
        for_type(c.cache, [&](auto type) { prepare_of<decltype(type)>(c, row, token, kv_head); });
    }

    template <typename T>
    static void prepare_of(AttentionCall const& c, int64_t row, int64_t token, int64_t kv_head) {
        constexpr bool kTurned = std::is_same_v<T, Nibbles>;
        int64_t const size = c.size, half = c.rotated / 2, shared = c.heads / c.kv_heads;
        int64_t const line = row * c.tokens + token, position = half > 0 ? c.positions[line] : 0;
        int64_t const place = (row * c.kv_heads + kv_head) * c.capacity + c.past(row) + token;
        float const* const queries = c.query + line * c.query_width;
        float const *cos = c.cos + position * half, *sin = c.sin + position * half;
        for (int64_t h = kv_head * shared; h < (kv_head + 1) * shared; ++h) {
            float* const into = c.queries + ((row * c.heads + h) * c.tokens + token) * size;
            rotate(queries + h * size, c, cos, sin, c.scale, into);
            if constexpr (std::is_same_v<T, int8_t>) {
                by_scales(into, c.keys.scales + kv_head * size, size);
            }
            if constexpr (kTurned) {
                turn(into, size);
            }
        }
        float* const fresh = c.fresh + (line * c.kv_heads + kv_head) * size;
        rotate(c.key + line * c.key_width + kv_head * size, c, cos, sin, 1, fresh);
        float const* value = c.value + line * c.value_width + kv_head * size;
        if constexpr (kTurned) {
            for (int64_t i = 0; c.center != nullptr && i < size; i += kLanes) {
                store(fresh + i, load(fresh + i) - load(c.center + kv_head * size + i));
            }
            turn(fresh, size);
        }
        Keep<Isa, T>::token(fresh, c.keys, kv_head, place, size);
        if constexpr (kTurned) {
            std::copy_n(value, size, fresh);
            turn(fresh, size);
            value = fresh;
        }
        Keep<Isa, T>::token(value, c.values, kv_head, place, size);
    }

    static void by_scales(float* x, float const* scales, int64_t size) {
        for (int64_t i = 0; i < size; i += kLanes) {
            store(x + i, load(x + i) * load(scales + i));
        }
    }

    // A head's first channels by pairs: those of its first half with those of the second, or neighbours.
    static void rotate(float const* x, AttentionCall const& c, float const* cos, float const* sin, float scale,
                       float* into) {
        int64_t const half = c.rotated / 2;
        auto const pairs = [&](int64_t step, int64_t other) {
            for (int64_t i = 0; i < half; ++i) {
                float const a = x[i * step], b = x[i * step + other];
                into[i * step] = (a * cos[i] - b * sin[i]) * scale;
                into[i * step + other] = (b * cos[i] + a * sin[i]) * scale;
            }
        };
        c.interleaved ? pairs(2, 1) : pairs(1, half);
        for (int64_t i = 2 * half; i < c.size; ++i) {
            into[i] = x[i] * scale;
        }
    }

    // Keys [tile * 16 ...) of a head, [size][16], zero behind the last; values in four bits are read beside them.
    static void pack(AttentionCall const& c, int64_t row, int64_t kv_head, int64_t tile, float* into) {
        for_type(c.cache, [&](auto type) {
            int64_t const first = tile * kLanes, count = std::min<int64_t>(kLanes, c.length(row) - first);
            int64_t const place = (row * c.kv_heads + kv_head) * c.capacity + first;
            Tile<Isa, decltype(type)> const keys(c.keys, place, c.size, count);
            for (int64_t i = 0; i < c.size; i += kLanes) {
                V sixteen[kLanes];
#pragma GCC unroll 16
                for (int64_t k = 0; k < kLanes; ++k) {
                    sixteen[k] = k < count ? keys.at(k, i) : V{};
                }
                transpose(sixteen);
#pragma GCC unroll 16
                for (int64_t k = 0; k < kLanes; ++k) {
                    store(into + (i + k) * kLanes, sixteen[k]);
                }
            }
            if constexpr (std::is_same_v<decltype(type), Nibbles>) {
                Tile<Isa, Nibbles> const values(c.values, place, c.size, count);
                float* const lines = c.values_read + tile_place(c, row, kv_head) * c.size + first * c.size;
                for (int64_t k = 0; k < count; ++k) {
                    for (int64_t i = 0; i < c.size; i += kLanes) {
                        store(lines + k * c.size + i, values.at(k, i));
                    }
                }
            }
        });
    }

    // Queries [first, first + R) of the heads that share `kv_head`, over keys [begin, end): weights that are not yet
    // divided by their sum, which is `total`, less `top`, the largest score; and `sums` of values [R][size].
    template <int R, typename T>
    static void attend(AttentionCall const& c, int64_t row, int64_t kv_head, int64_t first, int64_t begin, int64_t end,
                       float* weights, float* top, float* total, float* sums) {
        int64_t const shared = c.heads / c.kv_heads, stride = (end - begin + kLanes - 1) / kLanes * kLanes;
        int64_t const place = (row * c.kv_heads + kv_head) * c.capacity;
        float const *q[R], *mask[R];
        int64_t seen[R];  // keys before and at the query itself, whatever the mask says of others
        V most[R];
        for (int r = 0; r < R; ++r) {
            int64_t const token = (first + r) / shared, head = kv_head * shared + (first + r) % shared;
            q[r] = c.queries + ((row * c.heads + head) * c.tokens + token) * c.size;
            mask[r] = c.mask + (row * c.tokens + token) * c.columns;
            seen[r] = c.past(row) + token + 1;
            most[r] = spread(-INFINITY);
        }
        float const* const packed = c.packed == nullptr ? nullptr : c.packed + tile_place(c, row, kv_head) * c.size;
        for (int64_t t = begin; t < end;) {
            int64_t const wide = packed != nullptr && t + 2 * kLanes <= end ? 2 : 1;
            V scores[2][R];
            if (wide == 2) {
                packed_scores<R, 2>(packed + t * c.size, c.size, q, scores);
            } else if (packed != nullptr) {
                packed_scores<R, 1>(packed + t * c.size, c.size, q, scores);
            } else {
                int64_t const count = std::min<int64_t>(kLanes, end - t);
                direct_scores<R>(Tile<Isa, T>(c.keys, place + t, c.size, count), count, c.size, q, scores[0]);
            }
            for (int64_t w = 0; w < wide; ++w, t += kLanes) {
                for (int r = 0; r < R; ++r) {
                    V const score =
                        scores[w][r] + masked(mask[r] + t, std::min({int64_t{kLanes}, end - t, seen[r] - t}));
                    store(weights + r * stride + t - begin, score);
                    most[r] = largest(most[r], score);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            top[r] = largest(most[r]);
            V all{};
            float const base = top[r] == -INFINITY ? 0 : top[r];  // nothing is seen: all weights are 0
            for (int64_t t = 0; t < stride; t += kLanes) {
                V const weight = exponential(load(weights + r * stride + t) - base);
                store(weights + r * stride + t, weight);
                all += weight;
            }
            total[r] = sum(all);
        }
        if (std::is_same_v<T, Nibbles> && packed != nullptr) {
            CachePart const read{c.values_read};
            sum_all<R, float>(read, tile_place(c, row, kv_head), begin, end, c.size, weights, stride, sums);
        } else {
            sum_all<R, T>(c.values, place, begin, end, c.size, weights, stride, sums);
        }
        for (int r = 0; r < R; ++r) {
            if constexpr (std::is_same_v<T, int8_t>) {
                by_scales(sums + r * c.size, c.values.scales + kv_head * c.size, c.size);
            }
            if constexpr (std::is_same_v<T, Nibbles>) {
                turn(sums + r * c.size, c.size);  // back: the matrix is its own inverse
            }
        }
    }

    static V masked(float const* mask, int64_t count) {
        if (count == kLanes) {
            return load(mask);
        }
        float all[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
            all[i] = i < count ? mask[i] : -INFINITY;
        }
        return load(all);
    }

    // Of `Tiles` times sixteen keys: with two, no sum waits for the one before.
    template <int R, int Tiles>
    static void packed_scores(float const* keys, int64_t size, float const* const (&q)[R], V (&scores)[2][R]) {
        V sums[Tiles][R];
        for (auto& tile : sums) {
            for (V& each : tile) {
                each = V{};
            }
        }
        for (int64_t i = 0; i < size; ++i) {
            V key[Tiles];
            for (int t = 0; t < Tiles; ++t) {
                key[t] = load(keys + (t * size + i) * kLanes);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                V const x = spread(q[r][i]);
                for (int t = 0; t < Tiles; ++t) {
                    sums[t][r] += key[t] * x;
                }
            }
        }
        for (int t = 0; t < Tiles; ++t) {
            for (int r = 0; r < R; ++r) {
                scores[t][r] = sums[t][r];
            }
        }
    }

    template <int R, typename Keys>
    static void direct_scores(Keys const& keys, int64_t count, int64_t size, float const* const (&q)[R],
                              V (&scores)[R]) {
        V parts[R][kLanes];
        for (int64_t k = 0; k < kLanes; ++k) {
            V all[R]{};
            for (int64_t i = 0; i < size; i += kLanes) {
                V const part = keys.at(std::min(k, count - 1), i);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    all[r] += part * load(q[r] + i);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                parts[r][k] = all[r];
            }
        }
        for (int r = 0; r < R; ++r) {
            scores[r] = sums_of(parts[r]);
        }
    }

    // Where a head's tokens begin among those in tiles of sixteen.
    static int64_t tile_place(AttentionCall const& c, int64_t row, int64_t kv_head) {
        return (row * c.kv_heads + kv_head) * ((c.columns + kLanes - 1) / kLanes * kLanes);
    }

    template <int R, typename T>
    static void sum_all(CachePart const& part, int64_t place, int64_t begin, int64_t end, int64_t size,
                        float const* weights, int64_t stride, float* sums) {
        int64_t i = 0;
        for (; i + kWidth * kLanes <= size; i += kWidth * kLanes) {
            sum_values<R, kWidth, T>(part, place, begin, end, size, i, weights, stride, sums);
        }
        for (; i < size; i += kLanes) {
            sum_values<R, 1, T>(part, place, begin, end, size, i, weights, stride, sums);
        }
    }

    // `Width` vectors of the sums of values, from channel `i` on.
    template <int R, int Width, typename T>
    static void sum_values(CachePart const& part, int64_t place, int64_t begin, int64_t end, int64_t size, int64_t i,
                           float const* weights, int64_t stride, float* sums) {
        V all[R][Width]{};
        for (int64_t t = begin; t < end; t += kLanes) {
            int64_t const count = std::min<int64_t>(kLanes, end - t);
            Tile<Isa, T> const values(part, place + t, size, count);
            for (int64_t k = 0; k < count; ++k) {
                V value[Width];
                for (int w = 0; w < Width; ++w) {
                    value[w] = values.at(k, i + w * kLanes);
                }
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    float const weight = weights[r * stride + t - begin + k];
#pragma GCC unroll 4
                    for (int w = 0; w < Width; ++w) {
                        all[r][w] += value[w] * weight;
                    }
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int w = 0; w < Width; ++w) {
                store(sums + r * size + i + w * kLanes, all[r][w]);
            }
        }
    }

    static void attend(AttentionCall const& c, int64_t row, int64_t kv_head, int64_t first, int64_t count,
                       int64_t begin, int64_t end, float* weights, float* top, float* total, float* sums) {
        for_type(c.cache, [&](auto type) {
            using T = decltype(type);
            switch (count) {
                case 1:
                    return attend<1, T>(c, row, kv_head, first, begin, end, weights, top, total, sums);
                case 2:
                    return attend<2, T>(c, row, kv_head, first, begin, end, weights, top, total, sums);
                case 3:
                    return attend<3, T>(c, row, kv_head, first, begin, end, weights, top, total, sums);
                default:
                    return attend<4, T>(c, row, kv_head, first, begin, end, weights, top, total, sums);
            }
        });
    }
};

}  // namespace cpu
