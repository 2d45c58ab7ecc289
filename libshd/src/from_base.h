/* FROM_BASE: its limits, and the keys of the base's elements (FORMAT.md, section 4.7). */
#ifndef SHD_FROM_BASE_H
#define SHD_FROM_BASE_H

#include "kernels.h"
#include "tiles.h"

#define SHDI_MAX_BASE_CLASSES 16u
#define SHDI_MAX_BASE_TILE 1048576u
#define SHDI_MAX_BASE_TILE_FIELD 22u
#define SHDI_MAX_GROUPS (2 * (SHDI_MAX_RICE_K + 1u)) /* the most different bytes of a table */
#define SHDI_TURNED 0x80u                            /* what is listed are the elements that are no nonzeros */
#define SHDI_KEYS 32768u
#define SHDI_CELLS (SHDI_MAX_CLASSES * SHDI_MAX_CLASSES * SHDI_MAX_BASE_CLASSES)

#define SHDI_FROM_BASE_HEAD 24u

SHDI_BEGIN

/* The key of element i, of `size` bytes. */
static inline uint32_t shdi_key_at(const uint8_t *elements, uint64_t i, uint32_t size) {
    return size == 1 ? elements[i] & 0x7Fu : shdi_load16(elements + i * size + size - 2) & 0x7FFFu;
}

/* Writes the class of each key: the number of thresholds, of which there are `count`, that are at most it. Returns 0 if
 * they decrease. */
int shdi_classes_of_keys(const uint16_t *thresholds, uint32_t count, uint8_t *classes);

/* The groups of a table: its different bytes, increasing. */
typedef struct shdi_groups {
    uint32_t count;
    uint8_t k[SHDI_MAX_GROUPS];
    uint32_t first_turned;     /* those from here on are */
    uint8_t cells[SHDI_CELLS]; /* the group, by row class, then column class, then class of element */
} shdi_groups;

/* Where the cells of a class of rows start, and those of one of columns within them. */
#define SHDI_ROW_CELLS (SHDI_MAX_CLASSES * SHDI_MAX_BASE_CLASSES)
#define SHDI_COLUMN_CELLS SHDI_MAX_BASE_CLASSES

/* Numbers the bytes of a table. Returns how many of them are right before the first that is not: all, if all are. */
uint32_t shdi_number_groups(const uint8_t *table, uint32_t row_bits, uint32_t column_bits, uint32_t classes,
                            shdi_groups *groups);

/* Elements of 2 bytes in rows whose columns have one class are taken 64 at a time, where a kernel finds their classes. */
typedef struct shdi_masks {
    uint32_t classes;
    uint16_t thresholds[SHDI_MAX_BASE_CLASSES];
    uint8_t order[SHDI_MAX_CLASSES][SHDI_MAX_BASE_CLASSES]; /* by row class: classes, those of one group together */
    uint8_t last[SHDI_MAX_CLASSES][SHDI_MAX_BASE_CLASSES];  /* whether it is the last of its group */
} shdi_masks;

/* Sets up all but the thresholds. */
void shdi_open_masks(shdi_masks *masks, uint32_t classes, const shdi_groups *groups);

/* So many blocks are taken from the kernel at a time. */
#define SHDI_MASK_BLOCKS 16u

/* Whether a grid is one, but for its groups, which may be missing, and for what its arrays hold. */
int shdi_is_base_grid(const shd_base_grid *grid);

SHDI_END

#endif
