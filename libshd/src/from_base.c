/* FROM_BASE (FORMAT.md, section 4.7): gaps among the elements of a tile that the base makes equally likely to change. */
#include "from_base.h"
#include "index.h"
#include "section.h"
#include "weights.h"

#define LEAST (SHDI_FROM_BASE_HEAD + 8u + SHDI_SLACK)
#define NEVER UINT32_MAX /* no group has so many elements */

/* A group in the tile that is decoded. */
typedef struct group {
    shdi_unary unary;
    uint64_t low;  /* the bit where the next gap's are */
    uint64_t left; /* gaps that were not read */
    uint32_t k;
    uint32_t waits; /* a gap was read, and the element behind it did not come yet */
} group;

/* A section taken apart, and where decoding is; in the caller's memory. */
typedef struct state {
    const uint8_t *section;
    uint64_t numel;
    uint64_t rows;
    uint64_t tiles;
    uint64_t tile;
    uint64_t columns;
    uint64_t low; /* offset in the section */
    uint64_t low_bits;
    uint64_t low_bit; /* of the next tile */
    uint64_t unary;
    uint64_t unary_bits;
    uint64_t unary_bit;
    uint64_t end; /* of the section */
    uint32_t row_bits;
    uint32_t column_bits;
    uint32_t tile_rows;
    int unused; /* a bit before low that has to be zero is not */
    shdi_fields row_classes;
    shdi_fields sizes;
    shdi_fields counts[SHDI_MAX_GROUPS];
    group group[SHDI_MAX_GROUPS];
    uint32_t next[SHDI_MAX_GROUPS]; /* elements of a group before the one that is listed next */
    shdi_masks masks;
    shdi_groups table;
    uint8_t classes[SHDI_KEYS];     /* by key */
    uint8_t column_cells[];         /* where the cells of each column's class start in those of a row */
} state;

/* ---- The parts before low ---- */

SHDI_ONCE int shdi_classes_of_keys(const uint16_t *thresholds, uint32_t count, uint8_t *classes) {
    uint32_t last = 0;
    memset(classes, 0, SHDI_KEYS);
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t threshold = thresholds[i];
        if (threshold < last) {
            return 0;
        }
        if (threshold < SHDI_KEYS) {
            memset(classes + threshold, (int)i + 1, SHDI_KEYS - threshold);
        }
        last = threshold;
    }
    return 1;
}

SHDI_ONCE uint32_t shdi_number_groups(const uint8_t *table, uint32_t row_bits, uint32_t column_bits, uint32_t classes,
                            shdi_groups *groups) {
    const uint32_t all = classes << (row_bits + column_bits);
    uint8_t number[256] = {0};
    for (uint32_t i = 0; i < all; i++) {
        if ((table[i] & ~SHDI_TURNED) > SHDI_MAX_RICE_K) {
            return i;
        }
        number[table[i]] = 1;
    }
    groups->count = 0;
    for (uint32_t byte = 0; byte < 256; byte++) {
        if (number[byte]) {
            groups->k[groups->count] = byte & (SHDI_TURNED - 1);
            number[byte] = (uint8_t)groups->count++;
        }
        if (byte < SHDI_TURNED) {
            groups->first_turned = groups->count;
        }
    }
    for (uint32_t i = 0; i < all; i++) {
        const uint32_t row = i / classes >> column_bits, column = i / classes & ((1u << column_bits) - 1);
        groups->cells[row * SHDI_ROW_CELLS + column * SHDI_COLUMN_CELLS + i % classes] = number[table[i]];
    }
    return all;
}

SHDI_ONCE void shdi_open_masks(shdi_masks *masks, uint32_t classes, const shdi_groups *groups) {
    masks->classes = classes;
    for (uint32_t row = 0; row < SHDI_MAX_CLASSES; row++) {
        uint32_t listed = 0;
        for (uint32_t number = 0; number < groups->count; number++) {
            for (uint32_t class = 0; class < classes; class ++) {
                if (groups->cells[row * SHDI_ROW_CELLS + class] == number) {
                    masks->last[row][listed] = 0;
                    masks->order[row][listed++] = (uint8_t)class;
                }
            }
            if (listed > 0) {
                masks->last[row][listed - 1] = 1;
            }
        }
    }
}

/* Takes the table. */
SHDI_ONCE static shdi_fault take_table(state *s, shdi_parts *from, uint32_t classes) {
    const uint32_t all = classes << (s->row_bits + s->column_bits);
    const uint64_t start = from->at;
    const uint8_t *table = shdi_take(from, 8 * (uint64_t)all);
    uint8_t copy[SHDI_CELLS];
    if (table == NULL) {
        return shdi_fault_at(SHD_BAD_SIZE, start);
    }
    memcpy(copy, table, all);
    const uint32_t right = shdi_number_groups(copy, s->row_bits, s->column_bits, classes, &s->table);
    return right == all ? shdi_ok() : shdi_fault_at(SHD_BAD_INDEX, start + right);
}

/* Takes the widths, and everything that they are the widths of. */
SHDI_ONCE static shdi_fault take_sizes(state *s, shdi_parts *from, shdi_fields *column_classes) {
    const uint64_t start = from->at;
    const uint8_t *data = shdi_take(from, 8 * (1 + (uint64_t)s->table.count));
    uint8_t widths[1 + SHDI_MAX_GROUPS];
    if (data == NULL) {
        return shdi_fault_at(SHD_BAD_SIZE, start);
    }
    memcpy(widths, data, 1 + s->table.count);
    for (uint32_t i = 0; i <= s->table.count; i++) {
        if (widths[i] > SHDI_MAX_BASE_TILE_FIELD) {
            return shdi_fault_at(SHD_BAD_INDEX, start + i);
        }
    }
    int fits = shdi_take_fields(from, s->rows, s->row_bits, &s->row_classes) &&
               shdi_take_fields(from, s->columns, s->column_bits, column_classes) &&
               shdi_take_fields(from, s->tiles, widths[0], &s->sizes);
    for (uint32_t i = 0; fits && i < s->table.count; i++) {
        fits = shdi_take_fields(from, s->tiles, widths[1 + i], &s->counts[i]);
    }
    return fits && from->size - from->at >= SHDI_SLACK ? shdi_ok() : shdi_fault_at(SHD_BAD_SIZE, from->at);
}

/* The sum of a field of each tile. Fields of no bits are not looked at: there is any number of them. */
static uint64_t sum_of(const state *s, const shdi_fields *f) {
    uint64_t sum = 0;
    for (uint64_t tile = 0; f->bits != 0 && tile < s->tiles; tile++) {
        sum += shdi_field(f, tile);
    }
    return sum;
}

/* Takes the section apart, with all checks up to the tiles. There is room for so many columns. */
SHDI_ONCE static shdi_fault take_apart(state *s, uint64_t size, uint64_t room) {
    const uint8_t *section = s->section;
    shdi_parts from = {section, size, SHDI_FROM_BASE_HEAD, 0};
    shdi_fields column_classes = {NULL, 0};
    const uint32_t classes = section[2];
    s->row_bits = section[0];
    s->column_bits = section[1];
    s->tile_rows = shdi_load32(section + 4);
    uint64_t columns = shdi_load64(section + 8);
    SHDI_PIN(columns);
    s->columns = columns;
    s->unary_bits = shdi_load64(section + 16);
    if (s->row_bits > SHDI_MAX_CLASS_BITS || s->column_bits > SHDI_MAX_CLASS_BITS ||
        classes - 1 >= SHDI_MAX_BASE_CLASSES || section[3] != 0 || s->tile_rows == 0 || columns == 0 ||
        columns > SHDI_MAX_BASE_TILE || s->tile_rows > SHDI_MAX_BASE_TILE / columns || s->numel % columns != 0 ||
        s->tile_rows > s->numel / columns) {
        return shdi_fault_at(SHD_BAD_INDEX, 0);
    }
    if (columns > room) { /* the section has changed */
        return shdi_fault_at(SHD_BUFFER_TOO_SMALL, 0);
    }
    s->rows = s->numel / columns;
    s->tiles = shdi_ceil_div(s->rows, s->tile_rows);
    const uint8_t *thresholds = shdi_take(&from, 16 * (uint64_t)(classes - 1));
    if (thresholds == NULL) {
        return shdi_fault_at(SHD_BAD_SIZE, SHDI_FROM_BASE_HEAD);
    }
    memcpy(s->masks.thresholds, thresholds, 2 * (classes - 1));
    if (!shdi_classes_of_keys(s->masks.thresholds, classes - 1, s->classes)) {
        return shdi_fault_at(SHD_BAD_INDEX, SHDI_FROM_BASE_HEAD);
    }
    shdi_fault fault = take_table(s, &from, classes);
    if (fault.code == SHD_OK) {
        shdi_open_masks(&s->masks, classes, &s->table);
        fault = take_sizes(s, &from, &column_classes);
    }
    if (fault.code != SHD_OK) {
        return fault;
    }
    for (uint32_t i = 0; i < s->table.count; i++) {
        s->low_bits += sum_of(s, &s->counts[i]) * s->table.k[i];
    }
    s->unused = from.unused;
    s->low = from.at;
    s->unary = s->low + 4 * shdi_ceil_div(s->low_bits, 32);
    s->end = size;
    if (s->unary_bits / 8 > size || s->unary + 4 * shdi_ceil_div(s->unary_bits, 32) + SHDI_SLACK != size) {
        return shdi_fault_at(SHD_BAD_SIZE, 16);
    }
    if (sum_of(s, &s->sizes) != s->unary_bits) {
        return shdi_fault_at(SHD_BAD_INDEX, 16);
    }
    memset(s->column_cells, 0, (size_t)columns + 64); /* what masks leave of a tile is less */
    for (uint64_t i = 0; i < columns; i++) {
        s->column_cells[i] = (uint8_t)(shdi_field(&column_classes, i) * SHDI_COLUMN_CELLS);
    }
    return shdi_ok();
}

SHDI_ONCE static int check_unused(const state *s) {
    return s->unused || shdi_check_zeros(s->section, 8 * s->low + s->low_bits, s->unary).code != SHD_OK
               ? SHD_PADDING_NOT_ZERO
               : shdi_check_zeros(s->section, 8 * s->unary + s->unary_bits, s->end).code;
}

/* ---- Tiles ---- */

/* Reads the next gap of a group: that, or NEVER. */
static uint32_t read_gap(const state *s, group *g) {
    g->waits = g->left != 0;
    if (g->left == 0) {
        return NEVER;
    }
    g->left--;
    uint64_t gap = shdi_read_zeros(&g->unary) << g->k;
    gap += (shdi_load64(s->section + s->low + g->low / 8) >> (g->low % 8)) & ((UINT64_C(1) << g->k) - 1);
    g->low += g->k;
    return (uint32_t)shdi_min(gap, NEVER);
}

/* Finds where each group's gaps are in the next tile, and reads the first of each. */
SHDI_ONCE static int open_tile(state *s) {
    const uint8_t *unary = s->section + s->unary;
    const uint64_t size = shdi_field(&s->sizes, s->tile), end = s->unary_bit + size;
    if (size > s->unary_bits - s->unary_bit) { /* the file has changed */
        return SHD_BAD_INDEX;
    }
    for (uint32_t i = 0; i < s->table.count; i++) {
        group *g = &s->group[i];
        g->left = shdi_field(&s->counts[i], s->tile);
        g->k = s->table.k[i];
        g->low = s->low_bit;
        s->low_bit += g->left * g->k;
        shdi_unary reader = {unary, s->unary_bit, 0};
        if (s->low_bit > s->low_bits || !shdi_skip_ones(unary, &s->unary_bit, end, g->left)) {
            return SHD_BAD_INDEX;
        }
        reader.end = s->unary_bit;
        g->unary = reader;
    }
    if (s->unary_bit != end) {
        return SHD_BAD_INDEX;
    }
    for (uint32_t i = 0; i < s->table.count; i++) {
        s->next[i] = read_gap(s, &s->group[i]);
    }
    return SHD_OK;
}

/* Where positions go. More than there is room for are only counted. */
typedef struct walk {
    state *s;
    int64_t *positions;
    uint64_t count;
    uint64_t room;
} walk;

static inline void add_position(walk *w, uint64_t position) {
    if (w->count < w->room) {
        w->positions[w->count] = (int64_t)position;
    }
    w->count++;
}

/* Walks over a row, whose class has these cells. `size` is that of an element. */
static void walk_row(walk *w, const uint8_t *elements, uint32_t size, uint64_t count, uint64_t position,
                     const uint8_t *cells) {
    state *s = w->s;
    for (uint64_t i = 0; i < count; i++) {
        const uint32_t number = cells[s->column_cells[i] + s->classes[shdi_key_at(elements, i, size)]];
        const int turned = number >= s->table.first_turned, listed = s->next[number]-- == 0;
        if (listed) {
            s->next[number] = read_gap(s, &s->group[number]);
        }
        if (listed != turned) {
            add_position(w, position + i);
        }
    }
}

/* Those of a group's elements in a mask, `count` of them, that are listed. */
static uint64_t take_listed(state *s, uint32_t number, uint64_t mask, uint32_t count) {
    uint64_t listed = 0;
    uint32_t next = s->next[number];
    while (next < count) {
        const uint64_t one = UINT64_C(1) << shdi_select(mask, next);
        listed |= one;
        mask &= ~(one | (one - 1));
        count -= next + 1;
        next = read_gap(s, &s->group[number]);
    }
    s->next[number] = next - count;
    return listed;
}

/* The same, 64 elements at a time. */
static void walk_blocks(walk *w, const shdi_kernels *kernels, const uint8_t *elements, uint64_t blocks,
                        uint64_t position, uint32_t row_class) {
    state *s = w->s;
    const uint8_t *order = s->masks.order[row_class], *last = s->masks.last[row_class];
    const uint8_t *cells = s->table.cells + row_class * SHDI_ROW_CELLS;
    uint64_t masks[16 * SHDI_MASK_BLOCKS];
    uint8_t counts[16 * SHDI_MASK_BLOCKS];
    for (uint64_t block = 0; block < blocks; block++, position += 64) {
        const uint64_t of_run = 16 * (block % SHDI_MASK_BLOCKS);
        if (of_run == 0) {
            kernels->class_masks(elements + 128 * block, (uint32_t)shdi_min(blocks - block, SHDI_MASK_BLOCKS),
                                 s->masks.thresholds, s->masks.classes - 1, masks, counts);
        }
        uint64_t nonzeros = 0, mask = 0;
        uint32_t count = 0;
        for (uint32_t i = 0; i < s->masks.classes; i++) {
            mask |= masks[of_run + order[i]];
            count += counts[of_run + order[i]];
            if (!last[i]) {
                continue;
            }
            const uint32_t number = cells[order[i]];
            nonzeros |= number >= s->table.first_turned ? mask : 0;
            if (s->next[number] >= count) {
                s->next[number] -= count;
            } else {
                nonzeros ^= take_listed(s, number, mask, count);
            }
            mask = 0;
            count = 0;
        }
        for (; nonzeros != 0; nonzeros &= nonzeros - 1) {
            add_position(w, position + shdi_lowest_one(nonzeros));
        }
    }
}

static void walk_tile(walk *w, const uint8_t *elements, uint32_t size, uint64_t count, uint64_t position) {
    const state *s = w->s;
    const shdi_kernels *kernels = shdi_kernels_best();
    const int by_masks = kernels->class_masks != NULL && size == 2 && s->column_bits == 0;
    /* Rows of one class are like one row. */
    const uint64_t columns = by_masks && s->row_bits == 0 ? count : s->columns;
    for (uint64_t row = s->tile * s->tile_rows; count != 0; row++) {
        const uint32_t class = shdi_field(&s->row_classes, row);
        const uint64_t blocks = by_masks ? columns / 64 : 0, rest = columns - 64 * blocks;
        walk_blocks(w, kernels, elements, blocks, position, class);
        walk_row(w, elements + 64 * blocks * size, size, rest, position + 64 * blocks,
                 s->table.cells + class * SHDI_ROW_CELLS);
        elements += columns * size;
        position += columns;
        count -= columns;
    }
}

/* ---- The public functions ---- */

static uint64_t columns_of(const uint8_t *section) { return shdi_min(shdi_load64(section + 8), SHDI_MAX_BASE_TILE); }

SHDI_ONCE uint64_t shd_from_base_scratch_size(const void *section, uint64_t size) {
    return section == NULL || size < LEAST ? 0 : 64 + sizeof(state) + columns_of(section) + 64;
}

SHDI_ONCE static void set_next(shd_from_base *reader) {
    const state *s = reader->state;
    const uint64_t size = s->tile_rows * s->columns;
    reader->next_position = shdi_min(s->tile * size, s->numel);
    reader->next_count = shdi_min(size, s->numel - reader->next_position);
}

SHDI_ONCE int shd_from_base_open(shd_from_base *reader, const void *section, uint64_t size, uint64_t numel, uint64_t nnz,
                       void *scratch, uint64_t scratch_size) {
    if (reader == NULL || section == NULL || scratch == NULL || numel > SHDI_MAX_NUMEL || nnz > numel) {
        return SHD_INVALID_ARGUMENT;
    }
    memset(reader, 0, sizeof *reader);
    if (size < LEAST) {
        return SHD_BAD_SIZE;
    }
    if (scratch_size < shd_from_base_scratch_size(section, size)) {
        return SHD_BUFFER_TOO_SMALL;
    }
    state *s = (state *)(void *)((uint8_t *)scratch + (64 - (uintptr_t)scratch % 64) % 64);
    const uint64_t room = scratch_size - 128 - sizeof *s;
    memset(s, 0, sizeof *s);
    s->section = section;
    s->numel = numel;
    int code = take_apart(s, size, room).code;
    if (code == SHD_OK) {
        reader->nnz = nnz;
        reader->state = s;
        set_next(reader);
    }
    return code;
}

int shd_from_base_next(shd_from_base *reader, const void *elements, uint32_t element_size, int64_t *positions,
                       uint64_t capacity, uint64_t *count) {
    if (reader == NULL || reader->next_count == 0 || elements == NULL || !shdi_size_is_known(element_size) ||
        count == NULL) {
        return SHD_INVALID_ARGUMENT;
    }
    state *s = reader->state;
    const uint64_t rank = shdi_min(reader->rank, reader->nnz), most = shdi_min(reader->next_count, reader->nnz - rank);
    if (capacity < most || (positions == NULL && most != 0)) {
        return SHD_BUFFER_TOO_SMALL;
    }
    walk w = {s, positions, 0, most};
    int code = open_tile(s);
    if (code == SHD_OK) {
        walk_tile(&w, elements, element_size, reader->next_count, reader->next_position);
    }
    for (uint32_t i = 0; code == SHD_OK && i < s->table.count; i++) {
        code = s->group[i].waits || s->group[i].left != 0 ? SHD_WRONG_BASE : SHD_OK;
    }
    *count = shdi_min(w.count, most);
    reader->rank += w.count;
    s->tile++;
    set_next(reader);
    if (code == SHD_OK && reader->next_count == 0) {
        code = check_unused(s);
        if (code == SHD_OK && reader->rank != reader->nnz) {
            code = SHD_WRONG_BASE;
        }
    }
    if (code != SHD_OK) {
        *count = reader->next_count = 0;
    }
    return code;
}

/* ---- The codec ---- */

static int size_is_possible(const shd_tensor *tensor, uint64_t decoded) {
    (void)tensor;
    return decoded >= LEAST; /* the rest is checked when it is decoded */
}

/* shd_load() refuses it. */
const shdi_index_codec shdi_index_from_base = {.size_is_possible = size_is_possible};
