// Choosing a configuration: functions of the problem, and of what was measured; no CUDA. Tested without a GPU.
#include "config.h"

#include <cstdio>
#include <iterator>

#include "choices.h"

namespace wog {
namespace {

struct Rule {
    bool holds;
    char const *what, *expected;
    int64_t found;
};

int refuse(char* error, size_t size, char const* what, char const* expected, int64_t found) {
    std::snprintf(error, size, "WeightOnlyGemm: %s is %lld, expected %s", what, static_cast<long long>(found),
                  expected);
    return 1;
}

// Volta has a library of its own: today's compilers do not generate its code.
#ifdef WOG_VOLTA
constexpr int kKnown[] = {70};
constexpr char kExpectedSm[] = "70 (newer: libinstantrt_plugins.so)";
#else
constexpr int kKnown[] = {75, 80, 86, 89, 90, 100, 103, 120, 121};
constexpr char kExpectedSm[] = "75, 80, 86, 89, 90, 100, 103, 120 or 121 (70: libinstantrt_plugins_sm70.so)";
#endif

bool known_sm(int sm) { return std::find(std::begin(kKnown), std::end(kKnown), sm) != std::end(kKnown); }

// What a multiprocessor of a family of GPUs does, by the clock: a product of 16 x 8 x 16 in one of its quarters, in
// tenths of a cycle, and what it reads from memory, in tenths of a byte a cycle. Of A100, RTX 3090, RTX 4090, H200
// (measured), B200 and RTX 5090.
struct Pace {
    int min_sm, product, bytes;
};
constexpr Pace kPaces[] = {{80, 80, 127}, {86, 320, 67}, {89, 320, 31}, {90, 65, 200}, {100, 80, 290}, {120, 320, 44}};

Pace const& pace_of(int sm) {
    Pace const* last = kPaces;
    for (Pace const& pace : kPaces)
        if (pace.min_sm <= sm) last = &pace;
    return *last;
}

// A cluster must find room: of a device's multiprocessors a process may have few, by MPS. Where sums of parts of K go
// through memory only idle multiprocessors are worth that.
bool may_divide(wog_problem const& p, int64_t tiles, int splits) {
    if (splits == 1) return true;
    if (in_cluster(p)) return splits <= usable(p, splits);
    return tiles * splits <= std::min(p.sm_count, kMostMultiprocessors);
}

// Cycles, of rows for all since Ampere: what their weights take to come, or what the blocks take to issue their
// instructions, wave by wave; a second kernel that adds up parts of K, which are written and read
int64_t read_duration(wog_problem const& p, int64_t issue, int splits) {
    int64_t const bytes = int64_t(p.n) * p.k * p.bits / 8 + int64_t(p.n) * (p.k / p.group) * 4,
                  parts = splits * p.m * p.n * 8;
    int const rate = pace_of(p.sm).bytes * p.sm_count;
    return std::max(issue, bytes * 10 / rate) + (splits > 1 ? 4000 + parts * 10 / rate : 0);
}

// kStream's picoseconds, but for what all rows have in common: fitted to an H200's times of 40 layers and rows of x.
// Of the other rows cycles.
int64_t stream_duration(wog_problem const& p, Row const& row, int splits) {
    if (!for_hopper(row)) {
        int const tiles = ceil_div(p.n, row.block_n()) * splits;  // neighbours in n are on different multiprocessors
        int64_t const steps = int64_t(stream_x_steps(row, p, splits)) * row.warps_k * row.strips;
        return read_duration(p, ceil_div(tiles, p.sm_count) * (steps * row.pace[p.bits == 8] + 1000), splits);
    }
    int const tiles = ceil_div(p.n, row.block_n()), places = std::max(1, usable(p, splits) * row.resident / splits);
    int64_t const steps = int64_t(stream_x_steps(row, p, splits)) * row.warps_k * row.strips * row.resident;
    int64_t const joining = splits == 1 ? 0 : splits == 2 ? 800'000 : splits == 4 ? 1'100'000 : 1'550'000;
    int64_t const x = p.m * ceil_div(p.k, 64) / splits * row.resident * x_row(row);
    return ceil_div(tiles, places) * (steps * row.pace[p.bits == 8] + 470'000 + p.m * 15'000 + joining) + x * 8;
}

// The fastest division of K that leaves x room beside the rings. 0: there is none.
int stream_splits(wog_problem const& p, Row const& row) {
    int best = 0;
    for (int splits = 1; splits <= 8; splits++) {
        if (p.splits ? splits != p.splits : splits & (splits - 1)) continue;  // others leave multiprocessors idle
        if (!stream_resident(row, p, splits)) continue;
        if (!p.splits && !may_divide(p, ceil_div(p.n, row.block_n()) * ceil_div(p.m, row.block_m()), splits)) continue;
        if (!best || stream_duration(p, row, splits) < stream_duration(p, row, best)) best = splits;
    }
    return best;
}

// kTile: warps of a block in n, parts of K, and how long that takes
struct Tiling {
    int warps_n, splits;
    int64_t cycles;
};

constexpr int kLatency = 2000;  // cycles of the fastest clock, of memory under load: assumed, 0.8 us

// The least time, in cycles: waves of blocks, each of them its steps at the pace of the tensor cores or of what comes in,
// then its sums.
Tiling choose_tiling(wog_problem p, Row const& row) {
    if (p.batch_invariant) p.m = row.block_m();  // for many rows of x as for few
    int64_t const rows = ceil_div(p.m, row.block_m()), at_once = std::min<int64_t>(p.m, row.block_m());
    int const steps = ceil_div(p.k, 64 * row.warps_k), sides = row.warps_k * row.warps_m;
    bool const hopper = for_hopper(row);
    Pace const& pace = pace_of(p.sm);
    Tiling best{};
    auto const more = [&p](int splits) { return in_cluster(p) ? splits * 2 : splits + 1; };
    for (int splits = 1; splits <= 8; splits = more(splits))
        for (int warps_n = hopper ? 4 : 2; warps_n <= row.warps_n; warps_n += hopper ? 2 : 1) {  // whole warpgroups
            if (p.splits ? p.splits < splits || more(splits) <= p.splits : splits > 1 && steps < splits * 2) continue;
            if (tile_shared(row, p, splits, warps_n) > shared_limit(p.sm, row.resident)) continue;
            int64_t const tiles = ceil_div(p.n, warps_n * row.strips * 16) * rows;
            if (!p.splits && !may_divide(p, tiles, splits)) continue;
            int const places = std::max(1, (in_cluster(p) ? usable(p, splits) : p.sm_count) / splits);
            int const products = ceil_div(warps_n * sides, 4) * row.strips * row.columns * x_row(row) / 32;
            int const bytes = tile_stage(row, p.bits, tile_units(p), warps_n);
            int const arrive = hopper ? bytes * 10 / pace.bytes : kLatency / (row.stages[p.bits == 8] - 1);
            int64_t const step = std::max(products * pace.product / 10 + 100, arrive);
            int64_t const end = splits > 1 && hopper ? 2500 + at_once * warps_n * row.strips * 4 : 1000;
            int64_t const blocks = ceil_div(tiles, places) * (ceil_div(steps, splits) * step + end);
            int64_t const time = hopper ? blocks : read_duration(p, blocks, splits);
            if (!best.warps_n || time < best.cycles) best = {warps_n, splits, time};
        }
    return best;
}

// Of kHopper's tiles that are left over: what leaves the fewest stages to the busiest block, a sum over a cluster being
// worth six.
struct HopperPlan {
    int splits;
    int64_t stages;
};
HopperPlan hopper_plan(wog_problem const& p, int tiles, int stages) {
    HopperPlan best{1, ceil_div(tiles, hopper_clusters(p, 1)) * int64_t(stages)};
    for (int splits : {2, 4, 8}) {
        if (p.splits ? splits > p.splits : stages / splits < 4 || !may_divide(p, tiles, splits)) continue;
        if (splits > stages || !hopper_divides(p, tiles, splits)) continue;
        int const blocks = hopper_clusters(p, splits) * splits,
                  rest = tiles % blocks ? ceil_div(stages, splits) + 6 : 0;
        int64_t const all = int64_t(tiles / blocks) * stages + rest;
        if (p.splits || all < best.stages) best = {splits, all};
    }
    return best;
}

bool fits(Row const& row, wog_problem const& p) {
    if ((row.kernel == Kernel::kPlain) != bool(p.plain)) return false;
    // Where a row of x lies in a tile, and what lies beside it, changes nothing in its sums: one row serves any m
    if (p.batch_invariant && !row.any_batch) return false;
    if (row.kernel == Kernel::kDense && !(p.rounded_weights && p.library && p.sm != 90)) return false;
    bool const fine = row.kernel == Kernel::kHopper ? hopper_fine(row, p) : p.group % 64 != 0;
    if (fine && !row.fine) return false;
    if (row.candidate && !p.row) return false;
    bool const bits = row.activation_bits == 0 || row.activation_bits == p.activation_bits;
    if (row.whole_k && p.group != p.k) return false;
    // what was measured on Hopper is chosen there
    bool const ring = row.kernel == Kernel::kStream || row.kernel == Kernel::kTile;
    if (ring && p.sm == 90 && !p.row && !for_hopper(row)) return false;
    bool const rows = p.batch_invariant || ((p.row || row.min_m < p.m) && p.m <= row.max_m);
    if (!bits || !rows || p.sm < row.sms.first || p.sm > row.sms.last) return false;
    // Last, as they take the longest: every launch asks
    if (row.kernel == Kernel::kStream) return stream_splits(p, row) > 0;
    return row.kernel != Kernel::kTile || choose_tiling(p, row).warps_n > 0;
}

// K is divided among blocks only while that lets idle multiprocessors work, and never below four steps for each warp.
int choose_splits(wog_problem const& p, Row const& row, int blocks) {
    if (!splits_k(row)) return 1;
    int const steps = ceil_div(p.k, stage_k(row));
    if (row.kernel == Kernel::kStream) return stream_splits(p, row);
    if (row.kernel == Kernel::kHopper) return hopper_plan(p, blocks, steps).splits;
    if (p.splits) return std::min(p.splits, steps);
    int const places = std::min(p.sm_count, kMostMultiprocessors), by_depth = steps / (4 * row.warps_k);
    return std::max(1, std::min({places / std::max(blocks, 1), by_depth, 8}));
}

// How long a row takes, beside others of its kernel
int64_t duration(Row const& row, wog_problem const& p) {
    if (row.kernel == Kernel::kStream) return stream_duration(p, row, stream_splits(p, row));
    if (row.kernel == Kernel::kTile) return choose_tiling(p, row).cycles;
    int const tiles = ceil_div(p.n, row.block_n() * row.cluster) * ceil_div(p.m, row.block_m());
    int const stages = ceil_div(p.k, stage_k(row));
    // scaling sums after each 32 k: counted in instructions, not measured
    int const pace = row.pace[p.bits == 8] + (hopper_fine(row, p) ? hopper_units(row, true) * row.columns * 20 : 0);
    if (row.cluster == 1) return hopper_plan(p, tiles, stages).stages * pace;
    return ceil_div(tiles, hopper_clusters(p, row.cluster)) * int64_t(stages) * pace;
}

// The table ends with rows for any m on any known sm, so that null is an answer to a pinned row alone.
Row const* find_row(wog_problem const& p) {
    if (p.row) return p.row <= kRowCount && fits(kRows[p.row - 1], p) ? &kRows[p.row - 1] : nullptr;
    Row const* best = std::find_if(kRows, kRows + kRowCount, [&p](Row const& row) { return fits(row, p); });
    bool const timed = best->kernel != Kernel::kTuring && best->kernel != Kernel::kPlain;
    int64_t least = timed ? duration(*best, p) : 0;
    for (Row const* row = best + 1; timed && row->kernel == best->kernel; row++) {
        if (!fits(*row, p)) continue;
        int64_t const time = duration(*row, p);
        if (time < least) best = row, least = time;
    }
    return best;
}

constexpr int kMostInY = 65535;  // blocks of a grid

// By the model of the time, or what `p` pins
int choose(wog_problem const& p, wog_plan& plan, char* error, size_t size) {
    if (wog_check(&p, error, size)) return 1;
    Row const* const found = find_row(p);
    if (!found)
        return refuse(error, size, "row (pinned)", "one that serves these sizes, this sm and these bits", p.row);
    Row const& row = *found;
    bool const tile = row.kernel == Kernel::kTile;
    Tiling const tiling = tile ? choose_tiling(p, row) : Tiling{};
    int const warps_n = tile ? tiling.warps_n : row.warps_n;
    bool const dense = row.kernel == Kernel::kDense;  // a warp for each 512-byte block of codes
    int const grid_m = dense ? 1 : ceil_div(p.m, row.block_m());
    int const tiles = dense ? ceil_div(int64_t(p.n / 16) * ceil_div(p.k, 256 / p.bits), row.warps_n)
                            : ceil_div(p.n, row.block_n() / row.warps_n * warps_n);
    int const splits = tile ? tiling.splits : choose_splits(p, row, p.batch_invariant ? tiles : grid_m * tiles);
    // As many blocks as fit the device, each of which walks over its tiles; of a cluster those of kStream alone, the
    // others have one each
    bool const clusters = splits > 1 && in_cluster(p), stream = row.kernel == Kernel::kStream;
    bool const walks = stream || ((row.kernel == Kernel::kTuring || tile) && !clusters);
    int const resident = stream ? stream_resident(row, p, splits) : row.resident;
    // Not where that would leave more multiprocessors idle at the end than tiles of n one by one
    int64_t const places = std::max(1, usable(p, clusters ? splits : 1) * resident), abreast = int64_t(grid_m) * splits;
    int const fit = int(std::max<int64_t>(1, places / abreast));
    bool const even = int64_t(ceil_div(tiles, fit)) * ceil_div(abreast, places) <= ceil_div(tiles * abreast, places);
    int64_t const partials = sums_meet_in_memory(p, splits) ? splits * rows_of_a_turn(p, splits) * p.n * 4 : 0;
    plan = {row.name,
            int32_t(&row - kRows),
            splits,
            grid_m,
            walks ? std::min(tiles, even ? fit : kMostInY) : tiles,
            row.threads() - (row.warps_n - warps_n) * row.warps_k * row.warps_m * 32,
            tile ? tile_shared(row, p, splits, warps_n) : shared_bytes(row, p, splits),
            dense ? dense_buffers(p.m, p.n, p.k).total : before_partials(row, p) + partials,
            row.block_m(),
            row.block_n() / row.warps_n * warps_n,
            resident,
            bytes_in_flight(row, p, splits, warps_n)};
    return 0;
}

// By what was measured as the fastest, if the library's file says so. Not where that does not serve the problem, or would
// take more of the workspace than an engine has; nor where cuBLASLt may be asked, which was not measured beside it.
bool choose_measured(wog_problem const& p, wog_plan& plan) {
    auto const dense = [&](Row const& row) { return row.kernel == Kernel::kDense && fits(row, p); };
    if (p.row || p.splits || p.plain || p.batch_invariant || std::any_of(kRows, kRows + kRowCount, dense)) return false;
    Choice const measured = measured_choice(p);
    if (measured.row < 0 || kRows[measured.row].kernel == Kernel::kDense) return false;
    wog_problem pinned = p;
    pinned.row = measured.row + 1, pinned.splits = measured.splits;
    char error[256];
    if (choose(pinned, plan, error, sizeof error)) return false;
    int64_t const tiles = int64_t(ceil_div(p.m, plan.tile_m)) * ceil_div(p.n, plan.tile_n);
    return may_divide(p, tiles, plan.splits);
}

// Sums of as many parts of K as any device may divide it into
int64_t partials_of_any_device(Row const& row, wog_problem const& p) {
    int const parts = p.splits ? 8 : std::min(8, kMostMultiprocessors / ceil_div(p.n, row.block_n()));
    return splits_k(row) && sums_meet_in_memory(p, parts) ? parts * rows_of_a_turn(p, parts) * p.n * 4 : 0;
}

int launch_in_turns(wog_problem p, wog_tensors t, int64_t rows, void* stream, char* error, size_t size) {
    int64_t const all = p.m, x_bytes = int64_t(p.k) * 2, y_bytes = int64_t(p.n) / (1 + p.gated) * (p.wide ? 4 : 2);
    for (int64_t done = 0; done < all; done += p.m) {
        p.m = std::min(rows, all - done);
        if (wog_launch(&p, &t, stream, error, size)) return 1;
        t.x = static_cast<char const*>(t.x) + p.m * x_bytes, t.y = static_cast<char*>(t.y) + p.m * y_bytes;
    }
    return 0;
}

}  // namespace
}  // namespace wog

using namespace wog;

int wog_check(wog_problem const* problem, char* error, size_t size) {
    wog_problem const& p = *problem;
    Rule const rules[] = {
        {p.m > 0 && p.m < (int64_t(1) << 31), "M (rows of x)", "1 .. 2^31 - 1", p.m},
        {p.k > 0 && p.k % 32 == 0, "K (columns of x)", "a positive multiple of 32", p.k},
        {p.n > 0 && p.n % 16 == 0, "N (rows of codes)", "a positive multiple of 16", p.n},
        {int64_t(p.n) * p.k < int64_t(1) << 35, "N * K", "below 2^35", int64_t(p.n) * p.k},
        {p.group > 0 && p.group % 32 == 0 && p.k % p.group == 0, "group", "a multiple of 32 that divides K", p.group},
        {p.bits == 4 || p.bits == 8, "bits", "4 or 8", p.bits},
        {p.type == WOG_F16 || p.type == WOG_BF16, "type of x", "0 (fp16) or 1 (bf16)", p.type},
        {p.activation >= WOG_NONE && p.activation <= WOG_GELU_TANH, "activation", "0 .. 3", p.activation},
        {p.gated == 0 || p.gated == 1, "gated", "0 or 1", p.gated},
        {p.activation_bits == 16 || p.activation_bits == 8, "activation_bits", "16 or 8", p.activation_bits},
        {p.rounded_weights == 0 || p.rounded_weights == 1, "rounded_weights", "0 or 1", p.rounded_weights},
        {p.batch_invariant == 0 || p.batch_invariant == 1, "batch_invariant", "0 or 1", p.batch_invariant},
        {p.activation_bits == 16 || p.k <= 65536, "K with activation_bits 8", "at most 65536 (int32 sums)", p.k},
        {known_sm(p.sm), "sm of the device", kExpectedSm, p.sm},
        {p.type == WOG_F16 || p.sm >= 80, "sm of the device with bf16", "80 or more (use fp16)", p.sm},
        {p.activation_bits == 16 || p.sm >= 75, "sm of the device with activation_bits 8", "75 or more", p.sm},
        {p.sm_count > 0, "multiprocessor count", "a positive number", p.sm_count},
        {p.row >= 0, "row (pinned)", "0, or an index + 1", p.row},
        {p.splits >= 0 && p.splits <= 8, "splits (pinned)", "0 .. 8", p.splits},
    };
    for (Rule const& rule : rules)
        if (!rule.holds) return refuse(error, size, rule.what, rule.expected, rule.found);
    return 0;
}

int wog_choose(wog_problem const* problem, wog_plan* plan, char* error, size_t size) {
    return choose_measured(*problem, *plan) ? 0 : choose(*problem, *plan, error, size);
}

int64_t wog_workspace(wog_problem const* problem) {
    // Splitting stops at one tile per multiprocessor, which bounds the partial sums of every m that uses the same row.
    wog_problem p = *problem;
    char error[256];
    wog_plan plan{};
    int64_t most = 0;
    p.sm_count = kMostMultiprocessors, p.library = 1;
    for (Row const& row : kRows) {
        p.m = std::min(problem->m, row.max_m);
        p.sm = row.sms.first;  // every kind of device has a row that starts with it
        if (row.kernel == Kernel::kPlain || choose(p, plan, error, sizeof error)) continue;
        most = std::max(most, plan.workspace);
        if (p.batch_invariant) {  // one row serves every m, but each device may divide K in its own way
            Row const& only = kRows[plan.row];
            most = std::max(most, before_partials(only, p) + partials_of_any_device(only, p));
            continue;
        }
        for (Row const& other : {kRows[plan.row], row}) {  // that another m may use
            int64_t const tile = int64_t(other.block_m()) * other.block_n() * 4;
            int64_t const parts = other.kernel == Kernel::kHopper ? 0 : std::min(p.sm_count * tile, 8 * p.m * p.n * 4);
            if (splits_k(other)) most = std::max(most, before_partials(other, p) + parts);
        }
    }
    return most;
}

int32_t wog_rows(void) { return kRowCount; }
char const* wog_row_name(int32_t row) { return row >= 0 && row < kRowCount ? kRows[row].name : nullptr; }

int32_t wog_oldest_sm(void) { return kKnown[0]; }

int wog_device(int32_t* sm, int32_t* sm_count, char* error, size_t size) {
    char const* const failed = query_device(*sm, *sm_count);
    if (failed) std::snprintf(error, size, "WeightOnlyGemm: cannot query the device: %s", failed);
    return failed != nullptr;
}

int32_t wog_library() { return find_library(); }

int wog_launch(wog_problem const* problem, wog_tensors const* tensors, void* stream, char* error, size_t size) {
    wog_problem const& p = *problem;
    wog_plan plan{};
    if (wog_choose(problem, &plan, error, size)) return 1;
    wog_tensors const& t = *tensors;
    struct {
        char const* name;
        void const* pointer;
        bool needed;
    } const pointers[] = {
        {"address of x", t.x, true},           {"address of codes", t.codes, true},
        {"address of affine", t.affine, true}, {"address of bias", t.bias, false},
        {"address of y", t.y, true},           {"address of workspace", t.workspace, plan.workspace > 0}};
    for (auto const& each : pointers)
        if ((each.needed && !each.pointer) || reinterpret_cast<uintptr_t>(each.pointer) % 16)
            return refuse(error, size, each.name, "a multiple of 16, not null",
                          int64_t(reinterpret_cast<uintptr_t>(each.pointer)));
#ifdef WOG_VOLTA
    auto* const run = kRows[plan.row].kernel == Kernel::kVolta ? launch_volta : launch_plain;
#else
    decltype(&launch_turing) const launchers[] = {launch_plain,  launch_turing, launch_dense,
                                                  launch_stream, launch_tile,   launch_hopper};  // by Kernel
    auto* const run = launchers[int(kRows[plan.row].kernel)];
#endif
    int64_t const at_once = rows_of_a_turn(p, plan.splits);
    if (at_once < p.m) return launch_in_turns(p, t, at_once, stream, error, size);
    if (char const* failed = run(p, t, plan, stream)) {
        std::snprintf(error, size, "WeightOnlyGemm: launch of %s failed: %s", plan.kernel, failed);
        return 1;
    }
    return 0;
}
