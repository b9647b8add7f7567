// int8 activations, one block for each row: s_x = max|x| / 127 (1 for a row of zeros), values half to even; the same bits
// as semantics.py. A row with a NaN or infinity gets a scale of NaN or infinity and spoils no other row.
#include "int8.h"

namespace wog {
namespace {

constexpr int kQuantizeThreads = 256;

struct QuantizeArgs {
    uint16_t const* x;
    Int8Rows rows;
    int64_t m;
    int32_t k, group;
};

template <class T>
__global__ void __launch_bounds__(kQuantizeThreads) quantize(QuantizeArgs const p) {
    int64_t const m = blockIdx.x;
    uint16_t const* const x = p.x + m * p.k;
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunks = p.k / 16;
    uint32_t* const warp_max = reinterpret_cast<uint32_t*>(dynamic_shared());
    int32_t* const chunk_sums = reinterpret_cast<int32_t*>(warp_max + 8);  // [K / 16]

    // magnitudes compare as integers, and so a NaN wins
    uint32_t most = 0;
    for (int c = threadIdx.x; c < chunks * 2; c += kQuantizeThreads) {
        uint4 const v = reinterpret_cast<uint4 const*>(x)[c];
        for (uint32_t const word : {v.x, v.y, v.z, v.w})
            for (int half = 0; half < 2; half++) {
                uint32_t const magnitude = float_bits(to_float<T>(uint16_t(word >> 16 * half))) & 0x7fffffff;
                most = magnitude > most ? magnitude : most;
            }
    }
    for (int mask = 16; mask; mask /= 2) {
        uint32_t const other = exchange(most, mask);
        most = other > most ? other : most;
    }
    if (lane == 0) warp_max[warp] = most;
    block_barrier();
    for (int i = 0; i < kQuantizeThreads / 32; i++) most = warp_max[i] > most ? warp_max[i] : most;
    float const amax = most ? bits_float(most) : 127.0f;
    float const inverse = divide(127.0f, amax);
    if (threadIdx.x == 0) p.rows.scales[m] = divide(amax, 127.0f);

    for (int c = threadIdx.x; c < chunks; c += kQuantizeThreads) {
        uint32_t out[4] = {};
        int32_t sum = 0;
        for (int half = 0; half < 2; half++) {
            uint4 const v = reinterpret_cast<uint4 const*>(x)[c * 2 + half];
            uint32_t const words[4] = {v.x, v.y, v.z, v.w};
            for (int t = 0; t < 4; t++)
                for (int e = 0; e < 2; e++) {  // k = 8 half + 2 t + e goes to byte 2 e + half of word t
                    int q = round_to_int(multiply(to_float<T>(uint16_t(words[t] >> 16 * e)), inverse));
                    q = q < -127 ? -127 : q > 127 ? 127 : q;
                    sum += q;
                    out[t] |= (uint32_t(q) & 255) << 8 * (2 * e + half);
                }
        }
        reinterpret_cast<uint4*>(p.rows.values + m * p.k)[c] = {out[0], out[1], out[2], out[3]};
        chunk_sums[c] = sum;
    }
    block_barrier();
    int const per_group = p.group / 16;
    for (int group = warp; group < p.k / p.group; group += kQuantizeThreads / 32) {
        uint32_t sum = 0;
        for (int i = lane; i < per_group; i += 32) sum += uint32_t(chunk_sums[group * per_group + i]);
        for (int mask = 16; mask; mask /= 2) sum += exchange(sum, mask);
        if (lane == 0) p.rows.sums[group * p.m + m] = int32_t(sum);
    }
}

}  // namespace

char const* launch_quantize(wog_problem const& p, wog_tensors const& t, void* stream) {
    QuantizeArgs const args{static_cast<uint16_t const*>(t.x), int8_rows(p, t.workspace), p.m, p.k, p.group};
    Grid const grid{dim3(unsigned(p.m)), kQuantizeThreads, 32 + size_t(p.k) / 16 * 4};
    return launch(p.type == WOG_F16 ? quantize<Half> : quantize<Bfloat>, grid, static_cast<Stream>(stream), args);
}

}  // namespace wog
