// The kernels of WeightOnlyGemm for a few rows of 16-bit x: weights stream from memory through a ring of stages in
// shared memory, one ring for each warp, so that what is on its way is neither held in registers nor held up by what
// others wait for.
//
// Roles: the weights are the MMA's A operand (16 rows of n), x the B operand (8 columns of m), so M is granular in 8s
// and a lane owns rows g, g + 8 of a strip: two scales and zeros per strip and group.
//
// Work split: a cluster of blocks has some tiles of S * 16 n; their steps of 64 k, tile after tile, are one line, that
// its warps divide into parts as equal as can be. Where that cuts a tile, the warps' sums meet in shared memory, in
// order of K, when all have ended: no warp waits for another before.
//
//     tiles    |----- 0 -----|----- 1 -----|----- 2 -----|      each of G steps
//     warps    |-- 0 --|-- 1 --|-- 2 --|-- 3 --|-- 4 --|
//
// A stage is a step of a warp's S strips, with the scales and zeros of its group, D stages on their way across the ends
// of tiles. Each lane copies the bytes of codes that it reads back itself, so no barrier holds the stream up. x, as far
// as the block's warps need it, lies in shared memory from the start.
//
// Arithmetic: the codes, as they lie in their words, are turned into exact numbers with one instruction for each two,
// in units of `unit` (decode_raw), and multiplied with fp32 sums P; at the end of each group
//     acc += s * (P - (z + b) * X),   X = sum of x over the group in the same units (an MMA with ones),
// all in fp32: the float zero is never rounded into T. The sum is linear, so K may be cut anywhere at a multiple of 32;
// P is also handed over every kPromote k, because tensor cores cut bits off sums instead of rounding them.
//
// Needs K % 32 == 0, N % 16 == 0, group % 32 == 0, 16-byte aligned pointers: checked by wog_launch.
#include <array>
#include <type_traits>
#include <utility>

#include "decode.h"
#include "epilogue.h"
#include "tile.h"

namespace wog {
namespace {

struct StreamArgs {
    unsigned char const* x;
    unsigned char const* codes;
    uint32_t const* affine;  // (scale, zero) pairs, [K / group][N]
    Output out;
    int32_t k, group;
    int32_t x_rows, x_steps, places;  // in shared memory: rows and steps of x, places of sums for each warp
};

constexpr int kPromote = 1024;

template <class T, int Bits, int I>
struct Streamer {
    static constexpr Row kRow = kRows[I];
    static constexpr int kWarps = kRow.warps_k, S = kRow.strips, C = kRow.columns, D = kRow.stages[Bits == 8];
    static constexpr int kBlockN = kRow.block_n(), kBlockM = kRow.block_m(), kThreads = kRow.threads();
    static constexpr int kBlocks = Bits / 4;  // 512-byte blocks of one strip in a step
    static constexpr int kStage = stream_stage(kRow, Bits), kAffine = S * kBlocks * 512;  // bytes; where scales start
    static constexpr int kPitch = kBlockN + 4, kSums = kBlockM * kPitch;
    static_assert(kRow.warps_n == 1 && 8 % S == 0, "strips of a warp are neighbours in the packed layout");
    static_assert(D * kStage >= kSums * 4, "the last sums of a warp lie in its ring");

    StreamArgs const& p;
    int const lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int const warp = uniform(threadIdx.x / 32), rank = blockIdx.z, blocks = gridDim.z;
    int const steps = (p.k + 63) / 64;  // of a tile
    int const all_tiles = (p.out.n + kBlockN - 1) / kBlockN;
    int const first_tile = int(int64_t(blockIdx.y) * all_tiles / gridDim.y);  // of the cluster
    int const tiles = int(int64_t(blockIdx.y + 1) * all_tiles / gridDim.y) - first_tile;
    int const line = tiles * steps, parts = blocks * kWarps;

    // Where the part of a warp of the cluster begins, in steps of the line; which warp has a step
    __device__ __forceinline__ int begin(int part) const { return int(int64_t(part) * line / parts); }
    __device__ __forceinline__ int owner(int step) const { return int((int64_t(step + 1) * parts - 1) / line); }

    int const at = rank * kWarps + warp;
    int const first = begin(at), last = begin(at + 1);
    // steps of x in the block: all, or from `x_first` on, around the end of K
    int const block_first = begin(rank * kWarps), block_last = begin((rank + 1) * kWarps);
    int const x_count = block_last - block_first < steps ? block_last - block_first : steps;
    int const x_first = x_count < steps ? block_first % steps : 0;

    // Shared memory: [zeros: a row that x does not have][ring of each warp][x][places of sums of each warp]
    __device__ __forceinline__ unsigned char* ring() const { return dynamic_shared() + 128 + warp * (D * kStage); }
    __device__ __forceinline__ int x_step() const { return p.x_rows * 128; }
    __device__ __forceinline__ unsigned char* x_place() const { return dynamic_shared() + 128 + kWarps * (D * kStage); }
    // of a part: of its first tile, or of its last, when its ring is no longer needed
    __device__ __forceinline__ float* sums_of(int of_warp, bool its_last) const {
        unsigned char* const own = x_place() + p.x_steps * x_step() + of_warp * p.places * (kSums * 4);
        return reinterpret_cast<float*>(its_last ? dynamic_shared() + 128 + of_warp * (D * kStage) : own);
    }

    // What is sent for next: a step of a tile, into a slot of the ring
    int feed_at = first, feed_step = 0, feed_strips, feed_stride, feed_slot = 0;
    int feed_units;  // of 32 k, to the end of K
    unsigned char const* feed_codes;
    int feed_group_left;   // units of 32 k
    uint32_t feed_affine;  // first (scale, zero) pair of the group in the tile

    int units_left = 0;                       // of 32 k, from the step under way to the end of K
    int slot = 0, left = 0, group_left = 0;  // of the step under way; steps to the next handing over, to the group's end
    int x_at = 0;                             // of the step under way, from the first in shared memory
    Shared row_at[C];
    int row_moves[C];  // all bits, or none for a row that x does not have
    float acc[S][C][4] = {};
    float sum[S][C][4] = {};
    float x_sum[C][4] = {};

    __device__ __forceinline__ explicit Streamer(StreamArgs const& args) : p(args) {
        if (threadIdx.x < 8) reinterpret_cast<uint4*>(dynamic_shared())[threadIdx.x] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < C; j++) {
            int const row = j * 8 + lane % 8;
            bool const real = row < p.x_rows;
            row_at[j] = shared_address(real ? x_place() + row * 128 : dynamic_shared()) + ((lane / 8) ^ lane % 8) * 16;
            row_moves[j] = real ? -1 : 0;
        }
    }

    // ---- the stream ----

    __device__ __forceinline__ void seek(int tile, int step) {
        int const all = p.out.n / 16, strip = (first_tile + tile) * S, tile8 = strip / 8 * 8;
        int const width = all - tile8 < 8 ? all - tile8 : 8, blocks_k = (p.k + 256 / Bits - 1) / (256 / Bits);
        int const units = p.group / 32;
        feed_step = step;
        feed_strips = all - strip;
        feed_units = p.k / 32 - step * 2;
        feed_stride = width * 512;
        feed_codes = p.codes + lane * 16 +
                     (int64_t(tile8) * blocks_k + int64_t(step) * kBlocks * width + (strip - tile8)) * 512;
        feed_group_left = units - step * 2 % units;
        feed_affine = step * 2 / units * p.out.n + (first_tile + tile) * kBlockN;
    }

    __device__ __forceinline__ void send_affine(unsigned char* to, bool exists) const {
        if (lane < S * 4) {
            bool const valid = exists && lane / 4 < feed_strips;
            copy_async(shared_address(to + lane * 16), p.affine + (valid ? feed_affine + lane * 4ull : 0), valid);
        }
    }

    template <bool Fine>
    __device__ __forceinline__ void send() {
        if (feed_at < last) {
            unsigned char* const to = ring() + feed_slot;
#pragma unroll
            for (int b = 0; b < kBlocks; b++)
#pragma unroll
                for (int s = 0; s < S; s++) {
                    bool const valid = s < feed_strips && b < feed_units;
                    copy_async(shared_address(to + (b * S + s) * 512 + lane * 16),
                               valid ? feed_codes + b * feed_stride + s * 512 : p.codes, valid);
                }
#pragma unroll
            for (int unit = 0; unit < 2; unit++) {
                if (Fine || unit == 0) send_affine(to + kAffine + unit * (S * 64), unit < feed_units);
                if (--feed_group_left == 0) feed_group_left = p.group / 32, feed_affine += p.out.n;
            }
            feed_codes += kBlocks * feed_stride;
            feed_units -= 2;
            feed_slot = feed_slot == (D - 1) * kStage ? 0 : feed_slot + kStage;
            feed_at++;
            if (++feed_step == steps) seek(feed_at / steps, 0);
        }
        copy_commit();
    }

    __device__ __forceinline__ void load_x() const {
        Shared const to = shared_address(x_place());
        int const pitch = p.k * 2, pieces = p.x_rows * 8;
#pragma unroll 4
        for (int item = threadIdx.x; item < x_count * pieces; item += kThreads) {
            int const step = item / pieces, row = item % pieces / 8, chunk = item % 8;
            int const k = x_first + step - (x_first + step < steps ? 0 : steps), byte = k * 128 + chunk * 16;
            bool const valid = row < p.out.m && byte < pitch;
            copy_async(to + step * x_step() + row * 128 + (chunk ^ row % 8) * 16,
                       p.x + (valid ? int64_t(row) * pitch + byte : 0), valid);
        }
        copy_commit();
    }

    // ---- sums ----

    template <bool Fine>
    __device__ __forceinline__ void multiply_step() {
        unsigned char const* const stage = ring() + slot;
        uint4 words[S][kBlocks];
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int b = 0; b < kBlocks; b++)
                words[s][b] = *reinterpret_cast<uint4 const*>(stage + (b * S + s) * 512 + lane * 16);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t x[C][4];
#pragma unroll
            for (int j = 0; j < C; j++) load_matrices(x[j], flip(row_at[j] + (x_at & row_moves[j]), half * 64));
#pragma unroll
            for (int quarter = 0; quarter < 2; quarter++) {
#pragma unroll
                for (int s = 0; s < S; s++) {
                    uint32_t a[4];
                    decode_raw<T, Bits>(a, words[s][half * kBlocks / 2], half * 2 + quarter);
#pragma unroll
                    for (int j = 0; j < C; j++) multiply_add<T>(sum[s][j], a, x[j][quarter * 2], x[j][quarter * 2 + 1]);
                }
                uint32_t const ones[4] = {raw_one<T, Bits>(0), raw_one<T, Bits>(1), raw_one<T, Bits>(0),
                                          raw_one<T, Bits>(1)};
#pragma unroll
                for (int j = 0; j < C; j++) multiply_add<T>(x_sum[j], ones, x[j][quarter * 2], x[j][quarter * 2 + 1]);
            }
            if (Fine && half < units_left) finish_group(stage + kAffine + half * (S * 64));
        }
        x_at += x_step();
        if (x_at == x_count * x_step()) x_at = 0;
        slot = slot == (D - 1) * kStage ? 0 : slot + kStage;
        if (!Fine && --left == 0) {
            finish_group(stage + kAffine);
            start_span();
        }
    }

    // How many steps until P is handed over
    __device__ __forceinline__ void start_span() {
        constexpr int kMost = kPromote / 64;
        if (group_left == 0) group_left = p.group / 64;
        left = group_left < kMost ? group_left : kMost;
        group_left -= left;
    }

    // acc += s * (P - (z + b) * X). Every row of the ones-MMA is X, so it already lies in the right lane and column.
    __device__ __forceinline__ void finish_group(unsigned char const* affine) {
        auto const* const pairs = reinterpret_cast<uint32_t const*>(affine);
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t const pair = pairs[s * 16 + h * 8 + g];
                float const scale = to_float<T>(uint16_t(pair));
                float const zero = -raw_bias<T, Bits> - to_float<T>(uint16_t(pair >> 16));
#pragma unroll
                for (int j = 0; j < C; j++)
#pragma unroll
                    for (int e = h * 2; e < h * 2 + 2; e++) {
                        acc[s][j][e] += scale * (sum[s][j][e] + zero * x_sum[j][e]);
                        sum[s][j][e] = 0;
                    }
            }
#pragma unroll
        for (int j = 0; j < C; j++) x_sum[j][0] = x_sum[j][1] = x_sum[j][2] = x_sum[j][3] = 0;
    }

    // ---- tiles ----

    template <bool Fine>
    __device__ __forceinline__ void run() {
        seek(first / steps, first % steps);
#pragma unroll 1
        for (int d = 0; d < D - 1; d++) send<Fine>();
        wait_for_inputs();
        release_next();
        load_x();
        copy_wait<0>();
        block_barrier();

        x_at = (first % steps - x_first + (first % steps < x_first ? steps : 0)) * x_step();
#pragma unroll 1
        for (int step = first; step < last;) {
            int const tile = step / steps, begins = tile * steps, ends = begins + steps < last ? begins + steps : last;
            bool const whole = step == begins && ends == begins + steps, earliest = step == first;
            if (!Fine) {
                int const per_group = p.group / 64;
                group_left = per_group - (step - begins) % per_group;
                start_span();
            }
#pragma unroll 1
            for (; step < ends; step++) {
                if (Fine) units_left = p.k / 32 - (step - begins) * 2;
                copy_wait<D - 2>();
                warp_barrier();  // other lanes' scales and zeros are there, and all have left the slot before
                send<Fine>();
                if (!Fine && step == ends - 1) left = 1;
                multiply_step<Fine>();
            }
            warp_barrier();  // all have left the ring, where the last sums go
            float* const sums = whole ? sums_of(warp, false) + (p.places - 1) * kSums : sums_of(warp, !earliest);
            keep(sums);
            if (whole) {
                warp_barrier();
                each(1, lane, 32, [&](int, int row, int column) {
                    float const* const v = sums + row * kPitch + column;
                    store(tile, row, column, v[0], p.out.gated ? v[8] : 0.0f);
                });
                warp_barrier();
            }
        }
        join();
    }

    // Sums leave their registers
    __device__ __forceinline__ void keep(float* sums) {
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int j = 0; j < C; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[s][j][i] *= raw_unit<T, Bits>(i / 2);
        store_sums(sums, kPitch, acc, 0, 0, g, t);
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int j = 0; j < C; j++) acc[s][j][0] = acc[s][j][1] = acc[s][j][2] = acc[s][j][3] = 0.0f;
    }

    __device__ __forceinline__ void store(int tile, int row, int column, float sum, float up) const {
        int const n = (first_tile + tile) * kBlockN + column;
        if (n < p.out.n) finish_one<T>(p.out, sum, up, row, n);
    }

    // use(tile, row, column) for every output of so many tiles, or every gate, `step` threads apart. Unrolled, these few
    // rounds would take registers from the loop that streams.
    template <class Use>
    __device__ __forceinline__ void each(int count, int from, int step, Use const& use) const {
        int const width = p.out.gated ? kBlockN / 2 : kBlockN, rows = int(p.out.m);
#pragma unroll 1
        for (int item = from; item < count * rows * width; item += step) {
            int const i = item % width;
            use(item / width / rows, item / width % rows, p.out.gated ? i / 8 * 16 + i % 8 : i);
        }
    }

    // The tiles that begin in this block and were cut: their parts, in order of K, wherever in the cluster they are
    __device__ __forceinline__ void join() const {
        if (blocks > 1)
            cluster_barrier();
        else
            block_barrier();
        int const from = (block_first + steps - 1) / steps, to = (block_last + steps - 1) / steps;
        each(to - from, threadIdx.x, kThreads, [&](int i, int row, int column) {
            int const tile = from + i, begins = tile * steps, head = owner(begins), tail = owner(begins + steps - 1);
            if (head == tail) return;  // was not cut
            float total[2] = {};
#pragma unroll 2
            for (int part = head; part <= tail; part++) {
                if (begin(part) == begin(part + 1)) continue;
                float const* const sums = sums_of(part % kWarps, begin(part) < begins) + row * kPitch + column;
                total[0] += at_part(part, sums);
                if (p.out.gated) total[1] += at_part(part, sums + 8);
            }
            store(tile, row, column, total[0], total[1]);
        });
        if (blocks > 1) relaxed_cluster_barrier();  // a block that has ended has no memory
    }
    __device__ __forceinline__ float at_part(int part, float const* own) const {
        return part / kWarps == rank ? *own : load_from(part / kWarps, own);
    }
};

template <class T, int Bits, int I>
__global__ void __launch_bounds__(kRows[I].threads(), kRows[I].resident) stream(StreamArgs const p) {
#if DEVICE_SM
    if constexpr (kGenerated<T, I>) {
        Streamer<T, Bits, I> block{p};
        if (p.group % 64)
            block.template run<true>();
        else
            block.template run<false>();
    }
#endif
}

constexpr int kFirst = first_row(Kernel::kStream);

template <class T, int Bits, int... I>
constexpr auto instances(std::integer_sequence<int, I...>) {
    return std::array<void (*)(StreamArgs), sizeof...(I)>{stream<T, Bits, kFirst + I>...};
}

template <class T>
char const* launch_rows(wog_problem const& p, StreamArgs const& args, wog_plan const& plan, void* stream) {
    constexpr std::make_integer_sequence<int, count_rows(Kernel::kStream)> kAll;
    constexpr auto kFour = instances<T, 4>(kAll), kEight = instances<T, 8>(kAll);
    dim3 const blocks(plan.grid_m, plan.grid_n, plan.splits);
    Grid const grid{blocks, plan.threads, size_t(plan.shared), dim3(1, 1, plan.splits), p.sm >= 90};
    return launch((p.bits == 4 ? kFour : kEight)[plan.row - kFirst], grid, static_cast<Stream>(stream), args);
}

}  // namespace

char const* launch_stream(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream) {
    Row const& row = kRows[plan.row];
    StreamArgs const args{static_cast<unsigned char const*>(t.x),
                          static_cast<unsigned char const*>(t.codes),
                          static_cast<uint32_t const*>(t.affine),
                          output(p, t),
                          p.k,
                          p.group,
                          int32_t(p.m),
                          stream_x_steps(row, p, plan.splits, plan.grid_n),
                          stream_places(row, p, plan.splits, plan.grid_n)};
    return p.type == WOG_F16 ? launch_rows<Half>(p, args, plan, stream) : launch_rows<Bfloat>(p, args, plan, stream);
}

}  // namespace wog
