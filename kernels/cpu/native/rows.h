// What a step does to single rows: norms, rotation, SiLU, quantisation, embedding. Included inside a namespace.
//
// Each function works on one row and always in the same order, so that a row's result depends on nothing else.

// exp(x) for x <= 88, relative error about 2e-7; x below -87 counts as -87 (about 1e-38).
INLINE F exp(const F &x) {
    const F bounded = max(x, set1(-87.0f));
    // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even.
    const F magic = set1(12582912.0f);
    const F n = sub(fma(bounded, set1(1.44269504f), magic), magic);
    const F f = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), bounded));
    F p = fma(f, set1(1.9875691500e-4f), set1(1.3981999507e-3f));
    p = fma(p, f, set1(8.3334519073e-3f));
    p = fma(p, f, set1(4.1665795894e-2f));
    p = fma(p, f, set1(1.6666665459e-1f));
    p = fma(p, f, set1(5.0000001201e-1f));
    p = fma(mul(p, f), f, add(f, set1(1.0f)));
    return mul(p, exp2i(n));
}

// cols is a multiple of 16 throughout.
INLINE void rms_norm_row(const float *x, const float *weight, float eps, int64_t cols, float *out) {
    F total = set1(0.0f);
    for (int64_t c = 0; c < cols; c += 16) total = fma(load(x + c), load(x + c), total);
    const F factor = set1(1.0f / __builtin_sqrtf(sum(total) / static_cast<float>(cols) + eps));
    for (int64_t c = 0; c < cols; c += 16) store(out + c, mul(load(weight + c), mul(load(x + c), factor)));
}

INLINE void add_row(float *x, const float *y, int64_t cols) {
    for (int64_t c = 0; c < cols; c += 16) store(x + c, add(load(x + c), load(y + c)));
}

INLINE void silu_mul_row(const float *gate_up, int64_t cols, float *out) {
    for (int64_t c = 0; c < cols; c += 16) {
        const F gate = load(gate_up + c), up = load(gate_up + cols + c);
        // Beyond 87 the sigmoid is 0 or 1 in float32 anyway.
        const F bounded = max(gate, set1(-87.0f)), e = exp(sub(set1(0.0f), bounded));
        store(out + c, mul(up, div(bounded, add(set1(1.0f), e))));
    }
}

// Rotate one head: element i pairs with i + dims / 2. dims is a multiple of 16, so the half is one of 8.
INLINE void rope_head(float *x, const float *cos, const float *sin, int64_t dims) {
    const int64_t half = dims / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[i] + a * sin[i];
    }
}

INLINE uint16_t float_to_bf16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE int64_t kv_bytes(int32_t type) { return type == kKvF32 ? 4 : 2; }

INLINE void store_kv_head(uint8_t *out, int32_t type, const float *x, int64_t dims) {
    if (type == kKvF32) {
        __builtin_memcpy(out, x, static_cast<size_t>(dims) * 4);
        return;
    }
    uint16_t *halves = reinterpret_cast<uint16_t *>(out);
    if (type == kKvF16)
        for (int64_t d = 0; d < dims; d += 16) store_f16(halves + d, load(x + d));
    else
        for (int64_t d = 0; d < dims; d++) halves[d] = float_to_bf16(x[d]);
}

INLINE void load_kv_head(float *out, int32_t type, const uint8_t *x, int64_t dims) {
    const uint16_t *halves = reinterpret_cast<const uint16_t *>(x);
    if (type == kKvF32)
        __builtin_memcpy(out, x, static_cast<size_t>(dims) * 4);
    else if (type == kKvF16)
        for (int64_t d = 0; d < dims; d += 16) store(out + d, load_f16(halves + d));
    else
        for (int64_t d = 0; d < dims; d += 16) store(out + d, load_bf16(halves + d));
}

// Rows as integers for the quantised products: x ~ scale * codes per group of 32.
struct Activations {
    int8_t *codes;      // [rows, cols]
    float *scales;      // [rows, groups]
    float *offsets;     // [rows, groups]: scale * sum of the group's codes
    int32_t *sums;      // [rows, groups]
    int64_t cols, groups;
};

INLINE Activations from_row(const Activations &x, int64_t row) {
    return {x.codes + row * x.cols, x.scales + row * x.groups, x.offsets + row * x.groups, x.sums + row * x.groups,
            x.cols, x.groups};
}

INLINE void quantise_row(const float *x, const Activations &out, int64_t row) {
    const Activations to = from_row(out, row);
    for (int64_t g = 0; g < out.groups; g++) {
        const F a = load(x + g * kGroup), b = load(x + g * kGroup + 16);
        const float extreme = top(max(abs(a), abs(b)));
        const float scale = extreme / 127.0f, inverse = extreme > 0.0f ? 127.0f / extreme : 0.0f;
        int32_t total = round_to_int8(to.codes + g * kGroup, mul(a, set1(inverse)));
        total += round_to_int8(to.codes + g * kGroup + 16, mul(b, set1(inverse)));
        to.scales[g] = scale;
        to.sums[g] = total;
        to.offsets[g] = scale * static_cast<float>(total);
    }
}

// One row of a packed matrix as floats: the embedding of a token.
INLINE void unpack_row(const Matrix &m, int64_t row, float *out) {
    const uint8_t *tile = m.data + row / kTile * tile_bytes(m.format, m.cols);
    const int64_t i = row % kTile, groups = m.cols / kGroup;
    if (m.format == kF32) {
        for (int64_t k = 0; k < m.cols; k++) __builtin_memcpy(out + k, tile + (k * kTile + i) * 4, 4);
        return;
    }
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *codes = tile + g * group_bytes(m.format);
        uint16_t scales[16], minima[16];
        float d[16], least[16];
        const uint8_t *at = codes + code_bytes(m.format);
        __builtin_memcpy(scales, at, sizeof scales);
        __builtin_memcpy(minima, m.format == kQ4_1 ? at + kTile * 2 : at, sizeof minima);
        store(d, load_f16(scales));
        store(least, load_f16(minima));
        for (int64_t k = 0; k < kGroup; k++) {
            const int64_t b = k / 4 * 64 + 4 * i + k % 4;
            const int nibble = b < 256 ? codes[b] & 15 : codes[b - 256] >> 4;
            float *to = out + g * kGroup + k;
            if (m.format == kQ8_0)
                *to = d[i] * static_cast<float>(static_cast<int8_t>(codes[b]));
            else if (m.format == kQ4_0)
                *to = d[i] * static_cast<float>(nibble - 8);
            else
                *to = d[i] * static_cast<float>(nibble) + least[i];
        }
    }
}
