/* Writing RICE (FORMAT.md, section 4.2), one position after the other. */
#ifndef SHD_RICE_WRITER_H
#define SHD_RICE_WRITER_H

#include "bytes.h"

struct shdi_kernels;

/* Packs the low bits into 32-bit words. */
typedef struct shdi_packer {
    uint8_t *next;
    uint64_t bits;
    uint32_t count;
} shdi_packer;

static inline void shdi_pack(shdi_packer *p, uint64_t value, uint32_t bits) {
    p->bits |= value << p->count;
    p->count += bits;
    if (p->count >= 32) {
        shdi_store32(p->next, (uint32_t)p->bits);
        p->next += 4;
        p->bits >>= 32;
        p->count -= 32;
    }
}

/* Packs up to 56 bits, where up to 7 are left. Writes 8 bytes. */
static inline void shdi_pack_bytes(shdi_packer *p, uint64_t value, uint32_t bits) {
    p->bits |= value << p->count;
    shdi_store64(p->next, p->bits);
    p->count += bits;
    p->next += p->count / 8;
    p->bits >>= p->count & 56;
    p->count &= 7;
}

/* Writes the bits that fill no whole word. */
static inline void shdi_pack_rest(shdi_packer *p) {
    if (p->count > 0) {
        shdi_store32(p->next, (uint32_t)p->bits);
    }
}

/* A place in the section: at unary bit `bit`, after `rank` nonzeros, the last of which is at `position` - 1. */
typedef struct shdi_rice_writer {
    uint8_t *directory;
    uint8_t *unary; /* zeros, to begin with */
    shdi_packer low;
    uint32_t word;
    uint32_t k;
    uint64_t block; /* the next that needs an entry */
    uint64_t bit;
    uint64_t rank;
    uint64_t position;
} shdi_rice_writer;

/* Writes the entries of the blocks that start at or before unary bit `bit`. That bit is the next one, or a zero before
 * it. */
static inline void shdi_rice_write_entries(shdi_rice_writer *w, uint64_t bit) {
    for (; w->block * SHDI_BLOCK <= bit; w->block++) {
        uint64_t zeros = w->block * SHDI_BLOCK - w->bit;
        shdi_store_word(w->directory, w->word, w->position + (zeros << w->k));
        shdi_store_word(w->directory + w->word, w->word, w->rank);
        w->directory += 2 * w->word;
    }
}

/* Writes a position, which is not below w->position. */
static inline void shdi_rice_write(shdi_rice_writer *w, uint64_t position) {
    uint64_t gap = position - w->position;
    uint64_t one = w->bit + (gap >> w->k);
    if (w->block * SHDI_BLOCK <= one) {
        shdi_rice_write_entries(w, one);
    }
    w->unary[one / 8] |= (uint8_t)(1u << (one % 8));
    shdi_pack(&w->low, gap & ((UINT64_C(1) << w->k) - 1), w->k);
    w->bit = one + 1;
    w->position = position + 1;
    w->rank++;
}

SHDI_BEGIN

/* Writes positions base + offset[i], which increase and are not below w->position. Faster than one by one, but the low bits
 * and the unary ones have to be followed by 8 bytes that it may write, which are zeros behind the unary ones. */
void shdi_rice_write_run(shdi_rice_writer *w, const struct shdi_kernels *kernels, uint64_t base, const uint32_t *offset,
                         uint32_t count);

SHDI_END

#endif
