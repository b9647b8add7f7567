// The kernels of WeightOnlyGemm for Volta: the first tensor cores, no asynchronous copies, no ldmatrix.
//
// mma.m8n8k4 multiplies 8 x 4 by 4 x 8 in each of four quad pairs (device.h has the map). Whoever names the four k the
// same way in a and b may choose them, so frag16 serves as it is: lane (r, q) = row and quad pair reads the 16 bytes
// that lane 4 r + q reads elsewhere. Quad pair q then has, of every k16 step, k = {2q, 2q+1, 2q+8, 2q+9}, for rows r
// (registers 0, 2 of the decoded fragment) and r + 8 (1, 3), and the four quad pairs hold parts of one sum:
//
//     acc(q) += s * (P(q) - (z - c) * X(q))   at the end of each group, all fp32;   sum over q at the very end
//
// exact zeros as in turing.cu, and like there a sum over any parts of K. X is a product with ones, in the lanes that
// need it.
//
// That is best for few rows: every load of weights is one coalesced block. But a sum is held four times, so with many
// rows a warp takes four strips and gives one to each quad pair (kApart): lane (r, q) reads, of strip q, the 16 bytes
// of lanes 4 r .. 4 r + 3, which are the four parts of K, one after the other. The same registers then hold four times
// the tile.
//
// Work split as in turing.cu: a block owns WN * S * 16 n, C * 8 m and a part of K; warps (wk, wn). The WN warps of a wk
// share two slots of x, C KiB each: 128 bytes (64 k) a row, so that one is filled while the other is read.
#include "volta.h"

#include <device.h>

#include "decode.h"

namespace wog {
namespace {

constexpr uint32_t kOnes = 0x3c003c00;

template <int Bits, int I>
struct Volta {
    static constexpr Row kRow = kRows[I];
    static constexpr int WN = kRow.warps_n, WK = kRow.warps_k, S = kRow.strips, C = kRow.columns;
    static constexpr int kAhead = kRow.stages[Bits == 8], kThreads = kRow.threads();
    static constexpr int kBlockN = kRow.block_n(), kBlockM = kRow.block_m();
    static constexpr int kBlocks = Bits / 4;                                 // 512-byte blocks of one strip in a stage
    static constexpr int kSums = C > WN ? C / WN : 1;                        // columns of m whose X this warp counts
    static constexpr int kPieces = (kBlockM * 4 + WN * 32 - 1) / (WN * 32);  // of 32 bytes of x, that a thread moves
    static constexpr bool kApart = strip_for_each_quad_pair(kRow);
    static constexpr int kHeld = kApart ? 1 : S;  // strips whose sums a lane holds
    static_assert(C % kSums == 0 && volta_shared_bytes(kRow) <= 48 * 1024, "the table");

    VoltaArgs const& p;
    int const lane = threadIdx.x % 32, r = lane % 4 + lane / 16 * 4, q = lane % 16 / 4;
    int const warp = threadIdx.x / 32, wn = warp % WN, wk = warp / WN;
    int64_t const m0 = int64_t(blockIdx.x) * kBlockM;
    int const n0 = blockIdx.y * kBlockN + wn * S * 16;
    unsigned char* const x_slots = dynamic_shared() + wk * kXSlots * kBlockM * 128;
    float* const group_sums =
        reinterpret_cast<float*>(dynamic_shared() + WK * kXSlots * kBlockM * 128) + wk * 2 * kQuadPairs * kBlockM;

    float acc[kHeld][C][2][8] = {}, sum[kHeld][C][2][8] = {};  // [strip][column of 8 m][rows 8 h ..]; `sum` is P
    float x_sum[kSums][8] = {};                                // X of those columns
    uint32_t affine[kHeld][2][2];                              // of this lane's two rows of each eight
    uint4 words[kAhead][S][kBlocks];                           // weights in flight; kApart: by part of K, not by strip
    uint4 pieces[kPieces][2];                                  // x in flight
    int parity = 0;

    __device__ __forceinline__ void barrier() const {
        if constexpr (WN == 1)
            warp_barrier();
        else
            named_barrier(1 + wk, WN * 32);
    }

    // Block b of a stage
    __device__ __forceinline__ void load_words(uint4 (&to)[S][kBlocks], int stage, int b) const {
        int const strips = p.out.n / 16, blocks = (p.k + 256 / Bits - 1) / (256 / Bits), block = stage * kBlocks + b;
#pragma unroll
        for (int s = 0; s < S; s++) {
            int const strip = n0 / 16 + (kApart ? q : s), part = kApart ? s : q;
            int const tile = strip / 8 * 8, width = strips - tile < 8 ? strips - tile : 8;
            int64_t const at = int64_t(tile) * blocks + int64_t(block) * width + (strip - tile);
            unsigned char const* const from = p.codes + at * 512 + (4 * r + part) * 16;
            to[s][b] = uint4{0, 0, 0, 0};
            if (strip >= strips || block >= blocks) continue;
            if constexpr (kApart)
                to[s][b] = *reinterpret_cast<uint4 const*>(from);  // a neighbour's half of 32 bytes waits in L1
            else
                to[s][b] = load_once(from);
        }
    }

    // A piece is k16 step `step` of one row
    __device__ __forceinline__ void load_x(int stage) {
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            int const piece = wn * 32 + lane + i * WN * 32, row = piece / 4, at = stage * 64 + piece % 4 * 16;
            pieces[i][0] = pieces[i][1] = uint4{0, 0, 0, 0};
            if (row >= kBlockM || m0 + row >= p.out.m || at >= p.k) continue;
            auto const* const from = reinterpret_cast<uint4 const*>(p.x + (m0 + row) * p.k + at);
            pieces[i][0] = from[0], pieces[i][1] = from[1];
        }
    }

    // 16-byte chunk `chunk` of a row: XOR lets 16 lanes read 8 bytes each, and 8 lanes write, without bank conflicts
    __device__ __forceinline__ static int place(int row, int chunk) {
        return row * 128 + (chunk ^ (row % 4 * 2 + row % 2)) * 16;
    }

    // In the order of reading: chunk h of a step has k 4h, 4h+1, 4h+8, 4h+9, 4h+2, 4h+3, 4h+10, 4h+11
    __device__ __forceinline__ void store_x(unsigned char* slot) const {
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            int const piece = wn * 32 + lane + i * WN * 32, row = piece / 4, step = piece % 4;
            if (row >= kBlockM) continue;
            uint4 const &a = pieces[i][0], &b = pieces[i][1];
            *reinterpret_cast<uint4*>(slot + place(row, step * 2)) = uint4{a.x, b.x, a.y, b.y};
            *reinterpret_cast<uint4*>(slot + place(row, step * 2 + 1)) = uint4{a.z, b.z, a.w, b.w};
        }
    }

    // Of row r of the eight from `column`: the four k of this quad pair of a step; or a chunk, those of parts 2 i, 2 i
    // + 1
    __device__ __forceinline__ uint2 read_x(unsigned char const* slot, int column, int step) const {
        return *reinterpret_cast<uint2 const*>(slot + column * 8 * 128 + place(r, step * 2 + q / 2) + q % 2 * 8);
    }
    __device__ __forceinline__ uint4 read_chunk(unsigned char const* slot, int column, int chunk) const {
        return *reinterpret_cast<uint4 const*>(slot + column * 8 * 128 + place(r, chunk));
    }

    __device__ __forceinline__ void load_affine(int unit) {
        uint32_t const* const row = p.affine + int64_t(unit * 32 / p.group) * p.out.n;
#pragma unroll
        for (int s = 0; s < kHeld; s++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int const n = n0 + (kApart ? q : s) * 16 + i / 2 * 8 + i % 2 * 2 + lane % 2 + lane / 16 * 4;
                affine[s][i / 2][i % 2] = n < p.out.n ? row[n] : 0;
            }
    }

    // P += codes * x, X += ones * x, for 32 k. Columns to be counted are loaded again: picking them by warp from those
    // to be multiplied would put these into local memory.
    __device__ __forceinline__ void multiply_unit(unsigned char const* slot, int unit, uint4 const (&w)[S][kBlocks]) {
#pragma unroll
        for (int step = 0; step < 2; step++) {
            if constexpr (kApart)
                multiply_step_apart(slot, unit, step, w);
            else
                multiply_step(slot, unit, step, w);
        }
    }

    __device__ __forceinline__ void multiply_step(unsigned char const* slot, int unit, int step,
                                                  uint4 const (&w)[S][kBlocks]) {
        uint2 x[C];
#pragma unroll
        for (int j = 0; j < C; j++) x[j] = read_x(slot, j, unit * 2 + step);
#pragma unroll
        for (int s = 0; s < S; s++) {
            uint32_t a[4];
            decode<Half, Bits>(a, w[s][(2 * unit + step) * Bits / 16], 2 * unit + step);
#pragma unroll
            for (int j = 0; j < C; j++)
#pragma unroll
                for (int h = 0; h < 2; h++) multiply_add(sum[s][j][h], a[h], a[h + 2], x[j].x, x[j].y);
        }
        if (wn * kSums >= C) return;
#pragma unroll
        for (int j = 0; j < kSums; j++) {
            uint2 const own = read_x(slot, wn * kSums + j, unit * 2 + step);
            multiply_add(x_sum[j], kOnes, kOnes, own.x, own.y);
        }
    }

    // Each quad pair has all parts of K, two of them in a chunk of x.
    __device__ __forceinline__ void multiply_step_apart(unsigned char const* slot, int unit, int step,
                                                        uint4 const (&w)[S][kBlocks]) {
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            int const chunk = (unit * 2 + step) * 2 + pair;
            uint4 x[C];
#pragma unroll
            for (int j = 0; j < C; j++) x[j] = read_chunk(slot, j, chunk);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t a[4];
                decode<Half, Bits>(a, w[2 * pair + i][(2 * unit + step) * Bits / 16], 2 * unit + step);
#pragma unroll
                for (int j = 0; j < C; j++)
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        multiply_add(sum[0][j][h], a[h], a[h + 2], i ? x[j].z : x[j].x, i ? x[j].w : x[j].y);
            }
            if (wn * kSums >= C) continue;
#pragma unroll
            for (int j = 0; j < kSums; j++) {
                uint4 const own = read_chunk(slot, wn * kSums + j, chunk);
                multiply_add(x_sum[j], kOnes, kOnes, own.x, own.y);
                multiply_add(x_sum[j], kOnes, kOnes, own.z, own.w);
            }
        }
    }

    // acc += s * (P - (z - c) * X). Every row of the product with ones is X.
    __device__ __forceinline__ void finish_group() {
        float* const sums = group_sums + (parity * kQuadPairs + q) * kBlockM;
        if constexpr (WN > 1) {
            if (wn * kSums < C && r < 4 && r % 2 == 0) {  // rows 0 and 2: between them they own all eight columns
#pragma unroll
                for (int j = 0; j < kSums; j++)
#pragma unroll
                    for (int i = 0; i < 8; i++)
                        if (!(i & 2)) sums[(wn * kSums + j) * 8 + (i & 4) + (lane & 2) + i % 2] = x_sum[j][i];
            }
            barrier();  // two buffers: the next group's writes wait for this group's readers at the next barrier
        }
#pragma unroll
        for (int j = 0; j < C; j++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float const x = WN == 1 ? x_sum[j % kSums][i] : sums[j * 8 + (i & 4) + (lane & 2) + i % 2];
#pragma unroll
                for (int s = 0; s < kHeld; s++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        uint32_t const pair = affine[s][h][i / 2 % 2];
                        float const scale = to_float<Half>(uint16_t(pair));
                        float const zero = to_float<Half>(uint16_t(pair >> 16)) - float(1 << (Bits - 1));
                        acc[s][j][h][i] += scale * (sum[s][j][h][i] - zero * x);
                        sum[s][j][h][i] = 0.0f;
                    }
            }
#pragma unroll
        for (int j = 0; j < kSums; j++)
#pragma unroll
            for (int i = 0; i < 8; i++) x_sum[j][i] = 0.0f;
        parity ^= 1;
    }

    __device__ __forceinline__ void accumulate() {
        constexpr int kStage = 64;
        int const stages = (p.k + kStage - 1) / kStage, units = p.k / 32;
        int const part = blockIdx.z * WK + wk, parts = p.splits * WK;
        int const first = int(int64_t(stages) * part / parts), last = int(int64_t(stages) * (part + 1) / parts);
        if (first == last) return;  // the same for all warps of a barrier
        load_x(first);
#pragma unroll
        for (int i = 0; i < kAhead; i++)
            if (first + i < last)
                for (int b = 0; b < kBlocks; b++) load_words(words[i], first + i, b);
        load_affine(first * 2);
        int const per_group = p.group / 32;
        int left = per_group - first * 2 % per_group;  // units to the end of the group under way
        for (int base = first; base < last; base += kAhead) {
#pragma unroll
            for (int i = 0; i < kAhead; i++) {  // unrolled: words stay in registers
                int const stage = base + i;
                if (stage >= last) break;
                unsigned char* const slot = x_slots + (stage - first) % kXSlots * kBlockM * 128;
                store_x(slot);
                barrier();  // x is there for all, and all have left the other slot
                if (stage + 1 < last) load_x(stage + 1);
#pragma unroll
                for (int unit = 0; unit < 2; unit++) {
                    if (stage * 2 + unit >= units) break;  // K % 64 == 32
                    multiply_unit(slot, unit, words[i]);
                    if ((kBlocks == 2 || unit == 1) && stage + kAhead < last)  // the block has been used
                        load_words(words[i], stage + kAhead, unit % kBlocks);
                    if (--left > 0) continue;
                    finish_group();
                    left = per_group;
                    if (stage * 2 + unit + 1 < units) load_affine(stage * 2 + unit + 1);
                }
            }
        }
        if (left != per_group) finish_group();
    }

    // Finished sums into a tile of `pitch` floats a row of m. The sum over quad pairs: halves are handed to the
    // neighbour until a lane has, of a strip and eight m, four sums
    //     n = 8 (q % 2) + lane % 2 + (i & 2) + 4 * (lane / 16),   m = 4 * (q / 2) + (lane & 2) + i % 2,   i = 0 .. 3
    __device__ __forceinline__ void store_sums(float* tile, int pitch) const {
        int const n = lane % 2 + lane / 16 * 4, m = lane & 2;
#pragma unroll
        for (int j = 0; j < C; j++) {
            if constexpr (kApart) {
#pragma unroll
                for (int i = 0; i < 16; i++)
                    tile[(j * 8 + m + (i & 4) + i % 2) * pitch + q * 16 + i / 8 * 8 + n + (i & 2)] =
                        acc[0][j][i / 8][i % 8];
            } else {
#pragma unroll
                for (int s = 0; s < S; s++) {
                    float v[8];
#pragma unroll
                    for (int i = 0; i < 8; i++) v[i] = add_neighbours(acc[s][j][0][i], acc[s][j][1][i], q % 2, 4);
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        tile[(j * 8 + q / 2 * 4 + m + i % 2) * pitch + s * 16 + q % 2 * 8 + n + (i & 2)] =
                            add_neighbours(v[i], v[i + 4], q / 2, 8);
                }
            }
        }
    }

    // This lane keeps `low` or `high` and gives the other to the lane that keeps that.
    __device__ __forceinline__ static float add_neighbours(float low, float high, bool keeps_high, int mask) {
        return (keeps_high ? high : low) + bits_float(exchange(float_bits(keeps_high ? low : high), mask));
    }

    __device__ __forceinline__ void store() {
        constexpr int kPitch = kBlockN + 4;
        float* const tile = reinterpret_cast<float*>(dynamic_shared());
        block_barrier();  // x becomes the tile
        store_sums(tile + wk * kBlockM * kPitch + wn * S * 16, kPitch);
        block_barrier();
        for (int item = threadIdx.x; item < kBlockM * kBlockN / 16; item += kThreads) {
            int const row = item / (kBlockN / 16), column = item % (kBlockN / 16) * 16;
            int64_t const m = m0 + row;
            int const n = blockIdx.y * kBlockN + column;
            if (m >= p.out.m || n >= p.out.n) continue;
            float v[16];
#pragma unroll
            for (int i = 0; i < 16; i++) {
                v[i] = tile[row * kPitch + column + i];
                for (int part = 1; part < WK; part++) v[i] += tile[(part * kBlockM + row) * kPitch + column + i];
            }
            if (p.splits == 1)
                finish<Half>(p.out, v, m, n);
            else
                for (int i = 0; i < 16; i++) p.partials[(blockIdx.z * p.out.m + m) * p.out.n + n + i] = v[i];
        }
    }
};

}  // namespace
}  // namespace wog

#define VOLTA_KERNEL(row, index, bits)                                                                    \
    extern "C" __global__ void __launch_bounds__(wog::kRows[index].threads(), wog::kRows[index].resident) \
        volta_##row##_##bits(wog::VoltaArgs p) {                                                          \
        wog::Volta<bits, index> block{p};                                                                 \
        block.accumulate();                                                                               \
        block.store();                                                                                    \
    }
#define VOLTA_KERNELS(row, index) VOLTA_KERNEL(row, index, 4) VOLTA_KERNEL(row, index, 8)
VOLTA_ROWS(VOLTA_KERNELS)

// One thread per row and strip: the parts of K in their order
extern "C" __global__ void __launch_bounds__(256) volta_epilogue(wog::VoltaArgs p) {
    int const strips = p.out.n / 16;
    int64_t const item = int64_t(blockIdx.x) * 256 + threadIdx.x, m = item / strips;
    int const n = int(item % strips) * 16;
    if (m >= p.out.m) return;
    float v[16] = {};
    for (int part = 0; part < p.splits; part++)
        for (int i = 0; i < 16; i++) v[i] += p.partials[(part * p.out.m + m) * p.out.n + n + i];
    wog::finish<Half>(p.out, v, m, n);
}

extern "C" __global__ void __launch_bounds__(128) volta_plain(wog::PlainArgs p) { wog::plain_strip<Half>(p); }
