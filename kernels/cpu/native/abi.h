// What crosses the C interface; kernels/cpu/native.py mirrors every struct field by field.
//
// Tensors are row-major. All pointers belong to the caller and must outlive the call (a Model: every call that uses it).

#pragma once

#include <cstdint>

// Raised whenever a struct or a signature changes: the loader refuses another number.
constexpr int32_t kAbiVersion = 2;

enum Code : int32_t {
    kOk = 0,
    kBadBlock = 1,     // a block table or a slot names a block outside the KV cache
    kBadLength = 2,    // a sequence is longer than its block table, or shorter than its queries
    kBadToken = 3,     // a token id outside the vocabulary
    kBadPosition = 4,  // a position outside the rotary tables
    kNoMemory = 5,
    kBadFormat = 6,    // a matrix format or KV type that this library does not know
};

// How a packed matrix stores its weights (see pack.h for the bytes). Groups are 32 consecutive inputs of one output.
enum Format : int32_t {
    kF32 = 0,   // float32, exact
    kQ8_0 = 1,  // w = d * q, q int8
    kQ4_0 = 2,  // w = d * (q - 8), q 4 bits
    kQ4_1 = 3,  // w = d * q + m, q 4 bits
};

enum KvType : int32_t { kKvF32 = 0, kKvF16 = 1, kKvBf16 = 2 };

struct Matrix {
    const uint8_t *data;  // packed, aligned to 64 bytes
    int64_t rows, cols;   // outputs, inputs
    int32_t format, unused;
};

struct Layer {
    const float *attention_norm;  // [hidden]
    const float *qkv_bias;        // [(num_heads + 2 num_kv_heads) head_dim] or null
    const float *q_norm, *k_norm; // [head_dim] or null
    const float *mlp_norm;        // [hidden]
    Matrix qkv, attention_out, gate_up, down;
};

struct Model {
    const Layer *layers;
    const float *final_norm;   // [hidden]
    const float *cos, *sin;    // [num_positions, head_dim / 2]
    Matrix embedding, lm_head; // [vocab, hidden]
    int64_t num_layers, hidden, intermediate, num_heads, num_kv_heads, head_dim, vocab, num_positions;
    float eps, scale;
};

// The KV cache: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim] of `type`.
struct KvCache {
    uint8_t *data;
    int64_t num_blocks, num_layers, num_kv_heads, block_size, head_dim;
    int64_t block_stride, layer_stride;  // in elements
    int32_t type, unused;
};

// One forward: rows of `num_seqs` sequences, concatenated; the fields are those of model/batch.py.
struct Batch {
    const int64_t *token_ids, *positions, *slot_mapping;  // [num_rows]
    const int32_t *query_start;                           // [num_seqs + 1]
    const int32_t *seq_lens;                              // [num_seqs]
    const int32_t *block_tables;                          // [num_seqs, max_blocks]
    const int64_t *logits_indices;                        // [num_logits]
    float *logits;                                        // [num_logits, vocab]
    int64_t num_rows, num_seqs, max_blocks, num_logits;
    void (*on_layer)(int64_t);                            // or null; called on the calling thread
    const uint8_t *stops;                                 // [num_layers]: on_layer is called where this is not 0
};

// Causal attention of ragged query chunks over paged KV of one layer (a decode step: one query per sequence).
struct Attention {
    const float *q;               // [num_rows, num_heads, head_dim], rows q_stride floats apart
    float *out;                   // [num_rows, num_heads, head_dim], dense
    const int32_t *query_start, *seq_lens, *block_tables;
    const uint8_t *kv;            // K of block 0 of the layer
    int64_t num_seqs, num_heads, num_kv_heads, head_dim, block_size, max_blocks, num_blocks, block_stride, q_stride;
    float scale;
    int32_t kv_type;
};
