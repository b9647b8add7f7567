// The Hopper kernel of WeightOnlyGemm for many rows and groups that end inside hopper.cu's stages: 32 k, 96, 160, and of
// int8 activations 64. 16-bit or int8 activations, warpgroup products, warps with roles.
//
// A block owns a multiprocessor and works through tiles of 128 n x BM m (BM = 64 or 128), each with all of K or a part.
//
//     loader (warp 0)       x: one tensor copy a stage, 128 bytes of each row      full[stage] -> consumers
//                           weights: one bulk copy a stage, the strips of 128 n    empty[stage] <- consumers
//     sums (warp 1)         X of a group, which rows.cu left in the workspace      sum_full[slot] -> consumers
//                                                                                  sum_empty[slot] <- consumers
//     consumers (warps 4 .. 7, 8 .. 11)   64 n each: codes to registers, decode, multiply 32 k at a time, scale, store
//
// X is not summed here: that would take as many instructions as decoding, and a quarter of shared memory's bandwidth.
// The two groups of consumers share stages and nothing else: while one decodes, scales or stores, the other multiplies.
// Work goes on over the end of a tile: the ring is full again when the sums of a tile have been stored.
//
// Arithmetic: P = sum of x * (q - c), c = 8 or 128, in the tensor cores, in fp32 or int32; X = sum of x over a group.
// At each cut, which is the end of a group, of the part of K, or of 1024 k (fp32 sums inside tensor cores are
// truncated: they may not run long), acc += s * P in fp32; at the end of a group s * (P - (z - c) * X). For int8, s_x
// follows: y = s_x * acc, and where K is whole the bits are those of gemm.cu.
#include <array>
#include <utility>

#include <async.h>

#include "decode.h"
#include "epilogue.h"
#include "int8.h"
#include "tile.h"

namespace wog {
namespace {

struct WarpgroupArgs {
    TensorMap x;          // rows of x, or of its int8 values
    float const* scales;  // of rows, for int8
    float const* sums;    // [K / group, pitch]: X
    int64_t pitch;
    unsigned char const* codes;
    uint32_t const* affine;
    float* partials;  // [splits][M][N], null when K is not split
    Output out;
    int32_t k, group, splits;
    int32_t tiles_m, tiles_n, items, blocks;  // items of work: tiles of m, of n, parts of K
};

constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // times 128 and 256 threads: 64512 of 65536
constexpr int kBand = 8;      // tiles of m that blocks at work together share weights over
constexpr int kLongest = 32;  // units of 32 k from one cut to the next

// A part of a tile
struct Item {
    int64_t m0;
    int tile_n, split, first, last;  // stages
};

template <class T, int Bits, int I>
struct Shape {
    static constexpr Row kRow = kRows[I];
    static constexpr bool kInt8 = kRow.activation_bits == 8;
    static constexpr int C = kRow.columns, kBlockM = kRow.block_m();
    static constexpr int kStages = kRow.stages[Bits == 8], kStageK = stage_k(kRow), kUnits = kStageK / 32;
    static constexpr int kBlocks = kStageK * Bits / 256;  // 512-byte blocks of codes of a strip in a stage
    static constexpr int kXStage = x_stage_bytes(C), kStage = kXStage + kBlocks * 8 * 512;
    static constexpr int kStaged = kStages * kStage, kSums = kStaged + 2 * kStagedRows * kStagedPitch * 4;
    static constexpr int kBarriers = kSums + kSumSlots * kBlockM * 4;
    static_assert(kBarriers + 2 * (kStages + kSumSlots) * 8 == warpgroup_bytes(kRow, Bits), "as the table says");
    static_assert(warpgroup_bytes(kRow, Bits) <= 227 * 1024, "what a block of sm_90 may use");
    static_assert(kRow.block_n() == 128 && kRow.threads() == 384 && kStages >= 3, "roles of warps");
    static_assert(kXStage % 1024 == 0 && kStage % 1024 == 0, "the swizzle repeats every 1024 bytes");

    static __device__ __forceinline__ unsigned char* stage(int slot) { return dynamic_shared() + slot * kStage; }
    static __device__ __forceinline__ float* staged(int group) {
        return reinterpret_cast<float*>(dynamic_shared() + kStaged) + group * kStagedRows * kStagedPitch;
    }
    static __device__ __forceinline__ float* sums(int slot) {
        return reinterpret_cast<float*>(dynamic_shared() + kSums) + slot * kBlockM;
    }
    static __device__ __forceinline__ Barrier* barrier(int i) {
        return reinterpret_cast<Barrier*>(dynamic_shared() + kBarriers) + i;
    }
    static __device__ __forceinline__ Barrier* full(int slot) { return barrier(slot); }
    static __device__ __forceinline__ Barrier* empty(int slot) { return barrier(kStages + slot); }
    static __device__ __forceinline__ Barrier* sum_full(int slot) { return barrier(2 * kStages + slot); }
    static __device__ __forceinline__ Barrier* sum_empty(int slot) { return barrier(2 * kStages + kSumSlots + slot); }

    static __device__ __forceinline__ void start_barriers() {
        for (int i = 0; i < kStages; i++) barrier_init(full(i), 1), barrier_init(empty(i), 8);
        for (int i = 0; i < kSumSlots; i++) barrier_init(sum_full(i), 1), barrier_init(sum_empty(i), 8);
        publish_barriers();
    }

    // By all lanes of a warp that has read a stage
    static __device__ __forceinline__ void release(int slot, int lane) {
        warp_barrier();
        if (lane == 0) arrive(empty(slot));
    }

    static __device__ __forceinline__ Item item(WarpgroupArgs const& p, int index) {
        int const tiles = p.tiles_m * p.tiles_n, split = index / tiles, tile = index % tiles;
        int const band = tile / (kBand * p.tiles_n), inside = tile % (kBand * p.tiles_n),
                  left = p.tiles_m - band * kBand, rows = left < kBand ? left : kBand;
        int const stages = (p.k + kStageK - 1) / kStageK;
        return {int64_t(band * kBand + inside % rows) * kBlockM, inside / rows, split,
                int(int64_t(stages) * split / p.splits), int(int64_t(stages) * (split + 1) / p.splits)};
    }
};

// The cuts of one item, in units of 32 k, for the warp that brings X and those that use it
template <class S>
struct Cuts {
    int unit, last, group, group_end, per_group;

    __device__ __forceinline__ Cuts(WarpgroupArgs const& p, Item const& item) {
        unit = item.first * S::kUnits, last = item.last * S::kUnits;
        last = last < p.k / 32 ? last : p.k / 32;
        per_group = p.group / 32, group = unit / per_group, group_end = (group + 1) * per_group;
    }
    __device__ __forceinline__ bool left() const { return unit < last; }
    __device__ __forceinline__ int end() const {
        int e = last < group_end ? last : group_end;
        if (!S::kInt8 && e > unit + kLongest) e = unit + kLongest;
        return e;
    }
    __device__ __forceinline__ bool ends_group() const { return end() == group_end; }
    __device__ __forceinline__ void next() {
        unit = end();
        if (unit == group_end) group++, group_end += per_group;
    }
};

// ---- the loader: one thread ----

template <class S, int Bits>
struct Loader {
    WarpgroupArgs const& p;
    int index = int(blockIdx.x);
    Item item = S::item(p, index);
    int stage = item.first;
    Cursor<S::kStages> at{};

    __device__ __forceinline__ bool left() const { return index < p.items; }

    // Waits for the stage's memory, says how many bytes will come, and lets those of the weights come. The last tile of
    // n may have fewer strips, the last stage fewer blocks of k.
    __device__ __forceinline__ void load_weights() const {
        int const strips = p.out.n / 16 - item.tile_n * 8, width = strips < 8 ? strips : 8;
        int const blocks = (p.k + 256 / Bits - 1) / (256 / Bits), block = stage * S::kBlocks;
        int const count = blocks - block < S::kBlocks ? blocks - block : S::kBlocks, bytes = count * width * 512;
        wait(S::empty(at.slot), at.parity ^ 1);
        arrive_expecting(S::full(at.slot), S::kXStage + bytes);
        int64_t const from = int64_t(item.tile_n) * 8 * blocks + int64_t(block) * width;
        copy_bulk(S::stage(at.slot) + S::kXStage, p.codes + from * 512, bytes, S::full(at.slot));
    }

    __device__ __forceinline__ void load_x() const {
        copy_box<1>(S::stage(at.slot), p.x, stage * 128, item.m0, S::full(at.slot));
    }

    __device__ __forceinline__ void next() {
        at.next();
        if (++stage < item.last) return;
        index += p.blocks;
        if (left()) item = S::item(p, index), stage = item.first;
    }

    // The first stages: weights never change and need not wait for the kernel before.
    __device__ __forceinline__ void begin(int count) {
        prefetch_map(p.x);
        Loader ahead = *this;
        for (int i = 0; i < count && ahead.left(); i++) ahead.load_weights(), ahead.next();
        wait_for_inputs();
        for (int i = 0; i < count && left(); i++) load_x(), next();
    }

    // X of every group that ends in an item
    __device__ __forceinline__ void copy_sums() {
        Cursor<kSumSlots> slot;
        wait_for_inputs();
        for (; left(); index += p.blocks) {
            item = S::item(p, index);
            for (Cuts<S> cut(p, item); cut.left(); cut.next()) {
                if (!cut.ends_group()) continue;
                wait(S::sum_empty(slot.slot), slot.parity ^ 1);
                arrive_expecting(S::sum_full(slot.slot), S::kBlockM * 4);
                copy_bulk(S::sums(slot.slot), p.sums + cut.group * p.pitch + item.m0, S::kBlockM * 4,
                          S::sum_full(slot.slot));
                slot.next();
            }
        }
    }

    __device__ __forceinline__ void run() {
        begin(S::kStages);
        while (left()) load_weights(), load_x(), next();
    }
};

// ---- consumers: 128 threads and 64 n each ----

template <class T, int Bits, int I>
struct Consumer {
    using S = Shape<T, Bits, I>;
    using Sum = std::conditional_t<S::kInt8, int32_t, float>;
    static constexpr int C = S::C;
    static constexpr float kCenter = 1 << (Bits - 1);
    static constexpr int kBlockSteps = 4 / S::kBlocks;  // steps of 32 bytes of a row of x that a block of codes serves

    WarpgroupArgs const& p;
    int const thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    int const who = threadIdx.x / 128 - 1;  // which of the two
    int width = 8;                          // strips of the tile

    Sum sum[C][4];  // P since the last cut
    float acc[C][4];
    uint32_t a[4][4];  // fragments of the four steps of a stage
    uint4 codes;       // that fragments are decoded from
    Cursor<S::kStages> at{};
    Cursor<kSumSlots> sum_at{};

    template <int Step>
    __device__ __forceinline__ void decode_step(int slot) {
        if constexpr (Step % kBlockSteps == 0) {
            int const strip = Step / kBlockSteps * width + who * 4 + warp;  // beyond the last: decoded, never stored
            codes = *reinterpret_cast<uint4 const*>(S::stage(slot) + S::kXStage + strip * 512 + lane * 16);
        }
        if constexpr (S::kInt8)
            decode_signed<Bits>(a[Step], codes, Step);
        else
            decode<T, Bits>(a[Step], codes, Step % kBlockSteps);
    }

    // P += codes * x for steps First .. First + Count - 1, or P = that
    template <int First, int Count>
    __device__ __forceinline__ void multiply(int slot, bool add) {
#pragma unroll
        for (int i = First; i < First + Count; i++) settle(a[i]);
        warpgroup_begin();
#pragma unroll
        for (int i = First; i < First + Count; i++) {
            if constexpr (S::kInt8)
                warpgroup_multiply_add(sum, a[i], S::stage(slot), i, i > First || add);
            else
                warpgroup_multiply_add<T>(sum, a[i], S::stage(slot), i, i > First || add);
        }
        warpgroup_commit();
    }

    // acc += s * (P - (z - c) * X), or without X
    template <bool X>
    __device__ __forceinline__ void add_sums(float const (&scale)[2], float const (&zero)[2]) {
        float const* const x = S::sums(sum_at.slot) + 2 * t;
#pragma unroll
        for (int j = 0; j < C; j++) {
            float const x_sum[2] = {X ? x[j * 8] : 0.0f, X ? x[j * 8 + 1] : 0.0f};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float const total = X ? float(sum[j][i]) - zero[i / 2] * x_sum[i % 2] : float(sum[j][i]);
                acc[j][i] += scale[i / 2] * total;
            }
        }
        settle(acc);  // or the compiler joins the ends of the two forms, at the cost of an instruction for each sum
    }
    // {scale, zero} are those of rows g and g + 8 of the warp's strip; n is row g. X counts where a group ends, and not for zeros in the middle of the codes, as symmetric quantization has them.
    __device__ __forceinline__ void promote(int n, int group, bool end) {
        uint32_t const* const pairs = p.affine + int64_t(group) * p.out.n + n;
        float scale[2], zero[2];
        for (int h = 0; h < 2; h++) {
            scale[h] = to_float<T>(uint16_t(pairs[h * 8]));
            zero[h] = to_float<T>(uint16_t(pairs[h * 8] >> 16)) - kCenter;
        }
        if (end) wait(S::sum_full(sum_at.slot), sum_at.parity);
        if (end && any_lane(zero[0] != 0 || zero[1] != 0))
            add_sums<true>(scale, zero);
        else
            add_sums<false>(scale, zero);
        if (!end) return;
        warp_barrier();
        if (lane == 0) arrive(S::sum_empty(sum_at.slot));
        sum_at.next();
    }

    // 32 k at a time
    template <int Unit>
    __device__ __forceinline__ void accumulate_unit(Cuts<S>& cut, int& unit, int n, bool& fresh) {
        constexpr int kSteps = 4 / S::kUnits, kFirst = Unit * kSteps;
        if (unit < cut.last) {
            decode_step<kFirst>(at.slot);
            if constexpr (kSteps == 2) decode_step<kFirst + 1>(at.slot);
            multiply<kFirst, kSteps>(at.slot, !fresh);
            warpgroup_wait<0>();
            settle(sum);
            fresh = ++unit == cut.end();
            if (fresh) promote(n, cut.group, cut.ends_group()), cut.next();
        }
        if constexpr (Unit + 1 < S::kUnits) accumulate_unit<Unit + 1>(cut, unit, n, fresh);
    }
    __device__ __forceinline__ void accumulate(Item const& item, int n) {
        Cuts<S> cut(p, item);
        int unit = cut.unit;
        bool fresh = true;
        for (int stage = item.first; stage < item.last; stage++, at.next()) {
            wait(S::full(at.slot), at.parity);
            accumulate_unit<0>(cut, unit, n, fresh);
            S::release(at.slot, lane);
        }
    }

    // 32 m of the result to shared memory. The index is known when compiling: sums stay in registers.
    template <int Pass>
    __device__ __forceinline__ void stage_result(float* tile, int pass) const {
        if (pass == Pass) {
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    tile[(j * 8 + 2 * t + i % 2) * kStagedPitch + warp * 16 + i / 2 * 8 + g] = acc[Pass * 4 + j][i];
        } else if constexpr ((Pass + 1) * 4 < C) {
            stage_result<Pass + 1>(tile, pass);
        }
    }

    // Through shared memory, so that a thread has 16 n of a row and neighbours have neighbouring n
    __device__ __forceinline__ void store(Item const& item) const {
        float* const tile = S::staged(who);
        int const row = thread / 4, column = thread % 4 * 16, n = item.tile_n * 128 + who * 64 + column;
        int64_t m = item.m0 + row;
#pragma unroll 1
        for (int pass = 0; pass < C / 4; pass++, m += kStagedRows) {
            stage_result<0>(tile, pass);
            named_barrier(1 + who, 128);
            float v[16];
#pragma unroll
            for (int i = 0; i < 16; i++) v[i] = tile[row * kStagedPitch + column + i];
            named_barrier(1 + who, 128);
            if (m >= p.out.m || n >= p.out.n) continue;
            if constexpr (S::kInt8) {
                float const row_scale = p.scales[m];
#pragma unroll
                for (int i = 0; i < 16; i++) v[i] *= row_scale;
            }
            if (p.splits == 1)
                finish<T>(p.out, v, m, n);
            else
                store_partial(v, (item.split * p.out.m + m) * p.out.n + n);
        }
    }
    __device__ __forceinline__ void store_partial(float const (&v)[16], int64_t at) const {
        auto* const to = reinterpret_cast<float4*>(p.partials + at);
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = {v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]};
    }

    __device__ __forceinline__ void run() {
        wait_for_inputs();
        for (int index = int(blockIdx.x); index < p.items; index += p.blocks) {
            Item const item = S::item(p, index);
            int const strips = p.out.n / 16 - item.tile_n * 8, strip = who * 4 + warp;
            int const n = strip < strips ? item.tile_n * 128 + strip * 16 + g : g;  // beyond the last: any that exists
            width = strips < 8 ? strips : 8;
#pragma unroll
            for (int j = 0; j < C; j++) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.0f;
            accumulate(item, n);
            store(item);
        }
    }
};

template <class T, int Bits, int I>
__global__ void __launch_bounds__(384, 1) warpgroup(__grid_constant__ WarpgroupArgs const p) {
#if DEVICE_SM
    if constexpr (kGenerated<T, I>) {
        using S = Shape<T, Bits, I>;
        release_next();
        if (threadIdx.x == 0) S::start_barriers();
        block_barrier();
        if (threadIdx.x < 128) {
            keep_registers<kProducerRegisters>();
            if (threadIdx.x == 0) Loader<S, Bits>{p}.run();
            if (threadIdx.x == 32) Loader<S, Bits>{p}.copy_sums();
        } else {
            take_registers<kConsumerRegisters>();
            Consumer<T, Bits, I>{p}.run();
        }
    }
#endif
}

constexpr int kFirst = first_row(Kernel::kWarpgroup);

template <class T, int Bits, int... I>
constexpr auto instances(std::integer_sequence<int, I...>) {
    return std::array<void (*)(WarpgroupArgs), sizeof...(I)>{warpgroup<T, Bits, kFirst + I>...};
}

template <class T>
char const* launch_rows(int bits, WarpgroupArgs const& args, wog_plan const& plan, Stream stream) {
    constexpr std::make_integer_sequence<int, count_rows(Kernel::kWarpgroup)> kAll;
    constexpr auto kFour = instances<T, 4>(kAll), kEight = instances<T, 8>(kAll);
    Grid const grid{dim3(args.blocks), plan.threads, size_t(plan.shared), dim3(1), /*overlap=*/true};
    return launch((bits == 4 ? kFour : kEight)[plan.row - kFirst], grid, stream, args);
}

}  // namespace

char const* launch_warpgroup(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream) {
    Row const& row = kRows[plan.row];
    bool const int8 = p.activation_bits == 8;
    Int8Rows const rows = int8_rows(p, t.workspace);
    float* const sums = int8 ? rows.sums : static_cast<float*>(t.workspace);
    int const items = plan.grid_m * plan.grid_n * plan.splits;
    WarpgroupArgs args{{},
                       rows.scales,
                       sums,
                       padded_rows(p.m),
                       static_cast<unsigned char const*>(t.codes),
                       static_cast<uint32_t const*>(t.affine),
                       plan.splits > 1 ? partials(row, p, t.workspace) : nullptr,
                       output(p, t),
                       p.k,
                       p.group,
                       plan.splits,
                       plan.grid_m,
                       plan.grid_n,
                       items,
                       std::min(items, p.sm_count)};
    void const* const x = int8 ? rows.values : t.x;
    char const* failed = describe_rows(args.x, x, p.m, int64_t(p.k) * (int8 ? 1 : 2), row.block_m());
    if (!failed) failed = int8 ? launch_quantize(p, t, stream) : launch_sums(p, t, sums, stream);
    if (failed) return failed;
    auto const s = static_cast<Stream>(stream);
    failed = p.type == WOG_F16 ? launch_rows<Half>(p.bits, args, plan, s) : launch_rows<Bfloat>(p.bits, args, plan, s);
    return failed || plan.splits == 1 ? failed : launch_epilogue(p, t, args.partials, plan.splits, stream);
}

}  // namespace wog
