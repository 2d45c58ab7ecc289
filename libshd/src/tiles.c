/* Gaps in tiles: the parts of a section, taken and written, and unary numbers. */
#include "tiles.h"
#include "rice_writer.h"
#include "section.h"

SHDI_ONCE const uint8_t *shdi_take(shdi_parts *p, uint64_t bits) {
    const uint64_t size = 4 * shdi_ceil_div(bits, 32), start = p->at;
    if (size > p->size - start) {
        return NULL;
    }
    p->at += size;
    p->unused |= shdi_check_zeros(p->section, 8 * start + bits, p->at).code != SHD_OK;
    return p->section + start;
}

SHDI_ONCE int shdi_take_fields(shdi_parts *p, uint64_t count, uint32_t bits, shdi_fields *f) {
    f->bits = bits;
    f->data = shdi_take(p, count * bits);
    return f->data != NULL;
}

SHDI_ONCE uint32_t shdi_width_of(const uint32_t *numbers, uint64_t count) {
    uint32_t all = 0, width = 0;
    for (uint64_t i = 0; i < count; i++) {
        all |= numbers[i];
    }
    for (; all != 0; all >>= 1) {
        width++;
    }
    return width;
}

SHDI_ONCE uint8_t *shdi_write_numbers(uint8_t *to, const uint32_t *numbers, uint64_t count, uint32_t bits) {
    shdi_packer p = {to, 0, 0};
    for (uint64_t i = 0; bits != 0 && i < count; i++) {
        shdi_pack(&p, numbers[i], bits);
    }
    shdi_pack_rest(&p);
    return to + shdi_fields_size(count, bits);
}

SHDI_ONCE uint8_t *shdi_write_classes(uint8_t *to, const uint8_t *classes, uint64_t count, uint32_t bits) {
    shdi_packer p = {to, 0, 0};
    for (uint64_t i = 0; bits != 0 && i < count; i++) {
        shdi_pack(&p, classes[i], bits);
    }
    shdi_pack_rest(&p);
    return to + shdi_fields_size(count, bits);
}

int shdi_skip_ones(const uint8_t *bitmap, uint64_t *at, uint64_t end, uint64_t count) {
    while (count > 0) {
        if (*at >= end) {
            return 0;
        }
        const uint64_t valid = shdi_min(64 - *at % 8, end - *at); /* at least 57, or all */
        uint64_t word = shdi_load64(bitmap + *at / 8) >> (*at % 8);
        word = valid < 64 ? word & ((UINT64_C(1) << valid) - 1) : word;
        const uint32_t ones = shdi_ones(word);
        if (ones < count) {
            count -= ones;
            *at += valid;
            continue;
        }
        while (--count > 0) {
            word &= word - 1;
        }
        *at += shdi_lowest_one(word) + 1;
        return 1;
    }
    return 1;
}
