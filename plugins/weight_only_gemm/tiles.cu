// The kernels of WeightOnlyGemm for some tens of rows of 16-bit x: as stream.cu's, weights and x come through a ring of
// stages in shared memory, but here the warps of a block stand side by side in n and share what they load of x.
//
// Roles: the weights are the MMA's A operand (16 rows of n), x the B operand (8 columns of m). A warp owns S strips of 16
// n and C columns of 8 m; two warps ("sides") own the same n, and divide either K (WK) or m (WM).
//
// Work split: a block has as many warps in n as fill the device best, walks over tiles of n, gridDim.y apart, and owns a
// part of K; the blocks with the other parts are a cluster, that has one tile and adds up in its blocks' shared memory.
//
// A stage is 64 k of each part of K: x, the codes and the scales and zeros of all strips. The warps take turns to send for
// one, in a few large copies, as soon as all have left the stage two steps before; no barrier holds all of them. Sums of x
// over groups are made once for all: C warps of each side count a column each, a step ahead, into the stage.
//
// Arithmetic: as stream.cu's, acc += s * (P - (z + b) * X), with exact codes in units of `unit` (decode_raw).
//
// Needs K % 32 == 0, N % 16 == 0, group % 32 == 0, 16-byte aligned pointers: checked by wog_launch. sm_90 alone.
#include <array>
#include <utility>

#include <async.h>

#include "decode.h"
#include "epilogue.h"
#include "tile.h"

namespace wog {
namespace {

struct TileArgs {
    TensorMap x;
    unsigned char const* codes;
    uint32_t const* affine;  // (scale, zero) pairs, [K / group][N]
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
    static constexpr int kBlocks = Bits / 4;      // 512-byte blocks of one strip in a step
    static constexpr int kUnits = Fine ? 2 : 1;   // rows of scales and zeros in a step
    static constexpr int kX = kBlockM * 128;      // bytes of x in a stage, of one part of K
    static constexpr int kPitch = S * 16 + 4;     // floats, of one column of a warp on its way out
    static constexpr bool kAnew = !Fine && raw_bias<T, Bits> == 0;  // bf16's decoding leaves no registers for it
    static_assert(kSides == 2 && C <= 4 && D <= kTileStages, "pairs of warps; four warps in n count all columns");

    TileArgs const& p;
    int const lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int const warp = uniform(threadIdx.x / 32);
    int const warps_n = p.warps_n;
    int const side = warp >= warps_n, wn = warp - side * warps_n, wk = WK == 2 ? side : 0, wm = WM == 2 ? side : 0;

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

    // Warps that do not count send, if there are any
    int const senders = warps_n > C ? kSides * (warps_n - C) : kSides * warps_n;
    int turn = warps_n <= C ? warp : wn < C ? 1 << 30 : side * (warps_n - C) + wn - C;  // steps until this warp sends
    int slot = 0, parity = 0;
    // Of the step whose x is summed: k since its group began, steps since a handing over, after which 32 k there is one
    int at = 0, since = 0, ends = 0;
    float acc[S][C][4] = {};
    float sum[S][C][4] = {};
    float x_sum[4] = {};

    __device__ __forceinline__ explicit Tiler(TileArgs const& args) : p(args) {}

    __device__ __forceinline__ int strips() const { return warps_n * S; }  // of a tile
    __device__ __forceinline__ int tiles() const { return (p.out.n / 16 + strips() - 1) / strips(); }

    // ---- the stream ----

    __device__ __forceinline__ int units_left(int k, int step) const { return p.k / 32 - (first_of(k) + step) * 2; }

    // By all lanes of one warp, each a copy: at most four tiles of the packed layout, of one or two blocks
    __device__ __forceinline__ void send_weights(int tile, int step, int slot) const {
        int width = strips(), lane = this->lane;
        settle(width), settle(lane);  // the loop that streams has no registers for what is made of them
        int const all = p.out.n / 16, strip = tile * width, here = all - strip < width ? all - strip : width;
        int bytes = 0;
#pragma unroll
        for (int k = 0; k < WK; k++)
            if (step < steps_of(k)) {
                int const left = units_left(k, step) < 2 ? 1 : 2;
                bytes += here * ((kBlocks == 2 ? left : 1) * 512 + (Fine ? left : 1) * 64) + kX;
            }
        if (lane == 0) arrive_expecting(full(slot), bytes);
        warp_barrier();
        constexpr int kCopies = 4 * kBlocks;
        if (lane < kCopies * WK) {
            int const k = lane / kCopies, b = lane % kCopies / 4, tile8 = strip / 8 + lane % 4;
            int const from = tile8 * 8 > strip ? tile8 * 8 : strip;
            int const to = tile8 * 8 + 8 < strip + here ? tile8 * 8 + 8 : strip + here;
            int const wide8 = all - tile8 * 8 < 8 ? all - tile8 * 8 : 8, blocks = (p.k + 256 / Bits - 1) / (256 / Bits);
            int64_t const block = int64_t(tile8 * 8) * blocks + int64_t((first_of(k) + step) * kBlocks + b) * wide8;
            if (from < to && step < steps_of(k) && b < units_left(k, step))
                copy_bulk(stage(slot) + p.codes_at + ((k * kBlocks + b) * width + from - strip) * 512,
                          p.codes + (block + from - tile8 * 8) * 512, (to - from) * 512, full(slot));
        } else if (int const k = lane % 4 / 2, unit = lane % 2; lane >= 16 && lane < 20 && k < WK && unit < kUnits) {
            if (step < steps_of(k) && unit < units_left(k, step)) {
                int64_t const group = ((first_of(k) + step) * 64 + unit * 32) / p.group;
                copy_bulk(stage(slot) + p.affine_at + (k * kUnits + unit) * width * 64,
                          p.affine + group * p.out.n + strip * 16, here * 64, full(slot));
            }
        }
    }

    __device__ __forceinline__ void send_x(int step, int slot) const {
        if (int const k = lane - 20; 0 <= k && k < WK && step < steps_of(k))
            copy_box<1>(stage(slot) + k * kX, p.x, (first_of(k) + step) * 128, 0, full(slot));
    }

    // D - 2 steps on from a step of a tile, by the warp whose turn it is
    __device__ __forceinline__ void feed(int tile, int step) {
        if (turn-- > 0) return;
        turn = senders - 1;
        int period = count;
        settle(period);
        step += D - 2;
        tile += step / period * int(gridDim.y);
        if (tile >= tiles()) return;
        step %= period;
        int const to = slot < 2 ? slot + D - 2 : slot - 2;
        wait(empty(to), slot < 2 ? parity ^ 1 : parity);
        send_weights(tile, step, to);
        send_x(step, to);
    }

    // ---- sums ----

    // In a stage: where ldmatrix's lane finds 16 k of the first two columns of x, where this warp's codes and X are
    int const x_at = wk * kX + (wm * (C * 8) + lane / 16 * 8 + lane % 8) * 128 + ((lane / 8 % 2) ^ lane % 8) * 16;
    int const codes_at = p.codes_at + (wk * kBlocks * strips() + wn * S) * 512 + lane * 16;
    int const sums_at = p.sums_at + side * (C * 8 * 4);
    __device__ __forceinline__ float* x_sums(int slot, int half) const {
        return reinterpret_cast<float*>(stage(slot) + sums_at + half * (kSides * C * 8 * 4));
    }

    // X of a step, by the warps that count
    __device__ __forceinline__ void count_step(int slot, int parity, int step) {
        if (wn >= C || step >= own) return;
        wait(full(slot), parity);
        Shared const from = shared_address(stage(slot) + x_at + wn / 2 * 2048);
        uint32_t const one = raw_one<T, Bits>(0), ones[4] = {one, one, one, one};
#pragma unroll
        for (int quarter = 0; quarter < 4; quarter++) {
            uint32_t x[4];
            load_matrices(x, flip(from, quarter * 32));
            multiply_add<T>(x_sum, ones, wn % 2 ? x[2] : x[0], wn % 2 ? x[3] : x[1]);
            if (Fine && quarter == 1 && ends_of(step) & 1) publish(slot, 0);
        }
    }
    __device__ __forceinline__ void publish(int slot, int half) {
        float* const to = x_sums(slot, half) + wn * 8 + lane * 2;
        if (lane < 4) to[0] = x_sum[0], to[1] = x_sum[1];
        x_sum[0] = x_sum[1] = x_sum[2] = x_sum[3] = 0;
    }
    // After which 32 k of the step whose x is summed a group ends or P is handed over
    __device__ __forceinline__ int ends_of(int step) const {
        bool const last = step >= own - 1 || since == kHandOver - 1;
        if (!Fine) return at + 64 == p.group || last;
        return (at + 32 == p.group ? 1 : 0) | (at + 64 == p.group || p.group == 32 || last ? 2 : 0);
    }
    // Hands over what count_step summed, and goes on to the step after
    __device__ __forceinline__ void finish_count(int slot, int step) {
        ends = ends_of(step);
        if (wn < C) {
            if (step < own && (Fine ? ends & 2 : ends)) publish(slot, Fine ? 1 : 0);
            warp_barrier();
            if (lane == 0) arrive(summed(slot));
        }
        since = (Fine ? ends & 2 : ends) ? 0 : since + 1;
        at += 64;
        while (at >= p.group) at -= p.group;
        if (step == count - 1) at = first * 64 % p.group;
    }

    // Fresh: P starts anew, from the first products
    template <bool Fresh>
    __device__ __forceinline__ void multiply_step(int ends, int units) {
        unsigned char const* const from = stage(slot);
        auto const word = [&](int s, int b) {
            return *reinterpret_cast<uint4 const*>(from + codes_at + (b * strips() + s) * 512);
        };
        uint4 words[S];
        Shared const x_first = shared_address(from + x_at);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half == 0 || kBlocks == 2)
#pragma unroll
                for (int s = 0; s < S; s++) words[s] = word(s, half * kBlocks / 2);
#pragma unroll
            for (int quarter = half * 2; quarter < half * 2 + 2; quarter++) {
                uint32_t x[C / 2][4];
#pragma unroll
                for (int j = 0; j < C / 2; j++) load_matrices(x[j], flip(x_first, quarter * 32) + j * 2048);
#pragma unroll
                for (int s = 0; s < S; s++) {
                    uint32_t a[4];
                    decode_raw<T, Bits>(a, words[s], quarter);
                    if (Fresh && quarter == 0)
#pragma unroll
                        for (int j = 0; j < C; j++) sum[s][j][0] = sum[s][j][1] = sum[s][j][2] = sum[s][j][3] = 0;
#pragma unroll
                    for (int j = 0; j < C; j++)
                        multiply_add<T>(sum[s][j], a, x[j / 2][j % 2 * 2], x[j / 2][j % 2 * 2 + 1]);
                }
            }
            if (Fine ? (ends & 1 << half) && half < units : half && ends) finish_group(Fine ? half : 0);
        }
    }

    // acc += s * (P - (z + b) * X)
    __device__ __forceinline__ void finish_group(int half) {
        auto const* const pairs = reinterpret_cast<uint32_t const*>(
            stage(slot) + p.affine_at + ((wk * kUnits + half) * strips() + wn * S) * 64);
        wait(summed(slot), parity);
        float const* const sums = x_sums(slot, half) + 2 * t;
        float x[C][2];
#pragma unroll
        for (int j = 0; j < C; j++) x[j][0] = sums[j * 8], x[j][1] = sums[j * 8 + 1];
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t const pair = pairs[s * 16 + h * 8 + g];
                float const scale = to_float<T>(uint16_t(pair));
                float const zero = (-raw_bias<T, Bits> - to_float<T>(uint16_t(pair >> 16))) *
                                   (raw_unit<T, Bits>(0) / raw_unit<T, Bits>(h));  // X is in units of row g
#pragma unroll
                for (int j = 0; j < C; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        acc[s][j][h * 2 + e] += scale * (sum[s][j][h * 2 + e] + zero * x[j][e]);
                        if (!kAnew) sum[s][j][h * 2 + e] = 0;
                    }
            }
    }

    // ---- tiles ----

    __device__ __forceinline__ void run() {
        if (threadIdx.x == 0) {
            for (int d = 0; d < D; d++) {
                barrier_init(full(d), 1);
                barrier_init(empty(d), warps_n * kSides);
                barrier_init(summed(d), C * kSides);
            }
            publish_barriers();
        }
        block_barrier();
        int const step_y = int(gridDim.y);
        int const left = (tiles() - int(blockIdx.y) + step_y - 1) / step_y * count;  // steps of all tiles of this block
        int const ahead = left < D - 2 ? left : D - 2;
        if (warp == 0)
            for (int d = 0; d < ahead; d++) send_weights(blockIdx.y + d / count * step_y, d % count, d);
        wait_for_inputs();
        release_next();
        if (warp == 0)
            for (int d = 0; d < ahead; d++) send_x(d % count, d);
        at = first * 64 % p.group;
        if (left) count_step(0, 0, 0), finish_count(0, 0);

        bool fresh = true;
#pragma unroll 1
        for (int tile = blockIdx.y; tile < tiles(); tile += step_y) {
#pragma unroll 1
            for (int step = 0; step < count; step++) {
                feed(tile, step);
                int const next = step == count - 1 ? 0 : step + 1, next_slot = slot == D - 1 ? 0 : slot + 1;
                bool const more = next || tile + step_y < tiles();
                if (more) count_step(next_slot, next_slot ? parity : parity ^ 1, next);
                if (step < own) {
                    wait(full(slot), parity);
                    if (kAnew && fresh)
                        multiply_step<true>(ends, 0);
                    else
                        multiply_step<false>(ends, Fine ? units_left(wk, step) : 0);
                    fresh = ends;
                }
                warp_barrier();
                if (lane == 0) arrive(empty(slot));
                slot = next_slot, parity ^= slot == 0;
                if (more) finish_count(slot, next);
            }
            store(tile);
        }
    }

    __device__ __forceinline__ void store(int tile) {
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int j = 0; j < C; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[s][j][i] *= raw_unit<T, Bits>(i / 2);
        if (p.splits == 1)
            store_columns(tile);
        else
            store_cluster(tile);
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int j = 0; j < C; j++) acc[s][j][0] = acc[s][j][1] = acc[s][j][2] = acc[s][j][3] = 0.0f;
    }

    // Four outputs of row m: the sums from column n, or of gates there and the `up` eight columns on
    __device__ __forceinline__ void finish_four(float4 const& sums, float4 const& up, int m, int n) const {
        float v[4] = {sums.x, sums.y, sums.z, sums.w};
        float const u[4] = {up.x, up.y, up.z, up.w};
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = biased<T>(p.out, v[i], n + i);
        activate(v, p.out.activation);
        int64_t to = int64_t(m) * p.out.n + n;
        if (p.out.gated) {
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] *= biased<T>(p.out, u[i], n + 8 + i);
            to = int64_t(m) * (p.out.n / 2) + n / 16 * 8 + n % 8;
        }
        if (p.out.wide)
            *reinterpret_cast<float4*>(static_cast<float*>(p.out.y) + to) = {v[0], v[1], v[2], v[3]};
        else
            *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out.y) + to) = {round_pair<T>(v[0], v[1]),
                                                                              round_pair<T>(v[2], v[3])};
    }

    // All outputs of `rows` x `strips` strips from (m, n), some of them in each of `step` threads; sums(row, column) are
    // four of them
    template <class Sums>
    __device__ __forceinline__ void finish_some(int rows, int strips, int m, int n, int mine, int step,
                                                Sums const& sums) const {
        int const wide = p.out.gated ? strips * 2 : strips * 4;
#pragma unroll 1
        for (int item = mine; item < rows * wide; item += step) {
            int const row = item / wide, i = item - row * wide, column = p.out.gated ? i / 2 * 16 + i % 2 * 4 : i * 4;
            if (n + column >= p.out.n || m + row >= p.out.m) continue;
            finish_four(sums(row, column), p.out.gated ? sums(row, column + 8) : float4{}, m + row, n + column);
        }
    }

    static __device__ __forceinline__ void add(float4& to, float4 const& v) {
        to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w;
    }

    // Through a column's place beside the ring, which runs on
    __device__ __forceinline__ void store_columns(int tile) const {
        int thread = threadIdx.x, warps_n = p.warps_n;
        settle(thread), settle(warps_n);  // the loop that streams has no registers for what is made of them
        int const lane = thread % 32, warp = thread / 32, side = warp >= warps_n, wn = warp - side * warps_n;
        int const wk = WK == 2 ? side : 0, wm = WM == 2 ? side : 0, g = lane / 4, t = lane % 4;
        float* const places = reinterpret_cast<float*>(stage(D)) + wn * (8 * kPitch);
        int const apart = warps_n * 8 * kPitch;
        auto const meet = [&] {
            if (WK == 2)
                named_barrier(1 + wn, 64);
            else
                warp_barrier();
        };
#pragma unroll
        for (int j = 0; j < C; j++) {
            meet();  // all have read the column before
#pragma unroll
            for (int s = 0; s < S; s++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    places[side * apart + (2 * t + i % 2) * kPitch + s * 16 + i / 2 * 8 + g] = acc[s][j][i];
            meet();
            finish_some(8, S, (wm * C + j) * 8, (tile * warps_n + wn) * (S * 16), wk * 32 + lane, WK * 32,
                        [&](int row, int column) {
                            float const* const at = places + wm * apart + row * kPitch + column;
                            float4 v = *reinterpret_cast<float4 const*>(at);
                            if (WK == 2) add(v, *reinterpret_cast<float4 const*>(at + apart));
                            return v;
                        });
        }
    }

    // Sums of the parts of K, in their order, where the ring was; each block of a cluster finishes some of the outputs
    __device__ __forceinline__ void store_cluster(int tile) const {
        float* const sums = reinterpret_cast<float*>(ring());
        int thread = threadIdx.x;
        settle(thread);
        int const lane = thread % 32, warp = thread / 32, side = warp >= warps_n, wn = warp - side * warps_n;
        int const wk = WK == 2 ? side : 0, wm = WM == 2 ? side : 0, g = lane / 4, t = lane % 4;
        int const pitch = strips() * 16 + 4;
        block_barrier();  // all have left the ring
        store_sums(sums, pitch, acc, wk * kBlockM + wm * (C * 8), wn * (S * 16), g, t);
        cluster_barrier();
        int const threads = warps_n * kSides * 32;
        finish_some(int(p.out.m), strips(), 0, tile * strips() * 16, blockIdx.z * threads + threadIdx.x,
                    p.splits * threads, [&](int row, int column) {
                        float4 v{};
#pragma unroll 2
                        for (int rank = 0; rank < p.splits; rank++)
#pragma unroll
                            for (int part = 0; part < WK; part++)
                                add(v, load_four_from(rank, sums + (part * kBlockM + row) * pitch + column));
                        return v;
                    });
        relaxed_cluster_barrier();  // a block that has ended has no memory
    }
};

template <class T, int Bits, int I>
__global__ void __launch_bounds__(kRows[I].threads(), kRows[I].resident) tiles(__grid_constant__ TileArgs const p) {
#if DEVICE_SM
    if constexpr (kGenerated<T, I>) {
        if (p.group % 64)
            Tiler<T, Bits, I, true>{p}.run();
        else
            Tiler<T, Bits, I, false>{p}.run();
    }
#endif
}

constexpr int kFirst = first_row(Kernel::kTile);

template <class T, int Bits, int... I>
constexpr auto instances(std::integer_sequence<int, I...>) {
    return std::array<void (*)(TileArgs), sizeof...(I)>{tiles<T, Bits, kFirst + I>...};
}

template <class T>
char const* launch_rows(wog_problem const& p, TileArgs const& args, wog_plan const& plan, void* stream) {
    constexpr std::make_integer_sequence<int, count_rows(Kernel::kTile)> kAll;
    constexpr auto kFour = instances<T, 4>(kAll), kEight = instances<T, 8>(kAll);
    dim3 const blocks(1, plan.grid_n, plan.splits);
    Grid const grid{blocks, plan.threads, size_t(plan.shared), dim3(1, 1, plan.splits), p.sm >= 90};
    return launch((p.bits == 4 ? kFour : kEight)[plan.row - kFirst], grid, static_cast<Stream>(stream), args);
}

}  // namespace

char const* launch_tile(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream) {
    Row const& row = kRows[plan.row];
    int const steps = ceil_div(p.k, 64), parts = plan.splits * row.warps_k, units = tile_units(p);
    int const warps_n = plan.threads / 32 / (row.warps_k * row.warps_m), strips = warps_n * row.strips;
    int const codes_at = row.warps_k * row.block_m() * 128, affine_at = codes_at + row.warps_k * strips * p.bits * 128;
    TileArgs args{{},
                  static_cast<unsigned char const*>(t.codes),
                  static_cast<uint32_t const*>(t.affine),
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
    if (char const* failed = describe_rows(args.x, t.x, p.m, int64_t(p.k) * 2, row.block_m())) return failed;
    return p.type == WOG_F16 ? launch_rows<Half>(p, args, plan, stream) : launch_rows<Bfloat>(p, args, plan, stream);
}

}  // namespace wog
