// The 16-bit-activation kernels of WeightOnlyGemm: one template streams weights (few rows), tiles (many rows).
//
// Roles: the weights are the MMA's A operand (16 rows of n), x the B operand (8 columns of m), so M is granular in 8s and a
// lane owns rows g, g + 8 of a strip: two scales and zeros per strip and group.
//
// Work split: a block owns WN * S * 16 n, C * 8 m and a part of K.
//     warp (wk, wn):   n  -->  wn = 0   1   2  ..  WN-1        each warp S strips of 16 n
//                      k   wk = 0
//                      |        1                              the WK rows of warps divide the block's K
//                      v       ..                              and are summed, in order, in shared memory
// Rings: every (wk) has one of x, shared by its WN warps; every warp has one of weights, 16 bytes per lane that only that
// lane reads back, so weights need no barrier. Shared memory per stage: x C * 1 KiB; weights S * 0.5 (int4) or S KiB a warp.
// A row of a stage of x is 128 bytes, its 16-byte chunks XORed with the row: free of bank conflicts, and wgmma's own swizzle.
//
// Arithmetic: codes are turned into exact small integers q - c in T (c = 8 or 128) and multiplied with fp32 sums P; at the
// end of each group   acc += s * (P - (z - c) * X),   X = sum of x over the group (an MMA with ones), all in fp32: the float
// zero is never rounded into T. The sum is linear, so K may be cut anywhere at a multiple of 32.
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
};

constexpr int kStageK = stage_k(Kernel::kGemm);

// ---- the kernel ----

template <class T, int Bits, int I>
struct Gemm {
    static constexpr Row kRow = kRows[I];
    static constexpr int WN = kRow.warps_n, WK = kRow.warps_k, S = kRow.strips, C = kRow.columns;
    static constexpr int kStages = kRow.stages[Bits == 8], kThreads = kRow.threads();
    static constexpr int kBlockN = kRow.block_n(), kBlockM = kRow.block_m();
    static constexpr int kXStage = x_stage_bytes(C), kWStage = w_stage_bytes(kRow.kernel, S, Bits);
    static constexpr int kBlocks = Bits / 4;  // 512-byte blocks of one strip in a stage
    static constexpr int kSums = C / WN;      // columns of m whose X this warp counts
    static_assert(C % WN == 0, "warps side by side count the same number of columns");

    GemmArgs const& p;
    int const lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int const warp = threadIdx.x / 32, wn = warp % WN, wk = warp / WN;
    int64_t const m0 = int64_t(blockIdx.x) * kBlockM;
    int const n0 = blockIdx.y * kBlockN + wn * S * 16;
    unsigned char* const x_ring = dynamic_shared() + wk * kStages * (kXStage + WN * kWStage);
    unsigned char* const w_ring = x_ring + kStages * kXStage + wn * kStages * kWStage;
    float* const group_sums =
        reinterpret_cast<float*>(dynamic_shared() + WK * kStages * (kXStage + WN * kWStage)) + wk * 2 * kBlockM;

    float acc[S][C][4] = {}, sum[S][C][4] = {};  // [strip][column of 8 m]; `sum` is P of the group so far
    float x_sum[kSums][4] = {};                  // X of those columns
    uint32_t affine[S][2];                       // of rows g, g + 8 of each strip, for the group under way
    int parity = 0;

    // The WN warps that share an x ring
    __device__ __forceinline__ void barrier() const {
        if constexpr (WN == 1)
            warp_barrier();
        else
            named_barrier(1 + wk, WN * 32);
    }

    __device__ __forceinline__ void load_stage(int stage, int slot) const {
        load_rows<kBlockM, WN * 32>(x_ring + slot * kXStage, p.x, m0, p.out.m, p.k, stage, wn * 32 + lane);
        load_weights<Bits, kBlocks, S>(w_ring + slot * kWStage, p.codes, p.out.n, p.k, n0, stage, lane);
    }

    __device__ __forceinline__ void load_affine(int unit) {
        uint32_t const* const row = p.affine + int64_t(unit * 32 / p.group) * p.out.n;
        for (int s = 0; s < S; s++)
            for (int h = 0; h < 2; h++) {
                int const n = n0 + s * 16 + h * 8 + g;
                affine[s][h] = n < p.out.n ? row[n] : 0;
            }
    }

    // Where lane's part of 32-k unit `unit` of the first eight rows of x lies, for load_matrices
    __device__ __forceinline__ unsigned char const* column(int slot, int unit) const {
        return x_ring + slot * kXStage + lane % 8 * 128 + ((unit * 4 + lane / 8) ^ lane % 8) * 16;
    }

    // X += ones * x. The columns are loaded for themselves: picking them from x by warp would put x into local memory.
    __device__ __forceinline__ void count_unit(int slot, int unit) {
        uint32_t const one = from_float<T>(1.0f) * 0x10001u;
        uint32_t const ones[4] = {one, one, one, one};
#pragma unroll
        for (int j = 0; j < kSums; j++) {
            uint32_t x[4];
            load_matrices(x, column(slot, unit) + (wn * kSums + j) * 8 * 128);
            multiply_add<T>(x_sum[j], ones, x[0], x[1]);
            multiply_add<T>(x_sum[j], ones, x[2], x[3]);
        }
    }

    // P += codes * x for 32 k, warp by warp
    __device__ __forceinline__ void multiply_unit(int slot, int unit, uint4 const (&words)[S][kBlocks]) {
        uint32_t x[C][4];
#pragma unroll
        for (int j = 0; j < C; j++) load_matrices(x[j], column(slot, unit) + j * 8 * 128);
#pragma unroll
        for (int step = 0; step < 2; step++)
#pragma unroll
            for (int s = 0; s < S; s++) {
                uint32_t a[4];
                decode<T, Bits>(a, words[s], unit, step);
#pragma unroll
                for (int j = 0; j < C; j++) multiply_add<T>(sum[s][j], a, x[j][2 * step], x[j][2 * step + 1]);
            }
        count_unit(slot, unit);
    }

    // acc += s * (P - (z - c) * X). Every row of the ones-MMA is X, so it already lies in the right lane and column.
    __device__ __forceinline__ void finish_group() {
        float const* sums = group_sums + parity * kBlockM;
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
#pragma unroll
        for (int j = 0; j < C; j++) {
            float const x0 = WN == 1 ? x_sum[j % kSums][0] : sums[j * 8 + 2 * t];
            float const x1 = WN == 1 ? x_sum[j % kSums][1] : sums[j * 8 + 2 * t + 1];
#pragma unroll
            for (int s = 0; s < S; s++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float const scale = to_float<T>(uint16_t(affine[s][h]));
                    float const zero = to_float<T>(uint16_t(affine[s][h] >> 16)) - kCenter<Bits>;
                    acc[s][j][2 * h] += scale * (sum[s][j][2 * h] - zero * x0);
                    acc[s][j][2 * h + 1] += scale * (sum[s][j][2 * h + 1] - zero * x1);
                    sum[s][j][2 * h] = sum[s][j][2 * h + 1] = 0.0f;
                }
        }
        for (int i = 0; i < kSums; i++) x_sum[i][0] = x_sum[i][1] = x_sum[i][2] = x_sum[i][3] = 0.0f;
        parity ^= 1;
    }

    __device__ __forceinline__ void accumulate() {
        int const stages = (p.k + kStageK - 1) / kStageK, units = p.k / 32;
        int const part = blockIdx.z * WK + wk, parts = p.splits * WK;
        int const first = int(int64_t(stages) * part / parts), last = int(int64_t(stages) * (part + 1) / parts);
        if (first == last) return;  // the same for all warps of a barrier
        for (int i = 0; i < kStages - 1; i++) {
            if (first + i < last) load_stage(first + i, i);
            copy_commit();
        }
        load_affine(first * 2);
        int const per_group = p.group / 32;
        int left = per_group - first * 2 % per_group;  // units to the end of the group under way
        auto const advance = [&](int count, int next) {
            left -= count;
            if (left > 0) return;
            finish_group();
            left = per_group;
            if (next < units) load_affine(next);
        };
        for (int stage = first; stage < last; stage++) {
            int const slot = (stage - first) % kStages;
            copy_wait<kStages - 2>();
            barrier();  // the stage is there for all, and all have left the slot that is loaded next
            if (stage + kStages - 1 < last) load_stage(stage + kStages - 1, (stage - first + kStages - 1) % kStages);
            copy_commit();
            uint4 words[S][kBlocks];
            for (int s = 0; s < S; s++)
                for (int b = 0; b < kBlocks; b++)
                    words[s][b] = *reinterpret_cast<uint4 const*>(w_ring + slot * kWStage + (s * kBlocks + b) * 512 +
                                                                  lane * 16);
#pragma unroll
            for (int unit = 0; unit < 2; unit++) {
                if (stage * 2 + unit >= units) break;  // K % 64 == 32
                multiply_unit(slot, unit, words);
                advance(1, stage * 2 + unit + 1);
            }
        }
        if (left != per_group) finish_group();
    }

    __device__ __forceinline__ void store() {
        constexpr int kPitch = kBlockN + 4;  // 4: the eight g and four t of a warp fall into different banks
        float* const tile = reinterpret_cast<float*>(dynamic_shared());
        copy_wait<0>();
        block_barrier();  // the rings become the tile
        store_sums(tile, kPitch, acc, wk * kBlockM, wn * S * 16, g, t);
        block_barrier();
        for (int item = threadIdx.x; item < kBlockM * kBlockN / 16; item += kThreads) {
            int const row = item / (kBlockN / 16), column = item % (kBlockN / 16) * 16;
            int64_t const m = m0 + row;
            int const n = blockIdx.y * kBlockN + column;
            if (m >= p.out.m || n >= p.out.n) continue;
            float v[16];
            for (int i = 0; i < 16; i++) {
                v[i] = tile[row * kPitch + column + i];
                for (int part = 1; part < WK; part++) v[i] += tile[(part * kBlockM + row) * kPitch + column + i];
            }
            if (p.splits == 1)
                finish<T>(p.out, v, m, n);
            else
                for (int i = 0; i < 16; i++) p.partials[(blockIdx.z * p.out.m + m) * p.out.n + n + i] = v[i];
        }
    }
};

template <class T, int Bits, int I>
__global__ void __launch_bounds__(kRows[I].threads(), kRows[I].resident) gemm(GemmArgs const p) {
#if DEVICE_SM
    if constexpr (kGenerated<T, I>) {
        Gemm<T, Bits, I> block{p};
        block.accumulate();
        block.store();
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
    if (m >= p.out.m) return;
    float v[16];
    for (int i = 0; i < 16; i++) v[i] = p.parts[m * p.out.n + n + i];
    for (int part = 1; part < p.splits; part++)
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
    auto const s = static_cast<Stream>(stream);
    Grid const grid{dim3(plan.grid_m, plan.grid_n, plan.splits), plan.threads, size_t(plan.shared)};
    return launch((p.bits == 4 ? kFour : kEight)[plan.row - kFirst], grid, s, args);
}

}  // namespace

char const* launch_epilogue(wog_problem const& p, wog_tensors const& t, float const* parts, int splits, void* stream) {
    return launch(p.type == WOG_F16 ? epilogue<Half> : epilogue<Bfloat>, {dim3(ceil_div(p.m * (p.n / 16), 256)), 256},
                  static_cast<Stream>(stream), EpilogueArgs{parts, output(p, t), splits});
}

char const* launch_gemm(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream) {
    GemmArgs const args{static_cast<uint16_t const*>(t.x),
                        static_cast<unsigned char const*>(t.codes),
                        static_cast<uint32_t const*>(t.affine),
                        plan.splits > 1 ? static_cast<float*>(t.workspace) : nullptr,
                        output(p, t),
                        p.k,
                        p.group,
                        plan.splits};
    char const* const failed =
        p.type == WOG_F16 ? launch_rows<Half>(p, args, plan, stream) : launch_rows<Bfloat>(p, args, plan, stream);
    return failed || plan.splits == 1 ? failed : launch_epilogue(p, t, args.partials, plan.splits, stream);
}

}  // namespace wog
