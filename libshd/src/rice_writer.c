/* Writing many positions of RICE (FORMAT.md, section 4.2). */
#include "rice_writer.h"
#include "kernels.h"

/* Writes positions base + offset[i], one after the other. */
SHDI_OFTEN static void write_slowly(shdi_rice_writer *w, uint64_t base, const uint32_t *offset, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        shdi_rice_write(w, base + offset[i]);
    }
    shdi_pack_bytes(&w->low, 0, 0);
}

/* Where a block starts the kernel stops. */
SHDI_OFTEN void shdi_rice_write_run(shdi_rice_writer *w, const shdi_kernels *kernels, uint64_t base,
                                    const uint32_t *offset, uint32_t count) {
    uint32_t i = (uint32_t)shdi_min(count, 1);
    write_slowly(w, base, offset, i);
    while (w->k <= SHDI_PACKED_K && i < count) {
        i += kernels->rice_gaps(w, offset + i, count - i);
        w->position = base + offset[i - 1] + 1;
        const uint32_t few = (uint32_t)shdi_min(count - i, 8);
        uint32_t one = 0;
        for (const uint64_t block = w->block; one < few && w->block == block; one++) {
            shdi_rice_write(w, base + offset[i + one]);
        }
        i += one;
        shdi_pack_bytes(&w->low, 0, 0);
    }
    write_slowly(w, base, offset + i, count - i);
}
