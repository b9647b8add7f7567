// AVX-VNNI, of clients' CPUs without AVX-512: AVX2 with a product of 8 bits that is exact.
#include "avx2.h"
#include "table.h"

namespace cpu {
namespace {

struct AvxVnni : Avx2 {
    static __m256i spread(int8_t const* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        return _mm256_set1_epi32(four);
    }
    static I dot(I sum, I q, __m256i x) {
        return {_mm256_dpbusd_avx_epi32(sum.a, q.a, x), _mm256_dpbusd_avx_epi32(sum.b, q.b, x)};
    }
};

bool runs() { return __builtin_cpu_supports("avxvnni") && __builtin_cpu_supports("f16c"); }

}  // namespace

constinit Kernels const kAvxVnni = kernels_of<AvxVnni>("avxvnni", runs);

}  // namespace cpu
