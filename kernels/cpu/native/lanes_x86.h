// Eight lanes in a 256-bit register, for attention under AVX2 and AVX-512 alike. Included inside a namespace.

typedef __m256 H;

INLINE H zero8() { return _mm256_setzero_ps(); }
INLINE H load8(const float *p) { return _mm256_loadu_ps(p); }
INLINE H load8_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
INLINE H load8_bf16(const uint16_t *p) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
INLINE H fma8(const H &x, const H &y, const H &z) { return _mm256_fmadd_ps(x, y, z); }

// out[i] = sum of x[i], each as ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)).
INLINE void sum_lanes(float *out, const H *x) {
    // The shuffles below deal results out as 0 2 4 6 1 3 5 7: take the inputs in the order that undoes it.
    const int order[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    H half[4], quarter[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const H &p = x[order[2 * i]], &q = x[order[2 * i + 1]];
        half[i] = _mm256_add_ps(_mm256_permute2f128_ps(p, q, 0x20), _mm256_permute2f128_ps(p, q, 0x31));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        quarter[i] = _mm256_add_ps(_mm256_shuffle_ps(half[2 * i], half[2 * i + 1], 0x44),
                                   _mm256_shuffle_ps(half[2 * i], half[2 * i + 1], 0xee));
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_shuffle_ps(quarter[0], quarter[1], 0x88),
                                        _mm256_shuffle_ps(quarter[0], quarter[1], 0xdd)));
}

// transpose: out[d][p] = rows[p][d] for 16 positions p, by blocks of 8 x 8.

INLINE void transpose_8x8(float *out, const float *rows, int64_t dims) {
    __m256 r[8], s[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(rows + i * dims);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        t[4 * i] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0x44);
        t[4 * i + 1] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0xee);
        t[4 * i + 2] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0x44);
        t[4 * i + 3] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(out + 16 * i, _mm256_permute2f128_ps(t[i], t[i + 4], 0x20));
        _mm256_storeu_ps(out + 16 * (i + 4), _mm256_permute2f128_ps(t[i], t[i + 4], 0x31));
    }
}

INLINE void transpose(float *out, const float *rows, int64_t dims) {
    for (int64_t d = 0; d < dims; d += 8) {
        transpose_8x8(out + 16 * d, rows + d, dims);
        transpose_8x8(out + 16 * d + 8, rows + 8 * dims + d, dims);
    }
}
