/* Gaps in tiles, Rice coded with a k for each group of elements: what TILED and FROM_BASE share (FORMAT.md, 4.6, 4.7). */
#ifndef SHD_TILES_H
#define SHD_TILES_H

#include "bytes.h"
#include "errors.h"

#define SHDI_MAX_CLASS_BITS 4u
#define SHDI_MAX_CLASSES (1u << SHDI_MAX_CLASS_BITS)

SHDI_BEGIN

/* ---- The parts of a section, one after the other ---- */

typedef struct shdi_parts {
    const uint8_t *section;
    uint64_t size;
    uint64_t at; /* where the next part starts */
    int unused;  /* a bit that has to be zero is not */
} shdi_parts;

/* Takes a part of so many bits. NULL if the section ends before. */
const uint8_t *shdi_take(shdi_parts *p, uint64_t bits);

/* Packed fields of `bits` bits. */
typedef struct shdi_fields {
    const uint8_t *data;
    uint32_t bits;
} shdi_fields;

/* Takes `count` fields. Returns 0 if the section ends before. */
int shdi_take_fields(shdi_parts *p, uint64_t count, uint32_t bits, shdi_fields *f);

static inline uint32_t shdi_field(const shdi_fields *f, uint64_t i) {
    uint64_t bit = i * f->bits;
    /* The slack of the section lies behind the last field. */
    return f->bits == 0 ? 0 : (uint32_t)(shdi_load64(f->data + bit / 8) >> (bit % 8)) & ((1u << f->bits) - 1);
}

/* The bits that fields of these numbers need. */
uint32_t shdi_width_of(const uint32_t *numbers, uint64_t count);

static inline uint64_t shdi_fields_size(uint64_t count, uint32_t bits) { return 4 * shdi_ceil_div(count * bits, 32); }

/* Write numbers as fields, to where zeros are; return where the fields end. */
uint8_t *shdi_write_numbers(uint8_t *to, const uint32_t *numbers, uint64_t count, uint32_t bits);
uint8_t *shdi_write_classes(uint8_t *to, const uint8_t *classes, uint64_t count, uint32_t bits);

/* ---- Unary numbers ---- */

typedef struct shdi_unary {
    const uint8_t *bitmap;
    uint64_t bit;
    uint64_t end;
} shdi_unary;

/* The zeros before the next one, or up to the end. */
static inline uint64_t shdi_read_zeros(shdi_unary *r) {
    uint64_t from = r->bit;
    if (from >= r->end) { /* the file has changed */
        return 0;
    }
    uint64_t word = shdi_load64(r->bitmap + from / 8) >> (from % 8);
    if (word != 0) { /* most often */
        uint32_t zeros = shdi_lowest_one(word);
        r->bit = from + zeros + 1;
        return zeros;
    }
    uint64_t bit = (from / 8 + 8) * 8;
    for (; bit < r->end; bit += 64) {
        word = shdi_load64(r->bitmap + bit / 8);
        if (word != 0) {
            bit += shdi_lowest_one(word);
            break;
        }
    }
    bit = shdi_min(bit, r->end);
    r->bit = bit + 1;
    return bit - from;
}

/* Moves `*at` behind the `count`-th one from there on. Returns 0 if `end` comes first. */
int shdi_skip_ones(const uint8_t *bitmap, uint64_t *at, uint64_t end, uint64_t count);

SHDI_END

#endif
