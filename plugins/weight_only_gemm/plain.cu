// Launching the plain kernel, which plain.h has.
#include "plain.h"

namespace wog {
namespace {

template <class T>
__global__ void __launch_bounds__(128) plain(PlainArgs const p) {
    plain_strip<T>(p);
}

}  // namespace

char const* query_device(int32_t& sm, int32_t& sm_count) { return describe_device(sm, sm_count); }

char const* launch_plain(wog_problem const& p, wog_tensors const& t, wog_plan const&, void* stream) {
    Int8Rows const rows = int8_rows(p, t.workspace);
    if (char const* failed = launch_quantize(p, t, stream)) return failed;
    return launch(p.type == WOG_F16 ? plain<Half> : plain<Bfloat>, {dim3(ceil_div(p.m * (p.n / 16), 128)), 128},
                  static_cast<Stream>(stream), plain_args(p, t, rows));
}

}  // namespace wog
