/* The caller's weights: what a call may do with them, and reading, writing and adding to their elements. */
#ifndef SHD_WEIGHTS_H
#define SHD_WEIGHTS_H

#include "index.h"
#include "kernels.h"

SHDI_BEGIN

/* ---- What a call may do ---- */

/* Checks a call that uses `weights`. `saved` may be NULL. */
int shdi_check_weights(const shd_delta *delta, const shd_weights *weights, const void *saved);

/* Checks that the tensor's op applies with this strength. */
int shdi_check_strength(const shd_tensor *tensor, double strength);

/* ---- Elements ---- */

/* Elements shift + offset[i] of the weight buffer, all of them inside. Their ranks are rank + i. */
typedef struct shdi_run {
    uint64_t shift;
    uint64_t rank;
    const uint32_t *offset;
    uint32_t count;
} shdi_run;

/* Reads the elements of `r`, of `size` bytes each. With each of them it prefetches one of `ahead`, which has as many. */
void shdi_gather(const uint8_t *weights, uint32_t size, const shdi_run *r, const shdi_run *ahead, uint8_t *to);

/* Writes the elements of `r`. */
void shdi_scatter(uint8_t *weights, uint32_t size, const shdi_run *r, const uint8_t *from);

/* Prefetches the elements of `r`. */
void shdi_send_for(const uint8_t *weights, uint32_t size, const shdi_run *r);

SHDI_END

#endif
