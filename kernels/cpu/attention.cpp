// Paged decode attention in float32, single-threaded, for grouped query heads.
//
// A row's result depends on its own query, blocks and length only: the order of every sum is fixed (8 lanes over
// head_dim, positions in tiles of 8 from the first on), so it is bitwise the same in any batch.
// The kernel body is compiled once per instruction set and chosen at run time by what the processor has.

#include <cstdint>
#include <cstring>

namespace {

typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
#define INLINE static inline __attribute__((always_inline))

constexpr int kLanes = 8;       // floats per vector, and positions per tile
constexpr int kMaxHeads = 32;   // query heads whose running state is kept at once

struct Args {
    const float *q;
    const float *kv;
    const int32_t *block_tables;
    const int32_t *seq_lens;
    float *out;
    int64_t batch, num_heads, num_kv_heads, head_dim, block_size, max_blocks, num_blocks, block_stride;
    float scale;
};

INLINE void load(vf &r, const float *p) { std::memcpy(&r, p, sizeof r); }
INLINE void store(float *p, const vf &r) { std::memcpy(p, &r, sizeof r); }
INLINE void splat(vf &r, float x) { r = (vf){x, x, x, x, x, x, x, x}; }

// exp(x) for x <= 0: 2^n * 2^f with a degree-6 polynomial; relative error about 2e-7; below -87 it is about 1e-38.
INLINE void exp_nonpositive(vf &r, vf x) {
    vf low, half;
    splat(low, -87.0f);
    splat(half, 0.5f);
    const vi clamp = x < low;
    x = (vf)(((vi)low & clamp) | ((vi)x & ~clamp));
    const vf t = x * 1.44269504f;
    // x <= 0, so truncation after subtracting one half rounds to nearest.
    const vi n = __builtin_convertvector(t - half, vi);
    const vf nf = __builtin_convertvector(n, vf);
    const vf f = (x - nf * 0.693359375f) + nf * 2.12194440e-4f;
    vf p = f * 1.3981999507e-3f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    r = p * (vf)((n + 127) << 23);
}

// Sum the lanes of eight vectors: r[i] = sum(a[i]).
INLINE void sum_lanes(vf &r, const vf *a) {
    vf b[4], c[2];
    for (int i = 0; i < 4; i++)
        b[i] = SHUFFLE(a[2 * i], a[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               SHUFFLE(a[2 * i], a[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    for (int i = 0; i < 2; i++)
        c[i] = SHUFFLE(b[2 * i], b[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               SHUFFLE(b[2 * i], b[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    r = SHUFFLE(c[0], c[1], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(c[0], c[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

INLINE void score_tile(vf &scores, const float *q, const float *const *rows, int64_t head_dim) {
    vf acc[kLanes] = {};
    for (int64_t d = 0; d < head_dim; d += kLanes) {
        vf qd;
        load(qd, q + d);
#pragma GCC unroll 8
        for (int p = 0; p < kLanes; p++) {
            vf kd;
            load(kd, rows[p] + d);
            acc[p] += qd * kd;
        }
    }
    sum_lanes(scores, acc);
}

template <int kVectors>
INLINE void add_values(float *out, const float *values, int64_t head_dim, const float *weights, int num_valid) {
    vf acc[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) load(acc[j], out + j * kLanes);
    for (int p = 0; p < num_valid; p++) {
        vf w;
        splat(w, weights[p]);
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; j++) {
            vf vd;
            load(vd, values + p * head_dim + j * kLanes);
            acc[j] += w * vd;
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) store(out + j * kLanes, acc[j]);
}

INLINE void scale_row(float *out, int64_t head_dim, float factor) {
    vf f;
    splat(f, factor);
    for (int64_t d = 0; d < head_dim; d += kLanes) {
        vf x;
        load(x, out + d);
        store(out + d, x * f);
    }
}

// One tile of up to 8 positions for one query head: online softmax with running maximum m and sum l.
INLINE void attend_tile(const float *q, const float *const *rows, const float *values, int num_valid,
                        int64_t head_dim, float scale, float &m, float &l, float *out) {
    vf s, w, m_now;
    score_tile(s, q, rows, head_dim);
    s = s * scale;
    float top = m;
    for (int p = 0; p < num_valid; p++) top = s[p] > top ? s[p] : top;
    if (top > m) {  // earlier tiles were weighed against a smaller maximum
        vf shift, factor;
        splat(shift, m - top);
        exp_nonpositive(factor, shift);
        scale_row(out, head_dim, factor[0]);
        l *= factor[0];
        m = top;
    }
    splat(m_now, m);
    exp_nonpositive(w, s - m_now);
    float weights[kLanes];
    store(weights, w);
    for (int p = 0; p < num_valid; p++) l += weights[p];
    int64_t d = 0;
    for (; d + 64 <= head_dim; d += 64) add_values<8>(out + d, values + d, head_dim, weights, num_valid);
    for (; d < head_dim; d += kLanes) add_values<1>(out + d, values + d, head_dim, weights, num_valid);
}

// All query heads [first, first + count) of one KV head of one row.
INLINE int attend_heads(const Args &a, int64_t row, int64_t kv_head, int64_t first, int count) {
    const int64_t seq_len = a.seq_lens[row], head_size = a.block_size * a.head_dim;
    const int32_t *table = a.block_tables + row * a.max_blocks;
    const float *q = a.q + (row * a.num_heads + first) * a.head_dim;
    float *out = a.out + (row * a.num_heads + first) * a.head_dim;
    float m[kMaxHeads], l[kMaxHeads];
    for (int g = 0; g < count; g++) m[g] = -3.0e38f, l[g] = 0.0f;
    std::memset(out, 0, sizeof(float) * count * a.head_dim);
    for (int64_t start = 0; start < seq_len; start += a.block_size) {
        const int32_t block = table[start / a.block_size];
        if (block < 0 || block >= a.num_blocks) return 1;
        const float *keys = a.kv + block * a.block_stride + kv_head * head_size;
        const float *values = keys + a.num_kv_heads * head_size;
        const int64_t in_block = seq_len - start < a.block_size ? seq_len - start : a.block_size;
        for (int64_t t = 0; t < in_block; t += kLanes) {
            const int num_valid = in_block - t < kLanes ? (int)(in_block - t) : kLanes;
            // Positions past the context repeat the last valid row; their weight is never used.
            const float *rows[kLanes];
            for (int p = 0; p < kLanes; p++) rows[p] = keys + (t + (p < num_valid ? p : num_valid - 1)) * a.head_dim;
            for (int g = 0; g < count; g++)
                attend_tile(q + g * a.head_dim, rows, values + t * a.head_dim, num_valid, a.head_dim, a.scale, m[g],
                            l[g], out + g * a.head_dim);
        }
    }
    for (int g = 0; g < count; g++)
        if (l[g] > 0.0f) scale_row(out + g * a.head_dim, a.head_dim, 1.0f / l[g]);
    return 0;
}

INLINE int attend_batch(const Args &a) {
    const int64_t group = a.num_heads / a.num_kv_heads;
    for (int64_t row = 0; row < a.batch; row++) {
        if (a.seq_lens[row] < 0 || a.seq_lens[row] > a.max_blocks * a.block_size) return 2;
        for (int64_t kv_head = 0; kv_head < a.num_kv_heads; kv_head++)
            for (int64_t g = 0; g < group; g += kMaxHeads) {
                const int count = group - g < kMaxHeads ? (int)(group - g) : kMaxHeads;
                const int code = attend_heads(a, row, kv_head, kv_head * group + g, count);
                if (code) return code;
            }
    }
    return 0;
}

typedef int (*Kernel)(const Args &);

int attend_default(const Args &a) { return attend_batch(a); }
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) int attend_avx2(const Args &a) { return attend_batch(a); }
__attribute__((target("avx512f,avx512vl,avx2,fma"))) int attend_avx512(const Args &a) { return attend_batch(a); }
#endif

struct Choice {
    Kernel kernel;
    const char *name;
};

Choice choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
        return {attend_avx512, "avx512"};
    if (avx2) return {attend_avx2, "avx2"};
#endif
    return {attend_default, "default"};
}

const Choice kChoice = choose();

}  // namespace

extern "C" {

// Raised whenever a signature below changes: the loader refuses another number.
int32_t baton_abi_version(void) { return 1; }

const char *baton_instruction_set(void) { return kChoice.name; }

// q and out [batch, num_heads, head_dim]; kv: the K of block 0 of one layer, consecutive blocks block_stride floats
// apart, each [2, num_kv_heads, block_size, head_dim]; block_tables [batch, max_blocks]; seq_lens [batch].
// Returns 0, 1 for a block id outside the cache, 2 for a length that its block table cannot hold.
int32_t baton_paged_decode_attention(const float *q, const float *kv, const int32_t *block_tables,
                                     const int32_t *seq_lens, float *out, int64_t batch, int64_t num_heads,
                                     int64_t num_kv_heads, int64_t head_dim, int64_t block_size, int64_t max_blocks,
                                     int64_t num_blocks, int64_t block_stride, float scale) {
    const Args a = {q,        kv,         block_tables, seq_lens,   out,          batch, num_heads, num_kv_heads,
                    head_dim, block_size, max_blocks,   num_blocks, block_stride, scale};
    return kChoice.kernel(a);
}
}
