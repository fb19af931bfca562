// Causal attention over paged KV: a chunk of queries of one sequence, for one KV head. Included inside a namespace.
//
// A query's result is fixed by its own position: tiles of sixteen positions counted from the sequence's start; scores
// summed in eight lanes (dimension modulo 8) that are then added in one fixed tree; an online softmax tile after tile;
// values added position after position. So a single query, whose keys are read as they lie, and a chunk, for which
// they are transposed once, come to the same bits.

constexpr int64_t kPositions = 16;   // of a tile
constexpr int64_t kMaxUnitRows = 96; // queries x heads of a unit of work, unless one position has more heads
constexpr int kScoreRows = 6;

struct AttentionScratch {
    float *keys;     // [head_dim, 16]: a tile of K, transposed
    float *values;   // [16, head_dim]
    float *rows;     // [16, head_dim]: K before it is transposed
    float *queries;  // [rows, head_dim], scaled
    float *out;      // [rows, head_dim]
    F *totals;       // [rows]: sums of weights, lane by lane
    float *maxima;   // [rows]
    int64_t *last;   // [rows]: position of each query
};

INLINE int64_t positions_per_unit(const Attention &a) {
    const int64_t wanted = kMaxUnitRows / (a.num_heads / a.num_kv_heads);
    return wanted < 1 ? 1 : wanted;
}
INLINE int64_t unit_rows(const Attention &a) { return positions_per_unit(a) * (a.num_heads / a.num_kv_heads); }

INLINE int64_t attention_scratch_bytes(const Attention &a) {
    const int64_t rows = unit_rows(a), floats = 48 * a.head_dim + rows * (2 * a.head_dim + 16 + 1);
    return (floats * 4 + rows * 8 + 4096) / 64 * 64;
}

INLINE AttentionScratch carve(uint8_t *memory, const Attention &a) {
    const int64_t rows = unit_rows(a), tile = 16 * a.head_dim;
    float *f = reinterpret_cast<float *>(memory);
    AttentionScratch s;
    s.keys = f, s.values = f + tile, s.rows = f + 2 * tile, f += 3 * tile;
    s.queries = f, s.out = f + rows * a.head_dim, f += 2 * rows * a.head_dim;
    s.totals = reinterpret_cast<F *>(f), f += 16 * rows;
    s.last = reinterpret_cast<int64_t *>(f), f += 2 * rows;
    s.maxima = f;
    return s;
}

// Sixteen positions from `start`: K transposed to floats, V as floats. Positions from `length` on are zero.
INLINE const float *load_tile(const AttentionScratch &s, const Attention &a, const int32_t *table, int64_t kv_head,
                              int64_t start, int64_t length) {
    const int64_t dims = a.head_dim, size = kv_bytes(a.kv_type), head_bytes = a.block_size * dims * size;
    const int64_t to_values = a.num_kv_heads * head_bytes;
    for (int64_t p = 0; p < kPositions; p++) {
        const int64_t at = start + p;
        if (at >= length) {
            __builtin_memset(s.rows + p * dims, 0, static_cast<size_t>(dims) * 4);
            __builtin_memset(s.values + p * dims, 0, static_cast<size_t>(dims) * 4);
            continue;
        }
        const uint8_t *keys = a.kv + table[at / a.block_size] * a.block_stride * size + kv_head * head_bytes;
        const uint8_t *row = keys + at % a.block_size * dims * size;
        if (p == 0 && a.kv_type == kKvF32 && start + kPositions <= length && a.block_size % kPositions == 0) {
            // A whole tile of one block, in floats already: used where it stands.
            transpose(s.keys, reinterpret_cast<const float *>(row), dims);
            return reinterpret_cast<const float *>(row + to_values);
        }
        load_kv_head(s.rows + p * dims, a.kv_type, row, dims);
        load_kv_head(s.values + p * dims, a.kv_type, row + to_values, dims);
    }
    transpose(s.keys, s.rows, dims);
    return s.values;
}

// Ask for the tile at `start` while another one is being worked on: blocks lie anywhere, which no hardware foresees.
INLINE void ask_for_tile(const Attention &a, const int32_t *table, int64_t kv_head, int64_t start, int64_t length) {
    const int64_t row_bytes = a.head_dim * kv_bytes(a.kv_type), head_bytes = a.block_size * row_bytes;
    const int64_t end = start + kPositions < length ? start + kPositions : length;
    for (int64_t at = start; at < end; at++) {
        const uint8_t *row = a.kv + table[at / a.block_size] * a.block_stride * kv_bytes(a.kv_type) +
                             kv_head * head_bytes + at % a.block_size * row_bytes;
        for (int64_t b = 0; b < row_bytes; b += 64) prefetch(row + b), prefetch(row + b + a.num_kv_heads * head_bytes);
    }
}

// Weights of one tile for one row, from its scores; rescales what the row has so far when its maximum grows.
INLINE F weigh(const AttentionScratch &s, int64_t row, F scores, int valid, int64_t dims) {
    scores = first(valid, scores, set1(-3.0e38f));
    const float high = top(scores);
    if (high > s.maxima[row]) {
        const F factor = exp(set1(s.maxima[row] - high));
        s.maxima[row] = high;
        s.totals[row] = mul(s.totals[row], factor);
        float *out = s.out + row * dims;
        for (int64_t d = 0; d < dims; d += 16) store(out + d, mul(load(out + d), factor));
    }
    const F weights = first(valid, exp(sub(scores, set1(s.maxima[row]))), set1(0.0f));
    s.totals[row] = add(s.totals[row], weights);
    return weights;
}

template <int kVectors>
INLINE void add_values(float *out, const float *values, const float *weights, int count, int64_t dims) {
    F acc[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) acc[v] = load(out + 16 * v);
    for (int p = 0; p < count; p++, values += dims) {
        const F weight = set1(weights[p]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) acc[v] = fma(weight, load(values + 16 * v), acc[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) store(out + 16 * v, acc[v]);
}

// One lane of the scores of kRows queries for sixteen positions.
template <int kRows> INLINE void add_lane(F *acc, const float *keys, const float *queries, int64_t dims, int lane) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++) acc[r] = set1(0.0f);
    for (int64_t d = lane; d < dims; d += 8) {
        const F column = load(keys + 16 * d);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; r++) acc[r] = fma(set1(queries[r * dims + d]), column, acc[r]);
    }
}

template <int kRows>
static void score_rows(F *scores, const float *keys, const float *queries, int64_t dims) {
    F half[2][kRows], a[kRows], b[kRows];
    for (int h = 0; h < 2; h++) {
        add_lane<kRows>(a, keys, queries, dims, h);
        add_lane<kRows>(b, keys, queries, dims, h + 4);
        for (int r = 0; r < kRows; r++) half[h][r] = add(a[r], b[r]);
        add_lane<kRows>(a, keys, queries, dims, h + 2);
        add_lane<kRows>(b, keys, queries, dims, h + 6);
        for (int r = 0; r < kRows; r++) half[h][r] = add(half[h][r], add(a[r], b[r]));
    }
    for (int r = 0; r < kRows; r++) scores[r] = add(half[0][r], half[1][r]);
}

template <int kRows>
static void attend_rows(const AttentionScratch &s, const float *values, int64_t row, int64_t start, int64_t dims) {
    F scores[kRows];
    score_rows<kRows>(scores, s.keys, s.queries + row * dims, dims);
    for (int r = 0; r < kRows; r++) {
        const int64_t seen = s.last[row + r] + 1 - start;
        if (seen <= 0) continue;
        const int valid = seen < kPositions ? static_cast<int>(seen) : static_cast<int>(kPositions);
        float weights[16];
        store(weights, weigh(s, row + r, scores[r], valid, dims));
        float *out = s.out + (row + r) * dims;
        int64_t d = 0;
        for (; d + 64 <= dims; d += 64) add_values<4>(out + d, values + d, weights, valid, dims);
        for (; d < dims; d += 16) add_values<1>(out + d, values + d, weights, valid, dims);
    }
}

INLINE void attend_tile(const AttentionScratch &s, const float *values, int64_t first_row, int64_t rows, int64_t start,
                        int64_t dims) {
    int64_t row = first_row;
    for (; row + kScoreRows <= rows; row += kScoreRows) attend_rows<kScoreRows>(s, values, row, start, dims);
    if (row + 3 <= rows) attend_rows<3>(s, values, row, start, dims), row += 3;
    if (row + 2 <= rows) attend_rows<2>(s, values, row, start, dims), row += 2;
    if (row < rows) attend_rows<1>(s, values, row, start, dims);
}

template <int32_t kType> INLINE H load8_kv(const uint8_t *row, int64_t d) {
    if (kType == kKvF32) return load8(reinterpret_cast<const float *>(row) + d);
    const uint16_t *halves = reinterpret_cast<const uint16_t *>(row) + d;
    return kType == kKvF16 ? load8_f16(halves) : load8_bf16(halves);
}
template <int32_t kType> INLINE F load_kv(const uint8_t *row, int64_t d) {
    if (kType == kKvF32) return load(reinterpret_cast<const float *>(row) + d);
    const uint16_t *halves = reinterpret_cast<const uint16_t *>(row) + d;
    return kType == kKvF16 ? load_f16(halves) : load_bf16(halves);
}

// Scores of kRows queries for the sixteen key rows; out [kRows, 16].
template <int32_t kType, int kRows>
INLINE void score_single(float *out, const uint8_t *const *keys, const float *queries, int64_t dims) {
    for (int half = 0; half < 2; half++) {
        H acc[kRows][8];
        for (int p = 0; p < 8; p++) {
            const uint8_t *row = keys[8 * half + p];
            H sums[kRows];
#pragma GCC unroll 3
            for (int r = 0; r < kRows; r++) sums[r] = zero8();
            for (int64_t d = 0; d < dims; d += 8) {
                const H key = load8_kv<kType>(row, d);
#pragma GCC unroll 3
                for (int r = 0; r < kRows; r++) sums[r] = fma8(load8(queries + r * dims + d), key, sums[r]);
            }
#pragma GCC unroll 3
            for (int r = 0; r < kRows; r++) acc[r][p] = sums[r];
        }
        for (int r = 0; r < kRows; r++) sum_lanes(out + 16 * r + 8 * half, acc[r]);
    }
}

template <int32_t kType, int kRows>
INLINE void add_single(float *out, const uint8_t *const *rows, const float *weights, int count, int64_t dims) {
    for (int64_t d = 0; d < dims; d += 32) {
        const bool whole = d + 32 <= dims;
        F low[kRows], high[kRows];
#pragma GCC unroll 3
        for (int r = 0; r < kRows; r++) {
            low[r] = load(out + r * dims + d);
            high[r] = whole ? load(out + r * dims + d + 16) : low[r];
        }
        for (int p = 0; p < count; p++) {
            const F a = load_kv<kType>(rows[p], d), b = whole ? load_kv<kType>(rows[p], d + 16) : a;
#pragma GCC unroll 3
            for (int r = 0; r < kRows; r++) {
                const F weight = set1(weights[16 * r + p]);
                low[r] = fma(weight, a, low[r]), high[r] = fma(weight, b, high[r]);
            }
        }
#pragma GCC unroll 3
        for (int r = 0; r < kRows; r++) {
            store(out + r * dims + d, low[r]);
            if (whole) store(out + r * dims + d + 16, high[r]);
        }
    }
}

// One tile for kRows heads of a single query.
template <int32_t kType, int kRows>
static void attend_single(const AttentionScratch &s, const uint8_t *const *keys, const uint8_t *const *values,
                          int64_t row, int valid, int64_t dims) {
    float scores[16 * kRows], weights[16 * kRows];
    score_single<kType, kRows>(scores, keys, s.queries + row * dims, dims);
    for (int r = 0; r < kRows; r++) store(weights + 16 * r, weigh(s, row + r, load(scores + 16 * r), valid, dims));
    add_single<kType, kRows>(s.out + row * dims, values, weights, valid, dims);
}

// A single query: keys and values are read where they stand.
template <int32_t kType>
INLINE void single_tile(const AttentionScratch &s, const Attention &a, const int32_t *table, int64_t kv_head,
                        int64_t start, int64_t length, int64_t rows) {
    const int64_t row_bytes = a.head_dim * kv_bytes(kType), head_bytes = a.block_size * row_bytes;
    const int valid = static_cast<int>(length - start < kPositions ? length - start : kPositions);
    const uint8_t *keys[16], *values[16];
    for (int p = 0; p < kPositions; p++) {
        // Positions past the end repeat the last one; their weights are set to zero.
        const int64_t at = start + (p < valid ? p : valid - 1);
        const uint8_t *block = a.kv + table[at / a.block_size] * a.block_stride * kv_bytes(kType);
        keys[p] = block + kv_head * head_bytes + at % a.block_size * row_bytes;
        values[p] = keys[p] + a.num_kv_heads * head_bytes;
    }
    int64_t row = 0;
    for (; row + 3 <= rows; row += 3) attend_single<kType, 3>(s, keys, values, row, valid, a.head_dim);
    if (row + 2 <= rows) attend_single<kType, 2>(s, keys, values, row, valid, a.head_dim), row += 2;
    if (row < rows) attend_single<kType, 1>(s, keys, values, row, valid, a.head_dim);
}

// Queries [first, last) of sequence `seq`, counted within its chunk, for one KV head.
static void attend_unit(const Attention &a, int64_t seq, int64_t kv_head, int64_t first, int64_t last,
                        const AttentionScratch &s) {
    const int64_t dims = a.head_dim, heads = a.num_heads / a.num_kv_heads, rows = (last - first) * heads;
    const int64_t begin = a.query_start[seq], num_queries = a.query_start[seq + 1] - begin;
    const int64_t cached = a.seq_lens[seq] - num_queries, length = cached + last;
    const int32_t *table = a.block_tables + seq * a.max_blocks;
    const F scale = set1(a.scale);
    for (int64_t row = 0; row < rows; row++) {
        const float *q = a.q + (begin + first + row / heads) * a.q_stride + (kv_head * heads + row % heads) * dims;
        for (int64_t d = 0; d < dims; d += 16) store(s.queries + row * dims + d, mul(load(q + d), scale));
        s.totals[row] = set1(0.0f), s.maxima[row] = -3.0e38f, s.last[row] = cached + first + row / heads;
    }
    __builtin_memset(s.out, 0, static_cast<size_t>(rows * dims) * 4);
    ask_for_tile(a, table, kv_head, 0, length);
    for (int64_t start = 0; start < length; start += kPositions) {
        ask_for_tile(a, table, kv_head, start + kPositions, length);
        if (last - first == 1) {
            if (a.kv_type == kKvF32) single_tile<kKvF32>(s, a, table, kv_head, start, length, rows);
            if (a.kv_type == kKvF16) single_tile<kKvF16>(s, a, table, kv_head, start, length, rows);
            if (a.kv_type == kKvBf16) single_tile<kKvBf16>(s, a, table, kv_head, start, length, rows);
            continue;
        }
        const float *values = load_tile(s, a, table, kv_head, start, length);
        // Queries that stand before this tile have seen all of theirs.
        const int64_t done = start - cached - first;
        attend_tile(s, values, done > 0 ? done * heads : 0, rows, start, dims);
    }
    for (int64_t row = 0; row < rows; row++) {
        float *out = a.out + ((begin + first + row / heads) * a.num_heads + kv_head * heads + row % heads) * dims;
        const F inverse = set1(1.0f / sum(s.totals[row]));
        for (int64_t d = 0; d < dims; d += 16) store(out + d, mul(load(s.out + row * dims + d), inverse));
    }
}

struct AttentionWork {
    const Attention *attention;
    uint8_t *scratch;           // one piece per thread
    int64_t scratch_bytes;      // of a piece
    const int64_t *unit_start;  // [num_seqs + 1]: first unit of each sequence, heads innermost
};

static void attend_units(void *context, int64_t begin, int64_t end, int thread) {
    const AttentionWork &w = *static_cast<const AttentionWork *>(context);
    const Attention &a = *w.attention;
    const AttentionScratch scratch = carve(w.scratch + thread * w.scratch_bytes, a);
    const int64_t size = positions_per_unit(a);
    int64_t seq = 0;
    for (int64_t unit = begin; unit < end; unit++) {
        while (unit >= w.unit_start[seq + 1]) seq++;
        const int64_t within = unit - w.unit_start[seq], part = within / a.num_kv_heads;
        const int64_t num_queries = a.query_start[seq + 1] - a.query_start[seq];
        const int64_t last = (part + 1) * size < num_queries ? (part + 1) * size : num_queries;
        attend_unit(a, seq, within % a.num_kv_heads, part * size, last, scratch);
    }
}
