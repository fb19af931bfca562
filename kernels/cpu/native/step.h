// One forward of a whole batch, decode or prefill: the same code for both. Included inside a namespace.
//
//   embed ─► per layer: norm ─► qkv ─► rotate, write KV ─► (on_layer) ─► attention ─► output ─► norm ─► gate, up
//   ─► SiLU ─► down ─► after the last layer's attention only the rows with logits go on ─► norm ─► logits

struct Memory {
    float *hidden, *normed, *qkv, *attended, *gate_up, *kept_hidden, *kept_attended;
    Activations codes;
    int64_t *unit_start;
    uint8_t *attention;
    int64_t attention_bytes;
};

struct Step {
    const Model &model;
    const Batch &batch;
    const KvCache &kv;
    Pool &pool;
    Memory memory;
};

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t qkv_width(const Model &m) { return (m.num_heads + 2 * m.num_kv_heads) * m.head_dim; }

INLINE Attention attention_of(const Step &s, int64_t layer) {
    const int64_t size = kv_bytes(s.kv.type);
    Attention a = {};
    a.q = s.memory.qkv, a.out = s.memory.attended, a.q_stride = qkv_width(s.model);
    a.query_start = s.batch.query_start, a.seq_lens = s.batch.seq_lens, a.block_tables = s.batch.block_tables;
    a.kv = s.kv.data + layer * s.kv.layer_stride * size, a.kv_type = s.kv.type;
    a.num_seqs = s.batch.num_seqs, a.num_heads = s.model.num_heads, a.num_kv_heads = s.model.num_kv_heads;
    a.head_dim = s.model.head_dim, a.block_size = s.kv.block_size, a.max_blocks = s.batch.max_blocks;
    a.num_blocks = s.kv.num_blocks, a.block_stride = s.kv.block_stride, a.scale = s.model.scale;
    return a;
}

static Memory carve_step(const Step &s, Carver &carver) {
    const Model &m = s.model;
    const int64_t rows = s.batch.num_rows, kept = s.batch.num_logits, most = larger(rows, kept);
    const int64_t heads = m.num_heads * m.head_dim, widest = larger(larger(m.hidden, m.intermediate), heads);
    Memory memory = {};
    memory.hidden = carver.take<float>(rows * m.hidden);
    memory.normed = carver.take<float>(most * larger(m.hidden, m.intermediate));
    memory.qkv = carver.take<float>(rows * qkv_width(m));
    memory.attended = carver.take<float>(rows * heads);
    memory.gate_up = carver.take<float>(most * 2 * m.intermediate);
    memory.kept_hidden = carver.take<float>(kept * m.hidden);
    memory.kept_attended = carver.take<float>(kept * heads);
    memory.codes.codes = carver.take<int8_t>(most * widest);
    memory.codes.scales = carver.take<float>(most * (widest / kGroup + 1));
    memory.codes.offsets = carver.take<float>(most * (widest / kGroup + 1));
    memory.codes.sums = carver.take<int32_t>(most * (widest / kGroup + 1));
    memory.unit_start = carver.take<int64_t>(s.batch.num_seqs + 1);
    memory.attention_bytes = attention_scratch_bytes(attention_of(s, 0));
    memory.attention = carver.take<uint8_t>(memory.attention_bytes * s.pool.size());
    return memory;
}

// Run fn(row) for every row, on all threads.
template <class Fn> static void each_row(Pool &pool, int64_t rows, const Fn &fn) {
    const int64_t share = rows / (2 * pool.size());
    pool.run(
        [](void *context, int64_t begin, int64_t end, int) {
            for (int64_t row = begin; row < end; row++) (*static_cast<const Fn *>(context))(row);
        },
        const_cast<Fn *>(&fn), rows, share < 4 ? 4 : share);
}

INLINE Activations codes_for(const Step &s, const Matrix &m) {
    Activations codes = s.memory.codes;
    codes.cols = m.cols, codes.groups = m.cols / kGroup;
    return codes;
}

// Products with rows that stand in `values`, and in `codes` where the matrix is quantised.
static void project(const Step &s, const Matrix &m, const float *values, int64_t rows, float *out, int64_t stride,
                    bool accumulate) {
    const Activations codes = codes_for(s, m);
    const Linear l = {&m, values, &codes, rows, out, stride, accumulate};
    linear(l, s.pool);
}

static void norm_rows(const Step &s, const float *hidden, const float *weight, int64_t rows, const Matrix &next) {
    const Model &m = s.model;
    const Activations codes = codes_for(s, next);
    each_row(s.pool, rows, [&](int64_t row) {
        float *normed = s.memory.normed + row * m.hidden;
        rms_norm_row(hidden + row * m.hidden, weight, m.eps, m.hidden, normed);
        if (next.format != kF32) quantise_row(normed, codes, row);
    });
}

INLINE void finish_qkv_row(const Step &s, const Layer &layer, int64_t index, int64_t row) {
    const Model &m = s.model;
    const KvCache &kv = s.kv;
    const int64_t dims = m.head_dim, position = s.batch.positions[row], slot = s.batch.slot_mapping[row];
    const float *cos = m.cos + position * (dims / 2), *sin = m.sin + position * (dims / 2);
    float *qkv = s.memory.qkv + row * qkv_width(m), *keys = qkv + m.num_heads * dims, *values = keys + m.num_kv_heads * dims;
    if (layer.qkv_bias) add_row(qkv, layer.qkv_bias, qkv_width(m));
    for (int64_t head = 0; head < m.num_heads; head++) {
        float *q = qkv + head * dims;
        if (layer.q_norm) rms_norm_row(q, layer.q_norm, m.eps, dims, q);
        rope_head(q, cos, sin, dims);
    }
    for (int64_t head = 0; head < m.num_kv_heads; head++) {
        float *k = keys + head * dims;
        if (layer.k_norm) rms_norm_row(k, layer.k_norm, m.eps, dims, k);
        rope_head(k, cos, sin, dims);
        if (slot < 0) continue;
        const int64_t block = slot / kv.block_size, offset = slot % kv.block_size, size = kv_bytes(kv.type);
        const int64_t at = block * kv.block_stride + index * kv.layer_stride + (head * kv.block_size + offset) * dims;
        store_kv_head(kv.data + at * size, kv.type, k, dims);
        const int64_t to_values = kv.num_kv_heads * kv.block_size * dims;
        store_kv_head(kv.data + (at + to_values) * size, kv.type, values + head * dims, dims);
    }
}

static void attend(const Step &s, int64_t layer) {
    const Attention a = attention_of(s, layer);
    const AttentionWork work = {&a, s.memory.attention, s.memory.attention_bytes, s.memory.unit_start};
    s.pool.run(attend_units, const_cast<AttentionWork *>(&work), s.memory.unit_start[a.num_seqs], 1);
}

static void count_units(const Attention &a, int64_t *unit_start) {
    const int64_t size = positions_per_unit(a);
    unit_start[0] = 0;
    for (int64_t seq = 0; seq < a.num_seqs; seq++) {
        const int64_t num_queries = a.query_start[seq + 1] - a.query_start[seq];
        unit_start[seq + 1] = unit_start[seq] + (num_queries + size - 1) / size * a.num_kv_heads;
    }
}

static void finish_layer(const Step &s, const Layer &layer, float *hidden, const float *attended, int64_t rows) {
    const Model &m = s.model;
    const int64_t heads = m.num_heads * m.head_dim;
    if (layer.attention_out.format != kF32) {
        const Activations codes = codes_for(s, layer.attention_out);
        each_row(s.pool, rows, [&](int64_t row) { quantise_row(attended + row * heads, codes, row); });
    }
    project(s, layer.attention_out, attended, rows, hidden, m.hidden, true);
    norm_rows(s, hidden, layer.mlp_norm, rows, layer.gate_up);
    project(s, layer.gate_up, s.memory.normed, rows, s.memory.gate_up, 2 * m.intermediate, false);
    const Activations codes = codes_for(s, layer.down);
    each_row(s.pool, rows, [&](int64_t row) {
        float *out = s.memory.normed + row * m.intermediate;
        silu_mul_row(s.memory.gate_up + row * 2 * m.intermediate, m.intermediate, out);
        if (layer.down.format != kF32) quantise_row(out, codes, row);
    });
    project(s, layer.down, s.memory.normed, rows, hidden, m.hidden, true);
}

// Go on with the wanted rows only: nothing after the last attention mixes rows.
static void keep_rows(const Step &s) {
    const int64_t hidden = s.model.hidden, heads = s.model.num_heads * s.model.head_dim;
    for (int64_t i = 0; i < s.batch.num_logits; i++) {
        const int64_t row = s.batch.logits_indices[i];
        __builtin_memcpy(s.memory.kept_hidden + i * hidden, s.memory.hidden + row * hidden, static_cast<size_t>(hidden) * 4);
        __builtin_memcpy(s.memory.kept_attended + i * heads, s.memory.attended + row * heads, static_cast<size_t>(heads) * 4);
    }
}

static void run_layers(const Step &s) {
    const Model &m = s.model;
    const Batch &b = s.batch;
    const int64_t rows = b.num_rows;
    each_row(s.pool, rows, [&](int64_t row) {
        unpack_row(m.embedding, b.token_ids[row], s.memory.hidden + row * m.hidden);
    });
    for (int64_t index = 0; index < m.num_layers; index++) {
        const Layer &layer = m.layers[index];
        const bool is_last = index + 1 == m.num_layers;
        norm_rows(s, s.memory.hidden, layer.attention_norm, rows, layer.qkv);
        project(s, layer.qkv, s.memory.normed, rows, s.memory.qkv, qkv_width(m), false);
        each_row(s.pool, rows, [&](int64_t row) { finish_qkv_row(s, layer, index, row); });
        if (b.on_layer && b.stops[index]) b.on_layer(index);
        if (is_last && b.num_logits == 0) return;
        attend(s, index);
        if (!is_last) finish_layer(s, layer, s.memory.hidden, s.memory.attended, rows);
    }
    keep_rows(s);
    finish_layer(s, m.layers[m.num_layers - 1], s.memory.kept_hidden, s.memory.kept_attended, b.num_logits);
    norm_rows(s, s.memory.kept_hidden, m.final_norm, b.num_logits, m.lm_head);
    project(s, m.lm_head, s.memory.normed, b.num_logits, b.logits, m.vocab, false);
}

static int32_t forward(const Model &model, const Batch &batch, const KvCache &kv, Pool &pool, Scratch &scratch) {
    Step s = {model, batch, kv, pool, {}};
    Carver counting(nullptr);
    carve_step(s, counting);
    uint8_t *memory = scratch.reserve(counting.used());
    if (!memory) return kNoMemory;
    Carver carver(memory);
    s.memory = carve_step(s, carver);
    count_units(attention_of(s, 0), s.memory.unit_start);
    run_layers(s);
    return kOk;
}
