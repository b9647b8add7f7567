// The kernels of WeightOnlyGemm for some tens of rows of x, of 16 bits or int8, and, where hopper.cu has none, for more:
// as stream.cu's, weights and x come through a ring of stages in shared memory, but here the warps of a block stand side
// by side in n and share what they load of x.
//
// Roles: the weights are the MMA's A operand (16 rows of n), x the B operand (8 columns of m). A warp owns S strips of
// 16 n and C columns of 8 m; two warps ("sides") own the same n, and divide either K (WK) or m (WM).
//
// Work split: a block has as many warps in n as fill the device best, owns WM * C * 8 m and a part of K, and walks over
// tiles of n, gridDim.y apart; the blocks with the other parts of K are a cluster, that has one tile and adds up in its
// blocks' shared memory, or leave their sums in the workspace for a second kernel.
//
// A stage is 64 k of each part of K: x, the codes and the scales and zeros of all strips. Four warps beside those that
// multiply fill it: one sends for weights, through all tiles of the block, one for x, and two, one for each side, count
// the sums of x over groups into the stage. They run ahead as far as `empty` lets them. Rows for Hopper send a few large
// copies and give registers to those that multiply; the others, for all since Ampere, send 16 bytes a lane, and each
// lane arrives when its own have landed.
//
// Arithmetic: as stream.cu's, acc += s * (P - (z - c) * X), of 16-bit x with codes as exact integers q - c, of int8 x,
// whose rows' scales come last, in whole numbers.
//
// Needs K % 32 == 0, N % 16 == 0, group % 32 == 0, 16-byte aligned pointers: checked by wog_launch.
#include <type_traits>

#include <async.h>

#include "decode.h"
#include "epilogue.h"
#include "int8.h"
#include "tile.h"

namespace wog {
namespace {

struct TileArgs {
    TensorMap x;                // for Hopper's rows; of int8 activations their values
    unsigned char const* rows;  // the same, for the others
    float const* scales;        // of int8 activations their rows'
    unsigned char const* codes;
    uint32_t const* affine;  // (scale, zero) pairs, [K / group][N]
    float* partials;         // [splits][M][N], null where nothing is added up in the workspace
    Output out;
    int32_t k, group, splits, warps_n;
    int32_t share, longer;  // steps of each part of K, and how many of them have one more
    // In a stage, after x: where codes, (scale, zero) pairs and sums of x begin; its size
    int32_t codes_at, affine_at, sums_at, stage;
};

constexpr int kHandOver = 16;  // steps: tensor cores cut bits off long sums

template <class T, int Bits, int I, bool Fine>
struct Tiler {
    static constexpr Row kRow = kRows[I];
    static constexpr int WK = kRow.warps_k, WM = kRow.warps_m, S = kRow.strips, C = kRow.columns;
    static constexpr int D = kRow.stages[Bits == 8], kSides = WK * WM, kBlockM = kRow.block_m();
    static constexpr int kBlocks = Bits / 4;     // 512-byte blocks of one strip in a step
    static constexpr int kUnits = Fine ? 2 : 1;  // rows of scales and zeros in a step
    static constexpr bool kInt8 = kRow.activation_bits == 8;
    static constexpr int kXRow = x_row(kRow), kX = kBlockM * kXRow;  // bytes of a row of x in a step; of all of them
    static constexpr int kParts = kXRow / 32;                        // of a step, one MMA deep
    using Sum = std::conditional_t<kInt8, int32_t, float>;
    static constexpr int kPitch = S * 16 + 4;  // floats, of one column of a warp on its way out
    static constexpr bool kBulk = for_hopper(kRow);
    static constexpr int kSenders = kBulk ? 1 : 32;  // lanes of a warp that arrive when copies have landed
    // Registers of those that multiply: all that the others leave of the launch's
    static constexpr int kMultiply = kRow.warps_n * kSides, kEach = 65536 / 32 / (kMultiply + 4) / 8 * 8;
    static constexpr int kFew = kMultiply == 8 ? 40 : 32, kMany = kEach + (kEach - kFew) * 4 / kMultiply / 8 * 8;
    static_assert(kSides == 2 && C % 2 == 0 && D <= kTileStages, "pairs of warps, pairs of columns");

    TileArgs const& p;
    int const lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int const warp = uniform(threadIdx.x / 32);
    int const warps_n = p.warps_n;
    int const multiply = warps_n * kSides, helper = warp - multiply;  // how many warps do; which of the others this is
    int const side = helper >= 0 ? helper & 1 : warp >= warps_n, wn = warp - side * warps_n;
    int const wk = WK == 2 ? side : 0, wm = WM == 2 ? side : 0;
    int64_t const m0 = int64_t(blockIdx.x) * kBlockM;

    // Shared memory: [barriers][ring, or sums for the cluster][sums on their way out]
    static __device__ __forceinline__ Barrier* full(int slot) {
        return reinterpret_cast<Barrier*>(dynamic_shared()) + slot;
    }
    static __device__ __forceinline__ Barrier* empty(int slot) { return full(kTileStages + slot); }
    static __device__ __forceinline__ Barrier* summed(int slot) { return full(2 * kTileStages + slot); }
    static __device__ __forceinline__ unsigned char* ring() { return dynamic_shared() + 1024; }
    __device__ __forceinline__ unsigned char* stage(int slot) const { return ring() + slot * p.stage; }

    // Steps of a part of K: how many it has and where it starts; those of the block's longest part
    __device__ __forceinline__ int steps_of(int k) const { return p.share + (int(blockIdx.z) * WK + k < p.longer); }
    __device__ __forceinline__ int first_of(int k) const {
        int const part = int(blockIdx.z) * WK + k;
        return part * p.share + (part < p.longer ? part : p.longer);
    }
    int const first = first_of(wk), own = steps_of(wk), count = steps_of(0);

    int slot = 0, parity = 0;
    int at = 0;  // k since the group began
    float acc[S][C][4] = {};
    Sum sum[S][C][4] = {};

    __device__ __forceinline__ explicit Tiler(TileArgs const& args) : p(args) {}

    __device__ __forceinline__ int strips() const { return warps_n * S; }  // of a tile
    __device__ __forceinline__ int tiles() const { return (p.out.n / 16 + strips() - 1) / strips(); }

    // ---- the stream ----

    __device__ __forceinline__ int units_left(int k, int step) const { return p.k / 32 - (first_of(k) + step) * 2; }
    __device__ __forceinline__ void go_on() { slot = slot == D - 1 ? 0 : slot + 1, parity ^= slot == 0; }

    // Codes, scales and zeros, each lane a copy: at most four tiles of the packed layout, of one or two blocks
    __device__ __forceinline__ void send_weights() {
        constexpr int kCopies = 4 * kBlocks;
        int const width = strips(), all = p.out.n / 16, blocks = (p.k + 256 / Bits - 1) / (256 / Bits);
        bool const codes = lane < kCopies * WK;
        int const k = codes ? lane / kCopies : lane % 4 / 2, b = codes ? lane % kCopies / 4 : lane % 2;
        bool const pairs = lane >= 16 && lane < 20 && k < WK && b < kUnits;
        int const mine = codes || pairs ? steps_of(k) : 0, begin = first_of(k);
        int const to =
            codes ? p.codes_at + (k * kBlocks + b) * width * 512 : p.affine_at + (k * kUnits + b) * width * 64;
#pragma unroll 1
        for (int tile = blockIdx.y; tile < tiles(); tile += gridDim.y) {
            int const strip = tile * width, here = all - strip < width ? all - strip : width;
            int const tile8 = strip / 8 + lane % 4, wide8 = all - tile8 * 8 < 8 ? all - tile8 * 8 : 8;
            int from = strip, end = strip + here;
            if (codes && tile8 * 8 > from) from = tile8 * 8;
            if (codes && tile8 * 8 + 8 < end) end = tile8 * 8 + 8;
            int64_t const block = int64_t(tile8 * 8) * blocks + int64_t(begin * kBlocks + b) * wide8 + from - tile8 * 8;
            auto const* source = p.codes + block * 512;
            int const bytes = (end - from) * (codes ? 512 : 64), place = to + (from - strip) * 512;
            int at = begin * 64 + b * 32, group = at / p.group;
            at -= group * p.group;
#pragma unroll 1
            for (int step = 0; step < count; step++) {
                wait(empty(slot), parity ^ 1);
                int sum = 0;
#pragma unroll
                for (int part = 0; part < WK; part++)
                    if (step < steps_of(part)) {
                        int const left = units_left(part, step) < 2 ? 1 : 2;
                        sum += here * ((kBlocks == 2 ? left : 1) * 512 + (Fine ? left : 1) * 64);
                    }
                if (lane == 0) arrive_expecting(full(slot), sum);
                warp_barrier();
                if (!codes)
                    source = reinterpret_cast<unsigned char const*>(p.affine + int64_t(group) * p.out.n + strip * 16);
                if (bytes > 0 && step < mine && b < units_left(k, step))
                    copy_bulk(stage(slot) + place, source, bytes, full(slot));
                if (codes) source += kBlocks * wide8 * 512;
                at += 64;
                while (at >= p.group) at -= p.group, group++;
                go_on();
            }
        }
    }

    // The same, 16 bytes a lane
    __device__ __forceinline__ void send_weights_by_lanes() {
        int const width = strips(), all = p.out.n / 16, blocks = (p.k + 256 / Bits - 1) / (256 / Bits);
#pragma unroll 1
        for (int tile = blockIdx.y; tile < tiles(); tile += gridDim.y) {
            int const strip = tile * width, here = all - strip < width ? all - strip : width;
#pragma unroll 1
            for (int step = 0; step < count; step++) {
                wait(empty(slot), parity ^ 1);
                Shared const to = shared_address(stage(slot)) + lane * 16;
#pragma unroll
                for (int k = 0; k < WK; k++) {
                    int const begin = first_of(k) + step, left = step < steps_of(k) ? units_left(k, step) : 0;
#pragma unroll
                    for (int b = 0; b < kBlocks; b++)
#pragma unroll 1
                        for (int s = 0; s < here && b < left; s++) {
                            int const tile8 = (strip + s) / 8 * 8, wide8 = all - tile8 < 8 ? all - tile8 : 8;
                            int64_t const block =
                                int64_t(tile8) * blocks + int64_t(begin * kBlocks + b) * wide8 + strip + s - tile8;
                            copy_async(to + p.codes_at + ((k * kBlocks + b) * width + s) * 512,
                                       p.codes + block * 512 + lane * 16, true);
                        }
#pragma unroll
                    for (int unit = 0; unit < kUnits; unit++) {
                        int64_t const group = (begin * 64 + unit * 32) / p.group;
                        auto const* const from =
                            reinterpret_cast<unsigned char const*>(p.affine + group * p.out.n + strip * 16);
#pragma unroll 1
                        for (int piece = lane; piece < here * 4 && unit < left; piece += 32)
                            copy_async(to + p.affine_at + (k * kUnits + unit) * width * 64 + (piece - lane) * 16,
                                       from + piece * 16, true);
                    }
                }
                arrive_when_copied(full(slot));
                go_on();
            }
        }
        copy_commit(), copy_wait<0>();  // a warp does not end before its copies
    }

    __device__ __forceinline__ void send_x_by_lanes() {
        int const pitch = p.k * (kRow.activation_bits / 8);
        constexpr int kPieces = kXRow / 16, kAtOnce = 32 / kPieces;  // of a row; rows
#pragma unroll 1
        for (int tile = blockIdx.y; tile < tiles(); tile += gridDim.y)
#pragma unroll 1
            for (int step = 0; step < count; step++) {
                wait(empty(slot), parity ^ 1);
                Shared const to = shared_address(stage(slot));
#pragma unroll
                for (int k = 0; k < WK; k++) {
                    int const at = (first_of(k) + step) * kXRow + lane % kPieces * 16;
                    bool const inside = step < steps_of(k) && at < pitch;
#pragma unroll 4
                    for (int row = lane / kPieces; row < kBlockM; row += kAtOnce) {
                        bool const there = inside && m0 + row < p.out.m;
                        copy_async(to + k * kX + row * kXRow + turned<kXRow>(lane % kPieces, row) * 16,
                                   p.rows + (there ? (m0 + row) * pitch + at : 0), there);
                    }
                }
                arrive_when_copied(full(slot));
                go_on();
            }
        copy_commit(), copy_wait<0>();
    }

    __device__ __forceinline__ void send_x() {
#pragma unroll 1
        for (int tile = blockIdx.y; tile < tiles(); tile += gridDim.y)
#pragma unroll 1
            for (int step = 0; step < count; step++) {
                wait(empty(slot), parity ^ 1);
                int const parts = WK == 2 && step < steps_of(1) ? 2 : 1;
                if (lane == 0) arrive_expecting(full(slot), parts * kX);
                warp_barrier();
                if (lane < parts)
                    copy_box<1>(stage(slot) + lane * kX, p.x, (first_of(lane) + step) * kXRow, m0, full(slot));
                go_on();
            }
    }

    // ---- sums ----

    // In a stage: where ldmatrix's lane finds the first MMA's part of the first two columns of x, where this warp's
    // codes and X are
    int const x_at =
        wk * kX + (wm * (C * 8) + lane / 16 * 8 + lane % 8) * kXRow + turned<kXRow>(lane / 8 % 2, lane % 8) * 16;
    int const codes_at = p.codes_at + (wk * kBlocks * strips() + wn * S) * 512 + lane * 16;
    int const sums_at = p.sums_at + side * (C * 8 * 4);
    __device__ __forceinline__ Sum* x_sums(int slot, int half) const {
        return reinterpret_cast<Sum*>(stage(slot) + sums_at + half * (kSides * C * 8 * 4));
    }

    // After which 32 k of a step a group ends or P is handed over; goes on to the step after
    __device__ __forceinline__ void begin_tile() { at = first * 64 % p.group; }
    __device__ __forceinline__ int next_ends(int step) {
        bool const last = step >= own - 1 || (!kInt8 && step % kHandOver == kHandOver - 1);
        int ends = at + 64 == p.group || last ? 2 : 0;
        if (Fine) ends = (at + 32 == p.group ? 1 : 0) | (p.group == 32 ? 2 : ends);
        at += 64;
        if (Fine)
            while (at >= p.group) at -= p.group;
        else
            at = at == p.group ? 0 : at;
        return ends;
    }

    // X of all steps of a side
    __device__ __forceinline__ void count_all() {
        int const rows_at = wk * kX + (wm * (C * 8) + lane % 16) * kXRow + turned<kXRow>(lane / 16, lane % 8) * 16;
        Sum sums[C / 2][4] = {};
#pragma unroll 1
        for (int tile = blockIdx.y; tile < tiles(); tile += gridDim.y) {
            begin_tile();
#pragma unroll 1
            for (int step = 0; step < count; step++) {
                wait(full(slot), parity);
                int const ends = next_ends(step);
                Shared const from = shared_address(stage(slot) + rows_at);
                if (step < own)
#pragma unroll 1  // unrolled, it would spill
                    for (int half = 0; half < 2; half++) {
#pragma unroll
                        for (int part = half * kParts / 2; part < (half + 1) * kParts / 2; part++)
#pragma unroll
                            for (int j = 0; j < C / 2; j++) {
                                uint32_t x[4];
                                load_matrices(x, flip(from, part * 32) + j * 16 * kXRow);
                                sum_rows<T>(sums[j], x);
                            }
                        if (!(Fine ? ends & 1 << half : half && ends)) continue;
                        Sum* const to = x_sums(slot, Fine ? half : 0) + lane / 4;
#pragma unroll
                        for (int j = 0; j < C / 2; j++) {
                            if (lane % 4 == 0) to[j * 16] = sums[j][0], to[j * 16 + 8] = sums[j][2];
                            sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0;
                        }
                    }
                warp_barrier();
                if (lane == 0) arrive(summed(slot)), arrive(empty(slot));
                go_on();
            }
        }
    }

    __device__ __forceinline__ void multiply_step(int ends, int units) {
        unsigned char const* const from = stage(slot);
        uint4 words[S];
        Shared const x_first = shared_address(from + x_at);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half == 0 || kBlocks == 2)
#pragma unroll
                for (int s = 0; s < S; s++)
                    words[s] =
                        *reinterpret_cast<uint4 const*>(from + codes_at + (half * kBlocks / 2 * strips() + s) * 512);
#pragma unroll
            for (int part = half * kParts / 2; part < (half + 1) * kParts / 2; part++) {
                uint32_t x[C / 2][4];
#pragma unroll
                for (int j = 0; j < C / 2; j++) load_matrices(x[j], flip(x_first, part * 32) + j * 16 * kXRow);
#pragma unroll
                for (int s = 0; s < S; s++) {
                    uint32_t a[4];
                    fragment<T, Bits, kInt8>(a, words[s], part);
#pragma unroll
                    for (int j = 0; j < C; j++) wog::multiply<T>(sum[s][j], a, x[j / 2] + j % 2 * 2);
                }
            }
            if (Fine ? (ends & 1 << half) && half < units : half && ends) finish_group(Fine ? half : 0);
        }
    }

    // acc += s * (P - (z - c) * X)
    __device__ __forceinline__ void finish_group(int half) {
        auto const* const pairs = reinterpret_cast<uint32_t const*>(stage(slot) + p.affine_at +
                                                                    ((wk * kUnits + half) * strips() + wn * S) * 64);
        wait(summed(slot), parity);
        Sum const* const sums = x_sums(slot, half) + 2 * t;
        Sum x[C][2];
#pragma unroll
        for (int j = 0; j < C; j++) x[j][0] = sums[j * 8], x[j][1] = sums[j * 8 + 1];
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t const pair = pairs[s * 16 + h * 8 + g];
                float const scale = to_float<T>(uint16_t(pair));
                float const zero = float(1 << (Bits - 1)) - to_float<T>(uint16_t(pair >> 16));
#pragma unroll
                for (int j = 0; j < C; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        acc[s][j][h * 2 + e] += scale * corrected<Bits>(sum[s][j][h * 2 + e], x[j][e], zero);
                        sum[s][j][h * 2 + e] = 0;
                    }
            }
    }

    // ---- tiles ----

    __device__ __forceinline__ void run() {
        if (threadIdx.x == 0) {
            for (int d = 0; d < D; d++) {
                barrier_init(full(d), 2 * kSenders);
                barrier_init(empty(d), multiply + kSides);
                barrier_init(summed(d), kSides);
            }
            publish_barriers();
        }
        block_barrier();
        if (helper >= 0) {
            if constexpr (kBulk) keep_registers<kFew>();
            if (helper == 2) {
                if constexpr (kBulk)
                    send_weights();
                else
                    send_weights_by_lanes();
            } else {
                if constexpr (kBulk) prefetch_map(p.x);
                wait_for_inputs();
                if (helper < 2)
                    count_all();
                else if constexpr (kBulk)
                    send_x();
                else
                    send_x_by_lanes();
            }
            if (!alone()) cluster_barrier(), relaxed_cluster_barrier();
        } else {
            if constexpr (kBulk) take_registers<kMany>();
            wait_for_inputs();
            release_next();
            multiply_all();
        }
    }

    __device__ __forceinline__ void multiply_all() {
#pragma unroll 1
        for (int tile = blockIdx.y; tile < tiles(); tile += gridDim.y) {
            begin_tile();
#pragma unroll 1
            for (int step = 0; step < count; step++) {
                int const ends = next_ends(step);
                wait(full(slot), parity);
                if (step < own) multiply_step(ends, Fine ? units_left(wk, step) : 0);
                warp_barrier();
                if (lane == 0) arrive(empty(slot));
                go_on();
            }
            store(tile);
        }
    }

    // Not in a cluster
    __device__ __forceinline__ bool alone() const { return DEVICE_SM != 90 || p.splits == 1 || (!kBulk && p.partials); }

    // A rectangle of outputs: `rows` x `strips` strips from (m, n), some of them in each of `step` threads; in each of
    // `ranks` blocks WK parts of the sums, so many floats apart
    struct Rectangle {
        int rows, strips;
        int64_t m;
        int n, mine, step, ranks, apart, pitch;
    };
    __device__ __forceinline__ void finish_some(float const* sums, Rectangle const r) const {
        bool const apart = !kBulk && p.partials, gated = p.out.gated && !apart;
        int const wide = gated ? r.strips * 2 : r.strips * 4;
        auto const total = [&](int at, float scale) {
            float4 v{};
#pragma unroll 1
            for (int rank = 0; rank < r.ranks; rank++) {
                float4 block{};
#pragma unroll
                for (int part = 0; part < WK; part++)
                    add(block, r.ranks == 1 ? *reinterpret_cast<float4 const*>(sums + at + part * r.apart)
                                            : load_four_from(rank, sums + at + part * r.apart));
                add(v, kInt8 ? scaled(block, scale) : block);
            }
            return v;
        };
#pragma unroll 1
        for (int item = r.mine; item < r.rows * wide; item += r.step) {
            int const row = item / wide, i = item - row * wide, column = column_of_four(i, gated);
            if (r.n + column >= p.out.n || r.m + row >= p.out.m) continue;
            int const at = row * r.pitch + column;
            float const scale = kInt8 ? p.scales[r.m + row] : 1.0f;
            if (apart)
                *reinterpret_cast<float4*>(p.partials + (blockIdx.z * p.out.m + r.m + row) * p.out.n + r.n + column) =
                    total(at, scale);
            else
                finish_four<T>(p.out, total(at, scale), gated ? total(at + 8, scale) : float4{}, r.m + row,
                               r.n + column);
        }
    }

    // That exist, of x of this block
    __device__ __forceinline__ int rows() const { return p.out.m - m0 < kBlockM ? int(p.out.m - m0) : kBlockM; }

    // A tile of one block: through a column's place beside the ring, which runs on. Of a cluster: sums of the parts of
    // K, in their order, where the ring was; each block finishes some of the outputs
    __device__ __forceinline__ void store(int tile) {
        int thread = threadIdx.x, warps_n = p.warps_n;
        settle(thread), settle(warps_n);  // the loop that streams has no registers for what is made of them
        int const lane = thread % 32, warp = thread / 32, side = warp >= warps_n, wn = warp - side * warps_n;
        int const wk = WK == 2 ? side : 0, wm = WM == 2 ? side : 0, g = lane / 4, t = lane % 4;
        bool const alone = this->alone();
        int const threads = warps_n * kSides * 32, pitch = alone ? kPitch : warps_n * (S * 16) + 4;
        int const apart = alone ? warps_n * 8 * kPitch : kBlockM * pitch;
        float* const sums = reinterpret_cast<float*>(alone ? stage(D) : ring());
        float* const mine = alone ? sums + (side * warps_n + wn) * (8 * kPitch)
                                  : sums + (wk * kBlockM + wm * (C * 8)) * pitch + wn * (S * 16);
        auto const meet = [&] {
            if (WK == 2)
                named_barrier(1 + wn, 64);
            else
                warp_barrier();
        };
        if (!alone) named_barrier(15, threads);  // all have left the ring
#pragma unroll 1
        for (int column = 0; column < C; column++) {
            if (alone) meet();  // all have read the column before
            float* const to = mine + (alone ? 0 : column * 8 * pitch) + 2 * t * pitch + g;
#pragma unroll
            for (int j = 0; j < C; j++)
                if (j == column)
#pragma unroll
                    for (int s = 0; s < S; s++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            to[i % 2 * pitch + s * 16 + i / 2 * 8] = acc[s][j][i];
                            acc[s][j][i] = 0;
                        }
            if (alone)
                meet();
            else if (column < C - 1)
                continue;
            else
                cluster_barrier();
            finish_some(alone ? sums + (wm * warps_n + wn) * (8 * kPitch) : sums,
                        {alone ? 8 : rows(), alone ? S : warps_n * S, m0 + (alone ? (wm * C + column) * 8 : 0),
                         (tile * warps_n + (alone ? wn : 0)) * (S * 16),
                         alone ? wk * 32 + lane : int(blockIdx.z) * threads + thread,
                         alone ? WK * 32 : p.splits * threads, alone ? 1 : p.splits, apart, pitch});
        }
        if (!alone) relaxed_cluster_barrier();  // a block that has ended has no memory
    }
};

template <class T, int Bits, bool Fine, int I>
__global__ void __launch_bounds__(kRows[I].threads(), kRows[I].resident) tiles(__grid_constant__ TileArgs const p) {
#if DEVICE_SM
    if constexpr (kGenerated<T, Fine, I>) Tiler<T, Bits, I, Fine>{p}.run();
#endif
}

template <class T, int Bits, bool Fine, int I>
struct TileOf {
    static constexpr auto kernel = tiles<T, Bits, Fine, I>;
};

}  // namespace

char const* launch_tile(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream) {
    Row const& row = kRows[plan.row];
    int const steps = ceil_div(p.k, 64), parts = plan.splits * row.warps_k, units = tile_units(p);
    int const warps_n = (plan.threads / 32 - 4) / (row.warps_k * row.warps_m), strips = warps_n * row.strips;
    int const codes_at = row.warps_k * row.block_m() * x_row(row),
              affine_at = codes_at + row.warps_k * strips * p.bits * 128;
    if (char const* failed = launch_quantize(p, t, stream)) return failed;
    TileArgs args{{},
                  multiplied(p, t),
                  int8_rows(p, t.workspace).scales,
                  static_cast<unsigned char const*>(t.codes),
                  static_cast<uint32_t const*>(t.affine),
                  sums_apart(row, p, plan, t.workspace),
                  output(p, t),
                  p.k,
                  p.group,
                  plan.splits,
                  warps_n,
                  steps / parts,
                  steps % parts,
                  codes_at,
                  affine_at,
                  affine_at + row.warps_k * units * strips * 64,
                  tile_stage(row, p.bits, units, warps_n)};
    if (for_hopper(row))
        if (char const* failed = describe_rows(args.x, args.rows, p.m, int64_t(p.k) * row.activation_bits / 8,
                                               row.block_m(), x_row(row)))
            return failed;
    return launch_parts(instance<Kernel::kTile, TileOf>(p, plan, units > 1), args, p, t, plan, stream);
}

}  // namespace wog
