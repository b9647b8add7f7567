// Which kernels run here, and what they refuse; the C interface through which tests reach each of them.
#include "kernel.h"

namespace cpu_gemm {

char const* refuse(Weight const& w) {
    if (w.n <= 0 || w.k <= 0) {
        return "a weight without rows or columns";
    }
    if (w.group <= 0 || w.group % kBlock != 0 || w.k % w.group != 0) {
        return "group is no multiple of 32 that divides K";
    }
    if (w.form == Form::kInt8Rows && w.group > 65536) {
        return "a group above 65536 with a scale for each row of x";  // its products would not fit in 32 bits
    }
    return nullptr;
}

namespace {
Kernels const* const kAll[] = {&kAvx512, &kAvx2, &kPlain};  // the fastest first
}

Kernels const& kernels() {
    static Kernels const* const best = [] {
        for (Kernels const* each : kAll) {
            if (each->runs()) {
                return each;
            }
        }
        return &kPlain;
    }();
    return *best;
}

}  // namespace cpu_gemm
