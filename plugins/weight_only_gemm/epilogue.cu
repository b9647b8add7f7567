// Sums of the parts of K that blocks have left in the workspace: added up in their order, and finished.
#include "epilogue.h"

namespace wog {
namespace {

struct EpilogueArgs {
    float const* parts;
    Output out;
    int32_t splits;
};

// One thread per row and strip
template <class T>
__global__ void __launch_bounds__(256) epilogue(EpilogueArgs const p) {
    int const strips = p.out.n / 16;
    int64_t const item = int64_t(blockIdx.x) * 256 + threadIdx.x, m = item / strips;
    int const n = int(item % strips) * 16;
    wait_for_inputs();
    release_next();
    if (m >= p.out.m) return;
    float v[16] = {};
    for (int part = 0; part < p.splits; part++)
#pragma unroll
        for (int i = 0; i < 16; i++) v[i] += p.parts[(part * p.out.m + m) * p.out.n + n + i];
    finish<T>(p.out, v, m, n);
}

}  // namespace

char const* launch_epilogue(wog_problem const& p, wog_tensors const& t, float const* parts, int splits, void* stream) {
    Grid const grid{dim3(ceil_div(p.m * (p.n / 16), 256)), 256, 0, dim3(1), p.sm >= 90};
    return launch(p.type == WOG_F16 ? epilogue<Half> : epilogue<Bfloat>, grid, static_cast<Stream>(stream),
                  EpilogueArgs{parts, output(p, t), splits});
}

}  // namespace wog
