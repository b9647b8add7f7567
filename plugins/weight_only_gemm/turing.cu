// The kernels of WeightOnlyGemm for Turing, which has no asynchronous copies: for fp16 and for int8 activations one
// template streams weights (few rows of x) and multiplies tiles (more rows).
//
// Roles: the weights are the MMA's A operand (16 rows of n), x the B operand (8 columns of m), so M is granular in 8s
// and a lane owns rows g, g + 8 of a strip: two scales and zeros per strip and group.
//
// Work split: a block owns C * 8 m and a part of K, and walks over tiles of WN * S * 16 n, gridDim.y apart. The blocks
// with the other parts are its neighbours in z; their sums meet in the workspace.
//     warp (wk, wn):   n  -->  wn = 0   1   2  ..  WN-1        each warp S strips of 16 n
//                      k   wk = 0
//                      |        1                              the WK rows of warps divide the block's K
//                      v       ..                              and are summed, in order, in shared memory
//
// A step is 128 bytes of a row of x: 64 k, or 128 k of int8; a quarter of it is one MMA deep. Weights go from memory to
// registers, D steps ahead, across the ends of tiles: each byte is used by one lane, and no barrier holds the stream
// up. x goes through shared memory in chunks of one or two steps: the two chunks under way, or, where they fit, all
// chunks of the block's K, which stay there for all its tiles. The 16-byte pieces of a row are XORed with the row: free
// of bank conflicts.
//
// Arithmetic, 16-bit x: codes are turned into exact small integers q - c in T (c = 8 or 128) and multiplied with fp32
// sums P; at the end of each group   acc += s * (P - (z - c) * X),   X = sum of x over the group (an MMA with ones),
// all in fp32: the float zero is never rounded into T. The sum is linear, so K may be cut anywhere at a multiple of
// 32; P is also handed over every kPromote k, because tensor cores cut bits off sums instead of rounding them.
// int8 x (rows.cu): P and X are exact int32 of the codes as they are, c X is subtracted in int32, so that the zero
// is again z - c and small; the row's scale comes last.
//
// Needs K % 32 == 0, N % 16 == 0, group % 32 == 0, 16-byte aligned pointers: checked by wog_launch.
#include <type_traits>

#include "decode.h"
#include "epilogue.h"
#include "int8.h"
#include "tile.h"

namespace wog {
namespace {

struct TuringArgs {
    unsigned char const* x;  // of int8 activations their values
    Int8Rows rows;
    unsigned char const* codes;
    uint32_t const* affine;  // (scale, zero) pairs, [K / group][N]
    float* partials;         // [splits][M][N], null where nothing is added up in the workspace
    Output out;
    int32_t k, group, groups, splits;
    int32_t share, longer;    // steps of each warp that divides K, and how many of them have one more
    int32_t x_rows, x_steps;  // of x in shared memory: its rows, and the steps that have a place
};

constexpr int kPromote = 1024;

template <class T, int Bits, int I>
struct Turing {
    static constexpr Row kRow = kRows[I];
    static constexpr int WN = kRow.warps_n, WK = kRow.warps_k, S = kRow.strips, C = kRow.columns;
    static constexpr int D = kRow.stages[Bits == 8], kThreads = kRow.threads();
    static constexpr int kBlockN = kRow.block_n(), kBlockM = kRow.block_m();
    static constexpr bool kInt8 = kRow.activation_bits == 8;
    static constexpr int kStepK = stage_k(kRow), kChunk = turing_chunk(kRow, Bits);
    static constexpr int kBlocks = kStepK * Bits / 256;  // 512-byte blocks of one strip in a step
    static constexpr int kSums = C / WN;                 // columns of m whose X this warp counts
    static constexpr bool kCounts = !kInt8 || WK > 1;    // else whole groups are summed, which quantize has counted
    static constexpr bool kPairs = WN > 1;               // x is loaded for two columns at a time
    static constexpr int kPitch = kBlockN + 4;  // 4: the eight g and four t of a warp fall into different banks
    static constexpr int kCenter = 1 << (Bits - 1);
    static_assert(C % WN == 0, "warps side by side count the same number of columns");
    using Sum = typename std::conditional<kInt8, int32_t, float>::type;

    TuringArgs const& p;
    int const lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int const warp = uniform(threadIdx.x / 32), wn = warp % WN, wk = warp / WN;
    int64_t const m0 = int64_t(blockIdx.x) * kBlockM;
    int first, count;  // this warp's part of K, in steps

    // Weights: where the next block of a strip lies, and the steps that are on their way
    uint32_t codes = 0;    // in pieces of 16 bytes, as all of this
    int codes_stride = 0;  // from block to block
    int codes_left = 0;    // blocks still to load
    int strips = 0;        // of this warp's that exist in the tile of `codes`
    uint4 ring[D][S][kBlocks] = {};

    // Shared memory: [zeros: a row that x does not have][x of each wk][sums of x of each wk][finished sums]
    __device__ __forceinline__ int x_step() const { return (WN == 1 ? p.x_rows : kBlockM) * 128; }
    __device__ __forceinline__ unsigned char* x_ring() const {
        return dynamic_shared() + 128 + wk * p.x_steps * x_step();
    }
    __device__ __forceinline__ Sum* group_sums() const {
        return reinterpret_cast<Sum*>(dynamic_shared() + 128 + WK * p.x_steps * x_step()) + wk * 2 * kBlockM;
    }
    __device__ __forceinline__ float* tile_sums() const {
        return reinterpret_cast<float*>(dynamic_shared() + 128 + WK * (p.x_steps * x_step() + 2 * kBlockM * 4));
    }
    static constexpr int kRows8 = WN == 1 ? C : 1;
    Shared row_at[kRows8];  // this lane's row of the first step, or in the zeros, which do not move from step to step
    int row_moves[kRows8];
    Shared pair_at;
    bool x_stays;
    int x_at = 0;  // of the step under way, from the first

    // Groups: counted in steps, or in units of 32 k where groups end inside steps
    uint32_t affine_at = 0;
    uint32_t affine[S][2];         // scale and zero of rows g, g + 8 of each strip, for the group under way
    int groups_left = 0;           // after the group under way
    int left = 0, group_left = 0;  // to the next handing over of P; from there to the end of the group
    int parity = 0;
    float acc[S][C][4] = {};                   // [strip][column of 8 m]
    Sum sum[S][C][4] = {};                     // P
    Sum x_sum[kSums][4] = {};                  // X of the columns that this warp counts
    int32_t x_whole[kCounts ? 1 : C][2] = {};  // X of the whole group, where quantize has counted it

    __device__ __forceinline__ explicit Turing(TuringArgs const& args) : p(args) {
        int const part = blockIdx.z * WK + wk;
        count = p.share + (part < p.longer);
        first = count ? part * p.share + (part < p.longer ? part : p.longer) : 0;
        x_stays = WN == 1 && p.x_steps >= (count + kChunk - 1) / kChunk * kChunk;
#pragma unroll
        for (int j = 0; j < kRows8; j++) {
            int const row = j * 8 + lane % 8;
            bool const real = WN > 1 || row < p.x_rows;
            row_at[j] =
                shared_address(real ? x_ring() + row * 128 : dynamic_shared()) + turned<128>(lane / 8, lane % 8) * 16;
            row_moves[j] = real ? -1 : 0;
        }
        int const row = lane / 16 * 8 + lane % 8;
        pair_at = shared_address(x_ring() + row * 128) + turned<128>(lane / 8 % 2, lane % 8) * 16;
    }

    // The WN warps that share x
    __device__ __forceinline__ void barrier() const {
        if constexpr (WN == 1)
            warp_barrier();
        else
            named_barrier(1 + wk, WN * 32);
    }

    // ---- weights ----

    __device__ __forceinline__ void seek(int tile) {
        int const all = p.out.n / 16, strip = tile * (kBlockN / 16) + wn * S;
        int const tile8 = strip / 8 * 8, width = all - tile8 < 8 ? all - tile8 : 8;
        int const blocks = (p.k + 256 / Bits - 1) / (256 / Bits), end = (first + count) * kBlocks;
        strips = all - strip;
        codes_stride = width * 32;
        codes_left = strips > 0 ? (end < blocks ? end : blocks) - first * kBlocks : 0;
        codes = uint32_t(tile8 * blocks + first * kBlocks * width + (strip - tile8)) * 32 + lane;
    }

    __device__ __forceinline__ void load_block(uint4 (&words)[S][kBlocks], int b) {
#pragma unroll
        for (int s = 0; s < S; s++)
            if (codes_left > 0 && s < strips) words[s][b] = load_once(p.codes + (codes + s * 32ull) * 16);
        codes += codes_stride;
        codes_left--;
    }

    // ---- x ----

    __device__ __forceinline__ void load_chunk(int chunk, int place) const {
        constexpr int kPieces = kChunk * 8;  // of a row
        int const thread = wn * 32 + lane, piece = thread % kPieces, bytes = p.k * (kRow.activation_bits / 8);
        int const at = (first + kChunk * chunk) * 128 + piece * 16;
        Shared const slot = shared_address(x_ring()) + (kChunk * place + piece / 8) * x_step();
#pragma unroll 1
        for (int row = thread / kPieces; row < p.x_rows; row += WN * 32 / kPieces) {
            bool const valid = m0 + row < p.out.m && at < bytes;
            copy_async(slot + row * 128 + turned<128>(piece % 8, row) * 16, p.x + (valid ? (m0 + row) * bytes + at : 0),
                       valid);
        }
    }

    // The chunk under way becomes readable; the one after it, maybe the next tile's first, is sent for.
    __device__ __forceinline__ void next_chunk(int steps_left, bool more_tiles) {
        copy_wait<0>();
        barrier();  // it is there for all, and all have left the other place
        if (!x_stays) {
            if (kChunk == 2 && (x_at == x_step() || x_at == 3 * x_step()))
                x_at += x_step();  // half of one ended a tile
            if (x_at == 2 * kChunk * x_step()) x_at = 0;
        }
        int const chunk = (count - steps_left) / kChunk, place = x_stays ? chunk + 1 : x_at ? 0 : 1;
        if (steps_left > kChunk)
            load_chunk(chunk + 1, place);
        else if (more_tiles && !x_stays)
            load_chunk(0, place);
        copy_commit();
    }

    // What load_matrices reads from the step of x under way: two quarters of one column, or one quarter of two
    // columns, which keeps fewer registers. Quarters are 32 bytes apart, which XOR keeps inside the swizzled 128.
    __device__ __forceinline__ Shared one_column(int quarter, int j) const {
        Shared const row = WN == 1 ? row_at[j % kRows8] + (x_at & row_moves[j % kRows8]) : row_at[0] + x_at + j * 1024;
        return flip(row, quarter * 32);
    }
    __device__ __forceinline__ Shared two_columns(int quarter, int j) const {
        return flip(pair_at + x_at + j * 1024, quarter * 32);
    }

    // ---- sums ----

    // X += ones * x
    __device__ __forceinline__ void add_up(int j, uint32_t const* x) {
        constexpr uint32_t kOne = kOnesOf<T, Sum>;
        uint32_t const ones[4] = {kOne, kOne, kOne, kOne};
        multiply<T>(x_sum[j], ones, x);
    }

    template <bool Fine>
    __device__ __forceinline__ void multiply_step(uint4 (&words)[S][kBlocks], int tile) {
        uint32_t x[kPairs ? C / 2 : C][4];
#pragma unroll
        for (int quarter = 0; quarter < 4; quarter++) {
            if constexpr (kPairs) {
#pragma unroll
                for (int j = 0; j < C; j += 2) load_matrices(x[j / 2], two_columns(quarter, j));
            } else if (quarter % 2 == 0) {
#pragma unroll
                for (int j = 0; j < C; j++) load_matrices(x[j], one_column(quarter, j));
            }
#pragma unroll
            for (int s = 0; s < S; s++) {
                uint32_t a[4];
                fragment<T, Bits, kInt8>(a, words[s][quarter * kBlocks / 4], quarter);
#pragma unroll
                for (int j = 0; j < C; j++)
                    multiply<T>(sum[s][j], a, kPairs ? x[j / 2] + j % 2 * 2 : x[j] + quarter % 2 * 2);
            }
            if ((quarter + 1) * kBlocks % 4 == 0) load_block(words, quarter * kBlocks / 4);
            if constexpr (kCounts) {
#pragma unroll
                for (int j = 0; j < kSums; j++) {
                    if constexpr (kPairs) load_matrices(x[0], one_column(quarter / 2 * 2, wn * kSums + j));
                    add_up(j, x[kPairs ? 0 : j] + quarter % 2 * 2);
                }
            }
            if (Fine ? kInt8 || quarter % 2 : quarter == 3) advance<Fine>(tile);
        }
    }

    template <bool Fine>
    static constexpr int kCount = Fine ? 32 : kStepK;

    template <bool Fine>
    __device__ __forceinline__ void start_span() {
        constexpr int kMost = kPromote / kCount<Fine>;
        left = kInt8 || group_left < kMost ? group_left : kMost;
        group_left -= left;
    }

    template <bool Fine>
    __device__ __forceinline__ void start_groups(int tile) {
        unsigned const per_group = p.group / kCount<Fine>, at = first * (kStepK / kCount<Fine>), group = at / per_group;
        group_left = per_group - at % per_group;
        groups_left = p.groups - 1 - group;
        affine_at = group * p.out.n + tile * kBlockN + wn * S * 16 + g;
        load_group(tile);
        start_span<Fine>();
    }

    __device__ __forceinline__ void load_group(int tile) {
        int const live = p.out.n / 16 - tile * (kBlockN / 16) - wn * S;  // strips of this warp that exist
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int h = 0; h < 2; h++) affine[s][h] = s < live ? p.affine[affine_at + (s * 16ull + h * 8)] : 0;
        if constexpr (!kCounts) {
            float const* const sums = p.rows.sums + (p.groups - 1 - groups_left) * p.rows.pitch;
#pragma unroll
            for (int j = 0; j < C; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int64_t const m = m0 + j * 8 + 2 * t + e;
                    x_whole[j][e] = m < p.out.m ? Sum(sums[m]) : 0;
                }
        }
    }

    template <bool Fine>
    __device__ __forceinline__ void advance(int tile) {
        if (--left) return;
        finish_group();
        if (group_left == 0) {
            group_left = p.group / kCount<Fine>;
            if (groups_left-- > 0) {
                affine_at += p.out.n;
                load_group(tile);
            } else {
                for (auto& x : x_whole) x[0] = x[1] = 0;
            }
        }
        start_span<Fine>();
    }

    // acc += s * (P - (z - c) * X). Every row of the ones-MMA is X, so it already lies in the right lane and column.
    __device__ __forceinline__ void finish_group() {
        Sum* const sums = group_sums() + parity * kBlockM;
        if constexpr (kCounts && WN > 1) {
#pragma unroll
            for (int j = 0; j < kSums; j++)
                if (g == 0) {
                    sums[(wn * kSums + j) * 8 + 2 * t] = x_sum[j][0];
                    sums[(wn * kSums + j) * 8 + 2 * t + 1] = x_sum[j][1];
                }
            barrier();  // two buffers: the next group's writes wait for this group's readers at the next barrier
        }
        float scale[S][2], zero[S][2];
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                scale[s][h] = to_float<T>(uint16_t(affine[s][h]));
                zero[s][h] = float(kCenter) - to_float<T>(uint16_t(affine[s][h] >> 16));
            }
#pragma unroll
        for (int j = 0; j < C; j++) {
            Sum x[2];
#pragma unroll
            for (int e = 0; e < 2; e++)
                if constexpr (!kCounts)
                    x[e] = x_whole[j][e];
                else
                    x[e] = WN > 1 ? sums[j * 8 + 2 * t + e] : x_sum[j % kSums][e];
#pragma unroll
            for (int s = 0; s < S; s++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    acc[s][j][i] += scale[s][i / 2] * corrected<Bits>(sum[s][j][i], x[i % 2], zero[s][i / 2]);
                    sum[s][j][i] = 0;
                }
        }
#pragma unroll
        for (int i = 0; i < kSums; i++) x_sum[i][0] = x_sum[i][1] = x_sum[i][2] = x_sum[i][3] = 0;
        parity ^= 1;
    }

    // ---- tiles ----

    template <bool Fine>
    __device__ __forceinline__ void run() {
        seek(blockIdx.y);
#pragma unroll
        for (int d = 0; d < D; d++)
#pragma unroll
            for (int b = 0; b < kBlocks; b++) load_block(ring[d], b);
        if (threadIdx.x < 8) reinterpret_cast<uint4*>(dynamic_shared())[threadIdx.x] = {0, 0, 0, 0};
        wait_for_inputs();
        release_next();
        load_chunk(0, 0);
        copy_commit();
        block_barrier();  // the zeros

        int const step_y = int(gridDim.y);
#pragma unroll 1
        for (int tile = blockIdx.y; tile < tiles(); tile += step_y) {
            start_groups<Fine>(tile);
            if (x_stays) x_at = 0;
#pragma unroll 1
            for (int steps_left = count; steps_left > 0; steps_left -= D) {
                if (steps_left <= D) seek(tile + step_y);
#pragma unroll
                for (int d = 0; d < D; d++) {
                    if (d < steps_left) {
                        if (d % kChunk == 0 && (!x_stays || tile == int(blockIdx.y)))
                            next_chunk(steps_left - d, tile + step_y < tiles());
                        multiply_step<Fine>(ring[d], tile);
                        x_at += x_step();
                    } else {  // places that this part of K does not fill
#pragma unroll
                        for (int b = 0; b < kBlocks; b++) load_block(ring[d], b);
                    }
                }
            }
            finish_group();  // of the group that goes on in another warp; else of nothing
            store(tile);
        }
    }

    __device__ __forceinline__ int tiles() const { return (p.out.n + kBlockN - 1) / kBlockN; }

    // The sum over the WK parts of K, in their order
    __device__ __forceinline__ float total(int row, int column) const {
        float const* const sums = tile_sums() + row * kPitch + column;
        float v = sums[0];
#pragma unroll
        for (int part = 1; part < WK; part++) v += sums[part * kBlockM * kPitch];
        return kInt8 ? v * p.rows.scales[m0 + row] : v;
    }

    // use(row, column) for every output of a tile, or every gate. Unrolled, these few rounds would take registers from
    // the loop that streams.
    template <class Use>
    static __device__ __forceinline__ void each(int rows, int n_end, bool gated, Use const& use) {
        int const width = gated ? kBlockN / 2 : kBlockN;
#pragma unroll 1
        for (int item = threadIdx.x; item < rows * width; item += kThreads) {
            int const row = gated ? item / (kBlockN / 2) : item / kBlockN, i = item - row * width;
            int const column = gated ? i / 8 * 16 + i % 8 : i;
            if (column < n_end) use(row, column);
        }
    }

    __device__ __forceinline__ int rows() const { return p.out.m - m0 < kBlockM ? int(p.out.m - m0) : kBlockM; }
    __device__ __forceinline__ int columns(int n0) const { return p.out.n - n0 < kBlockN ? p.out.n - n0 : kBlockN; }

    __device__ __forceinline__ void store(int tile) {
        int const n0 = tile * kBlockN, n_end = columns(n0), rows = this->rows();
        block_barrier();  // all have read the tile before
        store_sums(tile_sums(), kPitch, acc, wk * kBlockM, wn * S * 16, g, t);
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int j = 0; j < C; j++) acc[s][j][0] = acc[s][j][1] = acc[s][j][2] = acc[s][j][3] = 0.0f;
        block_barrier();
        if (p.splits > 1) {
            float* const to = p.partials + (blockIdx.z * p.out.m + m0) * p.out.n + n0;
            each(rows, n_end, false,
                 [&](int row, int column) { to[int64_t(row) * p.out.n + column] = total(row, column); });
        } else if (kBlockM <= 16) {  // few values
            each(rows, n_end, p.out.gated, [&](int row, int column) {
                float const up = p.out.gated ? total(row, column + 8) : 0.0f;
                finish_one<T>(p.out, total(row, column), up, m0 + row, n0 + column);
            });
        } else {
            for (int item = threadIdx.x; item < rows * (kBlockN / 16); item += kThreads) {
                int const row = item / (kBlockN / 16), column = item % (kBlockN / 16) * 16;
                if (column >= n_end) continue;
                float v[16];
#pragma unroll
                for (int i = 0; i < 16; i++) v[i] = total(row, column + i);
                finish<T>(p.out, v, m0 + row, n0 + column);
            }
        }
    }
};

template <class T, int Bits, int I>
__global__ void __launch_bounds__(kRows[I].threads(), kRows[I].resident) turing(TuringArgs const p) {
#if DEVICE_SM
    if constexpr (kGenerated<T, false, I>) {
        Turing<T, Bits, I> block{p};
        if (p.group % Turing<T, Bits, I>::kStepK)
            block.template run<true>();
        else
            block.template run<false>();
    }
#endif
}

template <class T, int Bits, bool, int I>  // one kernel for all groups
struct TuringOf {
    static constexpr auto kernel = turing<T, Bits, I>;
};

}  // namespace

char const* launch_turing(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream) {
    Row const& row = kRows[plan.row];
    int const steps = ceil_div(p.k, stage_k(row)), parts = plan.splits * row.warps_k;
    if (char const* failed = launch_quantize(p, t, stream)) return failed;
    TuringArgs const args{multiplied(p, t),
                          int8_rows(p, t.workspace),
                          static_cast<unsigned char const*>(t.codes),
                          static_cast<uint32_t const*>(t.affine),
                          sums_apart(row, p, plan, t.workspace),
                          output(p, t),
                          p.k,
                          p.group,
                          p.k / p.group,
                          plan.splits,
                          steps / parts,
                          steps % parts,
                          turing_x_rows(row, p.m),
                          turing_x_steps(row, p, plan.splits)};
    return launch_parts(instance<Kernel::kTuring, TuringOf>(p, plan, false), args, p, t, plan, stream);
}

}  // namespace wog
