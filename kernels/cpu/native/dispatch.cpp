// The C interface: checks what it is given, then calls the instruction set chosen for this processor.

#include <cstring>
#include <memory>
#include <new>

#include "isa.h"
#include "pack.h"

namespace {

const Isa *const kAll[] = {
#if defined(__x86_64__)
    &kAvx512Isa, &kAvx2Isa,
#endif
    &kPortableIsa};

bool runs_here(const Isa *isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == &kAvx2Isa) return avx2;
    if (isa == &kAvx512Isa)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return isa == &kPortableIsa;
}

// The named one, or the best where no name is given; null where this processor cannot run it.
const Isa *find(const char *name) {
    for (const Isa *isa : kAll)
        if ((!name || !*name || !std::strcmp(name, isa->name)) && runs_here(isa)) return isa;
    return nullptr;
}

struct Engine {
    Engine(const Isa *isa_, int num_threads) : isa(isa_), pool(num_threads) {}
    const Isa *isa;
    Pool pool;
    Scratch scratch;
};

bool known(const Matrix &m) {
    return m.format == kF32 || ((m.format == kQ8_0 || m.format == kQ4_0 || m.format == kQ4_1) && m.cols % kGroup == 0);
}

int32_t check_tables(const int32_t *query_start, const int32_t *seq_lens, const int32_t *tables, int64_t num_seqs,
                     int64_t max_blocks, int64_t block_size, int64_t num_blocks, int64_t num_rows) {
    if (query_start[0] != 0 || query_start[num_seqs] != num_rows) return kBadLength;
    for (int64_t seq = 0; seq < num_seqs; seq++) {
        const int64_t num_queries = query_start[seq + 1] - query_start[seq], length = seq_lens[seq];
        if (num_queries < 0 || length < num_queries || length > max_blocks * block_size) return kBadLength;
        for (int64_t i = 0; i < (length + block_size - 1) / block_size; i++) {
            const int32_t block = tables[seq * max_blocks + i];
            if (block < 0 || block >= num_blocks) return kBadBlock;
        }
    }
    return kOk;
}

int32_t check_batch(const Model &m, const Batch &b, const KvCache &kv) {
    if (kv.type < kKvF32 || kv.type > kKvBf16) return kBadFormat;
    for (int64_t row = 0; row < b.num_rows; row++) {
        if (b.token_ids[row] < 0 || b.token_ids[row] >= m.vocab) return kBadToken;
        if (b.positions[row] < 0 || b.positions[row] >= m.num_positions) return kBadPosition;
        if (b.slot_mapping[row] >= kv.num_blocks * kv.block_size) return kBadBlock;
    }
    for (int64_t i = 0; i < b.num_logits; i++)
        if (b.logits_indices[i] < 0 || b.logits_indices[i] >= b.num_rows) return kBadLength;
    return check_tables(b.query_start, b.seq_lens, b.block_tables, b.num_seqs, b.max_blocks, kv.block_size,
                        kv.num_blocks, b.num_rows);
}

}  // namespace

extern "C" {

int32_t baton_abi_version(void) { return kAbiVersion; }

// The best instruction set of this library that this processor has.
const char *baton_instruction_set(void) { return find(nullptr)->name; }

// Threads and working memory for one caller at a time. `isa` may be null: the best. Null where it cannot run here.
void *baton_open(const char *isa, int32_t num_threads) {
    const Isa *found = find(isa);
    return found ? new (std::nothrow) Engine(found, num_threads) : nullptr;
}

void baton_close(void *engine) { delete static_cast<Engine *>(engine); }

int32_t baton_forward(void *engine, const Model *model, const Batch *batch, const KvCache *kv) {
    Engine &e = *static_cast<Engine *>(engine);
    const int32_t code = check_batch(*model, *batch, *kv);
    return code != kOk || batch->num_rows == 0 ? code : e.isa->forward(*model, *batch, *kv, e.pool, e.scratch);
}

int32_t baton_linear(void *engine, const Matrix *matrix, const float *x, int64_t rows, float *out) {
    Engine &e = *static_cast<Engine *>(engine);
    return known(*matrix) ? e.isa->linear(*matrix, x, rows, out, e.pool, e.scratch) : kBadFormat;
}

int32_t baton_attention(void *engine, const Attention *a) {
    Engine &e = *static_cast<Engine *>(engine);
    const int32_t code = check_tables(a->query_start, a->seq_lens, a->block_tables, a->num_seqs, a->max_blocks,
                                      a->block_size, a->num_blocks, a->query_start[a->num_seqs]);
    return code != kOk ? code : e.isa->attention(*a, e.pool, e.scratch);
}

void baton_rms_norm(void *engine, const float *x, const float *weight, float eps, int64_t rows, int64_t cols,
                    float *out) {
    static_cast<Engine *>(engine)->isa->rms_norm(x, weight, eps, rows, cols, out);
}

void baton_silu_mul(void *engine, const float *gate_up, int64_t rows, int64_t cols, float *out) {
    static_cast<Engine *>(engine)->isa->silu_mul(gate_up, rows, cols, out);
}

void baton_rope(void *engine, float *x, const int64_t *positions, const float *cos, const float *sin, int64_t rows,
                int64_t heads, int64_t dims) {
    static_cast<Engine *>(engine)->isa->rope(x, positions, cos, sin, rows, heads, dims);
}

void baton_store_kv(void *engine, const float *k, const float *v, const KvCache *kv, const int64_t *slots,
                    int64_t rows) {
    static_cast<Engine *>(engine)->isa->store_kv(k, v, *kv, slots, rows);
}

int64_t baton_packed_bytes(int32_t format, int64_t rows, int64_t cols) {
    return num_tiles(rows) * tile_bytes(format, cols);
}

int32_t baton_pack_blocks(int32_t format, const uint8_t *blocks, const int64_t *order, int64_t first, int64_t count,
                          int64_t cols, uint8_t *packed) {
    return pack_blocks(format, blocks, order, first, count, cols, packed);
}

int32_t baton_pack_floats(int32_t format, const float *values, const int64_t *order, int64_t first, int64_t count,
                          int64_t cols, uint8_t *packed) {
    return pack_floats(format, values, order, first, count, cols, packed);
}
}
