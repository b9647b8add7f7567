// CPUs with AVX2 alone: avx2.h.
#include "avx2.h"
#include "table.h"

namespace cpu {
namespace {

bool runs() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace

constinit Kernels const kAvx2 = kernels_of<Avx2>("avx2", runs);

}  // namespace cpu
