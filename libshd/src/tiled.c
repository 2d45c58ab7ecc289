/* TILED (FORMAT.md, section 4.6): gaps among the elements of equal density in a tile of rows. Such a section is decoded
 * once, when it is loaded, and becomes RICE: everything else knows that only. */
#include "tiled.h"
#include "bytes.h"
#include "index.h"
#include "section.h"
#include "tiles.h"

/* A section taken apart. */
typedef struct parts {
    uint32_t column_bits;
    uint32_t tile_rows;
    uint64_t rows;
    uint64_t columns;
    uint64_t tiles;
    uint32_t ks; /* how many different k there are */
    uint8_t k[SHDI_MAX_KS];
    uint16_t classes[SHDI_MAX_KS][SHDI_MAX_CLASSES]; /* by k and row class: a bit for each column class of this k */
    shdi_fields row_classes;
    shdi_fields column_classes;
    shdi_fields sizes;
    shdi_fields counts[SHDI_MAX_KS];
    uint64_t low; /* offset in the section */
    uint64_t low_bits;
    uint64_t unary;
    uint64_t unary_bits;
    int unused; /* a bit before low that has to be zero is not */
} parts;

/* ---- The parts before low ---- */

/* Takes the table, and lists its different k. */
SHDI_ONCE static shdi_fault take_table(parts *p, shdi_parts *from, uint32_t row_bits) {
    const uint32_t pairs = 1u << (row_bits + p->column_bits);
    const uint64_t start = from->at;
    const uint8_t *table = shdi_take(from, 8 * pairs);
    uint8_t number[SHDI_MAX_KS] = {0};
    if (table == NULL) {
        return shdi_fault_at(SHD_BAD_SIZE, start);
    }
    uint8_t copy[SHDI_MAX_CLASSES * SHDI_MAX_CLASSES];
    memcpy(copy, table, pairs);
    for (uint32_t i = 0; i < pairs; i++) {
        if (copy[i] > SHDI_MAX_RICE_K) {
            return shdi_fault_at(SHD_BAD_INDEX, start + i);
        }
        number[copy[i]] = 1;
    }
    p->ks = 0;
    for (uint32_t k = 0; k < SHDI_MAX_KS; k++) {
        if (number[k]) {
            number[k] = (uint8_t)p->ks;
            p->k[p->ks++] = (uint8_t)k;
        }
    }
    memset(p->classes, 0, sizeof p->classes);
    for (uint32_t i = 0; i < pairs; i++) {
        uint32_t row_class = i >> p->column_bits, column_class = i & ((1u << p->column_bits) - 1);
        p->classes[number[copy[i]]][row_class] |= (uint16_t)(1u << column_class);
    }
    return shdi_ok();
}

/* Takes the widths, and everything that they are the widths of. */
SHDI_ONCE static shdi_fault take_sizes(parts *p, shdi_parts *from, uint32_t row_bits) {
    const uint64_t start = from->at;
    const uint8_t *data = shdi_take(from, 8 * (1 + (uint64_t)p->ks));
    uint8_t widths[1 + SHDI_MAX_KS];
    if (data == NULL) {
        return shdi_fault_at(SHD_BAD_SIZE, start);
    }
    memcpy(widths, data, 1 + p->ks);
    for (uint32_t i = 0; i <= p->ks; i++) {
        if (widths[i] > SHDI_MAX_TILE_FIELD) {
            return shdi_fault_at(SHD_BAD_INDEX, start + i);
        }
    }
    int fits = shdi_take_fields(from, p->rows, row_bits, &p->row_classes) &&
               shdi_take_fields(from, p->columns, p->column_bits, &p->column_classes) &&
               shdi_take_fields(from, p->tiles, widths[0], &p->sizes);
    for (uint32_t i = 0; fits && i < p->ks; i++) {
        fits = shdi_take_fields(from, p->tiles, widths[1 + i], &p->counts[i]);
    }
    return fits ? shdi_ok() : shdi_fault_at(SHD_BAD_SIZE, from->at);
}

/* Takes the section apart, with all checks up to the tiles. */
SHDI_ONCE static shdi_fault take_apart(const shd_delta *delta, parts *p) {
    const uint8_t *section = delta->index;
    const uint64_t numel = delta->tensor.numel;
    const uint32_t row_bits = section[0];
    shdi_parts from = {section, delta->tensor.index.decoded, 24, 0};
    memset(p, 0, sizeof *p);
    p->column_bits = section[1];
    p->tile_rows = shdi_load32(section + 4);
    p->columns = shdi_load64(section + 8);
    p->unary_bits = shdi_load64(section + 16);
    if (row_bits - 1 >= SHDI_MAX_CLASS_BITS || p->column_bits - 1 >= SHDI_MAX_CLASS_BITS || shdi_load16(section + 2) != 0 || p->tile_rows == 0 ||
        p->columns == 0 || p->columns > SHDI_MAX_TILE || p->tile_rows > SHDI_MAX_TILE / p->columns || numel % p->columns != 0 ||
        p->tile_rows > numel / p->columns) {
        return shdi_fault_at(SHD_BAD_INDEX, 0);
    }
    p->rows = numel / p->columns; /* at most 2^56, so that bits of fields do not overflow */
    p->tiles = shdi_ceil_div(p->rows, p->tile_rows);
    shdi_fault fault = take_table(p, &from, row_bits);
    if (fault.code == SHD_OK) {
        fault = take_sizes(p, &from, row_bits);
    }
    if (fault.code == SHD_OK && from.size - from.at < SHDI_SLACK) {
        fault = shdi_fault_at(SHD_BAD_SIZE, from.at);
    }
    if (fault.code != SHD_OK) {
        return fault;
    }
    uint64_t count = 0, unary_bits = 0; /* each row takes a bit of the section, so that the sums do not overflow */
    for (uint64_t tile = 0; tile < p->tiles; tile++) {
        unary_bits += shdi_field(&p->sizes, tile);
        for (uint32_t i = 0; i < p->ks; i++) {
            uint64_t n = shdi_field(&p->counts[i], tile);
            count += n;
            p->low_bits += n * p->k[i];
        }
    }
    p->unused = from.unused;
    p->low = from.at;
    p->unary = p->low + 4 * shdi_ceil_div(p->low_bits, 32);
    const uint64_t decoded = delta->tensor.index.decoded;
    if (p->unary_bits / 8 > decoded || p->unary + 4 * shdi_ceil_div(p->unary_bits, 32) + SHDI_SLACK != decoded) {
        return shdi_fault_at(SHD_BAD_SIZE, 16);
    }
    return count == delta->tensor.nnz && unary_bits == p->unary_bits ? shdi_ok() : shdi_fault_at(SHD_BAD_INDEX, 16);
}

SHDI_ONCE static shdi_fault check_unused(const shd_delta *delta, const parts *p) {
    if (p->unused) {
        return shdi_fault_at(SHD_PADDING_NOT_ZERO, 24);
    }
    shdi_fault fault = shdi_check_zeros(delta->index, 8 * p->low + p->low_bits, p->unary);
    return fault.code != SHD_OK
               ? fault
               : shdi_check_zeros(delta->index, 8 * p->unary + p->unary_bits, delta->tensor.index.decoded);
}

/* ---- Tiles ---- */

/* The lines of one class among `lines`: from first to the next class's first. */
typedef struct classes {
    uint32_t *lines; /* by class, then in order: each times `step` */
    uint32_t step;
    uint32_t first[SHDI_MAX_CLASSES + 1];
} classes;

/* What decoding works on; pointers are to the caller's memory. */
typedef struct work {
    const shdi_kernels *kernels;
    uint8_t *bitmap; /* of a tile's elements, zeros between tiles */
    classes columns;
    classes rows; /* of a tile, from 0 */
    shdi_cell all_cells[SHDI_MAX_CLASSES * SHDI_MAX_CLASSES]; /* by k, then in the order; their rows tell the class */
    uint32_t first_cell[SHDI_MAX_KS + 1];
    shdi_cell cells[SHDI_MAX_CLASSES * SHDI_MAX_CLASSES]; /* those that the tile has, whose orders go on over all k */
    uint32_t first_order[SHDI_MAX_KS + 1];
    uint32_t order[SHDI_BLOCK_ROOM + SHDI_MORE_ORDERS];
    uint32_t row[SHDI_BLOCK_ROOM]; /* of orders, and column */
    uint32_t column[SHDI_BLOCK_ROOM];
} work;

/* Sorts `count` lines from `start` on. */
static shdi_fault sort_lines(const shdi_fields *of_lines, uint64_t start, uint32_t count, classes *c) {
    uint32_t next[SHDI_MAX_CLASSES + 1] = {0};
    for (uint32_t i = 0; i < count; i++) {
        next[shdi_field(of_lines, start + i) + 1]++;
    }
    for (uint32_t class = 0; class < SHDI_MAX_CLASSES; class ++) {
        next[class + 1] += next[class];
    }
    memcpy(c->first, next, sizeof next);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t class = shdi_field(of_lines, start + i);
        SHDI_PIN(class);
        if (next[class] >= c->first[class + 1]) { /* the file has changed */
            return shdi_fault_at(SHD_BAD_INDEX, 0);
        }
        c->lines[next[class]++] = i * c->step;
    }
    return shdi_ok();
}

/* Sorts the columns, and lists the cells that have some. */
SHDI_ONCE static shdi_fault list_cells(const parts *p, work *w) {
    shdi_fault fault = sort_lines(&p->column_classes, 0, (uint32_t)p->columns, &w->columns);
    uint32_t listed = 0;
    for (uint32_t i = 0; i < p->ks; i++) {
        w->first_cell[i] = listed;
        for (uint32_t a = 0; a < SHDI_MAX_CLASSES; a++) {
            for (uint32_t bits = p->classes[i][a]; bits != 0; bits &= bits - 1) {
                const uint32_t b = shdi_lowest_one(bits), first = w->columns.first[b];
                const uint32_t width = w->columns.first[b + 1] - first;
                if (width != 0) {
                    w->all_cells[listed++] = (shdi_cell){.rows = a, .columns = first, .width = width,
                        .reciprocal = shdi_cell_reciprocal(width), .shift = shdi_cell_shift(width)};
                }
            }
        }
    }
    w->first_cell[p->ks] = listed;
    return fault;
}

/* Lists the cells that the tile has. */
static void list_cells_of_tile(const parts *p, work *w) {
    const uint32_t *const first_row = w->rows.first;
    shdi_cell *to = w->cells;
    uint32_t order = 0;
    for (uint32_t i = 0; i < p->ks; i++) {
        w->first_order[i] = order;
        for (uint32_t j = w->first_cell[i]; j < w->first_cell[i + 1]; j++) {
            const shdi_cell c = w->all_cells[j];
            const uint32_t first = first_row[c.rows], size = (first_row[c.rows + 1] - first) * c.width;
            *to = (shdi_cell){order, size - 1, first, c.columns, c.width, c.reciprocal, c.shift};
            to += size != 0;
            order += size;
        }
    }
    w->first_order[p->ks] = order;
}

/* The number of ones of a tile, and whether its last bit is one of them. */
static int has_ones(const uint8_t *bitmap, uint64_t first, uint64_t end, uint64_t count) {
    uint64_t ones = 0;
    for (uint64_t bit = first; bit < end; bit += 56) {
        const uint64_t word = shdi_load64(bitmap + bit / 8) >> (bit % 8);
        ones += shdi_ones(word << (64 - shdi_min(end - bit, 56)));
    }
    return ones == count && (first == end || bitmap[(end - 1) / 8] >> ((end - 1) % 8) & 1);
}

/* Makes orders of indices of ones, in place, where k is over SHDI_NARROW_K: `bit` is the index after the one before,
 * and `next` the order after the one before. Returns 0 if an order is not below `end`. */
SHDI_ONCE static int find_orders(uint32_t *index, uint32_t count, uint64_t bit, uint64_t next, uint64_t end, uint32_t k,
                                 const uint8_t *low, uint64_t low_bit) {
    const uint32_t mask = (uint32_t)((UINT64_C(1) << k) - 1);
    for (uint32_t i = 0; i < count; i++, low_bit += k) {
        const uint64_t zeros = index[i] - bit;
        bit += zeros + 1;
        next += (zeros << k) + ((uint32_t)(shdi_load64(low + low_bit / 8) >> (low_bit % 8)) & mask);
        SHDI_PIN(next);
        if (next >= end) {
            return 0;
        }
        index[i] = (uint32_t)next++;
    }
    return 1;
}

/* SIMD kernels are worth their start from this many nonzeros on. */
#define FEW 8u

/* A walk over a tile's nonzeros, in the order of its unary bits. */
typedef struct walk {
    const uint64_t *counts; /* how many nonzeros each k has */
    uint64_t rest;          /* how many are to come, */
    uint64_t left;          /* how many of them have this k, */
    uint32_t number;        /* the k of the next, */
    uint64_t next;          /* and the order after the one before, which goes on over all k */
    uint64_t bit;           /* the unary bit after the one before */
    const uint8_t *low;
    uint64_t low_size; /* the bytes that may be read from there on */
    uint64_t low_bit;  /* of the next one */
} walk;

/* Makes orders of `n` indices of ones, which count from bit `start` on and are of one k. */
static int take_orders(const parts *p, const work *w, walk *at, uint32_t *order, uint32_t n, uint64_t start) {
    const uint32_t k = p->k[at->number];
    const uint64_t end = w->first_order[at->number + 1];
    const uint64_t place = at->bit - start; /* below 0, modulo 2^64, if zeros came before */
    const uint8_t *low = at->low + at->low_bit / 8;
    const uint32_t last = order[n - 1];
    at->bit = start + last + 1;
    if (k > SHDI_NARROW_K) {
        if (!find_orders(order, n, place, at->next, end, k, at->low, at->low_bit)) {
            return 0;
        }
        at->next = order[n - 1] + UINT64_C(1);
    } else {
        const shdi_kernels *kernels = n < FEW ? &shdi_scalar : w->kernels;
        const uint64_t base = at->next - (place << k);
        const uint64_t sum = kernels->rice_offsets(order, n, k, (uint32_t)base, low,
                                                   at->low_size - at->low_bit / 8, at->low_bit % 8);
        at->next = base + ((uint64_t)(last - (n - 1)) << k) + sum + n;
    }
    at->low_bit += n * (uint64_t)k;
    at->left -= n;
    at->rest -= n;
    return at->next <= end; /* orders increase, so the check of the last one is enough */
}

/* Makes orders of indices of ones, which count from bit `start` on. Returns 0 if the tile has no such elements. */
static int take_all_orders(const parts *p, const work *w, walk *at, uint32_t *order, uint32_t count, uint64_t start) {
    while (count != 0) {
        while (at->left == 0) {
            if (++at->number == p->ks) { /* the file has changed */
                return 0;
            }
            at->left = at->counts[at->number];
            at->next = w->first_order[at->number];
        }
        const uint32_t n = (uint32_t)shdi_min(count, at->left);
        if (!take_orders(p, w, at, order, n, start)) {
            return 0;
        }
        order += n;
        count -= n;
    }
    return 1;
}

/* Sets the bits of elements whose lines are known. */
static void set_elements(const work *w, uint32_t count) {
    const uint32_t *const rows = w->rows.lines, *const columns = w->columns.lines;
    uint8_t *const bitmap = w->bitmap;
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t element = rows[w->row[i]] + columns[w->column[i]];
        bitmap[element / 8] |= (uint8_t)(1u << (element % 8)); /* most often not the byte of the element before */
    }
}

/* Sets the bits of a tile's nonzeros, whose unary bits end before `end`. Returns 0 if they are not all in it. */
static int set_bits(const parts *p, work *w, walk *at, const uint8_t *unary, uint64_t end) {
    const shdi_cell *cell = w->cells;
    for (uint64_t bit = at->bit, start, bits; bit < end; bit = start + bits) {
        const uint32_t before = bit % 8; /* bits of its byte */
        start = bit - before;
        bits = shdi_min(end - start, SHDI_BLOCK);
        const uint32_t ones = w->kernels->ones(unary + start / 8, (uint32_t)bits, w->order);
        uint32_t first = 0;
        while (first < ones && w->order[first] < before) {
            first++;
        }
        if (first == ones) {
            continue;
        }
        uint32_t *const order = w->order + first;
        if (!take_all_orders(p, w, at, order, ones - first, start)) {
            return 0;
        }
        for (uint32_t i = 0; i < SHDI_MORE_ORDERS; i++) {
            w->order[ones + i] = INT32_MAX;
        }
        w->kernels->lines(order, ones - first, &cell, w->row, w->column);
        set_elements(w, ones - first);
    }
    return at->rest == 0;
}

/* ---- Decoding tiles ---- */

/* Writes the positions of the bits that are set among `elements`, from `base` on, and clears them. */
static void write_bits(work *w, uint64_t base, uint32_t elements, shdi_rice_writer *writer) {
    uint32_t *const words = w->row, *const offset = w->order;
    const uint32_t count = w->kernels->words(w->bitmap, 8 * (uint32_t)shdi_ceil_div(elements, 512), words);
    for (uint32_t i = 0; i < count;) {
        const uint32_t ones = w->kernels->take_ones(w->bitmap, words, &i, count, offset);
        shdi_rice_write_run(writer, w->kernels, base, offset, ones);
    }
}

SHDI_OFTEN static shdi_fault decode_tiles(const shd_delta *delta, const parts *p, work *w, shdi_rice_writer *writer) {
    const uint8_t *unary = delta->index + p->unary;
    walk at = {.low = delta->index + p->low, .low_size = delta->tensor.index.decoded - p->low};
    for (uint64_t tile = 0, unary_bit = 0; tile < p->tiles; tile++) {
        const uint64_t row = tile * p->tile_rows;
        const uint32_t rows = (uint32_t)shdi_min(p->rows - row, p->tile_rows);
        uint64_t size = shdi_field(&p->sizes, tile), count = 0, low_end = at.low_bit, n[SHDI_MAX_KS];
        SHDI_PIN(size);
        for (uint32_t i = 0; i < p->ks; i++) {
            uint64_t of_k = shdi_field(&p->counts[i], tile);
            SHDI_PIN(of_k);
            n[i] = of_k;
            count += of_k;
            low_end += of_k * p->k[i];
        }
        if (size > p->unary_bits - unary_bit || low_end > p->low_bits || count > delta->tensor.nnz - writer->rank ||
            !has_ones(unary, unary_bit, unary_bit + size, count)) {
            return shdi_fault_at(SHD_BAD_INDEX, p->unary + unary_bit / 8);
        }
        if (count == 0) {
            continue; /* and the tile has no unary bits */
        }
        shdi_fault fault = sort_lines(&p->row_classes, row, rows, &w->rows);
        if (fault.code != SHD_OK) {
            return fault;
        }
        list_cells_of_tile(p, w);
        at.counts = n;
        at.number = 0;
        at.left = n[0];
        at.rest = count;
        at.next = 0;
        at.bit = unary_bit;
        if (!set_bits(p, w, &at, unary, unary_bit + size)) {
            return shdi_fault_at(SHD_POSITION_RANGE, p->unary + unary_bit / 8);
        }
        write_bits(w, row * p->columns, rows * (uint32_t)p->columns, writer);
        unary_bit += size;
    }
    return shdi_ok();
}

/* ---- Loading ---- */

/* Where what decoding needs is in the scratch buffer, after the RICE. */
typedef struct room {
    uint64_t bitmap;
    uint64_t lines;
    uint64_t size;
} room;

/* The most columns, and the most rows of a tile: each takes a bit of the section. */
static uint64_t most_lines(const shd_tensor *tensor) {
    return shdi_min(shdi_min(tensor->numel, SHDI_MAX_TILE), 8 * tensor->index.decoded);
}

SHDI_ONCE static room room_of(const shd_tensor *tensor, uint64_t rice) {
    room r;
    r.bitmap = shdi_align64(rice);
    r.lines = r.bitmap + SHDI_MAX_TILE / 8;
    r.size = r.lines + 2 * 4 * most_lines(tensor);
    return r;
}

uint64_t shdi_tiled_room(const shd_tensor *tensor, uint64_t rice) { return room_of(tensor, rice).size; }

SHDI_ONCE shdi_fault shdi_tiled_decode(const shd_delta *delta, int check_padding, uint8_t *memory, uint64_t rice,
                                       shdi_rice_writer *writer) {
    const room r = room_of(&delta->tensor, rice);
    parts p;
    shdi_fault fault = take_apart(delta, &p);
    if (fault.code != SHD_OK) {
        return fault;
    }
    memset(memory + r.bitmap, 0, (size_t)(r.lines - r.bitmap));
    work w;
    w.kernels = shdi_kernels_of(delta);
    w.bitmap = memory + r.bitmap;
    w.columns.lines = (uint32_t *)(void *)(memory + r.lines);
    w.columns.step = 1;
    w.rows.lines = w.columns.lines + most_lines(&delta->tensor);
    w.rows.step = (uint32_t)p.columns;
    fault = list_cells(&p, &w);
    if (fault.code == SHD_OK) {
        fault = decode_tiles(delta, &p, &w, writer);
    }
    return fault.code == SHD_OK && check_padding ? check_unused(delta, &p) : fault;
}

/* ---- The codec ---- */

static int size_is_possible(const shd_tensor *tensor, uint64_t decoded) {
    (void)tensor;
    return decoded >= 60; /* the rest is checked when it is decoded */
}

/* Recoding comes before whatever the other functions of a codec do. */
const shdi_index_codec shdi_index_tiled = {.size_is_possible = size_is_possible};
