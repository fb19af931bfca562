#include "pack.h"

#include <cmath>
#include <cstring>

namespace {

#define INLINE static inline
#include "simd_portable.h"
#undef INLINE

struct Group {
    uint8_t codes[kGroup];
    uint16_t d, m;
};

void write_group(int32_t format, const Group &group, int64_t row, int64_t g, int64_t cols, uint8_t *packed) {
    const int64_t i = row % kTile;
    uint8_t *codes = packed + row / kTile * tile_bytes(format, cols) + g * group_bytes(format);
    for (int64_t k = 0; k < kGroup; k++) {
        const int64_t at = k / 4 * 64 + 4 * i + k % 4;
        if (format == kQ8_0)
            codes[at] = group.codes[k];
        else if (at < 256)
            codes[at] = static_cast<uint8_t>((codes[at] & 0xf0) | group.codes[k]);
        else
            codes[at - 256] = static_cast<uint8_t>((codes[at - 256] & 0x0f) | group.codes[k] << 4);
    }
    uint8_t *scales = codes + code_bytes(format) + i * 2;
    std::memcpy(scales, &group.d, 2);
    if (format == kQ4_1) std::memcpy(scales + kTile * 2, &group.m, 2);
}

Group read_block(int32_t format, const uint8_t *block) {
    Group group;
    std::memcpy(&group.d, block, 2);
    group.m = 0;
    block += 2;
    if (format == kQ4_1) std::memcpy(&group.m, block, 2), block += 2;
    if (format == kQ8_0) {
        std::memcpy(group.codes, block, kGroup);
        return group;
    }
    for (int k = 0; k < 16; k++) group.codes[k] = block[k] & 15, group.codes[16 + k] = block[k] >> 4;
    return group;
}

uint8_t nibble(float x) { return static_cast<uint8_t>(x < 0.0f ? 0.0f : x > 15.0f ? 15.0f : x); }

Group quantise_q4_1(const float *x) {
    Group group;
    float low = x[0], high = x[0];
    for (int k = 1; k < kGroup; k++) low = x[k] < low ? x[k] : low, high = x[k] > high ? x[k] : high;
    const float d = (high - low) / 15.0f, inverse = d > 0.0f ? 1.0f / d : 0.0f;
    group.d = float_to_half(d), group.m = float_to_half(low);
    for (int k = 0; k < kGroup; k++) group.codes[k] = nibble((x[k] - low) * inverse + 0.5f);
    return group;
}

Group quantise_q4_0(const float *x) {
    Group group;
    float extreme = 0.0f;
    for (int k = 0; k < kGroup; k++) extreme = std::fabs(x[k]) > std::fabs(extreme) ? x[k] : extreme;
    const float d = extreme / -8.0f, inverse = d != 0.0f ? 1.0f / d : 0.0f;
    group.d = float_to_half(d), group.m = 0;
    for (int k = 0; k < kGroup; k++) group.codes[k] = nibble(x[k] * inverse + 8.5f);
    return group;
}

Group quantise_q8_0(const float *x) {
    Group group;
    float extreme = 0.0f;
    for (int k = 0; k < kGroup; k++) extreme = std::fabs(x[k]) > extreme ? std::fabs(x[k]) : extreme;
    const float d = extreme / 127.0f, inverse = d > 0.0f ? 1.0f / d : 0.0f;
    group.d = float_to_half(d), group.m = 0;
    for (int k = 0; k < kGroup; k++)
        group.codes[k] = static_cast<uint8_t>(static_cast<int8_t>(std::lrintf(x[k] * inverse)));
    return group;
}

// Input by input for a whole tile at a time, so that what is written lies together.
void pack_plain(const float *values, const int64_t *order, int64_t first, int64_t count, int64_t cols, float *packed) {
    for (int64_t row = 0; row < count;) {
        const int64_t out = first + row, lane = out % kTile, left = kTile - lane;
        const int64_t rows = left < count - row ? left : count - row;
        float *tile = packed + out / kTile * cols * kTile + lane;
        const float *from[kTile];
        for (int64_t i = 0; i < rows; i++) from[i] = values + (order ? order[row + i] : row + i) * cols;
        for (int64_t k = 0; k < cols; k++)
            for (int64_t i = 0; i < rows; i++) tile[k * kTile + i] = from[i][k];
        row += rows;
    }
}

}  // namespace

int32_t pack_blocks(int32_t format, const uint8_t *blocks, const int64_t *order, int64_t first, int64_t count,
                    int64_t cols, uint8_t *packed) {
    if (format != kQ8_0 && format != kQ4_0 && format != kQ4_1) return kBadFormat;
    const int64_t groups = cols / kGroup, size = block_bytes(format);
    for (int64_t row = 0; row < count; row++) {
        const uint8_t *source = blocks + (order ? order[row] : row) * groups * size;
        for (int64_t g = 0; g < groups; g++)
            write_group(format, read_block(format, source + g * size), first + row, g, cols, packed);
    }
    return kOk;
}

int32_t pack_floats(int32_t format, const float *values, const int64_t *order, int64_t first, int64_t count,
                    int64_t cols, uint8_t *packed) {
    if (format < kF32 || format > kQ4_1) return kBadFormat;
    if (format == kF32) {
        pack_plain(values, order, first, count, cols, reinterpret_cast<float *>(packed));
        return kOk;
    }
    for (int64_t row = 0; row < count; row++) {
        const float *source = values + (order ? order[row] : row) * cols;
        const int64_t out = first + row;
        for (int64_t g = 0; g < cols / kGroup; g++) {
            const float *x = source + g * kGroup;
            const Group group = format == kQ8_0   ? quantise_q8_0(x)
                                : format == kQ4_0 ? quantise_q4_0(x)
                                                  : quantise_q4_1(x);
            write_group(format, group, out, g, cols, packed);
        }
    }
    return kOk;
}
