/* Writing a TILED section (FORMAT.md, section 4.6) of given classes. */
#include "rice_writer.h"
#include "tiled.h"
#include "tiles.h"

/* Where a tile's elements stand in one order: by k, then as those of each k do. */
typedef struct order {
    const shd_tiled *grid;
    uint64_t rows;
    uint64_t tiles;
    uint32_t cells;
    uint32_t ks;
    uint8_t k[SHDI_MAX_KS];
    uint16_t by_k[SHDI_MAX_CLASSES * SHDI_MAX_CLASSES];  /* cells, by k */
    uint8_t number[SHDI_MAX_CLASSES * SHDI_MAX_CLASSES]; /* of a cell's k among the different ones */
    uint32_t width[SHDI_MAX_CLASSES];                    /* columns of a class */
    /* Of the tile in work: */
    uint32_t first[SHDI_MAX_CLASSES * SHDI_MAX_CLASSES]; /* the place of a cell's first element */
    uint32_t first_of_k[SHDI_MAX_KS + 1];
    /* In the caller's memory: */
    uint64_t *bitmap;      /* of places, zeros between tiles */
    uint32_t *column_rank; /* of a column within its class */
    uint32_t *row_rank;    /* of a row of the tile within its class */
    uint32_t *sizes;       /* of tiles, in unary bits */
    uint32_t *counts;      /* of nonzeros, by k, then by tile */
} order;

/* Lays out the caller's memory. Returns how much it is. */
SHDI_ONCE static uint64_t lay_out(order *o, uint8_t *memory) {
    const uint64_t bitmap = 64, columns = bitmap + SHDI_MAX_TILE / 8, rows = columns + 4 * o->grid->columns;
    const uint64_t sizes = rows + 4 * (uint64_t)o->grid->tile_rows, counts = sizes + 4 * o->tiles;
    if (memory != NULL) {
        memory += (64 - (uintptr_t)memory % 64) % 64 - 64; /* the buffer may start anywhere */
        o->bitmap = (uint64_t *)(void *)(memory + bitmap);
        o->column_rank = (uint32_t *)(void *)(memory + columns);
        o->row_rank = (uint32_t *)(void *)(memory + rows);
        o->sizes = (uint32_t *)(void *)(memory + sizes);
        o->counts = (uint32_t *)(void *)(memory + counts);
    }
    return counts + 4 * o->tiles * o->ks;
}

/* Sets up everything that does not depend on a tile but `column_rank`. Returns 0 if the grid is not one. */
SHDI_ONCE static int open_order(order *o, const shd_tiled *grid) {
    uint8_t found[SHDI_MAX_KS] = {0};
    if (grid == NULL || grid->k == NULL || grid->row_classes == NULL || grid->column_classes == NULL ||
        grid->row_bits - 1 >= SHDI_MAX_CLASS_BITS || grid->column_bits - 1 >= SHDI_MAX_CLASS_BITS ||
        grid->columns == 0 || grid->columns > SHDI_MAX_TILE || grid->numel > SHDI_MAX_NUMEL ||
        grid->numel % grid->columns != 0 || grid->tile_rows == 0 || grid->tile_rows > SHDI_MAX_TILE / grid->columns ||
        grid->tile_rows > grid->numel / grid->columns) {
        return 0;
    }
    memset(o, 0, sizeof *o);
    o->grid = grid;
    o->rows = grid->numel / grid->columns;
    o->tiles = shdi_ceil_div(o->rows, grid->tile_rows);
    o->cells = 1u << (grid->row_bits + grid->column_bits);
    for (uint32_t cell = 0; cell < o->cells; cell++) {
        if (grid->k[cell] > SHDI_MAX_RICE_K) {
            return 0;
        }
        found[grid->k[cell]] = 1;
    }
    uint32_t listed = 0;
    for (uint32_t k = 0; k <= SHDI_MAX_RICE_K; k++) {
        if (found[k]) {
            for (uint32_t cell = 0; cell < o->cells; cell++) {
                if (grid->k[cell] == k) {
                    o->number[cell] = (uint8_t)o->ks;
                    o->by_k[listed++] = (uint16_t)cell;
                }
            }
            o->k[o->ks++] = (uint8_t)k;
        }
    }
    return 1;
}

static int rank_columns(order *o) {
    for (uint64_t c = 0; c < o->grid->columns; c++) {
        uint32_t class = o->grid->column_classes[c];
        if (class >> o->grid->column_bits != 0) {
            return 0;
        }
        o->column_rank[c] = o->width[class]++;
    }
    return 1;
}

/* Lays out the places of a tile's elements. Returns 0 if the class of a row is none. */
static int lay_out_tile(order *o, uint64_t tile) {
    const uint64_t row = tile * o->grid->tile_rows;
    uint32_t height[SHDI_MAX_CLASSES] = {0}, place = 0;
    for (uint64_t i = 0; i < shdi_min(o->rows - row, o->grid->tile_rows); i++) {
        uint32_t class = o->grid->row_classes[row + i];
        if (class >> o->grid->row_bits != 0) {
            return 0;
        }
        o->row_rank[i] = height[class]++;
    }
    for (uint32_t i = 0, k = 0; i < o->cells; i++) {
        const uint32_t cell = o->by_k[i];
        if (i == 0 || o->number[cell] != k) {
            k = o->number[cell];
            o->first_of_k[k] = place;
        }
        o->first[cell] = place;
        place += height[cell >> o->grid->column_bits] * o->width[cell & ((1u << o->grid->column_bits) - 1)];
    }
    o->first_of_k[o->ks] = place;
    return 1;
}

/* Sets the bits of a tile's positions, the first of which is positions[at]. Returns where they end. */
static uint64_t place_positions(order *o, const int64_t *positions, uint64_t at, uint64_t count, uint64_t tile) {
    const shd_tiled *grid = o->grid;
    const uint64_t start = tile * grid->tile_rows * grid->columns;
    const uint64_t end = shdi_min(start + grid->tile_rows * grid->columns, grid->numel);
    const uint32_t columns = (uint32_t)grid->columns;
    const uint8_t *row_classes = grid->row_classes + tile * grid->tile_rows;
    uint32_t row = 0, row_start = 0;
    for (; at < count && (uint64_t)positions[at] < end; at++) {
        const uint32_t element = (uint32_t)((uint64_t)positions[at] - start);
        for (; element - row_start >= columns; row++) {
            row_start += columns;
        }
        const uint32_t b = grid->column_classes[element - row_start];
        const uint32_t cell = ((uint32_t)row_classes[row] << grid->column_bits) + b;
        const uint32_t place = o->first[cell] + o->row_rank[row] * o->width[b] + o->column_rank[element - row_start];
        o->bitmap[place / 64] |= UINT64_C(1) << (place % 64);
    }
    return at;
}

/* Where the two streams are written. */
typedef struct streams {
    uint8_t *unary; /* NULL: they are only counted */
    shdi_packer low;
    uint64_t unary_bits;
    uint64_t low_bits;
} streams;

/* Writes, or counts, the places whose bits are set, and clears them. */
static void write_tile(order *o, uint64_t tile, streams *s) {
    const uint64_t start = s->unary_bits, words = shdi_ceil_div(o->first_of_k[o->ks], 64);
    uint32_t number = 0, next = 0;
    for (uint32_t i = 0; i < o->ks; i++) {
        o->counts[i * o->tiles + tile] = 0;
    }
    for (uint64_t i = 0; i < words; i++) {
        for (uint64_t word = o->bitmap[i]; word != 0; word &= word - 1) {
            const uint32_t place = (uint32_t)(64 * i) + shdi_lowest_one(word);
            while (place >= o->first_of_k[number + 1]) {
                next = o->first_of_k[++number];
            }
            const uint32_t k = o->k[number], gap = place - next;
            s->unary_bits += gap >> k;
            if (s->unary != NULL) {
                s->unary[s->unary_bits / 8] |= (uint8_t)(1u << (s->unary_bits % 8));
                shdi_pack(&s->low, gap & ((UINT64_C(1) << k) - 1), k);
            }
            s->unary_bits++;
            s->low_bits += k;
            o->counts[number * o->tiles + tile]++;
            next = place + 1;
        }
        o->bitmap[i] = 0;
    }
    o->sizes[tile] = (uint32_t)(s->unary_bits - start);
}

static int write_tiles(order *o, const int64_t *positions, uint64_t count, streams *s) {
    uint64_t at = 0;
    memset(o->bitmap, 0, SHDI_MAX_TILE / 8);
    for (uint64_t tile = 0; tile < o->tiles; tile++) {
        if (!lay_out_tile(o, tile)) {
            return SHD_INVALID_ARGUMENT;
        }
        at = place_positions(o, positions, at, count, tile);
        write_tile(o, tile, s);
    }
    return SHD_OK;
}

/* ---- The section ---- */

SHDI_ONCE static uint64_t size_before_low(const order *o) {
    uint64_t size = 24 + o->cells + shdi_align4(1 + o->ks) + shdi_fields_size(o->rows, o->grid->row_bits) +
                    shdi_fields_size(o->grid->columns, o->grid->column_bits) +
                    shdi_fields_size(o->tiles, shdi_width_of(o->sizes, o->tiles));
    for (uint32_t i = 0; i < o->ks; i++) {
        size += shdi_fields_size(o->tiles, shdi_width_of(o->counts + i * o->tiles, o->tiles));
    }
    return size;
}

/* Writes everything before the low bits; returns where these go. */
SHDI_ONCE static uint8_t *write_before_low(const order *o, uint64_t unary_bits, uint8_t *to) {
    const shd_tiled *grid = o->grid;
    to[0] = (uint8_t)grid->row_bits;
    to[1] = (uint8_t)grid->column_bits;
    shdi_store32(to + 4, grid->tile_rows);
    shdi_store64(to + 8, grid->columns);
    shdi_store64(to + 16, unary_bits);
    to += 24;
    memcpy(to, grid->k, o->cells);
    to += o->cells;
    to[0] = (uint8_t)shdi_width_of(o->sizes, o->tiles);
    for (uint32_t i = 0; i < o->ks; i++) {
        to[1 + i] = (uint8_t)shdi_width_of(o->counts + i * o->tiles, o->tiles);
    }
    const uint8_t *widths = to;
    to += shdi_align4(1 + o->ks);
    to = shdi_write_classes(to, grid->row_classes, o->rows, grid->row_bits);
    to = shdi_write_classes(to, grid->column_classes, grid->columns, grid->column_bits);
    to = shdi_write_numbers(to, o->sizes, o->tiles, widths[0]);
    for (uint32_t i = 0; i < o->ks; i++) {
        to = shdi_write_numbers(to, o->counts + i * o->tiles, o->tiles, widths[1 + i]);
    }
    return to;
}

/* ---- The public functions ---- */

uint64_t shd_tiled_scratch_size(const shd_tiled *grid) {
    order o;
    return open_order(&o, grid) ? lay_out(&o, NULL) : 0;
}

int shd_tiled_encode(const shd_tiled *grid, const int64_t *positions, uint64_t count, void *scratch,
                     uint64_t scratch_size, void *section, uint64_t capacity, uint64_t *size) {
    order o;
    if (!open_order(&o, grid) || positions == NULL || count == 0 || scratch == NULL || size == NULL) {
        return SHD_INVALID_ARGUMENT;
    }
    if (scratch_size < lay_out(&o, NULL)) {
        return SHD_BUFFER_TOO_SMALL;
    }
    for (uint64_t i = 0; i < count; i++) {
        if (i > 0 && positions[i] <= positions[i - 1]) {
            return SHD_POSITION_ORDER;
        }
    }
    if (positions[0] < 0 || (uint64_t)positions[count - 1] >= grid->numel) {
        return SHD_POSITION_RANGE;
    }
    lay_out(&o, scratch);
    streams counted = {NULL, {NULL, 0, 0}, 0, 0};
    int code = rank_columns(&o) ? write_tiles(&o, positions, count, &counted) : SHD_INVALID_ARGUMENT;
    if (code != SHD_OK) {
        return code;
    }
    const uint64_t low_size = 4 * shdi_ceil_div(counted.low_bits, 32);
    *size = size_before_low(&o) + low_size + 4 * shdi_ceil_div(counted.unary_bits, 32) + SHDI_SLACK;
    if (section == NULL) {
        return SHD_OK;
    }
    if (capacity < *size) {
        return SHD_BUFFER_TOO_SMALL;
    }
    memset(section, 0, (size_t)*size);
    uint8_t *low = write_before_low(&o, counted.unary_bits, section);
    streams written = {low + low_size, {low, 0, 0}, 0, 0};
    code = write_tiles(&o, positions, count, &written);
    shdi_pack_rest(&written.low);
    return code;
}
