// What each instruction set offers: the step, and its parts for tests and for torch code around them.

#pragma once

#include "abi.h"
#include "pool.h"
#include "scratch.h"

struct Isa {
    const char *name;
    int32_t (*forward)(const Model &, const Batch &, const KvCache &, Pool &, Scratch &);
    // out [rows, matrix.rows] = x [rows, matrix.cols] times the matrix
    int32_t (*linear)(const Matrix &, const float *x, int64_t rows, float *out, Pool &, Scratch &);
    int32_t (*attention)(const Attention &, Pool &, Scratch &);
    void (*rms_norm)(const float *x, const float *weight, float eps, int64_t rows, int64_t cols, float *out);
    void (*silu_mul)(const float *gate_up, int64_t rows, int64_t cols, float *out);
    // x [rows, heads, dims] rotated in place
    void (*rope)(float *x, const int64_t *positions, const float *cos, const float *sin, int64_t rows, int64_t heads,
                 int64_t dims);
    // k and v [rows, kv_heads, dims] into their slots of one layer of the cache
    void (*store_kv)(const float *k, const float *v, const KvCache &, const int64_t *slots, int64_t rows);
};

extern const Isa kPortableIsa;
#if defined(__x86_64__)
extern const Isa kAvx2Isa, kAvx512Isa;
#endif
