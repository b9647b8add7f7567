// AVX2: a vector is two registers. Its products of 8 bits saturate, so they are made of 16, which are exact.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernel.h"

namespace cpu {
namespace {

struct Avx2 {
    static constexpr bool kPairs = false;
    static constexpr int kRows = 2;  // 16 registers hold no more sums
    struct I {
        __m256i a, b;
    };
    struct F {
        __m256 a, b;
    };
    static I zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static I load(uint8_t const* p) { return {load_half(p), load_half(p + 32)}; }
    static __m256i load_half(uint8_t const* p) { return _mm256_loadu_si256(reinterpret_cast<__m256i const*>(p)); }
    static I low(I q) {
        __m256i const mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(q.a, mask), _mm256_and_si256(q.b, mask)};
    }
    static I high(I q) { return low({_mm256_srli_epi16(q.a, 4), _mm256_srli_epi16(q.b, 4)}); }
    struct X {
        __m256i even, odd;  // of four k, in 16 bits each
    };
    static X spread(int8_t const* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        __m256i const all = _mm256_set1_epi32(four);
        return {_mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), _mm256_srai_epi16(all, 8)};
    }
    static I dot(I sum, I q, X x) { return {dot_half(sum.a, q.a, x), dot_half(sum.b, q.b, x)}; }
    static __m256i dot_half(__m256i sum, __m256i q, X x) {
        __m256i const low = _mm256_madd_epi16(_mm256_and_si256(q, _mm256_set1_epi16(255)), x.even);
        return _mm256_add_epi32(sum, _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_srli_epi16(q, 8), x.odd)));
    }
    static I add(I a, I b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
    static I times256(I a) { return {_mm256_slli_epi32(a.a, 8), _mm256_slli_epi32(a.b, 8)}; }
    static F to_float(I a) { return {_mm256_cvtepi32_ps(a.a), _mm256_cvtepi32_ps(a.b)}; }
    static F set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
    static F load(float const* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, F v) {
        _mm256_storeu_ps(p, v.a);
        _mm256_storeu_ps(p + 8, v.b);
    }
    static F add(F a, F b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
    static F sub(F a, F b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
    static F mul(F a, F b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
    static F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
    static __m128i load_quarter(void const* p) { return _mm_loadu_si128(static_cast<__m128i const*>(p)); }
    static F from_f16(uint16_t const* p) {
        return {_mm256_cvtph_ps(load_quarter(p)), _mm256_cvtph_ps(load_quarter(p + 8))};
    }
    static F from_i8(int8_t const* p) {
        __m128i const all = load_quarter(p);
        return to_float({_mm256_cvtepi8_epi32(all), _mm256_cvtepi8_epi32(_mm_srli_si128(all, 8))});
    }
    static void to_i8(int8_t* p, F v) {
        __m256i const pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b));
        __m256i const all = _mm256_permute4x64_epi64(pairs, 0b11011000);
        __m128i const bytes = _mm_packs_epi16(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    }
    static void to_f16(uint16_t* p, F v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
    }
    static F from_bf16(uint16_t const* p) { return {widened(load_quarter(p)), widened(load_quarter(p + 8))}; }
    static __m256 widened(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
    static F from_u4(uint8_t const* p) {
        __m128i const pairs = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<__m128i const*>(p)));
        __m128i const all = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
        return to_float({_mm256_cvtepu8_epi32(all), _mm256_cvtepu8_epi32(_mm_srli_si128(all, 8))});
    }
    static F from_u8(uint8_t const* p) {
        __m128i const all = load_quarter(p);
        return to_float({_mm256_cvtepu8_epi32(all), _mm256_cvtepu8_epi32(_mm_srli_si128(all, 8))});
    }
};

}  // namespace
}  // namespace cpu
