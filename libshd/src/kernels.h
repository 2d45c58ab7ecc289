/* The kernels: what is worth SIMD. Every set of them computes what the scalar one does, bit for bit. */
#ifndef SHD_KERNELS_H
#define SHD_KERNELS_H

#include "internal.h"

SHDI_BEGIN

struct shdi_rice_writer;
struct shdi_draw;

/* The elements in some rows and some columns of a tile (FORMAT.md, 4.6), one row after the other. */
typedef struct shdi_cell {
    uint32_t start;      /* the order of the first */
    uint32_t last;       /* that of the last, less start */
    uint32_t rows;       /* where the rows start among the tile's */
    uint32_t columns;    /* and where the columns start */
    uint32_t width;      /* how many columns there are */
    uint32_t reciprocal; /* 2^shift / width + 1 */
    uint32_t shift;      /* 31 or 35, so that 32 bits hold it, and that a quotient of up to 2^17 / width is exact */
} shdi_cell;

static inline uint32_t shdi_cell_shift(uint32_t width) { return width < 16 ? 31 : 35; }
static inline uint32_t shdi_cell_reciprocal(uint32_t width) {
    return (uint32_t)((UINT64_C(1) << shdi_cell_shift(width)) / width + 1);
}

/* So many orders follow those that are given to a kernel. */
#define SHDI_MORE_ORDERS 31u

typedef struct shdi_kernels {
    const char *name;

    /* Writes the indices of the ones among bits [0, bits) of a bitmap, bits <= SHDI_BLOCK, and returns their number.
     * Reads whole 64-bit words of the bitmap. May write up to 8 entries too many. */
    uint32_t (*ones)(const uint8_t *bitmap, uint32_t bits, uint32_t *index);

    /* Turns indices t of unary ones into offsets base + ((t - i) << k) + (r[0] + ... + r[i]) + i, modulo 2^32 and in
     * place, where r[i] is the k bits from bit `low_bit` + i * k of `low` on. Returns the sum of all r. k <=
     * SHDI_NARROW_K. `low_size` bytes may be read, at least 8 more than r needs. */
    uint64_t (*rice_offsets)(uint32_t *t, uint32_t count, uint32_t k, uint32_t base, const uint8_t *low,
                             uint64_t low_size, uint64_t low_bit);

    /* Finds the lines of orders, which increase: row[i] and column[i] are numbers among those that cells count. *at is
     * the cell of the order before or an earlier one, and becomes that of the last. order[count] up to order[count +
     * SHDI_MORE_ORDERS - 1] are INT32_MAX. May write up to 8 lines too many. */
    void (*lines)(const uint32_t *order, uint32_t count, const shdi_cell **at, uint32_t *row, uint32_t *column);

    /* Writes the indices of the 64-bit words of a bitmap that are not 0, and returns their number. `count`, how many
     * words there are, is a multiple of 8. May write up to 8 entries too many. */
    uint32_t (*words)(const uint8_t *bitmap, uint32_t count, uint32_t *index);

    /* Clears the 64-bit words index[*at] up to index[count - 1] of a bitmap, none of which is 0, and writes the indices
     * of the bits that were ones. Stops behind SHDI_BLOCK - 64 ones, and moves *at. Returns how many ones there were.
     * May write up to 3 entries too many. */
    uint32_t (*take_ones)(uint8_t *bitmap, const uint32_t *index, uint32_t *at, uint32_t count, uint32_t *one);

    /* Appends the gaps between offset[i - 1] and offset[i] to a RICE, from i = 0 on, and returns how many. Stops where
     * fewer than 8 are left or where one of the next 8 ends in a block that is not begun. offset[-1] is that of the last
     * one there is. Leaves `position` alone. k <= SHDI_PACKED_K, and at most 7 low bits wait. */
    uint32_t (*rice_gaps)(struct shdi_rice_writer *w, const uint32_t *offset, uint32_t count);

    /* Makes what is drawn in each cell, less `base` and modulo 2^32, of the cells' numbers, in place. May write up to 7
     * too many. */
    void (*drawn)(const struct shdi_draw *draw, uint32_t base, uint32_t *number, uint32_t count);

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

/* Up to this k the low bits of four nonzeros are packed at a time. */
#define SHDI_PACKED_K 14u

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
