/* Draws: the position that a seed gives in each cell of a tensor (FORMAT.md, section 4.8). */
#ifndef SHD_DRAW_H
#define SHD_DRAW_H

#include "bytes.h"

typedef struct shdi_draw {
    uint64_t seed;
    uint64_t cells;    /* below 2^32 */
    uint64_t size;     /* of a small cell */
    uint64_t rest;     /* how many are larger by one */
    uint64_t fraction; /* rest / cells, times 2^32 and rounded down */
} shdi_draw;

/* The position that is drawn in cell i. */
static inline uint64_t shdi_drawn(const shdi_draw *d, uint64_t i) {
    uint64_t larger = i * d->fraction >> 32; /* of the cells before it; or one too few, since i is below 2^32 */
    uint64_t place = i * d->rest - larger * d->cells;
    const uint64_t one = place >= d->cells;
    larger += one;
    place -= one ? d->cells : 0;
    const uint64_t size = d->size + (place >= d->cells - d->rest);
    return i * d->size + larger + ((shdi_mix(i, d->seed) >> 32) * size >> 32);
}

#endif
