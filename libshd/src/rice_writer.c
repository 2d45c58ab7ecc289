/* Writing many positions of RICE (FORMAT.md, section 4.2). */
#include "rice_writer.h"

/* Packs up to 56 bits, where up to 7 are left. Writes 8 bytes. */
static inline void pack_bytes(shdi_packer *p, uint64_t value, uint32_t bits) {
    p->bits |= value << p->count;
    shdi_store64(p->next, p->bits);
    p->count += bits;
    p->next += p->count / 8;
    p->bits >>= p->count & 56;
    p->count &= 7;
}

/* Writes positions base + offset[i], one after the other. */
SHDI_OFTEN static void write_slowly(shdi_rice_writer *w, uint64_t base, const uint32_t *offset, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        shdi_rice_write(w, base + offset[i]);
    }
    pack_bytes(&w->low, 0, 0);
}

/* The largest k of which pack_bytes() takes four numbers at a time. */
#define FOUR_K 14u

/* Four at a time where no block starts. */
SHDI_OFTEN void shdi_rice_write_run(shdi_rice_writer *w, uint64_t base, const uint32_t *offset, uint32_t count) {
    uint32_t i = (uint32_t)shdi_min(count, 1);
    write_slowly(w, base, offset, i);
    const uint32_t k = w->k, mask = (1u << k) - 1;
    uint8_t *const unary = w->unary;
    while (k <= FOUR_K && count - i >= 4) {
        const uint64_t limit = w->block * SHDI_BLOCK, first = i;
        uint64_t last = w->bit - 1, word = shdi_load64(unary + last / 64 * 8);
        shdi_packer low = w->low;
        for (; count - i >= 4; i += 4) {
            uint32_t gap[4];
            uint64_t one[4], packed = 0;
            for (uint32_t j = 0; j < 4; j++) {
                gap[j] = offset[i + j] - offset[i + j - 1] - 1;
                one[j] = (j == 0 ? last : one[j - 1]) + 1 + (gap[j] >> k);
            }
            if (one[3] >= limit) {
                break;
            }
            for (uint32_t j = 0; j < 4; j++) {
                word = (one[j] / 64 == last / 64 ? word : 0) | UINT64_C(1) << (one[j] % 64);
                last = one[j];
                shdi_store64(unary + last / 64 * 8, word);
                packed |= (uint64_t)(gap[j] & mask) << (j * k);
            }
            pack_bytes(&low, packed, 4 * k);
        }
        w->low = low;
        w->bit = last + 1;
        w->position = base + offset[i - 1] + 1;
        w->rank += i - first;
        const uint32_t few = (uint32_t)shdi_min(count - i, 4); /* a block starts, or these are the last */
        write_slowly(w, base, offset + i, few);
        i += few;
    }
    write_slowly(w, base, offset + i, count - i);
}
