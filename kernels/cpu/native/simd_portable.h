// Sixteen lanes in plain C++: any processor, and the meaning of each operation. Included inside a namespace.
//
// The x86 versions give the same bits, but for the fused multiply-add where this processor has none.

struct F {
    float v[16];
};
struct I {
    int32_t v[16];
};

#define EACH for (int i = 0; i < 16; i++)

INLINE F load(const float *p) { F r; EACH r.v[i] = p[i]; return r; }
INLINE void store(float *p, const F &x) { EACH p[i] = x.v[i]; }
INLINE F set1(float x) { F r; EACH r.v[i] = x; return r; }
INLINE F add(const F &x, const F &y) { F r; EACH r.v[i] = x.v[i] + y.v[i]; return r; }
INLINE F sub(const F &x, const F &y) { F r; EACH r.v[i] = x.v[i] - y.v[i]; return r; }
INLINE F mul(const F &x, const F &y) { F r; EACH r.v[i] = x.v[i] * y.v[i]; return r; }
INLINE F div(const F &x, const F &y) { F r; EACH r.v[i] = x.v[i] / y.v[i]; return r; }
INLINE F max(const F &x, const F &y) { F r; EACH r.v[i] = x.v[i] > y.v[i] ? x.v[i] : y.v[i]; return r; }
INLINE F abs(const F &x) { F r; EACH r.v[i] = __builtin_fabsf(x.v[i]); return r; }
INLINE float fused(float x, float y, float z) {
#if defined(__FP_FAST_FMAF)
    return __builtin_fmaf(x, y, z);
#else
    return x * y + z;
#endif
}
// x * y + z
INLINE F fma(const F &x, const F &y, const F &z) { F r; EACH r.v[i] = fused(x.v[i], y.v[i], z.v[i]); return r; }
// x where the lane's number is below n, else y
INLINE F first(int n, const F &x, const F &y) { F r; EACH r.v[i] = i < n ? x.v[i] : y.v[i]; return r; }

INLINE float sum(const F &x) {
    float t[16];
    EACH t[i] = x.v[i];
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) t[i] = t[i] + t[i + width];
    return t[0];
}
INLINE float top(const F &x) {
    float t = x.v[0];
    for (int i = 1; i < 16; i++) t = x.v[i] > t ? x.v[i] : t;
    return t;
}

// 2^n for integral n in [-126, 127]
INLINE F exp2i(const F &n) {
    F r;
    EACH {
        const int32_t bits = (static_cast<int32_t>(n.v[i]) + 127) << 23;
        __builtin_memcpy(&r.v[i], &bits, 4);
    }
    return r;
}

INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | fraction << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else {  // zero or subnormal: fraction * 2^-24
        const float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
        __builtin_memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float r;
    __builtin_memcpy(&r, &bits, 4);
    return r;
}

INLINE uint16_t float_to_half(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
    if (size >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00);
    if (size < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
        float value;
        __builtin_memcpy(&value, &size, 4);
        value += 0.5f;
        uint32_t sum_bits;
        __builtin_memcpy(&sum_bits, &value, 4);
        return static_cast<uint16_t>(sign | (sum_bits - 0x3f000000u));
    }
    const uint32_t rounded = size + 0xfff + (size >> 13 & 1);
    return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

INLINE F load_f16(const uint16_t *p) { F r; EACH r.v[i] = half_to_float(p[i]); return r; }
INLINE void store_f16(uint16_t *p, const F &x) { EACH p[i] = float_to_half(x.v[i]); }
INLINE F load_bf16(const uint16_t *p) {
    F r;
    EACH {
        const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
        __builtin_memcpy(&r.v[i], &bits, 4);
    }
    return r;
}

INLINE F to_float(const I &x) { F r; EACH r.v[i] = static_cast<float>(x.v[i]); return r; }

// Round to the nearest integer, ties to even, and keep the low byte of each; returns their sum. |x| <= 127.
INLINE int32_t round_to_int8(int8_t *p, const F &x) {
    int32_t total = 0;
    EACH {
        const float shifted = x.v[i] + 12582912.0f;  // 1.5 * 2^23: the integer stands in the low bits
        int32_t bits;
        __builtin_memcpy(&bits, &shifted, 4);
        p[i] = static_cast<int8_t>(bits & 0xff);
        total += p[i];
    }
    return total;
}

// Dot products of one group: 16 outputs by 32 inputs (byte 64 j + 4 i + k holds output i, input 4 j + k).
template <int kRows> INLINE void dot_u4(I *out, const uint8_t *w, const int8_t *x, int64_t stride) {
    for (int r = 0; r < kRows; r++) EACH {
        int32_t total = 0;
        for (int j = 0; j < 8; j++)
            for (int k = 0; k < 4; k++) total += w[64 * j + 4 * i + k] * x[r * stride + 4 * j + k];
        out[r].v[i] = total;
    }
}
INLINE void unpack_u4(uint8_t *out, const uint8_t *w) {
    for (int b = 0; b < 256; b++) out[b] = w[b] & 15, out[256 + b] = w[b] >> 4;
}
template <int kRows> INLINE void dot_u4_packed(I *out, const uint8_t *w, const int8_t *x, int64_t stride) {
    uint8_t bytes[512];
    unpack_u4(bytes, w);
    dot_u4<kRows>(out, bytes, x, stride);
}
template <int kRows>
INLINE void dot_s8(I *out, const uint8_t *w, const int8_t *x, int64_t stride, const int32_t *, int64_t) {
    for (int r = 0; r < kRows; r++) EACH {
        int32_t total = 0;
        for (int j = 0; j < 8; j++)
            for (int k = 0; k < 4; k++)
                total += static_cast<int8_t>(w[64 * j + 4 * i + k]) * x[r * stride + 4 * j + k];
        out[r].v[i] = total;
    }
}
// out - 8 * group_sum, for weights stored with an offset of 8
INLINE void subtract_eights(I &x, int32_t group_sum) { EACH x.v[i] -= 8 * group_sum; }
INLINE void prefetch(const void *p) { __builtin_prefetch(p); }

// Eight lanes, for attention.
struct H {
    float v[8];
};
#define EACH8 for (int i = 0; i < 8; i++)
INLINE H zero8() { H r; EACH8 r.v[i] = 0.0f; return r; }
INLINE H load8(const float *p) { H r; EACH8 r.v[i] = p[i]; return r; }
INLINE H load8_f16(const uint16_t *p) { H r; EACH8 r.v[i] = half_to_float(p[i]); return r; }
INLINE H load8_bf16(const uint16_t *p) {
    H r;
    EACH8 {
        const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
        __builtin_memcpy(&r.v[i], &bits, 4);
    }
    return r;
}
INLINE H fma8(const H &x, const H &y, const H &z) { H r; EACH8 r.v[i] = fused(x.v[i], y.v[i], z.v[i]); return r; }
INLINE void sum_lanes(float *out, const H *x) {
    EACH8 {
        const float *a = x[i].v;
        out[i] = ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
    }
}
#undef EACH8

// out[d][p] = rows[p][d] for 16 positions p and `dims` dimensions; the rows hold floats.
INLINE void transpose(float *out, const float *rows, int64_t dims) {
    for (int64_t d = 0; d < dims; d++) EACH out[16 * d + i] = rows[i * dims + d];
}

#undef EACH
