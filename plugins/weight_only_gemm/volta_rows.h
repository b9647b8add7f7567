// The table of the library for Volta. As in config.h: the first row that fits is taken.
//
// Weights go from global memory straight into registers: `stages` counts those in flight. x has two slots in shared
// memory, of which Volta gives 48 KiB to a block.
#pragma once

#include <algorithm>

#include "row.h"

namespace wog {

// clang-format off
constexpr Row kRows[] = {
    {.name = "stream8", .kernel = Kernel::kVolta, .sms = kSm70, .max_m = 8,
     .warps_k = 4, .strips = 2, .stages = {2, 2}, .resident = 3},
    {.name = "stream16", .kernel = Kernel::kVolta, .sms = kSm70, .max_m = 16,
     .warps_n = 4, .warps_k = 2, .columns = 2, .stages = {2, 1}, .resident = 2},
    {.name = "tile32", .kernel = Kernel::kVolta, .sms = kSm70, .max_m = 128,
     .warps_n = 4, .columns = 4, .stages = {2, 2}, .resident = 2},
    {.name = "wide32", .kernel = Kernel::kVolta, .sms = kSm70,
     .warps_n = 4, .strips = 4, .columns = 4, .stages = {2, 1}, .resident = 2, .any_batch = true},
    {.name = "plain", .kernel = Kernel::kPlain, .sms = kSm70, .activation_bits = 0,
     .strips = 2, .resident = 4, .any_batch = true},
};
// clang-format on

constexpr int kXSlots = 2, kQuadPairs = 4;
constexpr bool strip_for_each_quad_pair(Row const& row) { return row.strips == kQuadPairs; }  // volta.cu says why

// x and the sums of a group by quad pair; then, in their place, the finished sums
constexpr int volta_shared_bytes(Row const& row) {
    int const x = row.warps_k * kXSlots * row.block_m() * 128;
    int const sums = row.warps_n > 1 ? row.warps_k * 2 * kQuadPairs * row.block_m() * 4 : 0;
    int const tile = row.warps_k * row.block_m() * (row.block_n() + 4) * 4;
    return std::max(x + sums, tile);
}

}  // namespace wog
