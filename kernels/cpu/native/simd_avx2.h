// Sixteen lanes as two 256-bit registers: AVX2, FMA and F16C. Included inside a namespace; see simd_portable.h.

struct F {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};

INLINE F load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float *p, const F &x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
INLINE F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F add(const F &x, const F &y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE F sub(const F &x, const F &y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE F mul(const F &x, const F &y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE F div(const F &x, const F &y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE F max(const F &x, const F &y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE F abs(const F &x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE F fma(const F &x, const F &y, const F &z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE F first(int n, const F &x, const F &y) {
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), limit = _mm256_set1_epi32(n);
    const __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
    return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, low))),
            _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, high)))};
}

INLINE float sum(const F &x) {
    const __m256 t = _mm256_add_ps(x.a, x.b);
    __m128 u = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
    u = _mm_add_ps(u, _mm_movehl_ps(u, u));
    return _mm_cvtss_f32(_mm_add_ss(u, _mm_movehdup_ps(u)));
}
INLINE float top(const F &x) {
    const __m256 t = _mm256_max_ps(x.a, x.b);
    __m128 u = _mm_max_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
    u = _mm_max_ps(u, _mm_movehl_ps(u, u));
    return _mm_cvtss_f32(_mm_max_ss(u, _mm_movehdup_ps(u)));
}

INLINE __m256 exp2i_half(__m256 n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
INLINE F exp2i(const F &n) { return {exp2i_half(n.a), exp2i_half(n.b)}; }

INLINE __m128i load128(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
INLINE __m256i load256(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
INLINE F load_f16(const uint16_t *p) { return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))}; }
INLINE void store_f16(uint16_t *p, const F &x) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
INLINE __m256 widen_bf16(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
INLINE F load_bf16(const uint16_t *p) { return {widen_bf16(load128(p)), widen_bf16(load128(p + 8))}; }

INLINE F to_float(const I &x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

INLINE int32_t round_to_int8(int8_t *p, const F &x) {
    const __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), bytes);
    const __m256i t = _mm256_add_epi32(a, b);
    __m128i u = _mm_add_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1));
    u = _mm_add_epi32(u, _mm_shuffle_epi32(u, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(u, _mm_shuffle_epi32(u, 0xb1)));
}

INLINE __m256i four_bytes(const int8_t *x) {
    int32_t word;
    __builtin_memcpy(&word, x, 4);
    return _mm256_set1_epi32(word);
}

// Compilers like to collect many products first and add them later, which spills every register: make them add now.
INLINE void settle(__m256i &x) { __asm__("" : "+x"(x)); }
INLINE void add16(__m256i &total, __m256i x) {
    total = _mm256_add_epi16(total, x);
    settle(total);
}
INLINE void add32(__m256i &total, __m256i x) {
    total = _mm256_add_epi32(total, x);
    settle(total);
}

// Products of 4 bits by 8 bits: eight pairs of them fit 16 bits (8 * 2 * 15 * 127 = 30,480), so widen once a group.
template <int kRows> INLINE void dot_u4(I *out, const uint8_t *w, const int8_t *x, int64_t stride) {
    __m256i a[kRows], b[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) a[r] = b[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        const __m256i low = load256(w + 64 * j), high = load256(w + 64 * j + 32);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) {
            const __m256i four = four_bytes(x + r * stride + 4 * j);
            add16(a[r], _mm256_maddubs_epi16(low, four));
            add16(b[r], _mm256_maddubs_epi16(high, four));
        }
    }
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) out[r] = {_mm256_madd_epi16(a[r], ones), _mm256_madd_epi16(b[r], ones)};
}
INLINE void unpack_u4(uint8_t *out, const uint8_t *w) {
    const __m256i mask = _mm256_set1_epi8(15);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        const __m256i bytes = load256(w + 32 * j);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + 32 * j), _mm256_and_si256(bytes, mask));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + 256 + 32 * j),
                            _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask));
    }
}
template <int kRows> INLINE void dot_u4_packed(I *out, const uint8_t *w, const int8_t *x, int64_t stride) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i a[kRows], b[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) a[r] = b[r] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m256i p = load256(w + 64 * j), q = load256(w + 64 * j + 32);
        const __m256i p_low = _mm256_and_si256(p, mask), p_high = _mm256_and_si256(_mm256_srli_epi16(p, 4), mask);
        const __m256i q_low = _mm256_and_si256(q, mask), q_high = _mm256_and_si256(_mm256_srli_epi16(q, 4), mask);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) {
            const __m256i near = four_bytes(x + r * stride + 4 * j), far = four_bytes(x + r * stride + 16 + 4 * j);
            add16(a[r], _mm256_maddubs_epi16(p_low, near));
            add16(b[r], _mm256_maddubs_epi16(q_low, near));
            add16(a[r], _mm256_maddubs_epi16(p_high, far));
            add16(b[r], _mm256_maddubs_epi16(q_high, far));
        }
    }
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) out[r] = {_mm256_madd_epi16(a[r], ones), _mm256_madd_epi16(b[r], ones)};
}

// Signed by signed: move the weight's sign to the input, since the instruction wants one unsigned side.
// 2 * 128 * 127 = 32,512 fits 16 bits, two such sums do not: widen each time.
template <int kRows>
INLINE void dot_s8(I *out, const uint8_t *w, const int8_t *x, int64_t stride, const int32_t *, int64_t) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) out[r].a = out[r].b = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        const __m256i low = load256(w + 64 * j), high = load256(w + 64 * j + 32);
        const __m256i low_size = _mm256_abs_epi8(low), high_size = _mm256_abs_epi8(high);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) {
            const __m256i four = four_bytes(x + r * stride + 4 * j);
            const __m256i p = _mm256_maddubs_epi16(low_size, _mm256_sign_epi8(four, low));
            const __m256i q = _mm256_maddubs_epi16(high_size, _mm256_sign_epi8(four, high));
            add32(out[r].a, _mm256_madd_epi16(p, ones));
            add32(out[r].b, _mm256_madd_epi16(q, ones));
        }
    }
}
INLINE void subtract_eights(I &x, int32_t group_sum) {
    const __m256i eights = _mm256_set1_epi32(8 * group_sum);
    x = {_mm256_sub_epi32(x.a, eights), _mm256_sub_epi32(x.b, eights)};
}
INLINE void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }

#include "lanes_x86.h"
