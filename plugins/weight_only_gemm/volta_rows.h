// The table of the library for Volta. As in config.h: the first row that fits is taken.
//
// Weights go from global memory straight into registers: `stages` counts those in flight. x has two slots in shared
// memory, of which Volta gives 48 KiB to a block.
#pragma once

#include <algorithm>

#include "row.h"

namespace wog {

constexpr Row kRows[] = {
    {"stream8", Kernel::kVolta, 16, 1, 4, 2, 1, {2, 2}, 3, 8, 70, 70},
    {"stream16", Kernel::kVolta, 16, 4, 2, 1, 2, {2, 1}, 2, 16, 70, 70},
    {"tile32", Kernel::kVolta, 16, 4, 1, 1, 4, {2, 2}, 2, 128, 70, 70},
    {"wide32", Kernel::kVolta, 16, 4, 1, 4, 4, {2, 1}, 2, kAny, 70, 70},
    {"plain", Kernel::kPlain, 0, 1, 1, 2, 1, {1, 1}, 4, kAny, 70, 70},
};

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
