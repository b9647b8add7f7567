// AVX-512 with VNNI: a vector is a register.
#include <immintrin.h>

#include "table.h"

namespace cpu {
namespace {

struct Avx512 {
    static constexpr int kRows = 8;  // with two limbs, 25 of 32 registers
    static constexpr bool kPairs = true;
    using I = __m512i;
    using F = __m512;
    static I zero() { return _mm512_setzero_si512(); }
    static I load(uint8_t const* p) { return _mm512_loadu_si512(p); }
    static I low(I q) { return _mm512_and_si512(q, _mm512_set1_epi8(15)); }
    static I high(I q) { return low(_mm512_srli_epi16(q, 4)); }
    static I spread(int8_t const* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        return _mm512_set1_epi32(four);
    }
    static I dot(I sum, I q, I x) { return _mm512_dpbusd_epi32(sum, q, x); }
    static I add(I a, I b) { return _mm512_add_epi32(a, b); }
    static I times256(I a) { return _mm512_slli_epi32(a, 8); }
    static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
    static F set(float v) { return _mm512_set1_ps(v); }
    static F load(float const* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F from_f16(uint16_t const* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((__m256i const*)p)); }
    static F from_i8(int8_t const* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((__m128i const*)p)));
    }
    static void to_i8(int8_t* p, F v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v))); }
    static void to_f16(uint16_t* p, F v) {
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static F from_bf16(uint16_t const* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((__m256i const*)p)), 16));
    }
    static F from_u4(uint8_t const* p) {
        __m128i const pairs = _mm_cvtepu8_epi16(_mm_loadl_epi64((__m128i const*)p));
        __m128i const all = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(all));
    }
    static F from_u8(uint8_t const* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((__m128i const*)p)));
    }
};

bool runs() {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
}

}  // namespace

constinit Kernels const kAvx512 = kernels_of<Avx512>("avx512", runs);

}  // namespace cpu
