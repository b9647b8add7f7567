// A8W8 and A8W4: activations quantized per row to int8, integer MMAs on unsigned weight codes, one float epilogue.
//
//     y[m, n] = s_x[m] * sum_g s[g, n] * (P_g[m, n] - z[g, n] * X_g[m]) + bias,    P, X exact int32
//
// rows.cu quantizes. int8_gemm: tiles with rings of stages of 128 k, WN warps side by side in n, each S strips x C * 8
// m. The packed words are the A registers of mma.sync: for 8 bits as they are, for 4 bits after one mask each for row g
// (low nibbles) and row g + 8 (high ones). c X is subtracted in int32, c = 8 or 128, so that the float zero is z - c
// and small.
#include "int8.h"

#include <array>
#include <utility>

#include "epilogue.h"
#include "tile.h"

namespace wog {
namespace {

struct Int8Args {
    Int8Rows rows;
    unsigned char const* codes;
    uint32_t const* affine;
    Output out;
    int32_t k, group;
};

constexpr int kStageK = stage_k(Kernel::kInt8);

template <class T, int Bits, int I>
struct Int8Gemm {
    static constexpr Row kRow = kRows[I];
    static constexpr int WN = kRow.warps_n, S = kRow.strips, C = kRow.columns, Stages = kRow.stages[Bits == 8];
    static constexpr int kThreads = kRow.threads(), kBlockN = kRow.block_n(), kBlockM = kRow.block_m();
    static constexpr int kXStage = x_stage_bytes(C), kWStage = w_stage_bytes(kRow.kernel, S, Bits);
    static constexpr int kBlocks = Bits / 2;            // 512-byte blocks of a strip in a stage
    static constexpr int kBlockUnits = 4 / kBlocks;     // each of so many times 32 k
    static constexpr int kCenter = 1 << (Bits - 1);
    static_assert(kRow.warps_k == 1, "K is not divided: sums of activations are kept for whole groups");

    Int8Args const& p;
    int const lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, wn = threadIdx.x / 32;
    int64_t const m0 = int64_t(blockIdx.x) * kBlockM;
    int const n0 = blockIdx.y * kBlockN + wn * S * 16;
    unsigned char* const x_ring = dynamic_shared();
    unsigned char* const w_ring = x_ring + Stages * kXStage + wn * Stages * kWStage;

    float acc[S][C][4] = {};
    int32_t sum[S][C][4] = {};

    __device__ __forceinline__ void load_stage(int stage, int slot) const {
        load_rows<kBlockM, kThreads>(x_ring + slot * kXStage, p.rows.values, m0, p.out.m, p.k, stage, threadIdx.x);
        load_weights<Bits, kBlocks, S>(w_ring + slot * kWStage, p.codes, p.out.n, p.k, n0, stage, lane);
    }

    __device__ __forceinline__ uint4 load_words(int slot, int s, int block) const {
        return *reinterpret_cast<uint4 const*>(w_ring + slot * kWStage + (s * kBlocks + block) * 512 + lane * 16);
    }

    // The A fragment of 32 k from the words of the block that they lie in
    static __device__ __forceinline__ void unpack(uint32_t (&a)[4], uint4 const& w, int unit) {
        if constexpr (Bits == 8) {
            a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
        } else {
            uint32_t const low = unit % 2 ? w.z : w.x, high = unit % 2 ? w.w : w.y;  // k16 steps
            a[0] = low & 0x0f0f0f0f, a[1] = low >> 4 & 0x0f0f0f0f;
            a[2] = high & 0x0f0f0f0f, a[3] = high >> 4 & 0x0f0f0f0f;
        }
    }

    // P += codes * x for 32 k, warp by warp
    __device__ __forceinline__ void multiply_unit(int slot, int unit, uint4 const (&words)[S]) {
        uint32_t a[S][4];
#pragma unroll
        for (int s = 0; s < S; s++) unpack(a[s], words[s], unit);
#pragma unroll
        for (int j = 0; j < C; j += 2) {  // two columns of 8 m: 32 k of each is two 8x16-byte matrices
            uint32_t x[4];
            int const row = (j + lane / 16) * 8 + lane % 8, chunk = unit * 2 + lane / 8 % 2;
            load_matrices(x, shared_address(x_ring) + slot * kXStage + row * 128 + (chunk ^ row % 8) * 16);
#pragma unroll
            for (int s = 0; s < S; s++) {
                multiply_add(sum[s][j], a[s], x[0], x[1]);
                multiply_add(sum[s][j + 1], a[s], x[2], x[3]);
            }
        }
    }

    __device__ __forceinline__ void finish_group(int group) {
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int const n = n0 + s * 16 + h * 8 + g;
                uint32_t const affine = n < p.out.n ? p.affine[int64_t(group) * p.out.n + n] : 0;
                float const scale = to_float<T>(uint16_t(affine)), zero = to_float<T>(uint16_t(affine >> 16)) - kCenter;
#pragma unroll
                for (int j = 0; j < C; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        int64_t const m = m0 + j * 8 + 2 * t + e;
                        int32_t const x_sum = m < p.out.m ? int32_t(p.rows.sums[group * p.rows.pitch + m]) : 0;
                        int32_t& total = sum[s][j][2 * h + e];
                        acc[s][j][2 * h + e] += scale * (float(total - kCenter * x_sum) - zero * float(x_sum));
                        total = 0;
                    }
            }
    }

    __device__ __forceinline__ void accumulate() {
        int const stages = (p.k + kStageK - 1) / kStageK, units = p.k / 32, per_group = p.group / 32;
        for (int i = 0; i < Stages - 1; i++) {
            if (i < stages) load_stage(i, i);
            copy_commit();
        }
        int left = per_group, group = 0;
        auto const advance = [&](int count) {
            left -= count;
            if (left > 0) return;
            finish_group(group++);
            left = per_group;
        };
        for (int stage = 0; stage < stages; stage++) {
            int const slot = stage % Stages;
            copy_wait<Stages - 2>();
            block_barrier();
            if (stage + Stages - 1 < stages) load_stage(stage + Stages - 1, (stage + Stages - 1) % Stages);
            copy_commit();
            uint4 words[S];
#pragma unroll
            for (int unit = 0; unit < 4; unit++) {
                if (stage * 4 + unit >= units) break;
                if (unit % kBlockUnits == 0)
                    for (int s = 0; s < S; s++) words[s] = load_words(slot, s, unit / kBlockUnits);
                multiply_unit(slot, unit, words);
                advance(1);
            }
        }
    }

    __device__ __forceinline__ void store() {
        constexpr int kPitch = kBlockN + 4;
        float* const tile = reinterpret_cast<float*>(dynamic_shared());
        copy_wait<0>();
        block_barrier();
        store_sums(tile, kPitch, acc, 0, wn * S * 16, g, t);
        block_barrier();
        for (int item = threadIdx.x; item < kBlockM * kBlockN / 16; item += kThreads) {
            int const row = item / (kBlockN / 16), column = item % (kBlockN / 16) * 16;
            int64_t const m = m0 + row;
            int const n = blockIdx.y * kBlockN + column;
            if (m >= p.out.m || n >= p.out.n) continue;
            float v[16];
            for (int i = 0; i < 16; i++) v[i] = tile[row * kPitch + column + i] * p.rows.scales[m];
            finish<T>(p.out, v, m, n);
        }
    }
};

template <class T, int Bits, int I>
__global__ void __launch_bounds__(kRows[I].threads(), kRows[I].resident) int8_gemm(Int8Args const p) {
#if DEVICE_SM
    if constexpr (kGenerated<T, I>) {
        Int8Gemm<T, Bits, I> block{p};
        block.accumulate();
        block.store();
    }
#endif
}

constexpr int kFirst = first_row(Kernel::kInt8);

template <class T, int Bits, int... I>
constexpr auto instances(std::integer_sequence<int, I...>) {
    return std::array<void (*)(Int8Args), sizeof...(I)>{int8_gemm<T, Bits, kFirst + I>...};
}

template <class T>
char const* launch_rows(int bits, Int8Args const& args, wog_plan const& plan, Stream stream) {
    constexpr std::make_integer_sequence<int, count_rows(Kernel::kInt8)> kAll;
    constexpr auto kFour = instances<T, 4>(kAll), kEight = instances<T, 8>(kAll);
    auto* const kernel = (bits == 4 ? kFour : kEight)[plan.row - kFirst];
    return launch(kernel, {dim3(plan.grid_m, plan.grid_n), plan.threads, size_t(plan.shared)}, stream, args);
}

}  // namespace

char const* launch_int8(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream) {
    if (char const* failed = launch_quantize(p, t, stream)) return failed;
    Int8Args const args{int8_rows(p, t.workspace),
                        static_cast<unsigned char const*>(t.codes),
                        static_cast<uint32_t const*>(t.affine),
                        output(p, t),
                        p.k,
                        p.group};
    auto const s = static_cast<Stream>(stream);
    return p.type == WOG_F16 ? launch_rows<Half>(p.bits, args, plan, s) : launch_rows<Bfloat>(p.bits, args, plan, s);
}

}  // namespace wog
