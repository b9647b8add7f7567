// A kernel configuration: one row of a library's table.
#pragma once

#include <cstdint>

namespace wog {

enum class Kernel : int32_t { kPlain, kGemm, kDense, kWarpgroup, kStream, kTile, kHopper, kVolta };

struct Row {
    char const* name;
    Kernel kernel;
    int activation_bits;   // that it takes; 0: any
    int warps_n, warps_k;  // warps_k of them share their n and divide K
    int strips;            // of 16 n that a warp owns
    int columns;           // of 8 m
    int stages[2];         // steps of weights on their way, for codes of 4 and 8 bits
    int resident;          // blocks that must fit a multiprocessor together: bounds the registers
    int64_t max_m;
    int min_sm, max_sm;
    int64_t min_m = 0;  // not chosen up to it; may be pinned there
    int cluster = 1;    // blocks side by side in n that share what they load of x
    // For codes of 4 and 8 bits, beside rows of one kernel: kStream's picoseconds (Hopper's rows) or cycles for 64 k of
    // a strip, cycles of the others for a stage
    int pace[2] = {};
    bool whole_k = false;  // takes only groups that are all of K
    int warps_m = 1;       // kTile: of them divide the columns of m

    constexpr int block_n() const { return warps_n * strips * 16; }
    constexpr int block_m() const { return warps_m * columns * 8; }
    // Beside those that multiply, on Hopper: four warps that fill the ring
    constexpr int helpers() const {
        return kernel == Kernel::kWarpgroup || kernel == Kernel::kTile || kernel == Kernel::kHopper ? 4 : 0;
    }
    constexpr int threads() const { return (warps_n * warps_k * warps_m + helpers()) * 32; }
};

constexpr int64_t kAny = int64_t(1) << 40;
constexpr int kNewest = 999;

}  // namespace wog
