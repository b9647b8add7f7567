// The table of kernel configurations, and the internal launchers that it chooses between.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernel.h"
#include "row.h"
#ifdef WOG_VOLTA
#include "volta_rows.h"
#endif

namespace wog {

// Where a library's product after dequantizing should pass the fused tiles: Marlin, which has tiles like ours, runs at
// 0.73 of cuBLAS on A100, and dequantizing (2.5 bytes a weight) costs as much at about this M. To be measured.
constexpr int64_t kManyRows = 512;
constexpr int kMostMultiprocessors = 256;  // bounds workspaces; larger devices just split less

#ifndef WOG_VOLTA
// The first row that fits is taken; rows of one kernel stand together. Registers bound the steps on their way, shared
// memory (64 KiB on sm_75, 99 KiB on sm_86, 89 and 120) the rows of a tile.
// Of the rows of kStream, kTile and kHopper the one that should end first is taken. The pace of Hopper's was measured
// on an H200, but for int8 rings, which have that of the rows of their shape with 16-bit x: they execute less, and
// memory bounds both. ring16_deep has that of ring16, whose loop it runs with a stage more on its way.
// hopper128x128_sums has that of hopper128x128: a stage of it has as many products with ones as one of hopper128x64 had
// when that was measured. The pace of the rows for all since Ampere is half of what their loops execute, copies of x
// with it (docs/facts.md, "What an H200 does", has how it is counted), as the H200 issues two instructions a cycle.
// Expected of turns: of two stages at g128, 128x128 of 16 bits, tensor cores need 1,024 cycles and 1,840 were measured;
// scaling the sums, which takes a group of consumers about 500, would be beside the other's products. So it would with
// more groups of consumers, or two strips of each: two stages of 256x64, as much work, need 1,024 cycles, too.
// clang-format off
constexpr Row kRows[] = {
    {.name = "dense", .kernel = Kernel::kDense, .sms = kFrom75, .min_m = kManyRows,
     .warps_n = 8},
    {.name = "ring8", .kernel = Kernel::kStream, .sms = kSm90, .max_m = 8,
     .warps_k = 16, .strips = 4, .stages = {3, 2}, .pace = {9100, 8500}},
    {.name = "ring8_narrow", .kernel = Kernel::kStream, .sms = kSm90, .max_m = 8,
     .warps_k = 8, .strips = 2, .stages = {6, 4}, .resident = 2, .pace = {10400, 7100}},
    {.name = "ring8_deep", .kernel = Kernel::kStream, .sms = kSm90, .max_m = 8,
     .warps_k = 16, .strips = 2, .stages = {7, 4}, .pace = {13200, 9500}},
    {.name = "ring16_deep", .kernel = Kernel::kStream, .sms = kSm90, .max_m = 16,
     .warps_k = 8, .strips = 4, .columns = 2, .stages = {4, 3}, .pace = {13800, 12800}},
    {.name = "ring16", .kernel = Kernel::kStream, .sms = kSm90, .max_m = 16,
     .warps_k = 8, .strips = 4, .columns = 2, .stages = {3, 2}, .pace = {13800, 12800}},
    {.name = "ring8_ampere", .kernel = Kernel::kStream, .sms = kFrom80, .max_m = 8,
     .warps_k = 8, .strips = 2, .stages = {3, 3}, .resident = 2, .pace = {47, 42}},
    {.name = "ring8_ampere_wide", .kernel = Kernel::kStream, .sms = kFrom80, .max_m = 8,
     .warps_k = 8, .strips = 4, .stages = {3, 2}, .resident = 2, .pace = {36, 31}},
    {.name = "ring16_ampere", .kernel = Kernel::kStream, .sms = kFrom80, .max_m = 16,
     .warps_k = 8, .strips = 2, .columns = 2, .stages = {3, 2}, .resident = 2, .pace = {60, 51}},
    {.name = "ring16_ampere_wide", .kernel = Kernel::kStream, .sms = kFrom80, .max_m = 16,
     .warps_k = 8, .strips = 4, .columns = 2, .stages = {3, 2}, .pace = {43, 36}},
    {.name = "int8_ring8", .kernel = Kernel::kStream, .sms = kSm90, .max_m = 8, .activation_bits = 8,
     .warps_k = 8, .strips = 2, .stages = {6, 4}, .resident = 2, .pace = {10400, 7100}},
    {.name = "int8_ring16", .kernel = Kernel::kStream, .sms = kSm90, .max_m = 16, .activation_bits = 8,
     .warps_k = 8, .strips = 4, .columns = 2, .stages = {5, 3}, .pace = {13800, 12800}},
    {.name = "int8_ring8_ampere", .kernel = Kernel::kStream, .sms = kFrom80, .max_m = 8, .activation_bits = 8,
     .warps_k = 8, .strips = 2, .stages = {3, 3}, .resident = 2, .pace = {31, 19}},
    {.name = "int8_ring16_ampere", .kernel = Kernel::kStream, .sms = kFrom80, .max_m = 16, .activation_bits = 8,
     .warps_k = 8, .strips = 2, .columns = 2, .stages = {3, 2}, .resident = 2, .pace = {42, 24}},
    {.name = "ring32", .kernel = Kernel::kTile, .sms = kSm90, .max_m = 32,
     .warps_n = 6, .warps_k = 2, .strips = 3, .columns = 4, .stages = {7, 4}},
    {.name = "ring32_narrow", .kernel = Kernel::kTile, .sms = kSm90, .max_m = 32,
     .warps_n = 8, .warps_k = 2, .strips = 2, .columns = 4, .stages = {7, 4}, .fine = false},
    {.name = "ring64", .kernel = Kernel::kTile, .sms = kSm90, .max_m = 64,
     .warps_n = 6, .warps_m = 2, .strips = 3, .columns = 4, .stages = {10, 7}, .any_batch = true},
    {.name = "ring64_narrow", .kernel = Kernel::kTile, .sms = kSm90, .max_m = 64,
     .warps_n = 8, .warps_m = 2, .strips = 2, .columns = 4, .stages = {11, 8}, .fine = false},
    {.name = "ring32_ampere", .kernel = Kernel::kTile, .sms = kFrom80, .max_m = 32,
     .warps_n = 4, .warps_k = 2, .strips = 3, .columns = 4, .stages = {3, 2}},
    {.name = "ring64_ampere", .kernel = Kernel::kTile, .sms = kFrom80,
     .warps_n = 4, .warps_m = 2, .strips = 3, .columns = 4, .stages = {5, 3}, .any_batch = true},
    {.name = "ring64_ampere_narrow", .kernel = Kernel::kTile, .sms = kFrom80,
     .warps_n = 4, .warps_m = 2, .strips = 2, .columns = 4, .stages = {6, 4}, .fine = false},
    {.name = "int8_ring32", .kernel = Kernel::kTile, .sms = kSm90, .max_m = 32, .activation_bits = 8,
     .warps_n = 6, .warps_k = 2, .strips = 3, .columns = 4, .stages = {7, 4}, .any_batch = true},
    {.name = "int8_ring32_ampere", .kernel = Kernel::kTile, .sms = kFrom80, .max_m = 32, .activation_bits = 8,
     .warps_n = 4, .warps_k = 2, .strips = 3, .columns = 4, .stages = {4, 2}},
    {.name = "int8_ring64_ampere", .kernel = Kernel::kTile, .sms = kFrom80, .activation_bits = 8,
     .warps_n = 4, .warps_m = 2, .strips = 3, .columns = 4, .stages = {6, 4}, .any_batch = true},
    {.name = "int8_ring64_ampere_narrow", .kernel = Kernel::kTile, .sms = kFrom80, .activation_bits = 8,
     .warps_n = 4, .warps_m = 2, .strips = 2, .columns = 4, .stages = {8, 5}, .fine = false},
    {.name = "hopper128x64", .kernel = Kernel::kHopper, .sms = kSm90,
     .warps_n = 8, .columns = 8, .own_sums = true, .pace = {910, 800}},
    {.name = "hopper128x128", .kernel = Kernel::kHopper, .sms = kSm90, .min_m = 128,
     .warps_n = 8, .columns = 16, .pace = {920, 790}},
    {.name = "hopper128x128_sums", .kernel = Kernel::kHopper, .sms = kSm90,
     .warps_n = 8, .columns = 16, .own_sums = true, .pace = {920, 790}},
    {.name = "int8_hopper128x64", .kernel = Kernel::kHopper, .sms = kSm90, .min_m = 32, .activation_bits = 8,
     .warps_n = 8, .columns = 8, .pace = {690, 690}},
    {.name = "int8_hopper192x64", .kernel = Kernel::kHopper, .sms = kSm90, .min_m = 32, .activation_bits = 8,
     .warps_n = 12, .columns = 8, .fine = false, .pace = {950, 950}},
    {.name = "int8_hopper128x128", .kernel = Kernel::kHopper, .sms = kSm90, .min_m = 32, .activation_bits = 8,
     .warps_n = 8, .columns = 16, .pace = {990, 990}},
    {.name = "int8_hopper192x128", .kernel = Kernel::kHopper, .sms = kSm90, .min_m = 32, .activation_bits = 8,
     .warps_n = 12, .columns = 16, .whole_k = true, .fine = false, .pace = {1320, 1320}},
    {.name = "int8_hopper128x256", .kernel = Kernel::kHopper, .sms = kSm90, .min_m = 32, .activation_bits = 8,
     .warps_n = 8, .columns = 32, .cluster = 2, .whole_k = true, .fine = false, .pace = {1700, 1700}},
    {.name = "hopper192x64", .kernel = Kernel::kHopper, .sms = kSm90,
     .warps_n = 12, .columns = 8, .fine = false, .own_sums = true, .candidate = true},
    {.name = "hopper256x64", .kernel = Kernel::kHopper, .sms = kSm90,
     .warps_n = 16, .columns = 8, .fine = false, .own_sums = true, .candidate = true},
    {.name = "hopper256x64_pairs", .kernel = Kernel::kHopper, .sms = kSm90,
     .warps_n = 8, .strips = 2, .columns = 8, .fine = false, .own_sums = true, .candidate = true},
    {.name = "hopper128x64_ordered", .kernel = Kernel::kHopper, .sms = kSm90,
     .warps_n = 8, .columns = 8, .fine = false, .ordered = true, .own_sums = true, .candidate = true},
    {.name = "hopper128x128_ordered", .kernel = Kernel::kHopper, .sms = kSm90,
     .warps_n = 8, .columns = 16, .fine = false, .ordered = true, .candidate = true},
    {.name = "int8_hopper128x128_ordered", .kernel = Kernel::kHopper, .sms = kSm90, .activation_bits = 8,
     .warps_n = 8, .columns = 16, .fine = false, .ordered = true, .candidate = true},
    {.name = "stream8_turing", .kernel = Kernel::kTuring, .sms = kSm75, .max_m = 8,
     .warps_k = 8, .strips = 2, .stages = {4, 2}},
    {.name = "stream16_turing", .kernel = Kernel::kTuring, .sms = kSm75, .max_m = 16,
     .warps_k = 4, .strips = 2, .columns = 2, .stages = {4, 2}},
    {.name = "tile32_turing", .kernel = Kernel::kTuring, .sms = kSm75,
     .warps_n = 4, .strips = 2, .columns = 4, .stages = {2, 2}, .resident = 2, .any_batch = true},
    {.name = "int8_stream8_turing", .kernel = Kernel::kTuring, .sms = kSm75, .max_m = 8, .activation_bits = 8,
     .warps_k = 8, .strips = 2, .stages = {2, 1}},
    {.name = "int8_tile32_turing", .kernel = Kernel::kTuring, .sms = kSm75, .activation_bits = 8,
     .warps_n = 4, .strips = 2, .columns = 4, .stages = {2, 1}, .resident = 2, .any_batch = true},
    {.name = "plain", .kernel = Kernel::kPlain, .sms = kFrom75, .activation_bits = 0,
     .strips = 2, .resident = 4, .any_batch = true},
};
// clang-format on
#endif

constexpr int kRowCount = sizeof kRows / sizeof kRows[0];

constexpr int first_row(Kernel kernel) {
    int i = 0;
    while (kRows[i].kernel != kernel) i++;
    return i;
}
constexpr int count_rows(Kernel kernel) {
    int count = 0;
    for (Row const& row : kRows) count += row.kernel == kernel;
    return count;
}

// Of two rows that are compared by it, one without a pace would always end first.
constexpr bool paces_are_there() {
    for (Row const& row : kRows) {
        bool const compared = row.kernel == Kernel::kStream || row.kernel == Kernel::kHopper;
        if (compared && !row.candidate && !(row.pace[0] > 0 && row.pace[1] > 0)) return false;
    }
    return true;
}
static_assert(paces_are_there(), "a row of kStream or kHopper has a pace, or is a candidate");

// Not where int8 sums of whole groups are read as they are
constexpr bool splits_k(Row const& row) {
    if (row.kernel == Kernel::kHopper) return row.cluster == 1;
    if (row.kernel == Kernel::kTuring) return row.activation_bits == 16 || row.warps_k > 1;
    return row.kernel != Kernel::kPlain && row.kernel != Kernel::kDense;
}

// Rows of kStream and kTile that take all that a multiprocessor of Hopper has; the others fit every one since Ampere.
constexpr bool for_hopper(Row const& row) { return row.sms.first == 90; }

// Where the blocks that divide K are a cluster: no workspace, no second kernel
constexpr bool in_cluster(wog_problem const& p) { return p.sm == 90; }
// Multiprocessors that clusters of so many blocks fill: on an H200 (132) 66 of two, 30 of four and 15 of eight blocks.
constexpr int usable(wog_problem const& p, int blocks) { return blocks > 2 ? p.sm_count * 10 / 11 : p.sm_count; }

constexpr int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }
constexpr int64_t align(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// A step is 64 k, but in kTuring and kHopper 128 of int8 x: 128 or 64 bytes of a row of x
constexpr int stage_k(Row const& row) {
    bool const wide = row.kernel == Kernel::kTuring || row.kernel == Kernel::kHopper;
    return row.activation_bits == 8 && wide ? 128 : 64;
}
constexpr int x_row(Row const& row) { return stage_k(row) * row.activation_bits / 8; }

// kTuring: steps that x comes in together
constexpr int turing_chunk(Row const& row, int bits) { return row.stages[bits == 8] % 2 ? 1 : 2; }

// Shared memory of kTuring: rows of x (few where it streams: they may all fit), and how many steps have a place
constexpr int turing_x_rows(Row const& row, int64_t m) {
    return row.warps_n == 1 ? int(std::min<int64_t>(m, row.block_m())) : row.block_m();
}
constexpr int turing_shared(Row const& row, int x_rows, int x_steps) {
    int const sums = row.warps_k * 2 * row.block_m() * 4, tile = row.warps_k * row.block_m() * (row.block_n() + 4) * 4;
    return 128 + row.warps_k * x_steps * x_rows * 128 + sums + tile;
}
// Of a multiprocessor, for `resident` blocks; 1 KiB of each is the driver's
constexpr int shared_limit(int sm, int resident) {
    int const kib = sm < 80 ? 64 : sm == 80 ? 164 : sm == 90 || sm == 100 || sm == 103 ? 228 : 100;
    return (kib / resident - (sm < 80 ? 0 : 1)) * 1024;
}
constexpr int turing_x_steps(Row const& row, wog_problem const& p, int splits) {
    int const chunk = turing_chunk(row, p.bits), most = ceil_div(ceil_div(p.k, stage_k(row)), splits * row.warps_k);
    int const all = ceil_div(most, chunk) * chunk, two = 2 * chunk;
    bool const fit = turing_shared(row, turing_x_rows(row, p.m), all) <= shared_limit(p.sm, row.resident);
    return row.warps_n == 1 && (all <= two || fit) ? all : two;
}

// Shared memory of kStream: a stage of a warp is the codes of 64 k and their scales and zeros; all of x; sums
constexpr int stream_stage(Row const& row, int bits, bool fine) {
    return row.strips * (bits * 128 + (fine ? 128 : 64));
}
constexpr int stream_x_rows(Row const& row, int64_t m) { return int(std::min<int64_t>(m, row.block_m())); }
constexpr int stream_x_steps(Row const& row, wog_problem const& p, int splits) {
    return ceil_div(ceil_div(p.k, stage_k(row)), splits * row.warps_k);
}
// of x that have a place: all, or as many as of the weights
constexpr int stream_x_places(Row const& row, wog_problem const& p, int splits) {
    return for_hopper(row) ? stream_x_steps(row, p, splits) : row.stages[p.bits == 8];
}
constexpr int64_t stream_shared(Row const& row, wog_problem const& p, int splits) {
    int64_t const x = int64_t(stream_x_places(row, p, splits)) * x_row(row), ring = row.stages[p.bits == 8];
    return 128 + row.warps_k * (ring * stream_stage(row, p.bits, p.group % 64 != 0) +
                                stream_x_rows(row, p.m) * (x + (row.block_n() + 4) * 4));
}

// Blocks of kStream on a multiprocessor; 0: it does not even have room for one, or for as many as Hopper's row wants
constexpr int stream_resident(Row const& row, wog_problem const& p, int splits) {
    int blocks = row.resident;
    while (blocks && stream_shared(row, p, splits) > shared_limit(p.sm, blocks))
        blocks = for_hopper(row) ? 0 : blocks - 1;
    return blocks;
}

// Shared memory of kTile, of a block of so many warps in n: barriers, a ring of stages (x, codes, scales and zeros and
// sums of x, of 64 k of each part of K), and sums on their way out: a column of each warp's, or all of them, instead
// of the ring, for a cluster to add up
constexpr int kTileStages = 32;
constexpr int tile_units(wog_problem const& p) { return p.group % 64 ? 2 : 1; }  // groups of 64 k
constexpr int tile_stage(Row const& row, int bits, int units, int warps_n) {
    int const sums = units * row.block_m() * 4;
    int const bytes =
        row.warps_k * (warps_n * row.strips * (bits * 128 + units * 64) + row.block_m() * x_row(row) + sums);
    return (bytes + 1023) / 1024 * 1024;
}
constexpr int tile_shared(Row const& row, wog_problem const& p, int splits, int warps_n) {
    int const ring = row.stages[p.bits == 8] * tile_stage(row, p.bits, tile_units(p), warps_n);
    int const staged = warps_n * row.warps_k * row.warps_m * 8 * (row.strips * 16 + 4) * 4;
    int const sums = row.warps_k * row.block_m() * (warps_n * row.strips * 16 + 4) * 4;
    return 1024 + (splits == 1 || !in_cluster(p) ? ring + staged : std::max(ring, sums));
}

// kHopper: a ring of stages, as many as fit; floats on their way to the output, of 64 n and so many m for each group of
// warps; sums of x in slots; barriers, two for each stage and slot. A stage is x, codes, scales, zeros and, without
// own_sums, sums of x: of a cut that ends with it, or, `fine`, of each 32 k, in which groups end.
constexpr int kStagedRows = 32, kStagedPitch = 64 + 4, kHopperSums = 2;
constexpr bool hopper_fine(Row const& row, wog_problem const& p) { return p.group % stage_k(row) && p.group != p.k; }
constexpr int hopper_units(Row const& row, bool fine) { return fine ? stage_k(row) / 32 : 1; }
constexpr int hopper_stage(Row const& row, int bits, bool fine) {
    int const sums = row.own_sums ? 0 : row.block_m() * 4, affine = row.block_n() * 4;
    int const x = row.block_m() * 128, codes = row.block_n() * stage_k(row) * bits / 8;
    return (x + codes + hopper_units(row, fine) * (affine + sums) + 1023) / 1024 * 1024;
}
constexpr int hopper_apart(Row const& row) {  // beside the ring
    return row.warps_n / 4 * kStagedRows * kStagedPitch * 4 + kHopperSums * (row.block_m() * 4 + 16);
}
constexpr int hopper_stages(Row const& row, int bits, bool fine) {
    return (227 * 1024 - hopper_apart(row)) / (hopper_stage(row, bits, fine) + 16);
}
constexpr int hopper_bytes(Row const& row, int bits, bool fine) {
    return hopper_stages(row, bits, fine) * (hopper_stage(row, bits, fine) + 16) + hopper_apart(row);
}

// Weights that a multiprocessor has on their way while it works on a stage of each ring
constexpr int bytes_in_flight(Row const& row, wog_problem const& p, int splits, int warps_n) {
    int const hopper = row.kernel == Kernel::kHopper ? hopper_stages(row, p.bits, hopper_fine(row, p)) : 0;
    int const ahead = (hopper ? hopper : row.stages[p.bits == 8]) - 1, codes = stage_k(row) * p.bits / 8;
    if (row.kernel == Kernel::kStream)
        return stream_resident(row, p, splits) * row.warps_k * ahead * stream_stage(row, p.bits, p.group % 64 != 0);
    if (row.kernel == Kernel::kTile)
        return ahead * row.warps_k * warps_n * row.strips * (16 * codes + tile_units(p) * 64);
    return row.resident * row.warps_k * ahead * row.block_n() * codes;
}

// kHopper: a group of consumers whose turn it is has no need of what the ring has no room for.
constexpr bool hopper_takes_turns(Row const& row, wog_problem const& p) {
    return row.ordered && 2 * p.group <= hopper_stages(row, p.bits, false) * stage_k(row);
}

// kHopper: clusters of so many blocks that the device holds at once. K of the tiles left over is divided if each
// cluster has at most one of them.
constexpr int hopper_clusters(wog_problem const& p, int size) { return std::max(1, usable(p, size) / size); }
constexpr bool hopper_divides(wog_problem const& p, int tiles, int splits) {
    int const clusters = hopper_clusters(p, splits);
    return tiles < clusters || tiles % (clusters * splits) <= clusters;
}

constexpr int shared_bytes(Row const& row, wog_problem const& p, int splits) {
#ifdef WOG_VOLTA
    return row.kernel == Kernel::kVolta ? volta_shared_bytes(row) : 0;
#else
    return row.kernel == Kernel::kTuring   ? turing_shared(row, turing_x_rows(row, p.m), turing_x_steps(row, p, splits))
           : row.kernel == Kernel::kStream ? int(stream_shared(row, p, splits))
           : row.kernel == Kernel::kHopper ? hopper_bytes(row, p.bits, hopper_fine(row, p))
                                           : 0;
#endif
}

// In the workspace: int8 activations, their rows' scales, sums of rows (of whole tiles, for bulk copies)
constexpr int64_t padded_rows(int64_t m) { return (m + 255) / 256 * 256; }
constexpr int64_t row_sums_bytes(int64_t m, int64_t k, int64_t group) { return k / group * padded_rows(m) * 4; }
struct Int8Buffers {
    int64_t values, scales, sums, total;  // offsets
};
constexpr Int8Buffers int8_buffers(int64_t m, int64_t k, int64_t group) {
    int64_t const scales = align(m * k), sums = scales + align(m * 4), total = sums + row_sums_bytes(m, k, group);
    return {0, scales, sums, total};
}

// Where partial sums start in the workspace: after what rows.cu leaves there
constexpr int64_t before_partials(Row const& row, wog_problem const& p) {
    if (p.activation_bits == 8) return int8_buffers(p.m, p.k, p.group).total;
    return row.kernel == Kernel::kHopper && !row.own_sums ? row_sums_bytes(p.m, p.k, p.group) : 0;
}
inline float* partials(Row const& row, wog_problem const& p, void* workspace) {
    return reinterpret_cast<float*>(static_cast<unsigned char*>(workspace) + before_partials(row, p));
}
constexpr bool sums_meet_in_memory(wog_problem const& p, int splits) { return splits > 1 && !in_cluster(p); }
// null where there are none: K is whole, or its parts are a cluster
inline float* sums_apart(Row const& row, wog_problem const& p, wog_plan const& plan, void* workspace) {
    return sums_meet_in_memory(p, plan.splits) ? partials(row, p, workspace) : nullptr;
}
// With batch_invariant K is divided for many rows of x as for few. They take turns, or their sums would need memory.
constexpr int64_t kRowsOfATurn = 256;
constexpr int64_t rows_of_a_turn(wog_problem const& p, int splits) {
    bool const turns = p.batch_invariant && sums_meet_in_memory(p, splits);
    return turns ? std::min(p.m, kRowsOfATurn) : p.m;
}

constexpr int64_t kLibraryWorkspace = 4 << 20;  // what cuBLASLt recommends before Hopper

// dequantized weights, fp32 sums and the library's own, in the workspace
struct DenseBuffers {
    int64_t weights, sums, library, total;  // offsets
};
constexpr DenseBuffers dense_buffers(int64_t m, int64_t n, int64_t k) {
    int64_t const sums = align(n * k * 2), library = sums + align(m * n * 4);
    return {0, sums, library, library + kLibraryWorkspace};
}

int32_t find_library();

// Each returns null or what the runtime said.
char const* query_device(int32_t& sm, int32_t& sm_count);
char const* launch_plain(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream);
char const* launch_turing(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream);
char const* launch_stream(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream);
char const* launch_tile(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream);
char const* launch_hopper(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream);
char const* launch_dense(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream);
// Sums of the parts of K, [splits][M][N], in their order; then bias, activation and gate.
char const* launch_epilogue(wog_problem const& p, wog_tensors const& t, float const* parts, int splits, void* stream);
char const* launch_volta(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream);

}  // namespace wog
