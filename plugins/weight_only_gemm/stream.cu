// The kernels of WeightOnlyGemm for a few rows of x, of 16 bits or int8: weights stream from memory through a ring of
// stages in shared memory, one ring for each warp, so that what is on its way is neither held in registers nor held up
// by what others wait for. sm_80 and newer: rows for Hopper, and rows for all of these, whose shared memory is smaller.
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
// P is also handed over every kPromote k, because tensor cores cut bits off sums instead of rounding them. Of int8 x
// (rows.cu) P and X are exact int32 of the codes as they are, and the row's scale comes last.
//
// Needs K % 32 == 0, N % 16 == 0, group % 32 == 0, 16-byte aligned pointers: checked by wog_launch.
#include <type_traits>

#include "decode.h"
#include "epilogue.h"
#include "int8.h"
#include "tile.h"

namespace wog {
namespace {

struct StreamArgs {
    unsigned char const* x;  // of int8 activations their values
    float const* scales;     // and their rows' scales
    unsigned char const* codes;
    uint32_t const* affine;  // (scale, zero) pairs, [K / group][N]
    float* partials;         // [splits][M][N], null where nothing is added up in the workspace
    Output out;
    int32_t k, group, splits;
    int32_t share, longer;    // steps of each warp that divides K, and how many of them have one more
    int32_t x_rows, x_steps;  // of x in shared memory: its rows, and the steps of a warp that have a place
};

constexpr int kPromote = 1024;

template <class T, int Bits, bool Fine, int I>  // Fine: groups end inside steps
struct Streamer {
    static constexpr Row kRow = kRows[I];
    static constexpr int WK = kRow.warps_k, S = kRow.strips, C = kRow.columns, D = kRow.stages[Bits == 8];
    static constexpr int kBlockN = kRow.block_n(), kBlockM = kRow.block_m(), kThreads = kRow.threads();
    static constexpr int kBlocks = Bits / 4;           // 512-byte blocks of one strip in a step
    static constexpr int kAffine = S * kBlocks * 512;  // where a stage's scales and zeros start
    static constexpr int kStage = stream_stage(kRow, Bits, Fine), kRing = D * kStage;  // bytes
    static constexpr int kPitch = kBlockN + 4;
    static constexpr int kGroupUnit = Fine ? 32 : 64, kUnits = 64 / kGroupUnit;  // k that groups are counted in
    static constexpr bool kHopper = for_hopper(kRow);                            // there all of x finds a place
    static constexpr bool kInt8 = kRow.activation_bits == 8;
    static constexpr int kXRow = x_row(kRow), kPieces = kXRow / 16;  // bytes of a row of x in a step; of 16
    static constexpr int kParts = kXRow / 32;                        // of a step, one MMA deep
    using Sum = std::conditional_t<kInt8, int32_t, float>;
    static_assert(kRow.warps_n == 1 && (S == 2 || S == 4), "strips of a warp are neighbours in the packed layout");

    // What each step would else compute again, in rows that have registers for it
    template <int Copy = 0, class V>
    static __device__ __forceinline__ V keep(V value) {
        return kHopper || C == 1 ? held<Copy>(value) : value;
    }

    StreamArgs const& p;
    int const lane = keep(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    int const wk = uniform(threadIdx.x / 32);
    int64_t const m0 = int64_t(blockIdx.x) * kBlockM;
    int const tiles = (p.out.n + kBlockN - 1) / kBlockN, per_group = p.group / kGroupUnit;
    int const n = keep(p.out.n);
    int first, count;             // this warp's part of K, in steps
    int first_group, first_left;  // where that begins, and the units of it that are in this part
    int missing;                  // units of the last step that are past the end of K

    // Shared memory: [zeros: a row that x does not have][ring of each wk][x of each wk][sums of each wk]
    int const x_step = p.x_rows * kXRow;
    __device__ __forceinline__ unsigned char* x_place() const {
        return dynamic_shared() + 128 + WK * kRing + wk * p.x_steps * x_step;
    }
    __device__ __forceinline__ float* tile_sums() const {
        return reinterpret_cast<float*>(dynamic_shared() + 128 + WK * (kRing + p.x_steps * x_step));
    }
    Shared const ring = shared_address(dynamic_shared() + 128 + wk * kRing) + lane * 16;  // this lane's first piece
    Shared const ring_affine = ring + (kAffine - lane * 16 + lane * S * 2);               // of its scales and zeros
    Shared const ring_wrap = keep(wrap_of<kStage, D>(ring));
    Shared stage = ring + (D - 1) * kStage;  // of the step under way
    // From there to the first piece of this quad, and to the scales and zeros that this lane converts
    int const to_quad = keep(-t * 16), to_pairs = keep(kAffine - lane * 16 + t * S * 16 + g * 4);

    // What is sent for next: a step of a tile. The stride is of words, from a block of codes to the next.
    int feed_tile = int(blockIdx.y) - int(gridDim.y), feed_strips, feed_stride;
    int feed_run = 0, feed_later = 0;  // plain steps, see send: to the group's end; from there to the tile's
    int feed_units = 0, feed_group;    // where steps are not plain, in group units: to the tile's end; to the group's
    int feed_x = 0, feed_step = 0;     // where x goes next, and, where it comes again, the step that it is of
    unsigned char const *feed_codes, *feed_affine;

    int units_left = 0;  // of 32 k, from the step under way to the end of K
    Shared row_at[C];    // this lane's row of the step under way, or the zeros, which do not move from step to step
    int row_moves[C];
    float acc[S][C][4] = {};
    Sum sum[S][C][4], x_sum[C][4];
    static constexpr uint32_t kOne = kOnesOf<T, Sum>;
    uint32_t const ones[4] = {keep<0>(kOne), keep<1>(kOne), keep<2>(kOne), keep<3>(kOne)};
    Carriers const carrier{keep(carriers<T, Bits>().low), keep(carriers<T, Bits>().high)};

    __device__ __forceinline__ explicit Streamer(StreamArgs const& args) : p(args) {
        int const part = blockIdx.z * WK + wk;
        count = p.share + (part < p.longer);
        first = part * p.share + (part < p.longer ? part : p.longer);
        first_group = first * kUnits / per_group;
        first_left = per_group - first * kUnits % per_group;
        missing = Fine && (first + count) * 64 > p.k;
        if (threadIdx.x < 8) reinterpret_cast<uint4*>(dynamic_shared())[threadIdx.x] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < C; j++) {
            int const row = j * 8 + lane % 8;
            bool const real = row < p.x_rows;
            row_moves[j] = keep(real ? x_step : 0);
            row_at[j] = shared_address(real ? x_place() + row * kXRow : dynamic_shared()) +
                        turned<kXRow>(lane / 8, lane % 8) * 16 +
                        (kHopper ? -1 : D - 1) * row_moves[j];  // a step before the first
        }
    }

    // ---- the stream ----

    __device__ __forceinline__ void seek(int tile) {
        int const all = p.out.n / 16, strip = tile * S, tile8 = strip / 8 * 8,
                  width = all - tile8 < 8 ? all - tile8 : 8;
        int const blocks = (p.k + 256 / Bits - 1) / (256 / Bits);
        feed_tile = tile;
        feed_strips = tile < tiles ? all - strip : 0;
        feed_stride = keep(width * 128);
        feed_codes =
            p.codes + lane * 16 + (int64_t(tile8) * blocks + int64_t(first) * kBlocks * width + (strip - tile8)) * 512;
        feed_affine =
            reinterpret_cast<unsigned char const*>(p.affine + int64_t(first_group) * p.out.n + tile * kBlockN) +
            lane * S * 2;
        feed_units = count * kUnits;
        feed_group = first_left;
    }

    // Sends a step's weights, and before them, with X, the x that is not there yet. Most steps are plain: all of their
    // strips, K and x are there, and their group is that of the step before, so that they only count down.
    template <bool X>
    __device__ __forceinline__ void send(Shared to) {
        if (Fine || feed_run == 0) {
            if (!Fine && feed_later != 0) {
                feed_affine = advance<4>(feed_affine, n);
                start_run(feed_later, per_group);
            } else {
                if (feed_units == 0) seek(feed_tile + int(gridDim.y));
                if (X) send_x(), warp_barrier();
                if (!Fine && feed_strips >= S) {
                    if (feed_group == 0) next_group();
                    int const steps = kHopper && feed_x < count ? 1 : feed_units;
                    start_run(steps, feed_group);
                    feed_units -= steps, feed_group--;
                } else {
                    return send_parts(to);
                }
            }
        }
        feed_run--;
        unsigned char const* from = feed_codes;
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
            if (b) from = advance<4>(from, feed_stride);
#pragma unroll
            for (int s = 0; s < S; s++) copy_async(to + (b * S + s) * 512, from + s * 512);
        }
        copy_async<S * 2>(ring_affine + (to - ring), feed_affine);
    }
    __device__ __forceinline__ void start_run(int steps, int most) {
        feed_run = steps < most ? steps : most;
        feed_later = steps - feed_run;
    }
    __device__ __forceinline__ void next_group() {
        feed_group = per_group;
        feed_affine = advance<4>(feed_affine, n);
    }

    // The same of a step that may lack strips or half of its K, or whose halves may be of two groups
    __device__ __forceinline__ void send_parts(Shared to) {
#pragma unroll
        for (int b = 0; b < kBlocks; b++)
#pragma unroll
            for (int s = 0; s < S; s++) {
                bool const there = s < feed_strips && (!Fine || b < feed_units - missing);
                unsigned char const* const from = advance<4>(feed_codes, feed_stride * b) + s * 512;
                copy_async(to + (b * S + s) * 512, there ? from : p.codes, there);
            }
#pragma unroll
        for (int unit = 0; unit < kUnits; unit++) {
            if (feed_group == 0) next_group();
            bool const there = lane * S / 32 < feed_strips && feed_units > missing;
            copy_async<S * 2>(ring_affine + (to - ring) + unit * (S * 64), there ? feed_affine : p.codes, there);
            feed_units--, feed_group--;
        }
    }

    // x of the next step of this warp, if it is not there
    __device__ __forceinline__ void send_x() {
        if (kHopper && feed_x >= count) return;
        Shared const to = shared_address(x_place() + feed_x * x_step);
        int const pitch = p.k * (kRow.activation_bits / 8), at = (first + (kHopper ? feed_x : feed_step)) * kXRow;
#pragma unroll 1
        for (int item = lane; item < p.x_rows * kPieces; item += 32) {
            int const row = item / kPieces, piece = item % kPieces;
            bool const there = m0 + row < p.out.m && at + piece * 16 < pitch;
            copy_async(to + row * kXRow + turned<kXRow>(piece, row) * 16,
                       p.x + (there ? (m0 + row) * pitch + at + piece * 16 : 0), there);
        }
        feed_x = !kHopper && feed_x == D - 1 ? 0 : feed_x + 1;
        if (!kHopper && ++feed_step >= count) feed_step = 0;
    }

    // ---- sums ----

    template <bool First>  // of its sums
    __device__ __forceinline__ void multiply_step() {
        uint4 words[S][kBlocks];
#pragma unroll
        for (int b = 0; b < kBlocks; b++)
#pragma unroll
            for (int s = 0; s < S; s++) words[s][b] = load_piece(stage + (b * S + s) * 512);
        uint32_t x[C][4];
#pragma unroll
        for (int part = 0; part < kParts; part++) {
            constexpr int kHalf = kParts / 2;
            if (First && (Fine ? part % kHalf : part) == 0) clear();
            if (part % 2 == 0) {
#pragma unroll
                for (int j = 0; j < C; j++) load_matrices(x[j], flip(row_at[j], part * 32));
            }
#pragma unroll
            for (int s = 0; s < S; s++) {
                uint32_t a[4];
                fragment<T, Bits, kInt8>(a, words[s][part * kBlocks / kParts], part, carrier);
#pragma unroll
                for (int j = 0; j < C; j++) multiply<T>(sum[s][j], a, x[j] + part % 2 * 2);
            }
#pragma unroll
            for (int j = 0; j < C; j++) multiply<T>(x_sum[j], ones, x[j] + part % 2 * 2);
            if (Fine && part % kHalf == kHalf - 1 && part / kHalf < units_left) finish_group(part / kHalf);
        }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int j = 0; j < C; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x_sum[j][i] = 0;
#pragma unroll
                for (int s = 0; s < S; s++) sum[s][j][i] = 0;
            }
    }

    // acc += s * (P - (z - c) * X). Every row of the ones-MMA is X, so it already lies in the right lane and column. The
    // lanes of a quad own the same rows of n: each converts a quarter of their scales and zeros, and leaves them where
    // its codes were.
    __device__ __forceinline__ void finish_group(int unit) {
        constexpr int kPairs = S / 2;  // of a lane
        Shared const mine = stage + to_pairs + unit * (S * 64);
        uint32_t values[4] = {};
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
            uint32_t const pair = load_word(mine + i * 32);
            values[i * 2] = float_bits(to_float<T>(uint16_t(pair)));
            values[i * 2 + 1] = float_bits(float(1 << (Bits - 1)) - to_float<T>(uint16_t(pair >> 16)));
        }
        store_piece(stage + unit * 512, {values[0], values[1], values[2], values[3]});
        warp_barrier();
#pragma unroll
        for (int q = 0; q < 4; q++) {
            uint4 const piece = load_piece(stage + to_quad + unit * 512 + q * 16);
#pragma unroll
            for (int i = 0; i < kPairs; i++) {
                int const s = (q * kPairs + i) / 2, h = (q * kPairs + i) % 2;
                float const scale = bits_float(i ? piece.z : piece.x), zero = bits_float(i ? piece.w : piece.y);
#pragma unroll
                for (int j = 0; j < C; j++)
#pragma unroll
                    for (int e = h * 2; e < h * 2 + 2; e++)
                        acc[s][j][e] += scale * corrected<Bits>(sum[s][j][e], x_sum[j][e], zero);
            }
        }
    }

    // A step, when the place of the one before has been filled again
    template <bool First>
    __device__ __forceinline__ void step() {
        copy_wait<D - 2>();
        warp_barrier();  // other lanes' scales, zeros and x are there, and all have left the stage before
        send<kHopper>(stage);
        if (!kHopper) send_x();
        copy_commit();
        feed_codes = advance<4 * kBlocks>(feed_codes, feed_stride);  // in send it would take copies of it
        bool const back = stage == ring + (D - 1) * kStage;
        stage = kHopper ? next_place<kStage, D>(stage, ring_wrap) : back ? ring : stage + kStage;
#pragma unroll
        for (int j = 0; j < C; j++) row_at[j] += !kHopper && back ? (1 - D) * row_moves[j] : row_moves[j];
        multiply_step<First>();
    }

    // ---- tiles ----

    __device__ __forceinline__ void run() {
#pragma unroll 1
        for (int d = 0; d < D - 1; d++) {
            if (count) send<false>(ring + d * kStage), feed_codes = advance<4 * kBlocks>(feed_codes, feed_stride);
            if (d == 0) wait_for_inputs(), release_next();  // x must not wait behind a flood of weights
            send_x();
            copy_commit();
        }
        block_barrier();  // the zeros

        int const step_y = int(gridDim.y);
#pragma unroll 1
        for (int tile = blockIdx.y; tile < tiles; tile += step_y) {
            int group_left = first_left;
#pragma unroll 1
            for (int left = count; left > 0;) {
                if (Fine) {
                    units_left = p.k / 32 - (first + count - left) * 2;
                    step<true>();
                    left--;
                } else {
                    // P is of steps of one group, of this tile, and of kMost at most
                    constexpr int kMost = kInt8 ? 1 << 20 : kPromote / 64;
                    int span = group_left < left ? group_left : left;
                    span = span < kMost ? span : kMost;
                    left -= span;
                    group_left = group_left > kMost ? group_left - kMost : per_group;
                    step<true>();
#pragma unroll 1
                    while (--span > 0) step<false>();
                    finish_group(0);
                }
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
        return kInt8 ? scaled(v, p.scales[m0 + row]) : v;
    }

    // use(row, column) for every four outputs of a tile, or four gates, `step` threads apart. Unrolled, these few
    // rounds would take registers from the loop that streams.
    template <class Use>
    static __device__ __forceinline__ void each(int rows, int n_end, bool gated, int from, int step, Use const& use) {
        int const fours = kBlockN / (gated ? 8 : 4);
#pragma unroll 1
        for (int item = from; item < rows * fours; item += step) {
            int const row = item / fours, i = item - row * fours, column = column_of_four(i, gated);
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

template <class T, int Bits, bool Fine, int I>
__global__ void __launch_bounds__(kRows[I].threads(), kRows[I].resident) stream(StreamArgs const p) {
#if DEVICE_SM
    if constexpr (kGenerated<T, Fine, I>) Streamer<T, Bits, Fine, I>{p}.run();
#endif
}

template <class T, int Bits, bool Fine, int I>
struct StreamOf {
    static constexpr auto kernel = stream<T, Bits, Fine, I>;
};

}  // namespace

char const* launch_stream(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream) {
    Row const& row = kRows[plan.row];
    int const steps = ceil_div(p.k, stage_k(row)), parts = plan.splits * row.warps_k;
    if (char const* failed = launch_quantize(p, t, stream)) return failed;
    StreamArgs const args{multiplied(p, t),
                          int8_rows(p, t.workspace).scales,
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
    return launch_parts(instance<Kernel::kStream, StreamOf>(p, plan, p.group % 64 != 0), args, p, t, plan, stream);
}

}  // namespace wog
