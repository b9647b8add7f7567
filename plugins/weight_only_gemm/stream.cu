// The kernels of WeightOnlyGemm for a few rows of 16-bit x: weights stream from memory through a ring of stages in
// shared memory, one ring for each warp, so that what is on its way is neither held in registers nor held up by what
// others wait for. sm_80 and newer: rows for Hopper, and rows for all of these, whose shared memory is smaller.
//
// Roles: the weights are the MMA's A operand (16 rows of n), x the B operand (8 columns of m), so M is granular in 8s
// and a lane owns rows g, g + 8 of a strip: two scales and zeros per strip and group.
//
// Work split: a block owns C * 8 m and a part of K, and walks over tiles of S * 16 n, gridDim.y apart. Its WK warps
// divide its part of K and are summed, in order, in shared memory. The blocks with the other parts of K are a cluster,
// that adds up in its blocks' shared memory, or leave their sums in the workspace for a second kernel.
//
// A stage is 64 k of a warp's S strips, with the scales and zeros of its group, D stages on their way across the ends
// of tiles. Each lane copies the bytes of codes that it reads back itself, so no barrier of the block holds the stream
// up. x comes with the first tile's stages and stays, or, where all of it finds no place, comes again with every tile's.
//
// Arithmetic: codes are turned into exact small integers q - c in T (c = 8 or 128) and multiplied with fp32 sums P; at
// the end of each group   acc += s * (P - (z - c) * X),   X = sum of x over the group (an MMA with ones),
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
    float* partials;         // [splits][M][N], null where nothing is added up in the workspace
    Output out;
    int32_t k, group, splits;
    int32_t share, longer;    // steps of each warp that divides K, and how many of them have one more
    int32_t x_rows, x_steps;  // of x in shared memory: its rows, and the steps of a warp that have a place
};

constexpr int kPromote = 1024;

template <class T, int Bits, int I, bool Fine>  // Fine: groups end inside steps
struct Streamer {
    static constexpr Row kRow = kRows[I];
    static constexpr int WK = kRow.warps_k, S = kRow.strips, C = kRow.columns, D = kRow.stages[Bits == 8];
    static constexpr int kBlockN = kRow.block_n(), kBlockM = kRow.block_m(), kThreads = kRow.threads();
    static constexpr int kBlocks = Bits / 4;           // 512-byte blocks of one strip in a step
    static constexpr int kAffine = S * kBlocks * 512;  // where a stage's scales and zeros start
    static constexpr int kStage = stream_stage(kRow, Bits, Fine), kRing = D * kStage;  // bytes
    static constexpr int kPitch = kBlockN + 4;
    static constexpr int kGroupUnit = Fine ? 32 : 64;  // k that groups are counted in
    static constexpr bool kHopper = for_hopper(kRow);  // there all of x finds a place
    static_assert(kRow.warps_n == 1 && 8 % S == 0, "strips of a warp are neighbours in the packed layout");

    StreamArgs const& p;
    int const lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int const wk = uniform(threadIdx.x / 32);
    int64_t const m0 = int64_t(blockIdx.x) * kBlockM;
    int const tiles = (p.out.n + kBlockN - 1) / kBlockN, per_group = p.group / kGroupUnit;
    int first, count;  // this warp's part of K, in steps

    // Shared memory: [zeros: a row that x does not have][ring of each wk][x of each wk][sums of each wk]
    int const x_step = p.x_rows * 128;
    __device__ __forceinline__ unsigned char* x_place() const {
        return dynamic_shared() + 128 + WK * kRing + wk * p.x_steps * x_step;
    }
    __device__ __forceinline__ float* tile_sums() const {
        return reinterpret_cast<float*>(dynamic_shared() + 128 + WK * (kRing + p.x_steps * x_step));
    }
    Shared const ring = shared_address(dynamic_shared() + 128 + wk * kRing) + lane * 16;  // this lane's first piece
    Shared stage = ring;                                                                  // of the step under way
    Shared before = ring + (D - 1) * kStage;  // the one that all have left, to be filled next

    // What is sent for next: a step of a tile
    int feed_tile, feed_left, feed_strips, feed_stride;
    int feed_x = 0, feed_step = 0;  // where x goes next, and, where it comes again, the step that it is of
    int feed_units, feed_group;     // of 32 k, to the end of K; to the end of the group
    unsigned char const *feed_codes, *feed_affine;

    int left = 0, group_left = 0;  // steps to the next handing over of P; from there to the group's end
    int units_left = 0;            // of 32 k, from the step under way to the end of K
    Shared row_at[C];  // this lane's row of the step under way, or the zeros, which do not move from step to step
    int row_moves[C];
    float acc[S][C][4] = {};
    float sum[S][C][4] = {};
    float x_sum[C][4] = {};

    __device__ __forceinline__ explicit Streamer(StreamArgs const& args) : p(args) {
        int const part = blockIdx.z * WK + wk;
        count = p.share + (part < p.longer);
        first = part * p.share + (part < p.longer ? part : p.longer);
        if (threadIdx.x < 8) reinterpret_cast<uint4*>(dynamic_shared())[threadIdx.x] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < C; j++) {
            int const row = j * 8 + lane % 8;
            bool const real = row < p.x_rows;
            row_at[j] = shared_address(real ? x_place() + row * 128 : dynamic_shared()) + ((lane / 8) ^ lane % 8) * 16;
            row_moves[j] = real ? x_step : 0;
        }
    }

    // ---- the stream ----

    __device__ __forceinline__ void seek(int tile) {
        int const all = p.out.n / 16, strip = tile * S, tile8 = strip / 8 * 8,
                  width = all - tile8 < 8 ? all - tile8 : 8;
        int const blocks = (p.k + 256 / Bits - 1) / (256 / Bits), at = first * (64 / kGroupUnit);
        feed_tile = tile;
        feed_left = count;
        feed_strips = tile < tiles ? all - strip : 0;
        feed_units = p.k / 32 - first * 2;
        feed_stride = width * 512;
        feed_codes =
            p.codes + (int64_t(tile8) * blocks + int64_t(first) * kBlocks * width + (strip - tile8)) * 512 + lane * 16;
        feed_group = per_group - at % per_group;
        feed_affine =
            reinterpret_cast<unsigned char const*>(p.affine + int64_t(at / per_group) * p.out.n + tile * kBlockN) +
            lane * 16;
    }

    // All: every strip is there, and all of the step's K
    template <bool All>
    __device__ __forceinline__ void send_pieces(Shared to) const {
#pragma unroll
        for (int b = 0; b < kBlocks; b++)
#pragma unroll
            for (int s = 0; s < S; s++) {
                bool const there = All || (s < feed_strips && b < feed_units);
                copy_async(to + (b * S + s) * 512, there ? feed_codes + b * feed_stride + s * 512 : p.codes, there);
            }
#pragma unroll
        for (int unit = 0; unit < 64 / kGroupUnit; unit++) {
            bool const there = All || (lane / 4 < feed_strips && unit < feed_units);
            unsigned char const* const from = feed_affine + (unit < feed_group ? 0 : p.out.n * 4ll);
            if (lane < S * 4) copy_async(to + kAffine + unit * (S * 64), there ? from : p.codes, there);
        }
    }

    __device__ __forceinline__ void send(Shared to) {
        if (feed_strips >= S && feed_units >= 2)
            send_pieces<true>(to);
        else
            send_pieces<false>(to);
        feed_group -= 64 / kGroupUnit;
        while (feed_group <= 0) feed_group += per_group, feed_affine += p.out.n * 4ll;
        feed_codes += kBlocks * feed_stride;
        feed_units -= 2;
        if (--feed_left == 0) seek(feed_tile + int(gridDim.y));
    }

    // x of the next step of this warp, if it is not there
    __device__ __forceinline__ void send_x() {
        if (kHopper && feed_x == count) return;
        Shared const to = shared_address(x_place() + feed_x * x_step);
        int const pitch = p.k * 2, at = (first + (kHopper ? feed_x : feed_step)) * 128;
#pragma unroll 1
        for (int piece = lane; piece < p.x_rows * 8; piece += 32) {
            int const row = piece / 8, chunk = piece % 8;
            bool const there = m0 + row < p.out.m && at + chunk * 16 < pitch;
            copy_async(to + row * 128 + (chunk ^ row % 8) * 16,
                       p.x + (there ? (m0 + row) * pitch + at + chunk * 16 : 0), there);
        }
        feed_x = !kHopper && feed_x == D - 1 ? 0 : feed_x + 1;
        if (!kHopper && ++feed_step >= count) feed_step = 0;
    }

    // ---- sums ----

    __device__ __forceinline__ void multiply_step(bool last) {
        uint4 words[S][kBlocks];
#pragma unroll
        for (int b = 0; b < kBlocks; b++)
#pragma unroll
            for (int s = 0; s < S; s++) words[s][b] = load_piece(stage + (b * S + s) * 512);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t x[C][4];
#pragma unroll
            for (int j = 0; j < C; j++) load_matrices(x[j], flip(row_at[j], half * 64));
#pragma unroll
            for (int quarter = 0; quarter < 2; quarter++) {
#pragma unroll
                for (int s = 0; s < S; s++) {
                    uint32_t a[4];
                    decode<T, Bits>(a, words[s][half * kBlocks / 2], half * 2 + quarter);
#pragma unroll
                    for (int j = 0; j < C; j++) multiply_add<T>(sum[s][j], a, x[j][quarter * 2], x[j][quarter * 2 + 1]);
                }
                uint32_t const one = from_float<T>(1.0f) * 0x10001u, ones[4] = {one, one, one, one};
#pragma unroll
                for (int j = 0; j < C; j++) multiply_add<T>(x_sum[j], ones, x[j][quarter * 2], x[j][quarter * 2 + 1]);
            }
            if (Fine && half < units_left) finish_group(half);
        }
        bool const back = !kHopper && stage == ring + (D - 1) * kStage;
#pragma unroll
        for (int j = 0; j < C; j++) row_at[j] += back ? (1 - D) * row_moves[j] : row_moves[j];
        if (!Fine && (--left == 0 || last)) finish_group(0), start_span();
    }

    // How many steps until P is handed over
    __device__ __forceinline__ void start_span() {
        constexpr int kMost = kPromote / 64;
        if (group_left == 0) group_left = p.group / 64;
        left = group_left < kMost ? group_left : kMost;
        group_left -= left;
    }

    // acc += s * (P - (z - c) * X). Every row of the ones-MMA is X, so it already lies in the right lane and column.
    __device__ __forceinline__ void finish_group(int unit) {
        Shared const pairs = stage + (kAffine + unit * (S * 64) + g * 4 - lane * 16);
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t const pair = load_word(pairs + (s * 16 + h * 8) * 4);
                float const scale = to_float<T>(uint16_t(pair));
                float const zero = float(1 << (Bits - 1)) - to_float<T>(uint16_t(pair >> 16));
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

    __device__ __forceinline__ void run() {
        seek(blockIdx.y);
#pragma unroll 1
        for (int d = 0; d < D - 1; d++) {
            if (count) send(ring + d * kStage);
            if (d == 0) wait_for_inputs(), release_next();  // x must not wait behind a flood of weights
            send_x();
            copy_commit();
        }
        block_barrier();  // the zeros

        int const step_y = int(gridDim.y);
#pragma unroll 1
        for (int tile = blockIdx.y; tile < tiles; tile += step_y) {
            if (!Fine) group_left = per_group - first % per_group, start_span();
#pragma unroll 1
            for (int step = 0; step < count; step++) {
                if (Fine) units_left = p.k / 32 - (first + step) * 2;
                copy_wait<D - 2>();
                warp_barrier();  // other lanes' scales, zeros and x are there, and all have left the stage before
                send(before);
                send_x();
                copy_commit();
                multiply_step(step == count - 1);
                before = stage;
                stage = stage == ring + (D - 1) * kStage ? ring : stage + kStage;
            }
#pragma unroll
            for (int j = 0; j < C; j++) row_at[j] -= kHopper ? count * row_moves[j] : 0;
            store(tile);
        }
    }

    // Four sums over the WK parts of K, in their order
    __device__ __forceinline__ float4 total(int row, int column) const {
        float const* sums = tile_sums() + row * kPitch + column;
        float4 v{};
#pragma unroll 4
        for (int part = 0; part < WK; part++, sums += p.x_rows * kPitch) add(v, *reinterpret_cast<float4 const*>(sums));
        return v;
    }

    // use(row, column) for every four outputs of a tile, or four gates, `step` threads apart. Unrolled, these few
    // rounds would take registers from the loop that streams.
    template <class Use>
    static __device__ __forceinline__ void each(int rows, int n_end, bool gated, int from, int step, Use const& use) {
        int const fours = kBlockN / (gated ? 8 : 4);
#pragma unroll 1
        for (int item = from; item < rows * fours; item += step) {
            int const row = item / fours, i = item - row * fours, column = gated ? i / 2 * 16 + i % 2 * 4 : i * 4;
            if (column < n_end) use(row, column);
        }
    }

    __device__ __forceinline__ void store(int tile) {
        int const n0 = tile * kBlockN, n_end = p.out.n - n0 < kBlockN ? p.out.n - n0 : kBlockN;
        int const rows = p.out.m - m0 < kBlockM ? int(p.out.m - m0) : kBlockM;
        bool const apart = !kHopper && p.partials, cluster = p.splits > 1 && !apart;
        if (!cluster) block_barrier();  // all have read the tile before
        float* const sums = tile_sums() + wk * p.x_rows * kPitch;
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int j = 0; j < C; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int const row = j * 8 + 2 * t + i % 2;
                    if (row < p.x_rows) sums[row * kPitch + s * 16 + i / 2 * 8 + g] = acc[s][j][i];
                    acc[s][j][i] = 0.0f;
                }
        block_barrier();
        if (apart)
            each(rows, n_end, false, threadIdx.x, kThreads, [&](int row, int column) {
                int64_t const at = (blockIdx.z * p.out.m + m0 + row) * p.out.n + n0 + column;
                *reinterpret_cast<float4*>(p.partials + at) = total(row, column);
            });
        else if (!cluster)
            each(rows, n_end, p.out.gated, threadIdx.x, kThreads, [&](int row, int column) {
                float4 const ups = p.out.gated ? total(row, column + 8) : float4{};
                finish_four<T>(p.out, total(row, column), ups, m0 + row, n0 + column);
            });
        else if (DEVICE_SM == 90)
            store_cluster(n0, n_end, rows);
    }

    // Sums of the blocks of a cluster, in their order; each finishes some of the outputs.
    __device__ __forceinline__ void store_cluster(int n0, int n_end, int rows) const {
        auto const place = [&](int row, int column) { return tile_sums() + row * kPitch + column; };
        each(rows, n_end, false, threadIdx.x, kThreads,
             [&](int row, int column) { *reinterpret_cast<float4*>(place(row, column)) = total(row, column); });
        auto const sum_of_all = [&](int row, int column) {
            float4 v{};
#pragma unroll 4
            for (int rank = 0; rank < p.splits; rank++) add(v, load_four_from(rank, place(row, column)));
            return v;
        };
        cluster_barrier();
        each(rows, n_end, p.out.gated, blockIdx.z * kThreads + threadIdx.x, p.splits * kThreads,
             [&](int row, int column) {
                 float4 const ups = p.out.gated ? sum_of_all(row, column + 8) : float4{};
                 finish_four<T>(p.out, sum_of_all(row, column), ups, m0 + row, n0 + column);
             });
        relaxed_cluster_barrier();  // a block that has ended has no memory; nor may the next tile's sums overtake
    }
};

template <class T, int Bits, int I, bool Fine>
__global__ void __launch_bounds__(kRows[I].threads(), kRows[I].resident) stream(StreamArgs const p) {
#if DEVICE_SM
    if constexpr (kGenerated<T, Fine, I>) Streamer<T, Bits, I, Fine>{p}.run();
#endif
}

constexpr int kFirst = first_row(Kernel::kStream);

template <class T, int Bits, bool Fine, int... I>
constexpr auto instances(std::integer_sequence<int, I...>) {
    return std::array<void (*)(StreamArgs), sizeof...(I)>{stream<T, Bits, kFirst + I, Fine>...};
}

template <class T>
char const* launch_rows(wog_problem const& p, StreamArgs const& args, wog_plan const& plan, void* stream) {
    constexpr std::make_integer_sequence<int, count_rows(Kernel::kStream)> kAll;
    constexpr auto kFour = instances<T, 4, false>(kAll), kFourFine = instances<T, 4, true>(kAll);
    constexpr auto kEight = instances<T, 8, false>(kAll), kEightFine = instances<T, 8, true>(kAll);
    bool const fine = p.group % 64;
    dim3 const blocks(plan.grid_m, plan.grid_n, plan.splits);
    dim3 const cluster(1, 1, args.partials ? 1 : plan.splits);
    Grid const grid{blocks, plan.threads, size_t(plan.shared), cluster, p.sm >= 90};
    auto const& some = p.bits == 4 ? fine ? kFourFine : kFour : fine ? kEightFine : kEight;
    return launch(some[plan.row - kFirst], grid, static_cast<Stream>(stream), args);
}

}  // namespace

char const* launch_stream(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream) {
    Row const& row = kRows[plan.row];
    int const steps = ceil_div(p.k, stage_k(row)), parts = plan.splits * row.warps_k;
    StreamArgs const args{static_cast<unsigned char const*>(t.x),
                          static_cast<unsigned char const*>(t.codes),
                          static_cast<uint32_t const*>(t.affine),
                          sums_apart(row, p, plan, t.workspace),
                          output(p, t),
                          p.k,
                          p.group,
                          plan.splits,
                          steps / parts,
                          steps % parts,
                          stream_x_rows(row, p.m),
                          stream_x_places(row, p, plan.splits)};
    char const* const failed =
        p.type == WOG_F16 ? launch_rows<Half>(p, args, plan, stream) : launch_rows<Bfloat>(p, args, plan, stream);
    return failed || !args.partials ? failed : launch_epilogue(p, t, args.partials, plan.splits, stream);
}

}  // namespace wog
