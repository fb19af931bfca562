// The body that each instruction set compiles for itself. Included inside a namespace, after one of simd_*.h.

#include "rows.h"
#include "linear.h"
#include "attention.h"
#include "step.h"

static int32_t linear_entry(const Matrix &m, const float *x, int64_t rows, float *out, Pool &pool, Scratch &scratch) {
    const int64_t num_groups = m.cols / kGroup;
    Carver counting(nullptr);
    counting.take<int8_t>(rows * m.cols);
    for (int i = 0; i < 3; i++) counting.take<float>(rows * num_groups);
    uint8_t *memory = scratch.reserve(counting.used() + 64);
    if (!memory) return kNoMemory;
    Carver carver(memory);
    Activations codes = {};
    codes.codes = carver.take<int8_t>(rows * m.cols);
    codes.scales = carver.take<float>(rows * num_groups), codes.offsets = carver.take<float>(rows * num_groups);
    codes.sums = carver.take<int32_t>(rows * num_groups), codes.cols = m.cols, codes.groups = num_groups;
    if (m.format != kF32)
        for (int64_t row = 0; row < rows; row++) quantise_row(x + row * m.cols, codes, row);
    const Linear l = {&m, x, &codes, rows, out, m.rows, false};
    linear(l, pool);
    return kOk;
}

static int32_t attention_entry(const Attention &a, Pool &pool, Scratch &scratch) {
    const int64_t piece = attention_scratch_bytes(a), starts = (a.num_seqs + 1) * 8 + 64;
    uint8_t *memory = scratch.reserve(piece * pool.size() + starts);
    if (!memory) return kNoMemory;
    int64_t *unit_start = reinterpret_cast<int64_t *>(memory + piece * pool.size());
    count_units(a, unit_start);
    const AttentionWork work = {&a, memory, piece, unit_start};
    pool.run(attend_units, const_cast<AttentionWork *>(&work), unit_start[a.num_seqs], 1);
    return kOk;
}

static void rms_norm_entry(const float *x, const float *weight, float eps, int64_t rows, int64_t cols, float *out) {
    for (int64_t row = 0; row < rows; row++) rms_norm_row(x + row * cols, weight, eps, cols, out + row * cols);
}

static void silu_mul_entry(const float *gate_up, int64_t rows, int64_t cols, float *out) {
    for (int64_t row = 0; row < rows; row++) silu_mul_row(gate_up + row * 2 * cols, cols, out + row * cols);
}

static void rope_entry(float *x, const int64_t *positions, const float *cos, const float *sin, int64_t rows,
                       int64_t heads, int64_t dims) {
    for (int64_t i = 0; i < rows * heads; i++) {
        const int64_t position = positions[i / heads];
        rope_head(x + i * dims, cos + position * (dims / 2), sin + position * (dims / 2), dims);
    }
}

static void store_kv_entry(const float *k, const float *v, const KvCache &kv, const int64_t *slots, int64_t rows) {
    const int64_t dims = kv.head_dim, size = kv_bytes(kv.type), to_values = kv.num_kv_heads * kv.block_size * dims;
    for (int64_t row = 0; row < rows; row++) {
        if (slots[row] < 0) continue;
        for (int64_t head = 0; head < kv.num_kv_heads; head++) {
            const int64_t block = slots[row] / kv.block_size, offset = slots[row] % kv.block_size;
            const int64_t at = block * kv.block_stride + (head * kv.block_size + offset) * dims;
            const int64_t from = (row * kv.num_kv_heads + head) * dims;
            store_kv_head(kv.data + at * size, kv.type, k + from, dims);
            store_kv_head(kv.data + (at + to_values) * size, kv.type, v + from, dims);
        }
    }
}

static constexpr Isa table(const char *name) {
    return {name, forward, linear_entry, attention_entry, rms_norm_entry, silu_mul_entry, rope_entry, store_kv_entry};
}
