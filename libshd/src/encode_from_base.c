/* Writing a FROM_BASE section (FORMAT.md, section 4.7) of given classes. */
#include "from_base.h"
#include "weights.h"

/* Where a group's gaps are written, and how many of its elements have come. */
typedef struct place {
    uint32_t seen; /* in the tile */
    uint32_t next; /* the first behind the last that was listed */
    uint32_t k;
    uint32_t turned;
    uint32_t listed;
    uint64_t unary; /* the next bit of each; what is planned counts from 0 */
    uint64_t low;
} place;

/* What a section is written from; in the caller's memory. */
typedef struct plan {
    uint64_t rows;
    uint64_t tiles;
    uint64_t low_bits;
    uint64_t unary_bits;
    uint8_t *low; /* where the streams are written; NULL: they are only counted */
    uint8_t *stream;
    uint32_t *sizes;  /* of tiles, in unary bits */
    uint32_t *counts; /* of what is listed, by group, then by tile */
    uint32_t *unary;  /* bits, by group, then by tile */
    place places[SHDI_MAX_GROUPS];
    shdi_groups table;
    shdi_masks masks;
    uint8_t classes[SHDI_KEYS];
    uint8_t column_cells[]; /* where the cells of each column's class start in those of a row; then the numbers */
} plan;

SHDI_ONCE int shdi_is_base_grid(const shd_base_grid *grid) {
    return grid != NULL && (grid->thresholds != NULL || grid->classes == 1) &&
           (grid->row_classes != NULL || grid->row_bits == 0) &&
           (grid->column_classes != NULL || grid->column_bits == 0) && grid->row_bits <= SHDI_MAX_CLASS_BITS &&
           grid->column_bits <= SHDI_MAX_CLASS_BITS && grid->classes - 1 < SHDI_MAX_BASE_CLASSES &&
           grid->columns != 0 && grid->columns <= SHDI_MAX_BASE_TILE && grid->numel <= SHDI_MAX_NUMEL &&
           grid->numel % grid->columns == 0 && grid->tile_rows != 0 &&
           grid->tile_rows <= SHDI_MAX_BASE_TILE / grid->columns && grid->tile_rows <= grid->numel / grid->columns;
}

SHDI_ONCE static int is_grid(const shd_base_grid *grid) { return shdi_is_base_grid(grid) && grid->groups != NULL; }

static uint64_t tiles_of(const shd_base_grid *grid) {
    return shdi_ceil_div(grid->numel / grid->columns, grid->tile_rows);
}

SHDI_ONCE uint64_t shd_from_base_plan_size(const shd_base_grid *grid) {
    const uint64_t numbers = 1 + 2 * SHDI_MAX_GROUPS; /* of a tile */
    return is_grid(grid) ? 64 + sizeof(plan) + shdi_align64(grid->columns + 64) + 4 * numbers * tiles_of(grid) : 0;
}

static plan *plan_in(void *memory) { return (plan *)(void *)((uint8_t *)memory + (64 - (uintptr_t)memory % 64) % 64); }

/* Sets up what no tile changes. Returns 0 if the grid is not one. */
SHDI_ONCE static int open_plan(plan *p, const shd_base_grid *grid) {
    memset(p, 0, sizeof *p);
    p->rows = grid->numel / grid->columns;
    p->tiles = tiles_of(grid);
    if (!shdi_classes_of_keys(grid->thresholds, grid->classes - 1, p->classes) ||
        shdi_number_groups(grid->groups, grid->row_bits, grid->column_bits, grid->classes, &p->table) !=
            grid->classes << (grid->row_bits + grid->column_bits)) {
        return 0;
    }
    for (uint32_t i = 0; i + 1 < grid->classes; i++) {
        p->masks.thresholds[i] = grid->thresholds[i];
    }
    shdi_open_masks(&p->masks, grid->classes, &p->table);
    memset(p->column_cells, 0, (size_t)grid->columns + 64); /* what masks leave of a tile is less */
    for (uint64_t i = 0; i < grid->columns; i++) {
        const uint32_t class = grid->column_bits == 0 ? 0 : grid->column_classes[i];
        if (class >> grid->column_bits != 0) {
            return 0;
        }
        p->column_cells[i] = (uint8_t)(class * SHDI_COLUMN_CELLS);
    }
    for (uint64_t i = 0; grid->row_bits != 0 && i < p->rows; i++) {
        if (grid->row_classes[i] >> grid->row_bits != 0) {
            return 0;
        }
    }
    p->sizes = (uint32_t *)(void *)((uint8_t *)p + sizeof *p + shdi_align64(grid->columns + 64));
    p->counts = p->sizes + p->tiles;
    p->unary = p->counts + p->tiles * p->table.count;
    return 1;
}

/* Lists an element of a group, before which `order` have come. */
static void list_element(plan *p, place *to, uint32_t order) {
    const uint32_t gap = order - to->next;
    to->next = order + 1;
    to->unary += gap >> to->k;
    if (p->low != NULL) {
        uint8_t *low = p->low + to->low / 8; /* unary bits and slack follow the last one */
        p->stream[to->unary / 8] |= (uint8_t)(1u << (to->unary % 8));
        shdi_store64(low, shdi_load64(low) | (gap & ((UINT64_C(1) << to->k) - 1)) << (to->low % 8));
    }
    to->unary++;
    to->low += to->k;
    to->listed++;
}

/* The positions that are not passed yet. */
typedef struct list {
    const int64_t *next;
    const int64_t *end;
} list;

/* Walks over elements from `position` on, of a row whose class has these cells. `size` is that of an element. */
static void walk_row(plan *p, const uint8_t *elements, uint32_t size, uint64_t count, uint64_t position,
                     const uint8_t *cells, list *nonzeros) {
    for (uint64_t i = 0; i < count; i++) {
        place *to = &p->places[cells[p->column_cells[i] + p->classes[shdi_key_at(elements, i, size)]]];
        const uint32_t order = to->seen++;
        const uint32_t is_nonzero = nonzeros->next < nonzeros->end && (uint64_t)*nonzeros->next == position + i;
        nonzeros->next += is_nonzero;
        if (to->turned != is_nonzero) {
            list_element(p, to, order);
        }
    }
}

/* The same, 64 elements at a time. */
static void walk_blocks(plan *p, const shdi_kernels *kernels, const uint8_t *elements, uint64_t blocks,
                        uint64_t position, uint32_t row_class, list *nonzeros) {
    const uint8_t *order = p->masks.order[row_class], *last = p->masks.last[row_class];
    const uint8_t *cells = p->table.cells + row_class * SHDI_ROW_CELLS;
    uint64_t masks[16 * SHDI_MASK_BLOCKS];
    uint8_t counts[16 * SHDI_MASK_BLOCKS];
    for (uint64_t block = 0; block < blocks; block++, position += 64) {
        const uint64_t of_run = 16 * (block % SHDI_MASK_BLOCKS);
        if (of_run == 0) {
            kernels->class_masks(elements + 128 * block, (uint32_t)shdi_min(blocks - block, SHDI_MASK_BLOCKS),
                                 p->masks.thresholds, p->masks.classes - 1, masks, counts);
        }
        uint64_t found = 0, mask = 0;
        uint32_t count = 0;
        for (; nonzeros->next < nonzeros->end && (uint64_t)*nonzeros->next < position + 64; nonzeros->next++) {
            found |= UINT64_C(1) << ((uint64_t)*nonzeros->next - position) % 64;
        }
        for (uint32_t i = 0; i < p->masks.classes; i++) {
            mask |= masks[of_run + order[i]];
            count += counts[of_run + order[i]];
            if (!last[i]) {
                continue;
            }
            place *to = &p->places[cells[order[i]]];
            for (uint64_t listed = mask & (to->turned ? ~found : found); listed != 0; listed &= listed - 1) {
                list_element(p, to, to->seen + shdi_ones(mask & ((listed & (0 - listed)) - 1)));
            }
            to->seen += count;
            mask = 0;
            count = 0;
        }
    }
}

/* Lists the elements of a tile. */
static void walk_tile(plan *p, const shd_base_grid *grid, const uint8_t *elements, uint32_t size, uint64_t tile,
                      list *nonzeros) {
    const shdi_kernels *kernels = shdi_kernels_best();
    const int by_masks = kernels->class_masks != NULL && size == 2 && grid->column_bits == 0;
    uint64_t position = tile * grid->tile_rows * grid->columns;
    const uint64_t end = shdi_min(position + grid->tile_rows * grid->columns, grid->numel);
    /* Rows of one class are like one row. */
    const uint64_t columns = by_masks && grid->row_bits == 0 ? end - position : grid->columns;
    for (uint64_t row = tile * grid->tile_rows; position < end; row++) {
        const uint32_t class = grid->row_bits == 0 ? 0 : grid->row_classes[row];
        const uint64_t done = by_masks ? columns / 64 * 64 : 0;
        walk_blocks(p, kernels, elements + position * size, done / 64, position, class, nonzeros);
        walk_row(p, elements + (position + done) * size, size, columns - done, position + done,
                 p->table.cells + class * SHDI_ROW_CELLS, nonzeros);
        position += columns;
    }
}

/* ---- The section ---- */

static uint32_t count_width(const plan *p, uint32_t group) {
    return shdi_width_of(p->counts + group * p->tiles, p->tiles);
}

/* Writes everything before the low bits; returns where these go. */
SHDI_ONCE static uint8_t *write_before_low(const plan *p, const shd_base_grid *grid, uint8_t *to) {
    const uint32_t cells = grid->classes << (grid->row_bits + grid->column_bits);
    to[0] = (uint8_t)grid->row_bits;
    to[1] = (uint8_t)grid->column_bits;
    to[2] = (uint8_t)grid->classes;
    shdi_store32(to + 4, grid->tile_rows);
    shdi_store64(to + 8, grid->columns);
    shdi_store64(to + 16, p->unary_bits);
    to += SHDI_FROM_BASE_HEAD;
    if (grid->classes > 1) {
        memcpy(to, grid->thresholds, 2 * (grid->classes - 1));
    }
    to += shdi_align4(2 * (grid->classes - 1));
    memcpy(to, grid->groups, cells);
    to += shdi_align4(cells);
    uint8_t *widths = to;
    to += shdi_align4(1 + p->table.count);
    to = shdi_write_classes(to, grid->row_classes, p->rows, grid->row_bits);
    to = shdi_write_classes(to, grid->column_classes, grid->columns, grid->column_bits);
    widths[0] = (uint8_t)shdi_width_of(p->sizes, p->tiles);
    to = shdi_write_numbers(to, p->sizes, p->tiles, widths[0]);
    for (uint32_t i = 0; i < p->table.count; i++) {
        widths[1 + i] = (uint8_t)count_width(p, i);
        to = shdi_write_numbers(to, p->counts + i * p->tiles, p->tiles, widths[1 + i]);
    }
    return to;
}

SHDI_ONCE static uint64_t size_of(const plan *p, const shd_base_grid *grid) {
    uint64_t size = SHDI_FROM_BASE_HEAD + shdi_align4(2 * (grid->classes - 1)) +
                    shdi_align4(grid->classes << (grid->row_bits + grid->column_bits)) +
                    shdi_align4(1 + p->table.count) + shdi_fields_size(p->rows, grid->row_bits) +
                    shdi_fields_size(grid->columns, grid->column_bits) +
                    shdi_fields_size(p->tiles, shdi_width_of(p->sizes, p->tiles));
    for (uint32_t i = 0; i < p->table.count; i++) {
        size += shdi_fields_size(p->tiles, count_width(p, i));
    }
    return size + 4 * shdi_ceil_div(p->low_bits, 32) + 4 * shdi_ceil_div(p->unary_bits, 32) + SHDI_SLACK;
}

/* ---- The public functions ---- */

/* Walks over all tiles and writes what they list. */
static void write_all(plan *p, const shd_base_grid *grid, const uint8_t *elements, uint32_t size,
                      const int64_t *positions, uint64_t count) {
    uint64_t low = 0, unary = 0;
    list nonzeros = {positions, positions + count};
    for (uint64_t tile = 0; tile < p->tiles; tile++) {
        for (uint32_t i = 0; i < p->table.count; i++) {
            const place start = {0, 0, p->table.k[i], i >= p->table.first_turned, 0, unary, low};
            p->places[i] = start;
            unary += p->unary[i * p->tiles + tile];
            low += (uint64_t)p->counts[i * p->tiles + tile] * p->table.k[i];
        }
        walk_tile(p, grid, elements, size, tile, &nonzeros);
    }
}

/* The same, and only counts. */
static void count_all(plan *p, const shd_base_grid *grid, const uint8_t *elements, uint32_t size,
                      const int64_t *positions, uint64_t count) {
    list nonzeros = {positions, positions + count};
    for (uint64_t tile = 0; tile < p->tiles; tile++) {
        for (uint32_t i = 0; i < p->table.count; i++) {
            const place start = {0, 0, p->table.k[i], i >= p->table.first_turned, 0, 0, 0};
            p->places[i] = start;
        }
        walk_tile(p, grid, elements, size, tile, &nonzeros);
        p->sizes[tile] = 0;
        for (uint32_t i = 0; i < p->table.count; i++) {
            p->unary[i * p->tiles + tile] = (uint32_t)p->places[i].unary;
            p->counts[i * p->tiles + tile] = p->places[i].listed;
            p->sizes[tile] += (uint32_t)p->places[i].unary;
            p->low_bits += p->places[i].low;
        }
        p->unary_bits += p->sizes[tile];
    }
}

static int are_positions(const int64_t *positions, uint64_t count, uint64_t numel) {
    for (uint64_t i = 1; i < count; i++) {
        if (positions[i] <= positions[i - 1]) {
            return SHD_POSITION_ORDER;
        }
    }
    return positions[0] < 0 || (uint64_t)positions[count - 1] >= numel ? SHD_POSITION_RANGE : SHD_OK;
}

int shd_from_base_plan(const shd_base_grid *grid, const void *elements, uint32_t element_size,
                       const int64_t *positions, uint64_t count, void *scratch, uint64_t scratch_size,
                       uint64_t *size) {
    if (!is_grid(grid) || elements == NULL || !shdi_size_is_known(element_size) || positions == NULL || count == 0 ||
        scratch == NULL || size == NULL) {
        return SHD_INVALID_ARGUMENT;
    }
    if (scratch_size < shd_from_base_plan_size(grid)) {
        return SHD_BUFFER_TOO_SMALL;
    }
    plan *p = plan_in(scratch);
    int code = are_positions(positions, count, grid->numel);
    if (code == SHD_OK && !open_plan(p, grid)) {
        code = SHD_INVALID_ARGUMENT;
    }
    if (code == SHD_OK) {
        count_all(p, grid, elements, element_size, positions, count);
        *size = size_of(p, grid);
    }
    return code;
}

int shd_from_base_encode(const shd_base_grid *grid, const void *elements, uint32_t element_size,
                         const int64_t *positions, uint64_t count, void *scratch, void *section, uint64_t capacity) {
    if (!is_grid(grid) || elements == NULL || positions == NULL || count == 0 || scratch == NULL || section == NULL) {
        return SHD_INVALID_ARGUMENT;
    }
    plan *p = plan_in(scratch);
    const uint64_t size = size_of(p, grid);
    if (capacity < size) {
        return SHD_BUFFER_TOO_SMALL;
    }
    memset(section, 0, (size_t)size);
    p->low = write_before_low(p, grid, section);
    p->stream = p->low + 4 * shdi_ceil_div(p->low_bits, 32);
    write_all(p, grid, elements, element_size, positions, count);
    return SHD_OK;
}
