// The 16-bit-activation kernels of WeightOnlyGemm for mma.sync: one template streams weights (few rows of x) and
// multiplies tiles (more rows).
//
// Roles: the weights are the MMA's A operand (16 rows of n), x the B operand (8 columns of m), so M is granular in 8s and
// a lane owns rows g, g + 8 of a strip: two scales and zeros per strip and group.
//
// Work split: a block owns C * 8 m and a part of K, and walks over tiles of WN * S * 16 n, gridDim.y apart.
//     warp (wk, wn):   n  -->  wn = 0   1   2  ..  WN-1        each warp S strips of 16 n
//                      k   wk = 0
//                      |        1                              the WK rows of warps divide the block's K
//                      v       ..                              and are summed, in order, in shared memory
//
// Weights go from memory to registers, D steps of 64 k ahead, across the ends of tiles: each byte is used by one lane, and
// no barrier holds the stream up. x goes through shared memory in chunks of 128 k: the two chunks under way, or, where
// they fit, all chunks of the block's K once for all its tiles. A row of 64 k is 128 bytes, its 16-byte pieces XORed with
// the row: free of bank conflicts.
//
// Arithmetic: codes are turned into exact small integers q - c in T (c = 8 or 128) and multiplied with fp32 sums P; at the
// end of each group   acc += s * (P - (z - c) * X),   X = sum of x over the group (an MMA with ones), all in fp32: the
// float zero is never rounded into T. The sum is linear, so K may be cut anywhere at a multiple of 32; P is also handed
// over every kPromote k, because tensor cores cut bits off sums instead of rounding them.
//
// Needs K % 32 == 0, N % 16 == 0, group % 32 == 0, 16-byte aligned pointers: checked by wog_launch.
#include <array>
#include <utility>

#include "decode.h"
#include "epilogue.h"
#include "tile.h"

namespace wog {
namespace {

struct GemmArgs {
    uint16_t const* x;
    unsigned char const* codes;
    uint32_t const* affine;  // (scale, zero) pairs, [K / group][N]
    float* partials;         // [splits][M][N], null when K is not split
    Output out;
    int32_t k, group, splits;
    int32_t x_rows, x_steps;  // of x in shared memory: its rows, and the steps of 64 k that have a place
};

constexpr int kPromote = 1024;

template <class T, int Bits, int I>
struct Gemm {
    static constexpr Row kRow = kRows[I];
    static constexpr int WN = kRow.warps_n, WK = kRow.warps_k, S = kRow.strips, C = kRow.columns;
    static constexpr int D = kRow.stages[Bits == 8], kThreads = kRow.threads();
    static constexpr int kBlockN = kRow.block_n(), kBlockM = kRow.block_m();
    static constexpr int kBlocks = Bits / 4;  // 512-byte blocks of one strip in a step of 64 k
    static constexpr int kSums = C / WN;      // columns of m whose X this warp counts
    static constexpr int kPitch = kBlockN + 4;  // 4: the eight g and four t of a warp fall into different banks
    static_assert(C % WN == 0, "warps side by side count the same number of columns");
    static_assert(D % 2 == 0, "a chunk of x is two steps");

    GemmArgs const& p;
    int const lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int const warp = uniform(threadIdx.x / 32), wn = warp % WN, wk = warp / WN;
    int64_t const m0 = int64_t(blockIdx.x) * kBlockM;
    int first, count;  // this warp's part of K, in steps of 64

    // Weights: where the next step lies, and the steps that are on their way
    unsigned char const* codes = nullptr;
    int codes_stride = 0;  // bytes from step to step
    int codes_left = 0;    // 512-byte blocks of a strip still to load
    int strips = 0;        // of this warp's that exist in the tile of `codes`
    uint4 ring[D][S][kBlocks] = {};

    // Shared memory: [zeros][x of each wk][sums of x of each wk][finished sums]
    int const x_step = p.x_rows * 128;
    unsigned char* const zeros = dynamic_shared();  // a row that x does not have
    unsigned char* const x_ring = zeros + 128 + wk * p.x_steps * x_step;
    float* const group_sums = reinterpret_cast<float*>(zeros + 128 + WK * p.x_steps * x_step) + wk * 2 * kBlockM;
    float* const tile_sums = reinterpret_cast<float*>(zeros + 128 + WK * (p.x_steps * x_step + 2 * kBlockM * 4));
    static constexpr int kRows8 = WN == 1 ? C : 1;
    Shared row_at[kRows8];  // this lane's row of the first step, or in the zeros, which do not move from step to step
    int row_moves[kRows8];
    Shared pair_at;
    bool x_stays;
    int chunk_slot = 1;  // of the chunk under way, where two take turns

    // Groups: counted in steps, or in units of 32 k where groups end inside steps
    uint32_t const* affine_at = nullptr;
    uint32_t affine[S][2];  // scale and zero of rows g, g + 8 of each strip, for the group under way
    int groups_left = 0;    // after it
    int live = 0;           // strips of this warp that exist in the tile under way
    int left = 0, group_left = 0;  // to the next handing over of P; from there to the end of the group
    int parity = 0;
    float acc[S][C][4] = {}, sum[S][C][4] = {};  // [strip][column of 8 m]; `sum` is P
    float x_sum[kSums][4] = {};                  // X of the columns that this warp counts

    __device__ __forceinline__ explicit Gemm(GemmArgs const& args) : p(args) {
        int const steps = (p.k + 63) / 64, part = blockIdx.z * WK + wk, parts = p.splits * WK;
        first = int(int64_t(steps) * part / parts);
        count = int(int64_t(steps) * (part + 1) / parts) - first;
        x_stays = p.x_steps >= (count + 1) / 2 * 2;
#pragma unroll
        for (int j = 0; j < kRows8; j++) {
            int const row = j * 8 + lane % 8;
            bool const real = WN > 1 || row < p.x_rows;
            row_at[j] = shared_address(real ? x_ring + row * 128 : zeros) + ((lane / 8) ^ lane % 8) * 16;
            row_moves[j] = real ? -1 : 0;
        }
        int const row = lane / 16 * 8 + lane % 8;
        pair_at = shared_address(x_ring + row * 128) + ((lane / 8 % 2) ^ lane % 8) * 16;
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
        codes_stride = kBlocks * width * 512;
        codes_left = strips > 0 ? (end < blocks ? end : blocks) - first * kBlocks : 0;
        codes = p.codes + (int64_t(tile8) * blocks + int64_t(first) * kBlocks * width + (strip - tile8)) * 512 + lane * 16;
    }

    __device__ __forceinline__ void load_step(uint4 (&words)[S][kBlocks]) {
#pragma unroll
        for (int b = 0; b < kBlocks; b++)
#pragma unroll
            for (int s = 0; s < S; s++)
                if (b < codes_left && s < strips) words[s][b] = load_once(codes + b * (codes_stride / kBlocks) + s * 512);
        codes += codes_stride;
        codes_left -= kBlocks;
    }

    // ---- x ----

    __device__ __forceinline__ void load_chunk(int chunk, int place) const {
        int const thread = wn * 32 + lane, piece = thread % 16, k = (first + 2 * chunk) * 64 + piece * 8;
        Shared const slot = shared_address(x_ring) + (2 * place + piece / 8) * x_step;
#pragma unroll 1
        for (int row = thread / 16; row < p.x_rows; row += 2 * WN) {
            bool const valid = m0 + row < p.out.m && k < p.k;
            copy_async(slot + row * 128 + (piece ^ row) % 8 * 16, p.x + (valid ? (m0 + row) * p.k + k : 0), valid);
        }
    }

    // The chunk that starts with `step` becomes readable; the one after it, maybe the next tile's first, is sent for.
    __device__ __forceinline__ void next_chunk(int step, bool more_tiles) {
        copy_wait<0>();
        barrier();  // it is there for all, and all have left the other slot
        chunk_slot ^= 1;
        bool const last = step + 2 >= count;
        if (!last || more_tiles) load_chunk(last ? 0 : step / 2 + 1, chunk_slot ^ 1);
        copy_commit();
    }

    // What load_matrices reads from a step of x at x_at: for one column 32 k, or for two columns 16 k, which keeps fewer
    // registers. Pieces of 16 k are 32 bytes apart, which XOR keeps inside the swizzled 128.
    __device__ __forceinline__ Shared one_column(int x_at, int unit, int j) const {
        Shared const row = WN == 1 ? row_at[j % kRows8] + (x_at & row_moves[j % kRows8]) : row_at[0] + x_at + j * 1024;
        return flip(row, unit * 64);
    }
    __device__ __forceinline__ Shared two_columns(int x_at, int k16, int j) const {
        return flip(pair_at + x_at + j * 1024, k16 * 32);
    }

    // ---- sums ----

    // X += ones * x for 32 k
    __device__ __forceinline__ void count_column(int j, uint32_t const (&x)[4]) {
        uint32_t const one = from_float<T>(1.0f) * 0x10001u;
        uint32_t const ones[4] = {one, one, one, one};
        multiply_add<T>(x_sum[j], ones, x[0], x[1]);
        multiply_add<T>(x_sum[j], ones, x[2], x[3]);
    }

    template <bool Fine>
    __device__ __forceinline__ void multiply_step(uint4 const (&words)[S][kBlocks], int x_at) {
        constexpr bool kPairs = WN > 1;
        uint32_t x[kPairs ? C / 2 : C][4];
#pragma unroll
        for (int k16 = 0; k16 < 4; k16++) {
            int const unit = k16 / 2, step = k16 % 2;
            if constexpr (kPairs) {
#pragma unroll
                for (int j = 0; j < C; j += 2) load_matrices(x[j / 2], two_columns(x_at, k16, j));
            } else if (step == 0) {
#pragma unroll
                for (int j = 0; j < C; j++) load_matrices(x[j], one_column(x_at, unit, j));
            }
#pragma unroll
            for (int s = 0; s < S; s++) {
                uint32_t a[4];
                decode<T, Bits>(a, words[s], unit, step);
#pragma unroll
                for (int j = 0; j < C; j++) {
                    uint32_t const* const b = kPairs ? x[j / 2] + 2 * (j % 2) : x[j] + 2 * step;
                    multiply_add<T>(sum[s][j], a, b[0], b[1]);
                }
            }
            if (step == 0) continue;
#pragma unroll
            for (int j = 0; j < kSums; j++) {
                if constexpr (kPairs) load_matrices(x[0], one_column(x_at, unit, wn * kSums + j));
                count_column(j, x[kPairs ? 0 : j]);
            }
            if (Fine || unit == 1) advance<Fine>();
        }
    }

    template <bool Fine>
    static constexpr int kCount = Fine ? 32 : 64;

    template <bool Fine>
    __device__ __forceinline__ void start_span() {
        constexpr int kMost = kPromote / kCount<Fine>;
        left = group_left < kMost ? group_left : kMost;
        group_left -= left;
    }

    template <bool Fine>
    __device__ __forceinline__ void start_groups(int tile) {
        int const per_group = p.group / kCount<Fine>, at = first * 64 / kCount<Fine>, group = at / per_group;
        group_left = per_group - at % per_group;
        groups_left = p.k / p.group - 1 - group;
        affine_at = p.affine + int64_t(group) * p.out.n + tile * kBlockN + wn * S * 16 + g;
        live = p.out.n / 16 - tile * (kBlockN / 16) - wn * S;
        load_affine();
        start_span<Fine>();
    }

    __device__ __forceinline__ void load_affine() {
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int h = 0; h < 2; h++) affine[s][h] = s < live ? affine_at[s * 16 + h * 8] : 0;
    }

    template <bool Fine>
    __device__ __forceinline__ void advance() {
        if (--left) return;
        finish_group();
        if (group_left == 0) {
            group_left = p.group / kCount<Fine>;
            if (groups_left-- > 0) {
                affine_at += p.out.n;
                load_affine();
            }
        }
        start_span<Fine>();
    }

    // acc += s * (P - (z - c) * X). Every row of the ones-MMA is X, so it already lies in the right lane and column.
    __device__ __forceinline__ void finish_group() {
        float const* const sums = group_sums + parity * kBlockM;
        if constexpr (WN > 1) {
#pragma unroll
            for (int j = 0; j < kSums; j++)
                if (g == 0) {
                    int const at = parity * kBlockM + (wn * kSums + j) * 8 + 2 * t;
                    group_sums[at] = x_sum[j][0];
                    group_sums[at + 1] = x_sum[j][1];
                }
            barrier();  // two buffers: the next group's writes wait for this group's readers at the next barrier
        }
        float scale[S][2], zero[S][2];
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                scale[s][h] = to_float<T>(uint16_t(affine[s][h]));
                zero[s][h] = kCenter<Bits> - to_float<T>(uint16_t(affine[s][h] >> 16));
            }
#pragma unroll
        for (int j = 0; j < C; j++) {
            float const x0 = WN == 1 ? x_sum[j % kSums][0] : sums[j * 8 + 2 * t];
            float const x1 = WN == 1 ? x_sum[j % kSums][1] : sums[j * 8 + 2 * t + 1];
#pragma unroll
            for (int s = 0; s < S; s++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    acc[s][j][2 * h] += scale[s][h] * (sum[s][j][2 * h] + zero[s][h] * x0);
                    acc[s][j][2 * h + 1] += scale[s][h] * (sum[s][j][2 * h + 1] + zero[s][h] * x1);
                    sum[s][j][2 * h] = sum[s][j][2 * h + 1] = 0.0f;
                }
        }
#pragma unroll
        for (int i = 0; i < kSums; i++) x_sum[i][0] = x_sum[i][1] = x_sum[i][2] = x_sum[i][3] = 0.0f;
        parity ^= 1;
    }

    // ---- tiles ----

    template <bool Fine>
    __device__ __forceinline__ void run() {
        seek(blockIdx.y);
#pragma unroll
        for (int d = 0; d < D; d++) load_step(ring[d]);
        if (threadIdx.x < 8) reinterpret_cast<uint4*>(zeros)[threadIdx.x] = {0, 0, 0, 0};
        wait_for_inputs();
        release_next();
        for (int chunk = 0; 2 * chunk < (x_stays ? count : 1); chunk++) load_chunk(chunk, chunk);
        copy_commit();
        if (x_stays) copy_wait<0>();
        block_barrier();

        int const rounds = (count + D - 1) / D, step_y = int(gridDim.y);
#pragma unroll 1
        for (int tile = blockIdx.y; tile < tiles(); tile += step_y) {
            start_groups<Fine>(tile);
#pragma unroll 1
            for (int round = 0; round < rounds; round++) {
                if (round + 1 == rounds) seek(tile + step_y);
#pragma unroll
                for (int d = 0; d < D; d++) {
                    int const step = round * D + d;
                    if (step < count) {
                        if (d % 2 == 0 && !x_stays) next_chunk(step, tile + step_y < tiles());
                        multiply_step<Fine>(ring[d], (x_stays ? step : 2 * chunk_slot + d % 2) * x_step);
                    }
                    load_step(ring[d]);
                }
            }
            finish_group();  // of the group that goes on in another warp; else of nothing
            store(tile);
        }
    }

    __device__ __forceinline__ int tiles() const { return (p.out.n + kBlockN - 1) / kBlockN; }

    // The sum over the WK parts of K, in their order
    __device__ __forceinline__ float total(int row, int column) const {
        float v = tile_sums[row * kPitch + column];
#pragma unroll
        for (int part = 1; part < WK; part++) v += tile_sums[(part * kBlockM + row) * kPitch + column];
        return v;
    }

    __device__ __forceinline__ void store(int tile) {
        int const n0 = tile * kBlockN, n_end = p.out.n - n0 < kBlockN ? p.out.n - n0 : kBlockN;
        int const rows = p.out.m - m0 < kBlockM ? int(p.out.m - m0) : kBlockM;
        block_barrier();  // all have read the tile before
        store_sums(tile_sums, kPitch, acc, wk * kBlockM, wn * S * 16, g, t);
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int j = 0; j < C; j++) acc[s][j][0] = acc[s][j][1] = acc[s][j][2] = acc[s][j][3] = 0.0f;
        block_barrier();
        if (p.partials || kBlockM <= 16) {  // few values: one for each thread
            bool const gated = p.out.gated && !p.partials;
            int const width = gated ? kBlockN / 2 : kBlockN;
            for (int item = threadIdx.x; item < rows * width; item += kThreads) {
                int const row = gated ? item / (kBlockN / 2) : item / kBlockN, i = item - row * width;
                int const column = gated ? i / 8 * 16 + i % 8 : i;
                if (column >= n_end) continue;
                float const v = total(row, column);
                if (p.partials)
                    p.partials[(blockIdx.z * p.out.m + m0 + row) * p.out.n + n0 + column] = v;
                else
                    finish_one<T>(p.out, v, gated ? total(row, column + 8) : 0.0f, m0 + row, n0 + column);
            }
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
__global__ void __launch_bounds__(kRows[I].threads(), kRows[I].resident) gemm(GemmArgs const p) {
#if DEVICE_SM
    if constexpr (kGenerated<T, I>) {
        Gemm<T, Bits, I> block{p};
        if (p.group % 64)
            block.template run<true>();
        else
            block.template run<false>();
    }
#endif
}

struct EpilogueArgs {
    float const* parts;
    Output out;
    int32_t splits;
};

// One thread per row and strip
template <class T>
__global__ void __launch_bounds__(256) epilogue(EpilogueArgs const p) {
    int const strips = p.out.n / 16;
    int64_t const item = int64_t(blockIdx.x) * 256 + threadIdx.x, m = item / strips;
    int const n = int(item % strips) * 16;
    wait_for_inputs();
    release_next();
    if (m >= p.out.m) return;
    float v[16] = {};
    for (int part = 0; part < p.splits; part++)
#pragma unroll
        for (int i = 0; i < 16; i++) v[i] += p.parts[(part * p.out.m + m) * p.out.n + n + i];
    finish<T>(p.out, v, m, n);
}

constexpr int kFirst = first_row(Kernel::kGemm);

template <class T, int Bits, int... I>
constexpr auto instances(std::integer_sequence<int, I...>) {
    return std::array<void (*)(GemmArgs), sizeof...(I)>{gemm<T, Bits, kFirst + I>...};
}

template <class T>
char const* launch_rows(wog_problem const& p, GemmArgs const& args, wog_plan const& plan, void* stream) {
    constexpr std::make_integer_sequence<int, count_rows(Kernel::kGemm)> kAll;
    constexpr auto kFour = instances<T, 4>(kAll), kEight = instances<T, 8>(kAll);
    Grid const grid{dim3(plan.grid_m, plan.grid_n, plan.splits), plan.threads, size_t(plan.shared), 1, p.sm >= 90};
    return launch((p.bits == 4 ? kFour : kEight)[plan.row - kFirst], grid, static_cast<Stream>(stream), args);
}

}  // namespace

char const* launch_epilogue(wog_problem const& p, wog_tensors const& t, float const* parts, int splits, void* stream) {
    Grid const grid{dim3(ceil_div(p.m * (p.n / 16), 256)), 256, 0, 1, p.sm >= 90};
    return launch(p.type == WOG_F16 ? epilogue<Half> : epilogue<Bfloat>, grid, static_cast<Stream>(stream),
                  EpilogueArgs{parts, output(p, t), splits});
}

char const* launch_gemm(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream) {
    Row const& row = kRows[plan.row];
    GemmArgs const args{static_cast<uint16_t const*>(t.x),
                        static_cast<unsigned char const*>(t.codes),
                        static_cast<uint32_t const*>(t.affine),
                        plan.splits > 1 ? static_cast<float*>(t.workspace) : nullptr,
                        output(p, t),
                        p.k,
                        p.group,
                        plan.splits,
                        gemm_x_rows(row, p.m),
                        gemm_x_steps(row, p, plan.splits)};
    char const* const failed =
        p.type == WOG_F16 ? launch_rows<Half>(p, args, plan, stream) : launch_rows<Bfloat>(p, args, plan, stream);
    return failed || plan.splits == 1 ? failed : launch_epilogue(p, t, args.partials, plan.splits, stream);
}

}  // namespace wog
