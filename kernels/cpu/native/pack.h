// The bytes of a packed matrix, and packing from GGUF blocks or floats.
//
// Sixteen outputs make a tile; the tiles of a matrix stand one after another, the last one filled up with zero rows.
//
//     quantised tile: its groups of 32 inputs one after another, each [codes][16 x d, fp16][Q4_1 only: 16 x m, fp16]
//       8-bit codes (512 bytes): byte 64 j + 4 i + k is output i, input 4 j + k
//       4-bit codes (256 bytes): the low nibbles are bytes 0-255 of that order, the high ones 256-511
//     float32 tile: [inputs][16 outputs]

#pragma once

#include <cstdint>

#include "abi.h"

constexpr int64_t kTile = 16;   // outputs of a tile
constexpr int64_t kGroup = 32;  // inputs that share a scale

inline int64_t num_tiles(int64_t rows) { return (rows + kTile - 1) / kTile; }
constexpr int64_t code_bytes(int32_t format) { return format == kQ8_0 ? 512 : 256; }
constexpr int64_t group_bytes(int32_t format) { return code_bytes(format) + (format == kQ4_1 ? 64 : 32); }

inline int64_t tile_bytes(int32_t format, int64_t cols) {
    if (format == kF32) return cols * kTile * 4;
    return cols / kGroup * group_bytes(format);
}

// Bytes of one GGUF block of 32 weights.
inline int64_t block_bytes(int32_t format) { return format == kQ8_0 ? 34 : format == kQ4_0 ? 18 : 20; }

// Pack rows [first, first + count) of a matrix, `first` a multiple of 16 unless it follows on. `blocks` holds them as
// GGUF does, row by row; output first + i comes from row order[i] of it, or row i where order is null.
int32_t pack_blocks(int32_t format, const uint8_t *blocks, const int64_t *order, int64_t first, int64_t count,
                    int64_t cols, uint8_t *packed);

// The same from float32 rows; for the quantised formats the rows are quantised as GGUF's own tools do it.
int32_t pack_floats(int32_t format, const float *values, const int64_t *order, int64_t first, int64_t count,
                    int64_t cols, uint8_t *packed);
