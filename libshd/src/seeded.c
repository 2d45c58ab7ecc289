/* SEEDED (FORMAT.md, section 4.8): positions that a seed gives, one in each cell, or in those that a list tells. */
#include "seeded.h"
#include "draw.h"
#include "index.h"
#include "section.h"

#define HEAD 16u

/* What is to be written. */
typedef struct output {
    shdi_draw draw;
    shdi_rice_writer *writer;
    const shdi_kernels *kernels;
    uint64_t left; /* how many nonzeros are to come */
    uint64_t next; /* the cell after the last one that is done */
    uint32_t count;
    uint32_t number[SHDI_BLOCK_ROOM]; /* of cells whose positions come next */
} output;

/* Makes positions of numbers of cells, in place and one by one, and writes them. */
SHDI_ONCE static void write_far(output *o, uint32_t count) {
    uint64_t base = 0;
    uint32_t start = 0;
    for (uint32_t i = 0; i < count; i++) {
        const uint64_t position = shdi_drawn(&o->draw, o->number[i]);
        if (i == start) {
            base = position;
        } else if (position - base > UINT32_MAX) {
            shdi_rice_write_run(o->writer, o->kernels, base, o->number + start, i - start);
            base = position;
            start = i;
        }
        o->number[i] = (uint32_t)(position - base);
    }
    shdi_rice_write_run(o->writer, o->kernels, base, o->number + start, count - start);
}

/* Writes the positions of the cells that wait. Returns 0 if they are too many. */
SHDI_OFTEN static int write_positions(output *o) {
    const uint32_t count = o->count;
    o->count = 0;
    if (count > o->left || count == 0) {
        return count == 0;
    }
    o->left -= count;
    const uint64_t first = shdi_drawn(&o->draw, o->number[0]), last = shdi_drawn(&o->draw, o->number[count - 1]);
    if (last - first > UINT32_MAX) {
        write_far(o, count);
        return 1;
    }
    o->kernels->drawn(&o->draw, (uint32_t)first, o->number, count);
    shdi_rice_write_run(o->writer, o->kernels, first, o->number, count);
    return 1;
}

/* Lets the cells up to `end` wait. Returns 0 if there are too many. */
SHDI_OFTEN static int add_up_to(output *o, uint64_t end) {
    while (o->next < end) {
        if (o->count == SHDI_BLOCK && !write_positions(o)) {
            return 0;
        }
        const uint32_t n = (uint32_t)shdi_min(end - o->next, SHDI_BLOCK - o->count), first = (uint32_t)o->next;
        uint32_t *const to = o->number + o->count;
        uint32_t four[4] = {first, first + 1, first + 2, first + 3};
        for (uint32_t i = 0; i < n; i += 4) { /* up to 3 too many */
            memcpy(to + i, four, sizeof four);
            for (uint32_t j = 0; j < 4; j++) {
                four[j] += 4;
            }
        }
        o->count += n;
        o->next += n;
    }
    return 1;
}

/* Takes cells from the list: their positions are written, or those of the others. Returns 0 if the file has changed. */
SHDI_OFTEN static int take_listed(output *o, const shdi_piece *piece, int others) {
    const uint64_t base = piece->base;
    if (piece->count == 0 || base + piece->offset[0] < o->next) {
        return piece->count == 0;
    }
    if (!others) {
        for (uint32_t i = 0; i < piece->count; i++) {
            o->number[i] = (uint32_t)base + piece->offset[i];
        }
        o->count = piece->count;
        o->next = base + piece->offset[piece->count - 1] + 1;
        return write_positions(o);
    }
    for (uint32_t i = 0; i < piece->count; i++) {
        if (!add_up_to(o, base + piece->offset[i])) {
            return 0;
        }
        o->next = base + piece->offset[i] + 1;
    }
    return 1;
}

/* Decodes the list, a RICE of the tensor's cells. */
static shdi_fault decode_list(const shd_delta *list, int check_all, int others, output *o) {
    shd_delta rice = *list;
    shdi_fault fault = shdi_index_open(&rice);
    if (fault.code == SHD_OK && check_all) {
        fault = shdi_index_check(&rice);
    }
    shdi_cursor cursor;
    shdi_piece piece = {.count = 1};
    if (fault.code == SHD_OK) {
        fault = shdi_cursor_open(&cursor, &rice, 0, rice.block_count);
    }
    while (fault.code == SHD_OK && piece.count != 0) {
        fault = shdi_cursor_next(&cursor, &piece);
        if (fault.code == SHD_OK && !take_listed(o, &piece, others)) {
            return shdi_fault_at(SHD_BAD_INDEX, 0);
        }
    }
    return fault;
}

SHDI_ONCE shdi_fault shdi_seeded_decode(const shd_delta *delta, int check_all, shdi_rice_writer *writer) {
    const uint64_t nnz = delta->tensor.nnz, numel = delta->tensor.numel, decoded = delta->tensor.index.decoded;
    uint64_t count = shdi_load64(delta->index + 8);
    SHDI_PIN(count);
    if (count < nnz || count > shdi_min(numel, UINT32_MAX) || shdi_ceil_div(numel, count) > UINT64_C(1) << 32) {
        return shdi_fault_at(SHD_BAD_INDEX, 8);
    }
    const uint64_t rest = numel % count;
    output o;
    o.draw = (shdi_draw){shdi_load64(delta->index), count, numel / count, rest, (rest << 32) / count};
    o.writer = writer;
    o.kernels = shdi_kernels_of(delta);
    o.left = nnz;
    o.next = o.count = 0;
    const int others = 2 * nnz > count;
    const uint64_t listed = others ? count - nnz : nnz;
    if (listed == 0 ? decoded != HEAD + SHDI_SLACK : decoded < HEAD + 16 + SHDI_SLACK) {
        return shdi_fault_at(SHD_BAD_SIZE, 8);
    }
    shdi_fault fault = shdi_ok();
    if (listed != 0) {
        shd_delta list = *delta;
        list.index += HEAD;
        list.tensor.index.decoded -= HEAD;
        list.tensor.index_codec = SHD_INDEX_RICE;
        list.tensor.numel = count;
        list.tensor.nnz = listed;
        fault = decode_list(&list, check_all, others, &o);
    } else if (check_all) {
        fault = shdi_check_zeros(delta->index, 8 * HEAD, decoded);
    }
    if (fault.code == SHD_OK && ((others && !add_up_to(&o, count)) || !write_positions(&o) || o.left != 0)) {
        fault = shdi_fault_at(SHD_BAD_INDEX, 0); /* the file has changed */
    }
    return fault;
}

static int size_is_possible(const shd_tensor *tensor, uint64_t decoded) {
    (void)tensor;
    return decoded >= HEAD + SHDI_SLACK; /* the rest is checked when it is decoded */
}

/* Recoding comes before whatever the other functions of a codec do. */
const shdi_index_codec shdi_index_seeded = {.size_is_possible = size_is_possible};
