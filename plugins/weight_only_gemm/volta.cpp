// Launching Volta's kernels, which volta.cu has: the same launchers as of the other kernels, for a library of its own.
#include <device.h>

#include "volta.h"

#ifndef KERNEL
#define KERNEL(name) name
#endif

namespace wog {

char const* query_device(int32_t& sm, int32_t& sm_count) { return describe_device(sm, sm_count); }
int32_t find_library() { return 0; }

char const* launch_volta(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream) {
#define VOLTA_PAIR(row, index) {KERNEL(volta_##row##_4), KERNEL(volta_##row##_8)},
    static decltype(+KERNEL(volta_epilogue)) const kKernels[][2] = {VOLTA_ROWS(VOLTA_PAIR)};
    VoltaArgs const args{static_cast<uint16_t const*>(t.x),
                         static_cast<unsigned char const*>(t.codes),
                         static_cast<uint32_t const*>(t.affine),
                         static_cast<float*>(t.workspace),
                         output(p, t),
                         p.k,
                         p.group,
                         plan.splits};
    auto const s = static_cast<Stream>(stream);
    Grid const grid{dim3(plan.grid_m, plan.grid_n, plan.splits), plan.threads, size_t(plan.shared)};
    if (char const* failed = launch(kKernels[plan.row][p.bits == 8], grid, s, args)) return failed;
    if (plan.splits == 1) return nullptr;
    return launch(KERNEL(volta_epilogue), {dim3(ceil_div(p.m * (p.n / 16), 256)), 256}, s, args);
}

char const* launch_plain(wog_problem const& p, wog_tensors const& t, wog_plan const&, void* stream) {
    return launch(KERNEL(volta_plain), {dim3(ceil_div(p.m * (p.n / 16), 128)), 128}, static_cast<Stream>(stream),
                  plain_args(p, t, {}));
}

}  // namespace wog
