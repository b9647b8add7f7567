// The kernels of Volta by name: volta.cu has them, volta.cpp launches them, sm70/ compiles the one without the other.
#pragma once

#include "config.h"
#include "epilogue.h"
#include "plain.h"

// A row of volta_rows.h, its index there, and its kernels: volta_<row>_4 and volta_<row>_8, by the bits of a code
#define VOLTA_ROWS(_) _(stream8, 0) _(stream16, 1) _(tile32, 2) _(wide32, 3)

namespace wog {

struct VoltaArgs {
    uint16_t const* x;
    unsigned char const* codes;
    uint32_t const* affine;  // (scale, zero) pairs, [K / group][N]
    float* partials;         // [splits][M][N], null when K is not split
    Output out;
    int32_t k, group, splits;
};

}  // namespace wog

#define VOLTA_DECLARE(row, index)                                 \
    extern "C" __global__ void volta_##row##_4(wog::VoltaArgs p); \
    extern "C" __global__ void volta_##row##_8(wog::VoltaArgs p);
VOLTA_ROWS(VOLTA_DECLARE)
extern "C" __global__ void volta_epilogue(wog::VoltaArgs p);
extern "C" __global__ void volta_plain(wog::PlainArgs p);
