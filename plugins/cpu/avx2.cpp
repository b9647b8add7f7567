// CPUs with AVX2 alone: avx2.h.
#include "attention.h"
#include "avx2.h"
#include "gemm.h"

namespace cpu {
namespace {

bool runs() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace

Kernels const kAvx2{"avx2",
                    runs,
                    Gemm<Avx2>::quantize,
                    Gemm<Avx2>::multiply,
                    Attention<Avx2>::prepare,
                    Attention<Avx2>::pack,
                    Attention<Avx2>::attend};

}  // namespace cpu
