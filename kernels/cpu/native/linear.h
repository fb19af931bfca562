// Products of rows with a packed matrix, by tiles of sixteen outputs. Included inside a namespace.
//
// An output is always acc = acc + product of one group (or input), group after group from the first on, whatever else
// is computed beside it: so a row's result is bitwise the same alone, in a batch, in a chunk, and on any thread.

constexpr int64_t kRowBlock = 128;      // rows whose inputs stay in the second-level cache while tiles pass by
constexpr int64_t kUnpackGroups = 24;   // groups of a tile unpacked at a time (12 KiB: the first-level cache)
constexpr int64_t kUnpackFrom = 12;     // fewer rows than this unpack in registers
constexpr int64_t kFloatRun = 64;       // inputs summed before they join the total
constexpr int64_t kAhead = 2048;        // bytes that float weights are asked for ahead of their use, when rows are few

struct Linear {
    const Matrix *matrix;
    const float *values;        // [rows, cols], for float32 matrices
    const Activations *codes;   // for quantised ones
    int64_t rows;
    float *out;                 // [rows, out_stride]
    int64_t out_stride;
    bool accumulate;            // out += product
};

INLINE void put(const Linear &l, int64_t row, int64_t tile, const F &value) {
    float *out = l.out + row * l.out_stride + tile * kTile;
    const int64_t valid = l.matrix->rows - tile * kTile;
    if (valid >= kTile) {
        store(out, l.accumulate ? add(load(out), value) : value);
        return;
    }
    float lanes[16];
    store(lanes, value);
    for (int64_t i = 0; i < valid; i++) out[i] = l.accumulate ? out[i] + lanes[i] : lanes[i];
}

// One group of a tile times kRows rows, added to acc. `codes` are those of the group, unpacked to bytes or as they are.
template <int32_t kFormat, int kRows, bool kPacked>
INLINE void add_group(F *acc, const uint8_t *codes, const uint8_t *scales, const Activations &x, int64_t g) {
    I dots[kRows];
    const int8_t *from = x.codes + g * kGroup;
    if (kFormat == kQ8_0)
        dot_s8<kRows>(dots, codes, from, x.cols, x.sums + g, x.groups);
    else if (kPacked)
        dot_u4_packed<kRows>(dots, codes, from, x.cols);
    else
        dot_u4<kRows>(dots, codes, from, x.cols);
    const F d = load_f16(reinterpret_cast<const uint16_t *>(scales));
    F m = d;
    if (kFormat == kQ4_1) m = load_f16(reinterpret_cast<const uint16_t *>(scales + kTile * 2));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
        if (kFormat == kQ4_0) subtract_eights(dots[r], x.sums[r * x.groups + g]);
        acc[r] = fma(mul(to_float(dots[r]), set1(x.scales[r * x.groups + g])), d, acc[r]);
        if (kFormat == kQ4_1) acc[r] = fma(m, set1(x.offsets[r * x.groups + g]), acc[r]);
    }
}

// kRows rows times kStreams tiles that lie `apart` from each other: memory gives one core about half as much again
// when it is read in several places at once.
template <int32_t kFormat, int kRows, int kStreams>
static void stream_tiles(const Linear &l, int64_t row, int64_t tile, int64_t apart) {
    const Matrix &m = *l.matrix;
    const Activations x = from_row(*l.codes, row);
    const int64_t step = group_bytes(kFormat), size = tile_bytes(kFormat, m.cols);
    const uint8_t *at = m.data + tile * size;
    F acc[kStreams][kRows];
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; s++)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) acc[s][r] = set1(0.0f);
    for (int64_t g = 0; g < x.groups; g++, at += step) {
#pragma GCC unroll 4
        for (int s = 0; s < kStreams; s++) {
            const uint8_t *codes = at + s * apart * size;
            add_group<kFormat, kRows, true>(acc[s], codes, codes + code_bytes(kFormat), x, g);
        }
    }
    for (int s = 0; s < kStreams; s++)
        for (int r = 0; r < kRows; r++) put(l, row + r, tile + s * apart, acc[s][r]);
}

template <int32_t kFormat, int kRows, int kStreams>
INLINE void stream_range(const Linear &l, int64_t begin, int64_t end) {
    const int64_t apart = (end - begin) / kStreams;
    for (int64_t tile = begin; tile < begin + apart; tile++) stream_tiles<kFormat, kRows, kStreams>(l, 0, tile, apart);
    for (int64_t tile = begin + apart * kStreams; tile < end; tile++) stream_tiles<kFormat, kRows, 1>(l, 0, tile, 0);
}

// Groups [begin, end) of one tile times kRows rows. `codes` begins with group `begin`, `scales` with group 0.
template <int32_t kFormat, int kRows, bool kPacked>
static void tile_rows(const Linear &l, int64_t row, int64_t tile, const uint8_t *codes, const uint8_t *scales,
                      int64_t begin, int64_t end, F *partial) {
    const Activations x = from_row(*l.codes, row);
    const int64_t step = kPacked ? group_bytes(kFormat) : 512;
    const bool is_first = row < kRows;
    F acc[kRows];
    for (int r = 0; r < kRows; r++) acc[r] = begin ? partial[r] : set1(0.0f);
    for (int64_t g = begin; g < end; g++, codes += step) {
        // The next tile comes while this one is multiplied with its first rows.
        if (kPacked && is_first)
            for (int64_t b = 0; b < step; b += 64) prefetch(codes + x.groups * step + b);
        add_group<kFormat, kRows, kPacked>(acc, codes, scales + g * group_bytes(kFormat), x, g);
    }
    for (int r = 0; r < kRows; r++) {
        if (end == x.groups)
            put(l, row + r, tile, acc[r]);
        else
            partial[r] = acc[r];
    }
}

template <int32_t kFormat, bool kPacked>
INLINE void tile_block(const Linear &l, int64_t first, int64_t last, int64_t tile, const uint8_t *codes,
                       const uint8_t *scales, int64_t begin, int64_t end, F *partial) {
    int64_t row = first;
    for (; row + 4 <= last; row += 4)
        tile_rows<kFormat, 4, kPacked>(l, row, tile, codes, scales, begin, end, partial + (row - first));
    F *rest = partial + (row - first);
    if (last - row == 3) tile_rows<kFormat, 3, kPacked>(l, row, tile, codes, scales, begin, end, rest);
    if (last - row == 2) tile_rows<kFormat, 2, kPacked>(l, row, tile, codes, scales, begin, end, rest);
    if (last - row == 1) tile_rows<kFormat, 1, kPacked>(l, row, tile, codes, scales, begin, end, rest);
}

template <int32_t kFormat> static void quantised_tile(const Linear &l, int64_t first, int64_t last, int64_t tile) {
    const Matrix &m = *l.matrix;
    const int64_t num_groups = m.cols / kGroup, size = tile_bytes(kFormat, m.cols), step = group_bytes(kFormat);
    const uint8_t *codes = m.data + tile * size, *scales = codes + code_bytes(kFormat);
    F partial[kRowBlock];
    if (kFormat == kQ8_0 || last - first < kUnpackFrom) {
        tile_block<kFormat, true>(l, first, last, tile, codes, scales, 0, num_groups, partial);
        return;
    }
    alignas(64) uint8_t unpacked[kUnpackGroups * 512];
    for (int64_t begin = 0; begin < num_groups; begin += kUnpackGroups) {
        const int64_t end = begin + kUnpackGroups < num_groups ? begin + kUnpackGroups : num_groups;
        for (int64_t g = begin; g < end; g++) {
            for (int64_t b = 0; b < step; b += 64) prefetch(codes + size + g * step + b);
            unpack_u4(unpacked + (g - begin) * 512, codes + g * step);
        }
        tile_block<kFormat, false>(l, first, last, tile, unpacked, scales, begin, end, partial);
    }
}

template <int32_t kFormat> INLINE void quantised_tiles(const Linear &l, int64_t begin, int64_t end) {
    if (l.rows == 1) return stream_range<kFormat, 1, 4>(l, begin, end);
    if (l.rows == 2) return stream_range<kFormat, 2, 2>(l, begin, end);
    for (int64_t first = 0; first < l.rows; first += kRowBlock) {
        const int64_t last = first + kRowBlock < l.rows ? first + kRowBlock : l.rows;
        for (int64_t tile = begin; tile < end; tile++) quantised_tile<kFormat>(l, first, last, tile);
    }
}

template <int kRows> static void float_rows(const Linear &l, int64_t row, int64_t tile) {
    const Matrix &m = *l.matrix;
    const float *w = reinterpret_cast<const float *>(m.data) + tile * m.cols * kTile, *x = l.values + row * m.cols;
    F total[kRows];
    for (int r = 0; r < kRows; r++) total[r] = set1(0.0f);
    // Sums of sums: rounding errors grow with the number of terms in a row.
    for (int64_t begin = 0; begin < m.cols; begin += kFloatRun) {
        const int64_t end = begin + kFloatRun < m.cols ? begin + kFloatRun : m.cols;
        F acc[kRows];
#pragma GCC unroll 6
        for (int r = 0; r < kRows; r++) acc[r] = set1(0.0f);
        for (int64_t k = begin; k < end; k++, w += kTile) {
            const F column = load(w);
            if (kRows < 6) prefetch(w + kAhead / 4);
#pragma GCC unroll 6
            for (int r = 0; r < kRows; r++) acc[r] = fma(set1(x[r * m.cols + k]), column, acc[r]);
        }
#pragma GCC unroll 6
        for (int r = 0; r < kRows; r++) total[r] = add(total[r], acc[r]);
    }
    for (int r = 0; r < kRows; r++) put(l, row + r, tile, total[r]);
}

INLINE void float_tile(const Linear &l, int64_t first, int64_t last, int64_t tile) {
    int64_t row = first;
    for (; row + 6 <= last; row += 6) float_rows<6>(l, row, tile);
    if (row + 4 <= last) float_rows<4>(l, row, tile), row += 4;
    if (row + 2 <= last) float_rows<2>(l, row, tile), row += 2;
    if (row < last) float_rows<1>(l, row, tile);
}

static void linear_tiles(void *context, int64_t begin, int64_t end, int) {
    const Linear &l = *static_cast<const Linear *>(context);
    switch (l.matrix->format) {
        case kQ8_0: return quantised_tiles<kQ8_0>(l, begin, end);
        case kQ4_0: return quantised_tiles<kQ4_0>(l, begin, end);
        case kQ4_1: return quantised_tiles<kQ4_1>(l, begin, end);
    }
    for (int64_t first = 0; first < l.rows; first += kRowBlock) {
        const int64_t last = first + kRowBlock < l.rows ? first + kRowBlock : l.rows;
        for (int64_t tile = begin; tile < end; tile++) float_tile(l, first, last, tile);
    }
}

static void linear(const Linear &l, Pool &pool) {
    const int64_t tiles = num_tiles(l.matrix->rows), share = tiles / (4 * pool.size());
    pool.run(linear_tiles, const_cast<Linear *>(&l), tiles, share < 1 ? 1 : share);
}
