// The kernels of WeightOnlyGemm for some tens of rows of 16-bit x: as stream.cu's, weights and x come through a ring of
// stages in shared memory, but here the warps of a block stand side by side in n and share what they load of x.
//
// Roles: the weights are the MMA's A operand (16 rows of n), x the B operand (8 columns of m). A warp owns S strips of 16
// n and C columns of 8 m; two warps ("sides") own the same n, and divide either K (WK) or m (WM).
//
// Work split: a block has as many warps in n as fill the device best, walks over tiles of n, gridDim.y apart, and owns a
// part of K; the blocks with the other parts are a cluster, that has one tile and adds up in its blocks' shared memory.
//
// A stage is 64 k of each part of K: the codes and the scales and zeros of all strips, and x. All warps send for it, D - 1
// steps ahead, across the ends of tiles; the one barrier of a step publishes the stage after the one it starts, so that
// sums of x over groups, a column or two in each warp, are ready a step before they are used.
//
// Arithmetic: as stream.cu's, acc += s * (P - (z + b) * X), with exact codes in units of `unit` (decode_raw).
//
// Needs K % 32 == 0, N % 16 == 0, group % 32 == 0, 16-byte aligned pointers: checked by wog_launch.
#include <array>
#include <utility>

#include "decode.h"
#include "epilogue.h"
#include "tile.h"

namespace wog {
namespace {

struct TileArgs {
    unsigned char const* x;
    unsigned char const* codes;
    uint32_t const* affine;  // (scale, zero) pairs, [K / group][N]
    Output out;
    int32_t k, group, splits, warps_n;
    int32_t share, longer;  // steps of each part of K, and how many of them have one more
    // In a stage: x, then the codes of each part of K, then scales and zeros, of each 32 k where a group may end there
    int32_t units, codes_size, affine_at, affine_size, stage;
};

constexpr int kHandOver = 16;  // steps: tensor cores cut bits off long sums

template <class T, int Bits, int I>
struct Tiler {
    static constexpr Row kRow = kRows[I];
    static constexpr int WK = kRow.warps_k, WM = kRow.warps_m, S = kRow.strips, C = kRow.columns;
    static constexpr int D = kRow.stages[Bits == 8], kSides = WK * WM;
    static constexpr int kBlocks = Bits / 4;  // 512-byte blocks of one strip in a step
    static constexpr int kBlockM = kRow.block_m(), kSums = tile_sums_of_x(kRow);
    static constexpr int kX = kBlockM * 128;  // bytes of x in a stage, of one part of K
    static constexpr int kPitch = S * 16 + 4;        // floats, of one column of a warp on its way out
    static constexpr int kCounted = C > 4 ? 2 : 1;   // columns whose x a warp sums
    // What one warp sends for of its n: where two share them, every other strip of 4 bits, or of 8 bits half of each
    static constexpr bool kAlternate = WM == 2 && kBlocks == 1;
    static constexpr int kSent = kAlternate ? (S + 1) / 2 : S;
    static_assert(kSides <= 2 && C <= 8, "pairs of warps; four warps in n count all columns");

    TileArgs const& p;
    int const lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int const warp = uniform(threadIdx.x / 32);
    int const warps_n = p.warps_n;
    int const side = warp >= warps_n, wn = warp - side * warps_n, wk = WK == 2 ? side : 0, wm = WM == 2 ? side : 0;
    int first, own, count;  // steps: this part of K, and those that all parts take
    int end_units;          // of 32 k: the end of this part
    static constexpr int kCodesAt = WK * kX;

    // Shared memory: [sums of x][ring, or sums for the cluster][sums on their way out]
    __device__ __forceinline__ float* x_sums() const { return reinterpret_cast<float*>(dynamic_shared()); }
    __device__ __forceinline__ unsigned char* ring() const { return dynamic_shared() + kSums; }

    // What is sent for next
    int feed_tile, feed_left, feed_units, feed_group_left, feed_slot = 0;
    uint32_t feed_affine;
    bool feed_pairs;
    uint32_t feed_at[kSent], feed_stride[kSent];  // in 16 bytes; stride 0: no such strip
    unsigned char const* x_from;
    int x_units, x_left, x_tile, x_slot = 0;

    int slot = 0, parity = 0;
    int at = 0, since = 0;      // of the step whose x is summed: k since its group began, steps since a handing over
    int counted = 0, ends = 0;  // of the step whose x is summed: which of its tile; after which 32 k sums are handed over
    float acc[S][C][4] = {};
    float sum[S][C][4] = {};
    float x_sum[kCounted][4] = {};

    __device__ __forceinline__ explicit Tiler(TileArgs const& args) : p(args) {
        int const part = blockIdx.z * WK + wk;
        own = p.share + (part < p.longer);
        count = p.share + (p.longer > 0);
        first = part * p.share + (part < p.longer ? part : p.longer);
        end_units = (first + own) * 2 < p.k / 32 ? (first + own) * 2 : p.k / 32;
    }

    __device__ __forceinline__ int block_n() const { return warps_n * S * 16; }
    __device__ __forceinline__ int tiles() const { return (p.out.n + block_n() - 1) / block_n(); }

    // ---- the stream ----

    static __device__ __forceinline__ int sent_strip(int i, int wm) { return kAlternate ? i * 2 + wm : i; }

    __device__ __forceinline__ void seek(int tile) {
        int const all = p.out.n / 16, blocks = (p.k + 256 / Bits - 1) / (256 / Bits), group_units = p.group / 32;
        feed_tile = tile;
        feed_left = count;
        feed_units = end_units - first * 2;
#pragma unroll
        for (int i = 0; i < kSent; i++) {
            int const s = sent_strip(i, wm), strip = (tile * warps_n + wn) * S + s;
            int const tile8 = strip / 8 * 8, width = all - tile8 < 8 ? all - tile8 : 8;
            bool const real = tile < tiles() && strip < all && s < S;
            feed_stride[i] = real ? kBlocks * width * 32 : 0;
            feed_at[i] = (uint32_t(tile8) * blocks + uint32_t(first * kBlocks) * width + (strip - tile8)) * 32 + lane;
        }
        int const n = (tile * warps_n + wn) * (S * 16) + lane * 4;
        feed_pairs = lane < S * 4 && n < p.out.n && tile < tiles() && wm == WM - 1;
        feed_group_left = group_units - first * 2 % group_units;
        feed_affine = uint32_t(first * 2 / group_units) * p.out.n + n;
    }

    __device__ __forceinline__ void send() {
        unsigned char* const to = ring() + feed_slot;
#pragma unroll
        for (int i = 0; i < kSent; i++) {
            int const s = sent_strip(i, wm);
#pragma unroll
            for (int h = 0; h < (WM == 2 ? 1 : kBlocks); h++) {
                int const b = WM == 2 && kBlocks == 2 ? wm : h;
                bool const valid = feed_stride[i] && b < feed_units;
                uint32_t const from = feed_at[i] + b * feed_stride[i] / kBlocks;
                if (!kAlternate || s < S)
                    copy_async(shared_address(to + kCodesAt + wk * p.codes_size + ((wn * S + s) * kBlocks + b) * 512 + lane * 16),
                               p.codes + (valid ? from * 16ull : 0), valid);
            }
            feed_at[i] += feed_stride[i];
        }
#pragma unroll
        for (int unit = 0; unit < 2; unit++) {
            if (unit < p.units && lane < S * 4 && wm == WM - 1) {
                bool const valid = feed_pairs && unit < feed_units;
                copy_async(shared_address(to + p.affine_at + (wk * p.units + unit) * p.affine_size + wn * (S * 64) + lane * 16),
                           p.affine + (valid ? feed_affine : 0), valid);
            }
            if (--feed_group_left == 0) feed_group_left = p.group / 32, feed_affine += p.out.n;
        }
        feed_units -= 2;
        feed_slot = feed_slot == (D - 1) * p.stage ? 0 : feed_slot + p.stage;
        if (--feed_left == 0) seek(feed_tile + int(gridDim.y));
    }

    // x of one part of K: two pieces of 16 bytes of each lane at the most, rows apart. The warps that divide m share it.
    __device__ __forceinline__ int piece() const { return (WM == 2 ? warp : wn) * 32 + lane; }
    __device__ __forceinline__ void seek_x(int tile) {
        x_tile = tile;
        x_left = count;
        x_units = tile < tiles() ? end_units - first * 2 - lane % 8 / 4 : 0;  // there is x while they are positive
        x_from = p.x + (int64_t(piece() / 8) * p.k + first * 64 + lane % 8 * 8) * 2;
    }
    __device__ __forceinline__ void send_x() {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int const row = piece() / 8 + i * (warps_n * WM * 4);
            bool const valid = x_units > 0 && row < p.out.m;
            if (row < kBlockM)
                copy_async(shared_address(ring() + x_slot + wk * kX + row * 128 + (lane % 8 ^ row % 8) * 16),
                           valid ? x_from + int64_t(i * (warps_n * WM * 4)) * p.k * 2 : p.x, valid);
        }
        x_from += 128;
        x_units -= 2;
        x_slot = x_slot == (D - 1) * p.stage ? 0 : x_slot + p.stage;
        if (--x_left == 0) seek_x(x_tile + int(gridDim.y));
    }

    // ---- sums ----

    // Where ldmatrix's lane finds x of the first column of `column`'s eight rows
    __device__ __forceinline__ Shared x_at(int slot, int column) const {
        int const row = (wm * C + column) * 8 + lane % 8;
        return shared_address(ring() + slot + wk * kX + row * 128 + ((lane / 8) ^ lane % 8) * 16);
    }
    __device__ __forceinline__ float* x_sums_of(int parity, int half) const {
        return x_sums() + ((parity * 2 + half) * kSides + side) * (C * 8);
    }

    // Which 32 k of a step are the last that its P takes: bits
    __device__ __forceinline__ int ends_of_step() const {
        bool const last = counted >= own - 1 || since == kHandOver - 1;
        if (p.units == 1) return at + 64 == p.group || last;
        return (at + 32 == p.group ? 1 : 0) | (at + 64 == p.group || p.group == 32 || last ? 2 : 0);
    }

    // X of the step in slot `slot`, and where it ends
    __device__ __forceinline__ void count_step(int slot, int parity) {
        ends = ends_of_step();
#pragma unroll
        for (int c = 0; c < kCounted; c++) {
            int const column = c * warps_n + wn;
            if (column >= C) continue;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t x[4], one = raw_one<T, Bits>(0);
                uint32_t const ones[4] = {one, one, one, one};
                load_matrices(x, flip(x_at(slot, column), half * 64));
                multiply_add<T>(x_sum[c], ones, x[0], x[1]);
                multiply_add<T>(x_sum[c], ones, x[2], x[3]);
                int const bit = p.units == 1 ? half : 1 << half;
                if (ends & bit) {
                    float* const to = x_sums_of(parity, p.units == 1 ? 0 : half) + column * 8 + lane * 2;
                    if (lane < 4) to[0] = x_sum[c][0], to[1] = x_sum[c][1];
                    x_sum[c][0] = x_sum[c][1] = x_sum[c][2] = x_sum[c][3] = 0;
                }
            }
        }
        since = ends & (p.units == 1 ? 1 : 2) ? 0 : since + 1;
        at += 64;
        while (at >= p.group) at -= p.group;
        if (++counted == count) counted = 0, at = first * 64 % p.group;
    }

    __device__ __forceinline__ void multiply_step(int ends) {
        unsigned char const* const codes = ring() + slot + kCodesAt + wk * p.codes_size + wn * (S * kBlocks * 512) + lane * 16;
        uint4 words[S];
        Shared const x_first = x_at(slot, 0);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half == 0 || kBlocks == 2)
#pragma unroll
                for (int s = 0; s < S; s++)
                    words[s] = *reinterpret_cast<uint4 const*>(codes + (s * kBlocks + half * kBlocks / 2) * 512);
            uint32_t x[C][4];
#pragma unroll
            for (int j = 0; j < C; j++) load_matrices(x[j], flip(x_first, half * 64) + j * 1024);
#pragma unroll
            for (int quarter = 0; quarter < 2; quarter++)
#pragma unroll
                for (int s = 0; s < S; s++) {
                    uint32_t a[4];
                    decode_raw<T, Bits>(a, words[s], half * 2 + quarter);
#pragma unroll
                    for (int j = 0; j < C; j++) multiply_add<T>(sum[s][j], a, x[j][quarter * 2], x[j][quarter * 2 + 1]);
                }
            if (p.units == 2 ? ends & 1 << half : half && ends) finish_group(p.units == 2 ? half : 0);
        }
    }

    // acc += s * (P - (z + b) * X)
    __device__ __forceinline__ void finish_group(int half) {
        auto const* const pairs = reinterpret_cast<uint32_t const*>(ring() + slot + p.affine_at +
                                                                    (wk * p.units + half) * p.affine_size + wn * (S * 64));
        float const* const sums = x_sums_of(parity, half) + 2 * t;
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
                        sum[s][j][h * 2 + e] = 0;
                    }
            }
    }

    // ---- tiles ----

    __device__ __forceinline__ void run() {
        seek(blockIdx.y);
#pragma unroll 1
        for (int d = 0; d < D - 1; d++) send();
        wait_for_inputs();
        release_next();
        seek_x(blockIdx.y);
#pragma unroll 1
        for (int d = 0; d < D - 1; d++) send_x(), copy_commit();
        copy_wait<D - 2>();
        block_barrier();
        at = first * 64 % p.group;
        count_step(0, 0);

        int const step_y = int(gridDim.y);
#pragma unroll 1
        for (int tile = blockIdx.y; tile < tiles(); tile += step_y) {
#pragma unroll 1
            for (int step = 0; step < count; step++) {
                copy_wait<D - 3>();
                block_barrier();  // all have left the slot before, the next one is there, and X of this one
                send();
                send_x();
                copy_commit();
                int const now = ends, next = slot == (D - 1) * p.stage ? 0 : slot + p.stage;
                count_step(next, parity ^ 1);
                multiply_step(now);
                slot = next;
                parity ^= 1;
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
        float* const places = reinterpret_cast<float*>(ring() + D * p.stage) + wn * (8 * kPitch);
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
            finish_some(8, S, (wm * C + j) * 8, tile * block_n() + wn * (S * 16), wk * 32 + lane, WK * 32,
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
        int const pitch = block_n() + 4;
        copy_wait<0>();
        block_barrier();
        store_sums(sums, pitch, acc, wk * kBlockM + wm * (C * 8), wn * (S * 16), g, t);
        cluster_barrier();
        int const threads = warps_n * kSides * 32;
        finish_some(int(p.out.m), warps_n * S, 0, tile * block_n(), blockIdx.z * threads + threadIdx.x,
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
__global__ void __launch_bounds__(kRows[I].threads(), kRows[I].resident) tiles(TileArgs const p) {
#if DEVICE_SM
    if constexpr (kGenerated<T, I>) Tiler<T, Bits, I>{p}.run();
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
    TileArgs const args{static_cast<unsigned char const*>(t.x),
                        static_cast<unsigned char const*>(t.codes),
                        static_cast<uint32_t const*>(t.affine),
                        output(p, t),
                        p.k,
                        p.group,
                        plan.splits,
                        warps_n,
                        steps / parts,
                        steps % parts,
                        units,
                        strips * p.bits * 128,
                        row.warps_k * (row.block_m() * 128 + strips * p.bits * 128),
                        strips * 64,
                        tile_stage(row, p.bits, units, warps_n)};
    return p.type == WOG_F16 ? launch_rows<Half>(p, args, plan, stream) : launch_rows<Bfloat>(p, args, plan, stream);
}

}  // namespace wog
