/* What choosing the classes of a FROM_BASE section counts over all of the base's elements (FORMAT.md, section 8). */
#include "from_base.h"
#include "weights.h"

int shd_key_counts(const void *elements, uint64_t count, uint32_t element_size, uint64_t *counts) {
    if ((elements == NULL && count != 0) || !shdi_size_is_known(element_size) || counts == NULL) {
        return SHD_INVALID_ARGUMENT;
    }
    memset(counts, 0, SHDI_KEYS * sizeof *counts);
    for (uint64_t i = 0; i < count; i++) {
        counts[shdi_key_at(elements, i, element_size)]++;
    }
    return SHD_OK;
}

/* Checks a call, and writes the class of each key. */
SHDI_ONCE static int open_classes(const shd_base_grid *grid, const void *elements, uint32_t element_size, uint8_t *classes) {
    return shdi_is_base_grid(grid) && elements != NULL && shdi_size_is_known(element_size) &&
                   shdi_classes_of_keys(grid->thresholds, grid->classes - 1, classes)
               ? SHD_OK
               : SHD_INVALID_ARGUMENT;
}

int shd_line_counts(const shd_base_grid *grid, const void *elements, uint32_t element_size, uint64_t *of_rows,
                    uint64_t *of_columns) {
    uint8_t classes[SHDI_KEYS];
    if (of_rows == NULL || of_columns == NULL || open_classes(grid, elements, element_size, classes) != SHD_OK) {
        return SHD_INVALID_ARGUMENT;
    }
    const uint64_t columns = grid->columns, rows = grid->numel / columns;
    memset(of_columns, 0, (size_t)(columns * grid->classes) * sizeof *of_columns);
    for (uint64_t row = 0; row < rows; row++, of_rows += grid->classes) {
        uint32_t found[2][SHDI_MAX_BASE_CLASSES] = {{0}, {0}}; /* two, so that one does not wait for the other */
        uint64_t *of_column = of_columns;
        for (uint64_t i = 0; i < columns; i++, of_column += grid->classes) {
            const uint32_t class = classes[shdi_key_at(elements, row * columns + i, element_size)];
            found[i % 2][class]++;
            of_column[class]++;
        }
        for (uint32_t class = 0; class < grid->classes; class ++) {
            of_rows[class] = found[0][class] + found[1][class];
        }
    }
    return SHD_OK;
}

int shd_joint_counts(const shd_base_grid *grid, const void *elements, uint32_t element_size, uint64_t *counts) {
    uint8_t classes[SHDI_KEYS];
    if (counts == NULL || open_classes(grid, elements, element_size, classes) != SHD_OK) {
        return SHD_INVALID_ARGUMENT;
    }
    const uint64_t columns = grid->columns, rows = grid->numel / columns;
    const uint32_t row_mask = (1u << grid->row_bits) - 1, column_mask = (1u << grid->column_bits) - 1;
    memset(counts, 0, (size_t)(grid->classes << (grid->row_bits + grid->column_bits)) * sizeof *counts);
    for (uint64_t row = 0; row < rows; row++) {
        const uint32_t row_class = grid->row_bits == 0 ? 0 : grid->row_classes[row] & row_mask;
        uint64_t *cells = counts + (row_class << grid->column_bits) * grid->classes;
        for (uint64_t i = 0; i < columns; i++) {
            const uint32_t column_class = grid->column_bits == 0 ? 0 : grid->column_classes[i] & column_mask;
            cells[column_class * grid->classes + classes[shdi_key_at(elements, row * columns + i, element_size)]]++;
        }
    }
    return SHD_OK;
}
