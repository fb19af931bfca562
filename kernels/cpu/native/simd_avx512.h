// Sixteen lanes as one 512-bit register: AVX-512 F, BW, VL and VNNI. Included inside a namespace; see simd_portable.h.

struct F {
    __m512 a;
};
struct I {
    __m512i a;
};

INLINE F load(const float *p) { return {_mm512_loadu_ps(p)}; }
INLINE void store(float *p, const F &x) { _mm512_storeu_ps(p, x.a); }
INLINE F set1(float x) { return {_mm512_set1_ps(x)}; }
INLINE F add(const F &x, const F &y) { return {_mm512_add_ps(x.a, y.a)}; }
INLINE F sub(const F &x, const F &y) { return {_mm512_sub_ps(x.a, y.a)}; }
INLINE F mul(const F &x, const F &y) { return {_mm512_mul_ps(x.a, y.a)}; }
INLINE F div(const F &x, const F &y) { return {_mm512_div_ps(x.a, y.a)}; }
INLINE F max(const F &x, const F &y) { return {_mm512_max_ps(x.a, y.a)}; }
INLINE F abs(const F &x) { return {_mm512_abs_ps(x.a)}; }
INLINE F fma(const F &x, const F &y, const F &z) { return {_mm512_fmadd_ps(x.a, y.a, z.a)}; }
INLINE F first(int n, const F &x, const F &y) {
    const unsigned bits = n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1;
    return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), y.a, x.a)};
}

INLINE __m256 upper_half(__m512 x) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)); }
// Halves first, as the other versions do: the order of a sum is part of the result.
INLINE float sum(const F &x) {
    const __m256 t = _mm256_add_ps(_mm512_castps512_ps256(x.a), upper_half(x.a));
    __m128 u = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
    u = _mm_add_ps(u, _mm_movehl_ps(u, u));
    return _mm_cvtss_f32(_mm_add_ss(u, _mm_movehdup_ps(u)));
}
INLINE float top(const F &x) { return _mm512_reduce_max_ps(x.a); }

INLINE F exp2i(const F &n) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvttps_epi32(n.a), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}

INLINE __m256i load256(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
INLINE F load_f16(const uint16_t *p) { return {_mm512_cvtph_ps(load256(p))}; }
INLINE void store_f16(uint16_t *p, const F &x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
}
INLINE F load_bf16(const uint16_t *p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16))};
}

INLINE F to_float(const I &x) { return {_mm512_cvtepi32_ps(x.a)}; }

INLINE int32_t round_to_int8(int8_t *p, const F &x) {
    const __m512i words = _mm512_cvtps_epi32(x.a);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtsepi32_epi8(words));
    return _mm512_reduce_add_epi32(words);
}

INLINE __m512i four_bytes(const int8_t *x) {
    int32_t word;
    __builtin_memcpy(&word, x, 4);
    return _mm512_set1_epi32(word);
}

template <int kRows> INLINE void dot_u4(I *out, const uint8_t *w, const int8_t *x, int64_t stride) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) out[r].a = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        const __m512i bytes = _mm512_loadu_si512(w + 64 * j);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++)
            out[r].a = _mm512_dpbusd_epi32(out[r].a, bytes, four_bytes(x + r * stride + 4 * j));
    }
}
INLINE void unpack_u4(uint8_t *out, const uint8_t *w) {
    const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i bytes = _mm512_loadu_si512(w + 64 * j);
        _mm512_storeu_si512(out + 64 * j, _mm512_and_si512(bytes, mask));
        _mm512_storeu_si512(out + 256 + 64 * j, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask));
    }
}
template <int kRows> INLINE void dot_u4_packed(I *out, const uint8_t *w, const int8_t *x, int64_t stride) {
    const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) out[r].a = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i bytes = _mm512_loadu_si512(w + 64 * j);
        const __m512i low = _mm512_and_si512(bytes, mask), high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) {
            out[r].a = _mm512_dpbusd_epi32(out[r].a, low, four_bytes(x + r * stride + 4 * j));
            out[r].a = _mm512_dpbusd_epi32(out[r].a, high, four_bytes(x + r * stride + 16 + 4 * j));
        }
    }
}
// The instruction wants unsigned weights: add 128 (flip the top bit), and take 128 times the group's sum off again.
template <int kRows>
INLINE void dot_s8(I *out, const uint8_t *w, const int8_t *x, int64_t stride, const int32_t *sums, int64_t sum_stride) {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) out[r].a = _mm512_set1_epi32(-128 * sums[r * sum_stride]);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        const __m512i bytes = _mm512_xor_si512(_mm512_loadu_si512(w + 64 * j), flip);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++)
            out[r].a = _mm512_dpbusd_epi32(out[r].a, bytes, four_bytes(x + r * stride + 4 * j));
    }
}
INLINE void subtract_eights(I &x, int32_t group_sum) {
    x.a = _mm512_sub_epi32(x.a, _mm512_set1_epi32(8 * group_sum));
}
INLINE void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }

#include "lanes_x86.h"
