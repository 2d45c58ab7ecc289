/* The value codec ULP: shifts, in blocks that decode independently (FORMAT.md, 5.1). */
#ifndef SHD_VALUES_ULP_H
#define SHD_VALUES_ULP_H

#include "bytes.h"
#include "errors.h"

SHDI_BEGIN

/* The nonzeros of a block. */
#define SHDI_ULP_BLOCK 8192u

#define SHDI_ULP_MAX_K 13u
#define SHDI_ULP_MAX_J 62u
#define SHDI_ULP_MAX_WIDTH 63u

/* A field of at most 63 bits. Reads nine bytes; the slack follows the stream. */
static inline uint64_t shdi_ulp_field(const uint8_t *stream, uint64_t at, uint32_t width) {
    const uint8_t *from = stream + at / 8;
    uint32_t low = (uint32_t)(at % 8);
    uint64_t word = shdi_load64(from) >> low;
    if (low != 0) {
        word |= (uint64_t)from[8] << (64 - low);
    }
    return word & ((UINT64_C(1) << width) - 1);
}

/* Writes a shift as an integer of `size` bytes. */
static inline void shdi_put_shift(uint8_t *to, uint32_t size, uint64_t shift) {
    switch (size) {
    case 1: to[0] = (uint8_t)shift; break;
    case 2: shdi_store16(to, (uint16_t)shift); break;
    case 4: shdi_store32(to, (uint32_t)shift); break;
    default: shdi_store64(to, shift); break;
    }
}

/* Where reading is. Bits are counted in the stream, ranks in the tensor. */
typedef struct shdi_ulp {
    const uint8_t *directory, *signs, *stream;
    uint64_t bits, listed; /* of all blocks */
    uint64_t nnz;
    uint64_t most; /* the largest magnitude */
    uint32_t k, j, word, size;
    uint64_t rank;                      /* that comes next */
    uint64_t end_rank;                  /* of its block; 0 before the first one is open */
    uint64_t gap, low, unary, field;    /* what comes next in each of the block's four parts */
    uint64_t end;                       /* of the block's stream */
    uint64_t left;                      /* shifts of its list that were not read */
    uint64_t listed_rank, listed_value; /* the next one of the list; end_rank if there is none */
} shdi_ulp;

/* Makes a reader, and checks the section's head and size. */
shdi_fault shdi_ulp_open(shdi_ulp *ulp, const shd_delta *delta);

/* Writes the shifts of ranks [rank, rank + count), which exist, as integers of the elements' size. Fastest where calls
 * go on from each other. Leaves no memory but `shifts` changed, whatever the section holds. */
shdi_fault shdi_ulp_read(shdi_ulp *ulp, uint64_t rank, uint64_t count, uint8_t *shifts);

/* Makes every check of section 5.1. */
shdi_fault shdi_ulp_check(const shd_delta *delta);

/* The least bytes of a section, and of one of ULP_FROM_BASE. */
uint64_t shdi_ulp_size(uint64_t count);
uint64_t shdi_ulp_from_base_size(uint64_t count);

SHDI_END

#endif
