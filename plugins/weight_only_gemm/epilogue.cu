// Sums of the parts of K that blocks have left in the workspace: added up in their order, and finished.
#include "epilogue.h"

#include "tile.h"

namespace wog {
namespace {

struct EpilogueArgs {
    float const* parts;
    Output out;
    int32_t splits;
};

// Four outputs a thread, neighbours have the next ones
template <class T>
__global__ void __launch_bounds__(256) epilogue(EpilogueArgs const p) {
    bool const gated = p.out.gated;
    int const fours = p.out.n / (gated ? 8 : 4);
    int64_t const item = int64_t(blockIdx.x) * 256 + threadIdx.x, m = item / fours;
    int const i = int(item % fours), n = column_of_four(i, gated);
    wait_for_inputs();
    release_next();
    if (m >= p.out.m) return;
    auto const total = [&](int n) {
        float4 v{};
        for (int part = 0; part < p.splits; part++)
            add(v, *reinterpret_cast<float4 const*>(p.parts + (part * p.out.m + m) * p.out.n + n));
        return v;
    };
    finish_four<T>(p.out, total(n), gated ? total(n + 8) : float4{}, m, n);
}

}  // namespace

char const* launch_epilogue(wog_problem const& p, wog_tensors const& t, float const* parts, int splits, void* stream) {
    Grid const grid{dim3(ceil_div(p.m * (p.n / (p.gated ? 8 : 4)), 256)), 256, 0, dim3(1), p.sm >= 90};
    return launch(p.type == WOG_F16 ? epilogue<Half> : epilogue<Bfloat>, grid, static_cast<Stream>(stream),
                  EpilogueArgs{parts, output(p, t), splits});
}

}  // namespace wog
