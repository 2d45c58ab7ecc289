/* The caller's weights: what a call may do with them, and reading, writing and adding to their elements. */
#ifndef SHD_WEIGHTS_H
#define SHD_WEIGHTS_H

#include "index.h"
#include "kernels.h"

SHDI_BEGIN

/* ---- What a call may do ---- */

/* Checks a call that uses `weights`. `saved` may be NULL. After SHD_OK the size of an element is a known one. */
int shdi_check_weights(const shd_delta *delta, const shd_weights *weights, const void *saved);

/* Checks that the tensor's op applies with this strength. */
int shdi_check_strength(const shd_tensor *tensor, double strength);

/* ---- Elements ---- */

/* An element may have so many bytes. The loops below are written for these sizes and do nothing for others. */
static inline int shdi_size_is_known(uint32_t size) { return size == 1 || size == 2 || size == 4 || size == 8; }

static inline int shdi_is_aligned(const void *pointer, uint32_t size) { return (uintptr_t)pointer % size == 0; }

/* Elements shift + offset[i] of the weight buffer, all of them inside. Their ranks are rank + i. */
typedef struct shdi_run {
    uint64_t shift;
    uint64_t rank;
    const uint32_t *offset;
    uint32_t count;
} shdi_run;

/* Reads the elements of `r`, of `size` bytes each, and prefetches those of `ahead`, which has as many. */
void shdi_gather(const uint8_t *weights, uint32_t size, const shdi_run *r, const shdi_run *ahead, uint8_t *to);

/* Writes the elements of `r`. */
void shdi_scatter(uint8_t *weights, uint32_t size, const shdi_run *r, const uint8_t *from);

/* Prefetches the elements of `r`. */
void shdi_prefetch(const uint8_t *weights, uint32_t size, const shdi_run *r);

/* result = weight + alpha * value for `count` elements of a dtype. Returns SHD_WRONG_DTYPE if it has no kernel. */
int shdi_add(const shdi_kernels *kernels, int dtype, void *result, const void *weight, const float *value, float alpha,
             uint32_t count);

/* result = weight moved by `shifts`, integers of the elements' size, for `count` elements of a dtype. Returns
 * SHD_OUT_OF_RANGE where an element would leave the dtype's range, SHD_WRONG_DTYPE if the dtype has no order. */
int shdi_shift(int dtype, void *result, const void *weight, const uint8_t *shifts, uint32_t count);

SHDI_END

#endif
