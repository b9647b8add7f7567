// A kernel configuration: one row of a library's table. docs/extending/kernel.md says what limits each field, by kernel.
#pragma once

#include <cstdint>

#if __cplusplus <= 201703L  // GCC 10 calls its C++20 201709
#error "C++20 (-std=c++20): without it nvcc 13.0 takes the rows below and leaves out their members' defaults"
#endif

namespace wog {

enum class Kernel : int32_t { kPlain, kTuring, kDense, kStream, kTile, kHopper, kVolta };

constexpr int64_t kAny = int64_t(1) << 40;

struct Sms {
    int first, last;
};
constexpr int kNewest = 999;
constexpr Sms kSm70{70, 70}, kSm75{75, 79}, kSm90{90, 90}, kFrom75{75, kNewest}, kFrom80{80, kNewest};

struct Row {
    char const* name;
    Kernel kernel;
    Sms sms;
    int64_t min_m = 0, max_m = kAny;            // not chosen up to min_m; may be pinned there
    int activation_bits = 16;                   // that it takes; 0: any
    int warps_n = 1, warps_k = 1, warps_m = 1;  // warps_k of them divide K, kTile's warps_m the columns of m
    int strips = 1;                             // of 16 n that a warp owns
    int columns = 1;                            // of 8 m
    int stages[2] = {1, 1};  // steps of weights on their way, for codes of 4 and 8 bits; kHopper's: what fits
    int resident = 1;        // blocks that must fit a multiprocessor together: bounds the registers
    int cluster = 1;         // blocks side by side in n that share what they load of x
    bool whole_k = false;    // takes only groups that are all of K
    bool fine = true;        // takes groups that end inside its steps
    bool ordered = false;    // kHopper: groups of consumers take turns to multiply
    bool own_sums = false;   // kHopper, 16-bit x: sums rows of x itself, no kernel does before
    bool any_batch = false;  // the one of its format and SMs for any m where a batch may not change a row's bits
    bool candidate = false;  // not measured yet: taken where it is pinned, or by a measured choice
    // For codes of 4 and 8 bits, beside rows of one kernel: kStream's picoseconds (Hopper's rows) or cycles for 64 k of
    // a strip, cycles of the others for a stage
    int pace[2] = {};

    constexpr int block_n() const { return warps_n * strips * 16; }
    constexpr int block_m() const { return warps_m * columns * 8; }
    // Beside those that multiply: four warps that fill the ring
    constexpr int helpers() const { return kernel == Kernel::kTile || kernel == Kernel::kHopper ? 4 : 0; }
    constexpr int threads() const { return (warps_n * warps_k * warps_m + helpers()) * 32; }
};

}  // namespace wog
