// What products of many rows need to know of x beforehand, in one pass over it: X, the sum of each row over each group,
// and for int8 activations the rows' values and scales.
//
// A block of 256 threads has 1 to 8 rows, a thread every so many 16 k of one row, the first of them kept in registers
// from the search for the largest to the rounding. s_x = max|x| / 127 (1 for a row of zeros), values half to even; the
// same bits as semantics.py. A row with a NaN or infinity gets a scale of NaN or infinity and spoils no other row.
#include <type_traits>

#include "int8.h"

namespace wog {
namespace {

constexpr int kThreads = 256, kHeld = 4;

struct RowsArgs {
    uint16_t const* x;
    int8_t* values;  // [M, K], for int8
    float* scales;   // [M], likewise
    float* sums;     // [K / group, pitch]: of values, or of x
    int64_t pitch, m;
    int32_t k, group, threads;  // of a row: 32 .. 256
};

struct Sixteen {
    uint4 half[2];
};

template <class T, bool kInt8>
struct Rows {
    using Sum = std::conditional_t<kInt8, int32_t, float>;

    RowsArgs const& p;
    int const inside = threadIdx.x / p.threads, thread = threadIdx.x % p.threads;
    int const lane = thread % 32, warp = thread / 32;
    int64_t const m = int64_t(blockIdx.x) * (kThreads / p.threads) + inside;
    int const chunks = m < p.m ? p.k / 16 : 0;
    uint32_t* const warp_max = reinterpret_cast<uint32_t*>(dynamic_shared());
    Sum* const chunk_sums = reinterpret_cast<Sum*>(warp_max + kThreads / 32) + inside * (p.k / 16);

    __device__ __forceinline__ Sixteen load(int chunk) const {
        auto const* const from = reinterpret_cast<uint4 const*>(p.x + m * p.k) + 2 * chunk;
        return {from[0], from[1]};
    }

    // Magnitudes compare as integers, two at a time, and so a NaN wins.
    static __device__ __forceinline__ uint32_t largest(uint32_t most, Sixteen const& v) {
#pragma unroll
        for (uint4 const& half : v.half)
            for (uint32_t const word : {half.x, half.y, half.z, half.w}) most = max_halves(most, word & 0x7fff7fff);
        return most;
    }

    // Over all threads of the row
    __device__ __forceinline__ float row_max(uint32_t halves) const {
        uint32_t most = halves >> 16 > (halves & 0xffff) ? halves >> 16 : halves & 0xffff;
        for (int mask = 16; mask; mask /= 2) {
            uint32_t const other = exchange(most, mask);
            most = other > most ? other : most;
        }
        if (lane == 0) warp_max[threadIdx.x / 32] = most;
        block_barrier();
        int const first = inside * (p.threads / 32);
        for (int i = first; i < first + p.threads / 32; i++) most = warp_max[i] > most ? warp_max[i] : most;
        return to_float<T>(uint16_t(most));
    }

    __device__ __forceinline__ void quantize(Sixteen const& v, int chunk, float inverse) const {
        uint32_t out[4] = {};
        int32_t sum = 0;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t const words[4] = {v.half[h].x, v.half[h].y, v.half[h].z, v.half[h].w};
#pragma unroll
            for (int t = 0; t < 4; t++)
#pragma unroll
                for (int e = 0; e < 2; e++) {  // k = 8 h + 2 t + e goes to byte 2 e + h of word t
                    int q = round_to_int(multiply(to_float<T>(uint16_t(words[t] >> 16 * e)), inverse));
                    q = q < -127 ? -127 : q > 127 ? 127 : q;
                    sum += q;
                    out[t] |= (uint32_t(q) & 255) << 8 * (2 * e + h);
                }
        }
        reinterpret_cast<uint4*>(p.values + m * p.k)[chunk] = {out[0], out[1], out[2], out[3]};
        chunk_sums[chunk] = sum;
    }

    __device__ __forceinline__ void add(Sixteen const& v, int chunk) const {
        float sums[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t const words[4] = {v.half[h].x, v.half[h].y, v.half[h].z, v.half[h].w};
            float pairs[4];
#pragma unroll
            for (int t = 0; t < 4; t++)
                pairs[t] = to_float<T>(uint16_t(words[t])) + to_float<T>(uint16_t(words[t] >> 16));
            sums[h] = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
        }
        chunk_sums[chunk] = sums[0] + sums[1];
    }

    static __device__ __forceinline__ float exchange_sum(float sum, int mask) {
        return bits_float(exchange(float_bits(sum), mask));
    }
    static __device__ __forceinline__ int32_t exchange_sum(int32_t sum, int mask) {
        return int32_t(exchange(uint32_t(sum), mask));
    }

    // As many lanes add the sums of a group's chunks as there are, up to a warp
    __device__ __forceinline__ void sum_groups() const {
        int const per_group = p.group / 16, groups = p.k / p.group;
        int lanes = 2;
        while (lanes < 32 && lanes < per_group) lanes *= 2;
        for (int first = warp * (32 / lanes); first < groups; first += p.threads / lanes) {
            int const group = first + lane / lanes;
            Sum sum = 0;
            if (group < groups && chunks)
                for (int i = lane % lanes; i < per_group; i += lanes) sum += chunk_sums[group * per_group + i];
            for (int mask = lanes / 2; mask; mask /= 2) sum += exchange_sum(sum, mask);
            if (group < groups && chunks && lane % lanes == 0) p.sums[group * p.pitch + m] = float(sum);
        }
    }

    __device__ __forceinline__ void run() {
        Sixteen held[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (thread + i * p.threads < chunks) held[i] = load(thread + i * p.threads);
        int const rest = thread + kHeld * p.threads;
        float inverse = 0;
        if constexpr (kInt8) {
            uint32_t most = 0;
#pragma unroll
            for (int i = 0; i < kHeld; i++)
                if (thread + i * p.threads < chunks) most = largest(most, held[i]);
            for (int c = rest; c < chunks; c += p.threads) most = largest(most, load(c));
            float const found = row_max(most), amax = found == 0 ? 127.0f : found;
            inverse = divide(127.0f, amax);
            if (thread == 0 && chunks) p.scales[m] = divide(amax, 127.0f);
        }
        auto const finish = [&](Sixteen const& v, int chunk) {
            if constexpr (kInt8)
                quantize(v, chunk, inverse);
            else
                add(v, chunk);
        };
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (thread + i * p.threads < chunks) finish(held[i], thread + i * p.threads);
        for (int c = rest; c < chunks; c += p.threads) finish(load(c), c);
        block_barrier();
        sum_groups();
    }
};

template <class T, bool kInt8>
__global__ void __launch_bounds__(kThreads) rows(RowsArgs const p) {
    wait_for_inputs();
    release_next();
    Rows<T, kInt8>{p}.run();
}

// `to`: where the results go
char const* launch_rows(void (*kernel)(RowsArgs), wog_problem const& p, RowsArgs to, wog_tensors const& t,
                        void* stream) {
    RowsArgs args{static_cast<uint16_t const*>(t.x), to.values, to.scales, to.sums, to.pitch, p.m, p.k, p.group, 32};
    while (args.threads < kThreads && args.threads * 2 < p.k / 16) args.threads *= 2;
    int const rows = kThreads / args.threads;
    size_t const shared = kThreads / 32 * 4 + size_t(rows) * (p.k / 16) * 4;
    Grid const grid{dim3(unsigned(ceil_div(p.m, rows))), kThreads, shared, dim3(1), p.sm >= 90};
    return launch(kernel, grid, static_cast<Stream>(stream), args);
}

}  // namespace

char const* launch_quantize(wog_problem const& p, wog_tensors const& t, void* stream) {
    if (p.activation_bits != 8) return nullptr;
    Int8Rows const to = int8_rows(p, t.workspace);
    auto* const kernel = p.type == WOG_F16 ? rows<Half, true> : rows<Bfloat, true>;
    return launch_rows(kernel, p, {nullptr, to.values, to.scales, to.sums, to.pitch}, t, stream);
}

char const* launch_sums(wog_problem const& p, wog_tensors const& t, float* sums, void* stream) {
    auto* const kernel = p.type == WOG_F16 ? rows<Half, false> : rows<Bfloat, false>;
    return launch_rows(kernel, p, {nullptr, nullptr, nullptr, sums, padded_rows(p.m)}, t, stream);
}

}  // namespace wog
