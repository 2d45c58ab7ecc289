/* The kernels: what is worth SIMD. Every set of them computes what the scalar one does, bit for bit. */
#ifndef SHD_KERNELS_H
#define SHD_KERNELS_H

#include "internal.h"

SHDI_BEGIN

typedef struct shdi_kernels {
    const char *name;

    /* Writes the indices of the ones among bits [0, bits) of a bitmap, bits <= SHDI_BLOCK, and returns their number.
     * Reads whole 64-bit words of the bitmap. May write up to 8 entries too many. */
    uint32_t (*ones)(const uint8_t *bitmap, uint32_t bits, uint32_t *index);

    /* Turns indices t of unary ones into offsets ((t - i) << k) + (r[0] + ... + r[i]) + i, in place, where r[i] is
     * the k bits from bit `low_bit` + i * k of `low` on. Returns the sum of all r. k <= SHDI_NARROW_K. `low_size`
     * bytes may be read, at least 8 more than r needs. */
    uint64_t (*rice_offsets)(uint32_t *t, uint32_t count, uint32_t k, const uint8_t *low, uint64_t low_size,
                             uint64_t low_bit);

    /* The number of ones among bits [0, bits) of a bitmap. Reads whole 64-bit words of it. */
    uint64_t (*count_ones)(const uint8_t *bitmap, uint64_t bits);

    /* The sum of the `count` fields of k bits from bit `low_bit` of `low` on; 0 < k <= SHDI_NARROW_K, count <=
     * SHDI_BLOCK. `low_size` bytes may be read, at least 8 more than the fields need. */
    uint32_t (*sum_fields)(const uint8_t *low, uint64_t low_size, uint64_t low_bit, uint32_t k, uint32_t count);

    /* positions[i] = base + offset[i] */
    void (*widen)(const uint32_t *offset, uint32_t count, uint64_t base, int64_t *positions);

    /* values[i] = fl32(scale * q[i]) */
    void (*scale_i8)(const uint8_t *q, uint32_t count, float scale, float *values);

    /* values[i] = magnitude[nibble & 7], negative where bit 3 is set, for the nibbles from number `first` on */
    void (*look_up_i4)(const uint8_t *nibbles, uint64_t first, uint32_t count, const float magnitude[8], float *values);

    /* result = weight + alpha * value by section 6.1, elementwise. `result` may be `weight`. */
    void (*add_f32)(uint32_t *result, const uint32_t *weight, const float *value, float alpha, uint32_t count);
    void (*add_f16)(uint16_t *result, const uint16_t *weight, const float *value, float alpha, uint32_t count);
    void (*add_bf16)(uint16_t *result, const uint16_t *weight, const float *value, float alpha, uint32_t count);

    /* Writes the indices i < count of |x[i]| >= threshold, count <= SHDI_BLOCK, and returns their number. May write
     * up to 8 entries too many. */
    uint32_t (*at_least)(const float *x, uint32_t count, float threshold, uint32_t *index);

    /* The sum over i of (gap[i] >> k) */
    uint64_t (*sum_shifted)(const uint64_t *gap, uint32_t count, uint32_t k);

    /* The classes of the keys (FORMAT.md, 4.7) of `blocks` times 64 elements of 2 bytes, `count` thresholds making them,
     * count < 16. Of element i of block b, bit i of masks[16 * b + its class] is set, and no other; counts[16 * b + c] is
     * how many bits masks[16 * b + c] has. NULL: looking up each key is faster. */
    void (*class_masks)(const uint8_t *elements, uint32_t blocks, const uint16_t *thresholds, uint32_t count,
                        uint64_t *masks, uint8_t *counts);
} shdi_kernels;

/* Up to this k a block's offsets fit 32 bits: 4,096 * 2^19 + 2,048 < 2^32. */
#define SHDI_NARROW_K 19u

/* Room for the indices of a block, and for what a kernel writes too many. */
#define SHDI_BLOCK_ROOM (SHDI_BLOCK + 16)

extern const shdi_kernels shdi_scalar;
#if SHDI_AVX2
extern const shdi_kernels shdi_avx2;
#endif
#if SHDI_NEON
extern const shdi_kernels shdi_neon;
#endif

/* The fastest kernels that this machine runs. */
const shdi_kernels *shdi_kernels_best(void);

/* The kernels that a tensor was loaded for. */
const shdi_kernels *shdi_kernels_of(const shd_delta *delta);

SHDI_END

#endif
