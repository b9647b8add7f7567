// The Hopper kernel of WeightOnlyGemm for many rows: 16-bit or int8 activations, warpgroup products, warps with roles.
//
// A block owns a multiprocessor and works through tiles of W * 64 n x C * 8 m. What is left when all blocks have had as
// many whole tiles, or all of a few tiles, is divided in K: the blocks of a cluster have a part each, and add up in
// shared memory. One launch, no workspace. Else blocks of a pair work on neighbours in n, and each loads half of the
// rows of x for both.
//
//     loaders (warps 0, 1)   128 bytes of rows of x; codes, and at a cut scales and zeros   full[stage] -> all others
//     sums (warps 2, 3)      own_sums: X, in the tensor cores, by a matrix of ones          sum_full[slot] -> consumers
//     consumers              H * 64 n each: codes to registers, multiply, scale, store    empty[stage], sum_empty[slot]
//
// `ordered`: the groups of consumers take turns, so that one scales its sums and decodes while another multiplies. Else
// they come to the ends of groups together, and the tensor cores wait for all of them.
// Three or four groups of consumers keep the tensor cores at work while codes are decoded and sums scaled: what one group
// does in between takes longer than its products. So do two strips of 16 n in each warp (H = 2): of one the sums are
// scaled while the other's products run.
//
// Arithmetic: P = sum of x * (q - c), in the tensor cores, c = 8 or 128, X = sum of x. At each cut, the end of a
// group, of the part of K or of 1024 k (fp32 sums inside tensor cores are truncated: they may not run long), acc += s
// * (P - (z - c) * X), all in fp32. Without own_sums X is rows.cu's, of a whole group: counted where the group ends. For
// int8, sums are whole numbers, X is rows.cu's, cuts are those of groups and parts, and s_x follows: y = s_x * acc.
// With one group, its sums turn into the result where they are.
//
// Where groups are multiples of a stage's k, 64 or 128, or all of K, cuts stand at ends of stages. Else (Fine) after any 32
// k, with scales, zeros and X, if it is rows.cu's, of each in its stage.
//
// Room for experts, products of one shape whose numbers of rows only the device knows: item() alone says where a tile
// lies, so that an expert adds where its rows of x, its codes and its scales begin, and the rest stays.
#include <type_traits>

#include <async.h>

#include "decode.h"
#include "epilogue.h"
#include "int8.h"
#include "tile.h"

namespace wog {
namespace {

struct HopperArgs {
    TensorMap x;
    float const* scales;  // of rows, for int8
    float const* sums;    // [K / group, pitch]: X, without own_sums
    int64_t pitch;
    unsigned char const* codes;
    uint32_t const* affine;  // (scale, zero) pairs, [K / group][N]
    Output out;
    int32_t stages, splits, groups;             // in K
    int32_t units, group_units;                 // of K and of a group: of 32 k, or of a stage's
    int32_t blocks;                             // of codes, of a strip
    int32_t tiles_m, tiles_n, items, clusters;  // items: tiles, of n by pairs
    int32_t turns, whole;                       // of a block, and how many of them are whole tiles
    int32_t ordered;
};

constexpr int kBand = 8;      // tiles of m that blocks at work together share weights over
constexpr int kLongest = 16;  // stages of 16-bit x from one cut to the next
constexpr int kNever = 1 << 20;

struct Item {
    int m0, n0, first, last;  // rows of x and of codes; stages
};

// The cuts of an item that end with stages, for loaders; where they end inside, there is one
template <int Longest, bool Fine>
struct Cuts {
    int stage, last, group, group_end, per_group;

    __device__ __forceinline__ Cuts(HopperArgs const& p, Item const& item) {
        stage = item.first, last = item.last, per_group = Fine ? kNever : p.group_units;
        group = stage / per_group, group_end = (group + 1) * per_group;
    }
    __device__ __forceinline__ bool left() const { return stage < last; }
    __device__ __forceinline__ int end() const {
        int const e = last < group_end ? last : group_end;
        return e - stage > Longest ? stage + Longest : e;
    }
    __device__ __forceinline__ bool ends_group() const { return end() == group_end; }
    __device__ __forceinline__ void next() {
        stage = end();
        if (stage == group_end) group++, group_end += per_group;
    }
};

// The next cut, wherever it stands: units to the end of the item and of the group; since the cut before
template <class S>
struct Span {
    int left, group_left, since = 0;

    __device__ __forceinline__ Span(HopperArgs const& p, Item const& item) {
        int const unit = item.first * S::kUnits, end = item.last * S::kUnits;
        left = (end < p.units ? end : p.units) - unit;  // K may not fill the last stage
        group_left = p.group_units - unit % p.group_units;
    }
    // Goes over a unit; does a cut end with it?
    __device__ __forceinline__ bool next() {
        left--, group_left--, since++;
        return left == 0 || group_left == 0 || since == S::kLongest;
    }
    __device__ __forceinline__ bool ends_group() const { return group_left == 0; }
    __device__ __forceinline__ void begin(HopperArgs const& p) {
        since = 0;
        if (ends_group()) group_left = p.group_units;
    }
};

// The groups of the units of an item, one after the other
struct Units {
    int group, left, per_group, last;

    __device__ __forceinline__ Units(HopperArgs const& p, int unit) {
        per_group = p.group_units, last = p.groups - 1;
        group = unit / per_group, left = per_group - unit % per_group;
    }
    __device__ __forceinline__ int next() {
        int const here = group < last ? group : last;  // beyond K
        if (--left == 0) group++, left = per_group;
        return here;
    }
};

template <class T, int Bits, int I, bool Fine>
struct Shape {
    static constexpr Row kRow = kRows[I];
    static constexpr int C = kRow.columns, W = kRow.warps_n / 4, H = kRow.strips, kCluster = kRow.cluster;
    static constexpr int kBlockM = kRow.block_m(), kBlockN = kRow.block_n(), kStrips = kBlockN / 16;
    static constexpr int kStages = hopper_stages(kRow, Bits, Fine), kBlocks = stage_k(kRow) * Bits / 256,
                         kThreads = kRow.threads();
    static constexpr bool kOwnSums = kRow.own_sums, kInt8 = kRow.activation_bits == 8, kFine = Fine;
    static constexpr int kUnits = hopper_units(kRow, Fine);
    static constexpr int kLongest = kInt8 ? kNever : wog::kLongest * kUnits;  // units from one cut to the next
    using Cuts = wog::Cuts<Fine ? kNever : kLongest, Fine>;
    static constexpr int kCodes = kBlockM * 128, kAffine = kCodes + kBlocks * kStrips * 512;
    static constexpr int kX = kAffine + kUnits * kBlockN * 4, kStage = hopper_stage(kRow, Bits, Fine);
    static constexpr int kTile = kStages * kStage, kSums = kTile + W * kStagedRows * kStagedPitch * 4;
    static constexpr int kBarriers = kSums + kHopperSums * kBlockM * 4;
    static constexpr int kReaders = W * 4 + (kOwnSums ? 2 : 0);  // warps that read a stage
    static constexpr int kPitch = kBlockN + 4;                   // of a tile on its way through a cluster
    static_assert(kBarriers + 2 * (kStages + kHopperSums) * 8 == hopper_bytes(kRow, Bits, Fine), "as planned");
    static_assert(H == 1 || !Fine, "cuts inside stages would wait for both strips");
    static_assert(kStages >= 3 && kStage % 1024 == 0 && kCodes / kCluster % 1024 == 0, "the swizzle repeats");
    static_assert(kBlockM * kPitch * 4 <= kTile, "a tile takes the place of the stages");
    static constexpr int kConsumerRegisters = W == 2 ? 216 : W == 4 ? 104 : C == 8 || kRow.whole_k ? 152 : 160;
    static constexpr int kEights = 65536 / kThreads / 8 * (W + 1);  // of registers that a block has for 128 lanes
    static constexpr int kProducerRegisters = kEights * 8 - W * kConsumerRegisters;

    static __device__ __forceinline__ unsigned char* stage(int slot) { return dynamic_shared() + slot * kStage; }
    static __device__ __forceinline__ float* staged(int who) {
        return reinterpret_cast<float*>(dynamic_shared() + kTile) + who * kStagedRows * kStagedPitch;
    }
    static __device__ __forceinline__ float* tile() { return reinterpret_cast<float*>(dynamic_shared()); }
    static __device__ __forceinline__ float* sums(int slot) {
        return reinterpret_cast<float*>(dynamic_shared() + kSums) + slot * kBlockM;
    }
    static __device__ __forceinline__ Barrier* barrier(int i) {
        return reinterpret_cast<Barrier*>(dynamic_shared() + kBarriers) + i;
    }
    static __device__ __forceinline__ Barrier* full(int slot) { return barrier(slot); }
    static __device__ __forceinline__ Barrier* empty(int slot) { return barrier(kStages + slot); }
    static __device__ __forceinline__ Barrier* sum_full(int slot) { return barrier(2 * kStages + slot); }
    static __device__ __forceinline__ Barrier* sum_empty(int slot) { return barrier(2 * kStages + kHopperSums + slot); }

    static __device__ __forceinline__ void start_barriers() {
        for (int i = 0; i < kStages; i++) barrier_init(full(i), 2), barrier_init(empty(i), kReaders * kCluster);
        for (int i = 0; i < kHopperSums; i++) barrier_init(sum_full(i), 2), barrier_init(sum_empty(i), W * 4);
        publish_barriers();
    }

    // By all lanes of a warp that has read a stage: neighbours copy into it too.
    static __device__ __forceinline__ void release(int slot, int lane) {
        warp_barrier();
        if (kCluster == 1 && lane == 0) arrive(empty(slot));
        if (kCluster > 1 && lane < kCluster) arrive_at(empty(slot), lane);
    }

    // Neighbours of a pair differ in n, those who divide K in the part
    static __device__ __forceinline__ int index(HopperArgs const& p, int turn) {
        int const block = int(blockIdx.x), sharers = turn < p.whole ? 1 : p.splits;
        return kCluster > 1 ? turn * p.clusters + block / kCluster : turn * p.clusters * p.splits + block / sharers;
    }
    static __device__ __forceinline__ bool left(HopperArgs const& p, int turn) {
        return turn < p.turns && index(p, turn) < p.items;
    }
    static __device__ __forceinline__ Item item(HopperArgs const& p, int turn) {
        int const at = index(p, turn), across = (p.tiles_n + kCluster - 1) / kCluster, band = at / (kBand * across);
        int const inside = at % (kBand * across), left = p.tiles_m - band * kBand, rows = left < kBand ? left : kBand;
        int const neighbour = kCluster > 1 ? int(blockIdx.x) % kCluster : 0;
        bool const whole = kCluster > 1 || turn < p.whole;
        int const part = whole ? 0 : int(blockIdx.x) % p.splits, parts = whole ? 1 : p.splits;
        return {(band * kBand + inside % rows) * kBlockM, (inside / rows * kCluster + neighbour) * kBlockN,
                int(int64_t(p.stages) * part / parts), int(int64_t(p.stages) * (part + 1) / parts)};
    }
};

// ---- loaders: two warps, of which one lane copies ----
//
// A stage takes consumers 400 cycles and more, and a lone warp about 6 for an instruction: what an item needs is found
// once, control is the same for all lanes (so that addresses can be in uniform registers, as copies want them), and two
// warps share the work. Each says how many bytes it will send.

template <class S>
struct Loader {
    HopperArgs const& p;
    Cursor<S::kStages> at{};

    // Strips of 16 n lie in tiles of 128 n, of which the last may have fewer; a tile of ours touches at most two.
    struct Piece {
        unsigned char const* from;
        int bytes, pitch;  // of a block; from one block of k to the next

        __device__ __forceinline__ Piece(HopperArgs const& p, int n, int end, int block) {
            int const tile = n / 128 * 128, all = p.out.n - tile < 128 ? p.out.n - tile : 128;
            bytes = ((tile + all < end ? tile + all : end) - n) * 32, pitch = all * 32;
            if (n >= end) bytes = pitch = 0;
            from = p.codes + (int64_t(tile) * p.blocks + (n - tile)) * 32 + int64_t(block) * pitch;
        }
        __device__ __forceinline__ void copy(unsigned char* to, int block, Barrier* full) const {
            copy_bulk(to + block * (S::kStrips * 512), from + block * pitch, bytes, full);
        }
    };

    // The second block of the last pair may have no n at all. Weights never change: they need not wait for the kernel
    // before.
    __device__ __forceinline__ void send_weights() {
        for (int turn = 0; S::left(p, turn); turn++) {
            Item const item = S::item(p, turn);
            int const left = p.out.n - item.n0, width = left < 0 ? 0 : left < S::kBlockN ? left : S::kBlockN;
            int const end = item.n0 + width;
            Piece low(p, item.n0, end, item.first * S::kBlocks);
            Piece high(p, item.n0 + low.bytes / 32, S::kBlockN > 128 ? end : 0, item.first * S::kBlocks);
            int const whole = low.bytes + high.bytes, offset = low.bytes;
            Units units(p, item.first * S::kUnits);
            for (typename S::Cuts cut(p, item); cut.left(); cut.next()) {
                int const last = cut.end() - 1;
#pragma unroll 1
                for (int stage = cut.stage; stage <= last; stage++) {
                    int const blocks = S::kBlocks == 1 ? 1 : p.blocks - stage * S::kBlocks;  // the last stage has fewer
                    int const count = blocks < S::kBlocks ? blocks : S::kBlocks;
                    bool const ends = S::kFine || stage == last;
                    int groups[S::kUnits];
#pragma unroll
                    for (int& group : groups) group = S::kFine ? units.next() : cut.group;
                    unsigned char* const to = S::stage(at.slot);
                    Barrier* const full = S::full(at.slot);
                    wait(S::empty(at.slot), at.parity ^ 1);
                    if (elected()) {
                        arrive_expecting(full, count * whole + (ends ? S::kUnits * width * 4 : 0));
#pragma unroll
                        for (int i = 0; i < S::kBlocks; i++) {
                            if (i < count && low.bytes) low.copy(to + S::kCodes, i, full);
                            if (S::kBlockN > 128 && i < count && high.bytes)
                                high.copy(to + S::kCodes + offset, i, full);
                        }
#pragma unroll
                        for (int u = 0; u < S::kUnits; u++)
                            if (ends && width)
                                copy_bulk(to + S::kAffine + u * (S::kBlockN * 4),
                                          p.affine + int64_t(groups[u]) * p.out.n + item.n0, width * 4, full);
                    }
                    low.from += S::kBlocks * low.pitch, high.from += S::kBlocks * high.pitch;
                    at.next();
                }
            }
        }
    }

    __device__ __forceinline__ void send_x() {
        constexpr int kSumBytes = S::kBlockM * 4, kRows = S::kBlockM / S::kCluster;
        int const rank = S::kCluster > 1 ? int(blockIdx.x) % S::kCluster : 0;
        if (elected()) prefetch_map(p.x);
        wait_for_inputs();
        for (int turn = 0; S::left(p, turn); turn++) {
            Item const item = S::item(p, turn);
            Units units(p, item.first * S::kUnits);
            for (typename S::Cuts cut(p, item); cut.left(); cut.next()) {
                int const last = cut.end() - 1;
#pragma unroll 1
                for (int stage = cut.stage; stage <= last; stage++, at.next()) {
                    bool const ends = !S::kOwnSums && (S::kFine || stage == last);
                    int groups[S::kUnits];
#pragma unroll
                    for (int& group : groups) group = S::kFine ? units.next() : cut.group;
                    unsigned char* const to = S::stage(at.slot);
                    Barrier* const full = S::full(at.slot);
                    wait(S::empty(at.slot), at.parity ^ 1);
                    if (!elected()) continue;
                    arrive_expecting(full, S::kCodes + (ends ? S::kUnits * kSumBytes : 0));
                    copy_box<S::kCluster>(to + rank * (S::kCodes / S::kCluster), p.x, stage * 128,
                                          item.m0 + rank * kRows, full);
#pragma unroll
                    for (int u = 0; u < S::kUnits; u++)
                        if (ends)
                            copy_bulk(to + S::kX + u * kSumBytes, p.sums + groups[u] * p.pitch + item.m0, kSumBytes,
                                      full);
                }
            }
        }
        if constexpr (S::kCluster > 1)  // neighbours arrive here until they have left the last stages
            for (int i = 0; i < S::kStages; i++, at.next()) wait(S::empty(at.slot), at.parity ^ 1);
    }
};

// ---- X: two warps, every second 16 rows of x each ----

template <class T, class S>
struct Ones {
    static constexpr int kMine = S::C / 4;

    HopperArgs const& p;
    int const lane = threadIdx.x % 32, which = threadIdx.x / 32 - 2;
    Cursor<S::kStages> at{};
    Cursor<kHopperSums> sum_at{};
    float sum[kMine][4] = {};  // since the last cut

    __device__ __forceinline__ void add_up(Shared x) {
#pragma unroll
        for (int i = 0; i < kMine; i++) {
            uint32_t rows[4];
            load_matrices(rows, x + i * 4096);
            sum_rows<T>(sum[i], rows);
        }
    }

    __device__ __forceinline__ void hand_over() {
        wait(S::sum_empty(sum_at.slot), sum_at.parity ^ 1);
        float* const to = S::sums(sum_at.slot) + which * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < kMine; i++) {
            if (lane % 4 == 0) to[i * 32] = sum[i][0], to[i * 32 + 8] = sum[i][2];
            sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0;
        }
        warp_barrier();
        if (lane == 0) arrive(S::sum_full(sum_at.slot));
        sum_at.next();
    }

    __device__ __forceinline__ void run() {
        int const inside = which * 2048 + lane % 16 * 128 + turned<128>(lane / 16, lane % 8) * 16;
        for (int turn = 0; S::left(p, turn); turn++) {
            Item const item = S::item(p, turn);
            Span<S> span(p, item);
            for (int stage = item.first; stage < item.last; stage++, at.next()) {
                wait(S::full(at.slot), at.parity);
                Shared const x = shared_address(S::stage(at.slot)) + inside;
#pragma unroll 1
                for (int unit = 0; unit < S::kUnits && span.left; unit++) {
#pragma unroll
                    for (int step = 0; step < 4 / S::kUnits; step++)
                        add_up(flip(x, (unit * (4 / S::kUnits) + step) * 32));
                    if (span.next()) hand_over(), span.begin(p);
                }
                S::release(at.slot, lane);
            }
        }
    }
};

// ---- consumers: 128 threads and H times 64 n each ----

template <class T, int Bits, int I, bool Fine>
struct Consumer {
    using S = Shape<T, Bits, I, Fine>;
    using Sum = std::conditional_t<S::kInt8, int32_t, float>;
    static constexpr int C = S::C, W = S::W, H = S::H;
    static constexpr bool kInt8 = S::kInt8, kWhole = S::kRow.whole_k;
    static constexpr int kBlockSteps = 4 / S::kBlocks;  // steps of 32 bytes of a row of x that a block of codes serves
    static constexpr bool kAhead = W == 2 || (W == 3 && C == 8);
    static constexpr int kParts = Fine ? S::kUnits : kAhead && H == 1 ? 2 : 4;
    static constexpr int kTurns = kParts * H;  // in a stage: each strip has one in each part
    static constexpr int kPartSteps = 4 / kParts, kFragments = 2 * kPartSteps;

    HopperArgs const& p;
    int const thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    int const who = threadIdx.x / 128 - 1;

    Sum sum[H][C][4];                 // P since the last cut
    float acc[H][kWhole ? 1 : C][4];  // with one cut, its result takes P's place
    uint32_t a[kFragments][4];        // of k16 steps
    uint4 codes[H];                   // that fragments are decoded from
    Cursor<S::kStages> at{};
    Cursor<kHopperSums> sum_at{};

    // Where the 64 n of a strip's turn begin in the tile
    __device__ __forceinline__ int first_of(int strip) const { return (who * H + strip) * 64; }

    template <int Turn>
    __device__ __forceinline__ void decode_part(int slot) {
        uint4& of = codes[Turn % H];
#pragma unroll
        for (int i = 0; i < kPartSteps; i++) {
            int const step = Turn / H * kPartSteps + i;
            unsigned char const* const from = S::stage(slot) + S::kCodes + step / kBlockSteps * (S::kStrips * 512) +
                                              (first_of(Turn % H) / 16 + warp) * 512 + lane * 16;
            constexpr bool kAtOnce = kBlockSteps == 1 || (kAhead && H == 1);
            constexpr int kHalf = kAtOnce ? kBlockSteps : kBlockSteps / 2;
            if (kHalf == kBlockSteps && step % kBlockSteps == 0) of = *reinterpret_cast<uint4 const*>(from);
            if (kHalf != kBlockSteps && step % kHalf == 0) {  // half of them: two registers fewer
                int const half = step % kBlockSteps / kHalf;
                uint32_t const* const words = reinterpret_cast<uint32_t const*>(from) + half * 2;
                (half ? of.z : of.x) = words[0], (half ? of.w : of.y) = words[1];
            }
            uint32_t (&to)[4] = a[(Turn * kPartSteps + i) % kFragments];
            if constexpr (kInt8)
                decode_signed<Bits>(to, of, step);
            else
                decode<T, Bits>(to, of, step % kBlockSteps);
        }
    }

    // P += codes * x for a part of a stage, or P = that
    template <int Turn>
    __device__ __forceinline__ void multiply(int slot, bool add) {
#pragma unroll
        for (int i = 0; i < kPartSteps; i++) settle(a[(Turn * kPartSteps + i) % kFragments]);
        warpgroup_begin();
#pragma unroll
        for (int i = 0; i < kPartSteps; i++) {
            int const step = Turn / H * kPartSteps + i, fragment = (Turn * kPartSteps + i) % kFragments;
            bool const adds = (Fine ? i : step) > 0 || add;
            if constexpr (kInt8)
                warpgroup_multiply_add(sum[Turn % H], a[fragment], S::stage(slot), step, adds);
            else
                warpgroup_multiply_add<T>(sum[Turn % H], a[fragment], S::stage(slot), step, adds);
        }
        warpgroup_commit();
        warpgroup_wait<1>();
    }

    // acc += s * (P - (z - c) * X), of the cut that ends with a unit of `slot`, whose products have ended. `end`: whether
    // rows.cu's X counts.
    template <int Strip>
    __device__ __forceinline__ void promote(int slot, int unit, bool end) {
        settle(sum[Strip]);
        auto const* const pairs = reinterpret_cast<uint32_t const*>(S::stage(slot) + S::kAffine) + unit * S::kBlockN +
                                  first_of(Strip) + warp * 16 + g;
        float scale[2], zero[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t const pair = pairs[h * 8];
            scale[h] = to_float<T>(uint16_t(pair));
            zero[h] = float(1 << (Bits - 1)) - to_float<T>(uint16_t(pair >> 16));
            if (!S::kOwnSums && !end) zero[h] = 0.0f;
        }
        if (S::kOwnSums && Strip == 0) wait(S::sum_full(sum_at.slot), sum_at.parity);
        auto const* const x = S::kOwnSums ? S::sums(sum_at.slot)
                                          : reinterpret_cast<float const*>(S::stage(slot) + S::kX) + unit * S::kBlockM;
#pragma unroll
        for (int j = 0; j < C; j++) {
            float const x_sum[2] = {x[j * 8 + 2 * t], x[j * 8 + 2 * t + 1]};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float const v = scale[i / 2] * (float(sum[Strip][j][i]) + zero[i / 2] * x_sum[i % 2]);
                if constexpr (kWhole)
                    sum[Strip][j][i] = int32_t(float_bits(v));
                else
                    acc[Strip][j][i] += v;
            }
        }
        if (S::kOwnSums && Strip == H - 1) {
            warp_barrier();
            if (lane == 0) arrive(S::sum_empty(sum_at.slot));
            sum_at.next();
        }
    }

    // All but the decoding of its first part, which was before, and that of the next stage's
    template <int Turn = 0>
    __device__ __forceinline__ void multiply_stage(int slot, int before, bool first) {
        multiply<Turn>(slot, !first);
        if (Turn == 0 && !first) S::release(before, lane);
        if constexpr (Turn + 1 < kTurns) decode_part<Turn + 1>(slot), multiply_stage<Turn + 1>(slot, before, first);
    }

    // Among the groups of consumers, by a named barrier for each: from one to the next, and from the last to the first
    static constexpr int kOrder = 2 + W;
    __device__ __forceinline__ void take_turn() const {
        if (S::kRow.ordered && p.ordered) named_barrier(kOrder + who, 256);
    }
    __device__ __forceinline__ void give_turn() const {
        if (S::kRow.ordered && p.ordered) named_arrive(kOrder + (who + 1) % W, 256);
    }

    // Stages that an item and its group have left; how many there are to the next cut. As Cuts, in fewer registers
    struct Left {
        int item, group;
        bool ended = false;  // a group, by the cut that was taken last

        __device__ __forceinline__ Left(HopperArgs const& p, Item const& of)
            : item(of.last - of.first), group(p.group_units - of.first % p.group_units) {}
        __device__ __forceinline__ int take(HopperArgs const& p) {
            int const least = item < group ? item : group, stages = least < S::kLongest ? least : S::kLongest;
            item -= stages, group -= stages;
            ended = group == 0;
            if (ended) group = p.group_units;
            return stages;
        }
    };

    // A part of a stage is decoded while the part before it is multiplied; nothing that depends on data stands between
    // a product's start and the wait for it, or the compiler serializes. kAhead: over the end of a cut too.
    __device__ __forceinline__ void accumulate(Item const& item) {
        if (kAhead) wait(S::full(at.slot), at.parity), decode_part<0>(at.slot);
        Left left(p, item);
        while (left.item) {
            int const stages = left.take(p);
            if (!kAhead) wait(S::full(at.slot), at.parity), decode_part<0>(at.slot);
            int slot = at.slot, before = slot;
            take_turn();
#pragma unroll 1
            for (int i = 0; i + 1 < stages; i++) {
                multiply_stage(slot, before, i == 0);
                at.next();
                before = slot, slot = at.slot;
                wait(S::full(slot), at.parity);
                decode_part<0>(slot);
            }
            multiply_stage(slot, before, stages == 1);
            give_turn();
            at.next();
            if constexpr (kAhead) {
                if (left.item) wait(S::full(at.slot), at.parity);
                decode_part<0>(left.item ? at.slot : slot);  // the last: for nothing, but without a branch
            }
            warpgroup_wait<0>();
            promote<0>(slot, 0, left.ended);
            S::release(slot, lane);
        }
    }

    // The same of two strips. One's sums are scaled while the last product of the other's cut runs, and the other's while
    // the first product of the next cut does.
    __device__ __forceinline__ void accumulate_pairs(Item const& item) {
        wait(S::full(at.slot), at.parity), decode_part<0>(at.slot);
        multiply<0>(at.slot, false);
        Left left(p, item);
        while (left.item) {
            int const stages = left.take(p);
            int slot = at.slot;
            decode_part<1>(slot), multiply_stage<1>(slot, slot, true);
#pragma unroll 1
            for (int i = 1; i < stages; i++) {
                at.next();
                slot = at.slot;
                wait(S::full(slot), at.parity);
                decode_part<0>(slot);
                multiply_stage(slot, slot ? slot - 1 : S::kStages - 1, false);
            }
            at.next();
            if (left.item) wait(S::full(at.slot), at.parity);
            int const next = left.item ? at.slot : slot;  // the last: for nothing, but without a branch
            decode_part<0>(next);
            promote<0>(slot, 0, left.ended);
            multiply<0>(next, false);
            promote<1>(slot, 0, left.ended);
            if (!left.item) warpgroup_wait<0>();
            S::release(slot, lane);
        }
    }

    // Groups end inside stages: a part is 32 k, and each may end a cut. While one group of warps scales its sums another
    // multiplies.
    __device__ __forceinline__ void accumulate_fine(Item const& item) {
        Span<S> span(p, item);
#pragma unroll 1
        for (int stage = item.first; stage < item.last; stage++, at.next()) {
            wait(S::full(at.slot), at.parity);
            decode_part<0>(at.slot);
            multiply_parts<0>(span);
            S::release(at.slot, lane);
        }
    }
    template <int Part>
    __device__ __forceinline__ void multiply_parts(Span<S>& span) {
        if (span.left == 0) return;  // of a last stage that K does not fill
        multiply<Part>(at.slot, span.since > 0);
        if constexpr (Part + 1 < kParts) decode_part<Part + 1>(at.slot);
        warpgroup_wait<0>();
        settle(sum);
        if (span.next()) promote<0>(at.slot, Part, span.ends_group()), span.begin(p);
        if constexpr (Part + 1 < kParts) multiply_parts<Part + 1>(span);
    }

    __device__ __forceinline__ float result(int strip, int j, int i) const {
        if constexpr (kWhole)
            return bits_float(uint32_t(sum[strip][j][i]));
        else
            return acc[strip][j][i];
    }

    // 32 m of a strip's result to shared memory. The index is known when compiling: sums stay in registers.
    template <int Strip, int Pass = 0>
    __device__ __forceinline__ void stage_result(float* tile, int pitch, int pass) const {
        if (pass == Pass) {
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    tile[(j * 8 + 2 * t + i % 2) * pitch + warp * 16 + i / 2 * 8 + g] = result(Strip, Pass * 4 + j, i);
        } else if constexpr ((Pass + 1) * 4 < C) {
            stage_result<Strip, Pass + 1>(tile, pitch, pass);
        }
    }

    static __device__ __forceinline__ void load_sixteen(float (&v)[16], float const* from) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float4 const four = reinterpret_cast<float4 const*>(from)[i];
            v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
        }
    }

    __device__ __forceinline__ float scale_of(int64_t m) const { return kInt8 && m < p.out.m ? p.scales[m] : 1.0f; }
    static __device__ __forceinline__ void scale_row(float (&v)[16], float scale) {
#pragma unroll
        for (float& f : v) f = kInt8 ? f * scale : f;
    }

    // Through shared memory, so that a thread has 16 n of a row and neighbours have neighbouring n
    template <int Strip = 0>
    __device__ __forceinline__ void store(Item const& item) const {
        float* const tile = S::staged(who);
        int const row = thread / 4, column = thread % 4 * 16;
#pragma unroll 1
        for (int pass = 0; pass < C / 4; pass++) {
            int64_t const m = int64_t(item.m0) + pass * kStagedRows + row;
            int n = item.n0 + first_of(Strip) + column;
            settle(n);  // or addresses that follow from it are held in registers, more than there are
            float const row_scale = scale_of(m);
            stage_result<Strip>(tile, kStagedPitch, pass);
            named_barrier(1 + who, 128);
            float v[16];
            load_sixteen(v, tile + row * kStagedPitch + column);
            named_barrier(1 + who, 128);
            scale_row(v, row_scale);
            if (m < p.out.m && n < p.out.n) finish<T>(p.out, v, m, n);
        }
        if constexpr (Strip + 1 < H) store<Strip + 1>(item);
    }

    // The parts of K: this block's sums take the place of its stages, and it finishes every so many rows.
    __device__ __forceinline__ void hand_over() const {
        named_barrier(1 + W, W * 128);
#pragma unroll
        for (int strip = 0; strip < H; strip++)
#pragma unroll
            for (int j = 0; j < C; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    S::tile()[(j * 8 + 2 * t + i % 2) * S::kPitch + first_of(strip) + warp * 16 + i / 2 * 8 + g] =
                        result(strip, j, i);
    }
    __device__ __forceinline__ void store_cluster(Item const& item) const {
        int const rank = int(blockIdx.x) % p.splits, all = int(threadIdx.x) - 128;
        int const left = p.out.m - item.m0 < S::kBlockM ? int(p.out.m - item.m0) : S::kBlockM;
        int const rows = left > rank ? (left - rank + p.splits - 1) / p.splits : 0;
#pragma unroll 1
        for (int i = all; i < rows * (S::kBlockN / 4); i += W * 128) {
            float* const own =
                S::tile() + (rank + i / (S::kBlockN / 4) * p.splits) * S::kPitch + i % (S::kBlockN / 4) * 4;
            float4 sum = {0, 0, 0, 0};
#pragma unroll 4
            for (int part = 0; part < p.splits; part++) {
                float4 const other = load_four_from(part, own);
                sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
            }
            *reinterpret_cast<float4*>(own) = sum;
        }
        named_barrier(1 + W, W * 128);
#pragma unroll 1
        for (int i = all; i < rows * S::kStrips; i += W * 128) {
            int const row = rank + i / S::kStrips * p.splits, column = i % S::kStrips * 16;
            float v[16];
            load_sixteen(v, S::tile() + row * S::kPitch + column);
            scale_row(v, scale_of(int64_t(item.m0) + row));
            if (item.n0 + column < p.out.n) finish<T>(p.out, v, item.m0 + row, item.n0 + column);
        }
    }

    __device__ __forceinline__ void run() {
        wait_for_inputs();
        if (who == W - 1) give_turn();
        for (int turn = 0; S::left(p, turn); turn++) {
#pragma unroll
            for (auto& strip : acc)
#pragma unroll
                for (auto& a : strip) a[0] = a[1] = a[2] = a[3] = 0.0f;
            if constexpr (H == 2)
                accumulate_pairs(S::item(p, turn));
            else if constexpr (Fine)
                accumulate_fine(S::item(p, turn));
            else
                accumulate(S::item(p, turn));
            settle(turn);  // what follows from it is found again, and not held in registers in between
            Item const item = S::item(p, turn);
            if (S::kCluster > 1 || turn < p.whole) {
                store(item);
            } else {
                hand_over();
                cluster_barrier();
                store_cluster(item);
                relaxed_cluster_barrier();  // a block that has ended has no memory
            }
        }
        if (who == 0) take_turn();  // the last one's
    }
};

template <class T, int Bits, bool Fine, int I>
__global__ void __launch_bounds__(kRows[I].threads(), 1) hopper(__grid_constant__ HopperArgs const p) {
#if DEVICE_SM
    if constexpr (kGenerated<T, Fine, I>) {
        using S = Shape<T, Bits, I, Fine>;
        release_next();
        if (threadIdx.x == 0) S::start_barriers();
        if constexpr (S::kCluster > 1)
            relaxed_cluster_barrier();
        else
            block_barrier();
        int const warp = uniform(int(threadIdx.x / 32));
        if (warp < 4) {
            keep_registers<S::kProducerRegisters>();
            if (warp == 0) Loader<S>{p}.send_weights();
            if (warp == 1) Loader<S>{p}.send_x();
            if constexpr (S::kOwnSums)
                if (warp >= 2) Ones<T, S>{p}.run();
            if (p.turns > p.whole && S::left(p, p.whole)) {
                warp_barrier();
                cluster_barrier();
                relaxed_cluster_barrier();
            }
        } else {
            take_registers<S::kConsumerRegisters>();
            Consumer<T, Bits, I, Fine>{p}.run();
        }
    }
#endif
}

template <class T, int Bits, bool Fine, int I>
struct HopperOf {
    static constexpr auto kernel = hopper<T, Bits, Fine, I>;
};

}  // namespace

char const* launch_hopper(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream) {
    Row const& row = kRows[plan.row];
    bool const int8 = p.activation_bits == 8, fine = hopper_fine(row, p);
    int const stages = ceil_div(p.k, stage_k(row));
    Int8Rows const rows = int8_rows(p, t.workspace);
    float* const sums = int8 ? rows.sums : static_cast<float*>(t.workspace);
    int const items = plan.grid_m * ceil_div(plan.grid_n, row.cluster);
    int const clusters = std::min(items, hopper_clusters(p, std::max(row.cluster, plan.splits)));
    int const blocks = clusters * plan.splits, whole = plan.splits > 1 ? items / blocks : ceil_div(items, clusters);
    HopperArgs args{{},
                    rows.scales,
                    sums,
                    padded_rows(p.m),
                    static_cast<unsigned char const*>(t.codes),
                    static_cast<uint32_t const*>(t.affine),
                    output(p, t),
                    stages,
                    plan.splits,
                    p.k / p.group,
                    fine ? p.k / 32 : stages,
                    fine ? p.group / 32 : ceil_div(p.group, stage_k(row)),
                    ceil_div(p.k, 256 / p.bits),
                    plan.grid_m,
                    plan.grid_n,
                    items,
                    clusters,
                    whole + (plan.splits > 1),
                    whole,
                    hopper_takes_turns(row, p)};
    char const* failed = describe_rows(args.x, multiplied(p, t), p.m, int64_t(p.k) * row.activation_bits / 8,
                                       row.block_m() / row.cluster);
    if (!failed && !row.own_sums) failed = int8 ? launch_quantize(p, t, stream) : launch_sums(p, t, sums, stream);
    if (failed) return failed;
    dim3 const cluster(std::max(row.cluster, plan.splits));
    Grid const grid{dim3(clusters * cluster.x), plan.threads, size_t(plan.shared), cluster, /*overlap=*/true};
    return launch(instance<Kernel::kHopper, HopperOf>(p, plan, fine), grid, static_cast<Stream>(stream), args);
}

}  // namespace wog
