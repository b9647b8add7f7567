// What the tiled kernels share: which of them are generated, handing over their sums.
#pragma once

#include <device.h>

#include <type_traits>
#include <utility>

#include "config.h"

namespace wog {

// Is this row's code generated for the SM being compiled? Where the table can choose it, and bf16 starts at sm_80.
template <class T, bool Fine, int I>
constexpr bool kGenerated = kRows[I].sms.first <= DEVICE_SM && DEVICE_SM <= kRows[I].sms.last &&
                            (DEVICE_SM >= 80 || std::is_same<T, Half>::value) && (!Fine || kRows[I].fine);

// Of<T, Bits, Fine, I>::kernel is the kernel of row I: the one that a plan asks for
template <Kernel Kind, template <class, int, bool, int> class Of>
auto instance(wog_problem const& p, wog_plan const& plan, bool fine) {
    constexpr int kFirst = first_row(Kind);
    return [&]<int... I>(std::integer_sequence<int, I...>) {
        using Pointer = decltype(+Of<Half, 4, false, kFirst>::kernel);
        static constexpr Pointer kAll[][2][2][2] = {
            {{{Of<Half, 4, false, kFirst + I>::kernel, Of<Half, 4, true, kFirst + I>::kernel},
              {Of<Half, 8, false, kFirst + I>::kernel, Of<Half, 8, true, kFirst + I>::kernel}},
             {{Of<Bfloat, 4, false, kFirst + I>::kernel, Of<Bfloat, 4, true, kFirst + I>::kernel},
              {Of<Bfloat, 8, false, kFirst + I>::kernel, Of<Bfloat, 8, true, kFirst + I>::kernel}}}...};
        return kAll[plan.row - kFirst][p.type != WOG_F16][p.bits == 8][fine];
    }(std::make_integer_sequence<int, count_rows(Kind)>());
}

// Blocks with tiles of m and n and parts of K; then what adds up the sums that they leave in the workspace, if they do
template <class Args>
char const* launch_parts(void (*kernel)(Args), Args const& args, wog_problem const& p, wog_tensors const& t,
                         wog_plan const& plan, void* stream) {
    dim3 const blocks(plan.grid_m, plan.grid_n, plan.splits), cluster(1, 1, args.partials ? 1 : plan.splits);
    Grid const grid{blocks, plan.threads, size_t(plan.shared), cluster, p.sm >= 90};
    char const* const failed = launch(kernel, grid, static_cast<Stream>(stream), args);
    return failed || !args.partials ? failed : launch_epilogue(p, t, args.partials, plan.splits, stream);
}

// c += a * b: of 16-bit x with sums in fp32, of int8 x in int32
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], uint32_t const (&a)[4], uint32_t const* b) {
    multiply_add<T>(c, a, b[0], b[1]);
}
template <class T>
__device__ __forceinline__ void multiply(int32_t (&c)[4], uint32_t const (&a)[4], uint32_t const* b) {
    multiply_add(c, a, b[0], b[1]);
}

// Where a row of x has a 16-byte piece of a step: in its place, that of eight rows would lie in the same banks. As bulk
// copies of tensors have it, too.
template <int RowBytes>
__device__ __forceinline__ int turned(int piece, int row) {
    return piece ^ (RowBytes == 64 ? row / 2 % 4 : row % 8);
}

// A register of ones, whose products with x are sums of x
template <class T, class Sum = float>
constexpr uint32_t kOnesOf = std::is_same<Sum, int32_t>::value ? 0x01010101
                             : std::is_same<T, Half>::value    ? 0x3c003c00
                                                               : 0x3f803f80;

// X += x * ones, of 16 rows of x: as the first operand, or one that is not finite would not stay in its own sum. The
// sums of rows g and g + 8 are s[0] and s[2], in each of a quad's lanes.
template <class T>
__device__ __forceinline__ void sum_rows(float (&s)[4], uint32_t const (&x)[4]) {
    multiply_add<T>(s, x, kOnesOf<T>, kOnesOf<T>);
}
template <class T>
__device__ __forceinline__ void sum_rows(int32_t (&s)[4], uint32_t const (&x)[4]) {
    multiply_add_signed(s, x, kOnesOf<T, int32_t>, kOnesOf<T, int32_t>);
}

// P - (z - c) * X, P of codes less c (16-bit x) or, in whole numbers, as they are (int8 x)
template <int Bits>
__device__ __forceinline__ float corrected(float product, float x, float center_less_zero) {
    return product + center_less_zero * x;
}
template <int Bits>
__device__ __forceinline__ float corrected(int32_t product, int32_t x, float center_less_zero) {
    return float(product - (x << (Bits - 1))) + center_less_zero * float(x);
}

// One warp's sums into a tile of `pitch` floats a row: strips from column n, columns of 8 m from row m
template <int S, int C>
__device__ __forceinline__ void store_sums(float* tile, int pitch, float const (&acc)[S][C][4], int m, int n, int g,
                                           int t) {
#pragma unroll
    for (int s = 0; s < S; s++)
#pragma unroll
        for (int j = 0; j < C; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                tile[(m + j * 8 + 2 * t + i % 2) * pitch + n + s * 16 + i / 2 * 8 + g] = acc[s][j][i];
}

// A slot of a ring, and the parity of its barriers' phase
template <int Slots>
struct Cursor {
    int slot = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++slot == Slots) slot = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void add(float4& to, float4 const& v) { to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w; }
__device__ __forceinline__ float4 scaled(float4 const& v, float s) { return {v.x * s, v.y * s, v.z * s, v.w * s}; }

}  // namespace wog
