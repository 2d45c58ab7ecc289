/* STRUCT (FORMAT.md, section 4.5): rows, columns and diagonals of a matrix. */
#include "index.h"
#include "section.h"

enum { ROW = 0, COLUMN = 1, DIAGONAL = 2, KINDS = 3 };
enum { SEEK_ROW = 0, IN_WHOLE_ROW = 1, IN_CROSSED_ROW = 2 };

static int64_t line_of(const shdi_progression *entry, uint64_t line) {
    return entry->start + (int64_t)(entry->step * line);
}

static uint64_t diagonal_length(uint64_t rows, uint64_t columns, int64_t diagonal) {
    uint64_t from_row = diagonal < 0 ? (uint64_t)-diagonal : 0;
    uint64_t from_column = diagonal > 0 ? (uint64_t)diagonal : 0;
    return shdi_min(rows - from_row, columns - from_column);
}

/* ---- Entries ---- */

static int in_range(const shdi_lines *lines, const shdi_progression *entry) {
    int64_t least = entry->kind == DIAGONAL ? -(int64_t)(lines->rows - 1) : 0;
    int64_t most = (int64_t)(entry->kind == ROW ? lines->rows : lines->columns) - 1;
    if (entry->start < least || entry->start > most) {
        return 0;
    }
    /* start + step * (count - 1) <= most, without an overflow */
    return entry->count - 1 <= (uint64_t)(most - entry->start) / entry->step;
}

/* Counts the elements on an entry's lines, and stops beyond `most`. */
static uint64_t count_elements(const shdi_lines *lines, const shdi_progression *entry, uint64_t most) {
    if (entry->kind != DIAGONAL) {
        /* The lines are in range and distinct, so this is at most numel. */
        return entry->count * (entry->kind == ROW ? lines->columns : lines->rows);
    }
    uint64_t elements = 0;
    for (uint64_t i = 0; i < entry->count && elements <= most; i++) {
        elements += diagonal_length(lines->rows, lines->columns, line_of(entry, i));
    }
    return elements;
}

SHDI_ONCE static shdi_fault check_entry(const shdi_lines *lines, const shdi_progression *entry,
                                        const shdi_progression *last, uint64_t *elements, uint64_t nnz,
                                        uint64_t offset) {
    if (entry->kind > DIAGONAL || entry->step == 0 || entry->count == 0 || !in_range(lines, entry)) {
        return shdi_fault_at(SHD_BAD_INDEX, offset);
    }
    if (last != NULL && (entry->kind < last->kind ||
                         (entry->kind == last->kind && entry->start <= line_of(last, last->count - 1)))) {
        return shdi_fault_at(SHD_POSITION_ORDER, offset);
    }
    if (last == NULL || entry->kind != last->kind) {
        *elements = 0;
    }
    uint64_t more = count_elements(lines, entry, nnz - *elements);
    if (more > nnz - *elements) {
        return shdi_fault_at(SHD_BAD_INDEX, offset);
    }
    *elements += more;
    return shdi_ok();
}

static shdi_line_cursor first_of_kind(const shdi_lines *lines, uint32_t entries, uint64_t kind) {
    shdi_line_cursor c = {0, 0, 0, 0};
    while (c.first_entry < entries && lines->entries[c.first_entry].kind < kind) {
        c.first_entry++;
    }
    c.end_entry = c.first_entry;
    while (c.end_entry < entries && lines->entries[c.end_entry].kind == kind) {
        c.end_entry++;
    }
    c.entry = c.first_entry;
    return c;
}

/* ---- Walking along the lines of one kind ---- */

static int at_end(const shdi_line_cursor *c) { return c->entry == c->end_entry; }

static int64_t current(const shdi_lines *lines, const shdi_line_cursor *c) {
    return line_of(&lines->entries[c->entry], c->line);
}

static void step(const shdi_lines *lines, shdi_line_cursor *c) {
    if (++c->line == lines->entries[c->entry].count) {
        c->entry++;
        c->line = 0;
    }
}

/* Moves to the line before. Returns 0 if there is none. */
static int step_back(const shdi_lines *lines, shdi_line_cursor *c) {
    if (c->line > 0) {
        c->line--;
    } else if (c->entry > c->first_entry) {
        c->entry--;
        c->line = lines->entries[c->entry].count - 1;
    } else {
        return 0;
    }
    return 1;
}

/* ---- Walking over the elements ---- */

/* Moves lines->lowest to the first diagonal that meets `row` or an earlier row. Returns the first row at or after `row`
 * that a diagonal meets, or lines->rows. Rows only increase, so the walk steps over every diagonal once. */
static uint64_t row_met_by_diagonal(shdi_lines *lines, uint64_t row) {
    shdi_line_cursor before = lines->lowest;
    while (step_back(lines, &before)) {
        if (current(lines, &before) < -(int64_t)row) {
            break;
        }
        lines->lowest = before;
    }
    if (!at_end(&lines->lowest) && current(lines, &lines->lowest) + (int64_t)row < (int64_t)lines->columns) {
        return row;
    }
    before = lines->lowest;
    return step_back(lines, &before) ? (uint64_t)-current(lines, &before) : lines->rows;
}

/* Finds the next row that has an element, from lines->row on. Returns 0 if there is none. */
static int seek_row(shdi_lines *lines) {
    uint64_t row = lines->row;
    if (row >= lines->rows) {
        return 0;
    }
    while (!at_end(&lines->whole) && (uint64_t)current(lines, &lines->whole) < row) {
        step(lines, &lines->whole);
    }
    uint64_t whole = at_end(&lines->whole) ? lines->rows : (uint64_t)current(lines, &lines->whole);
    uint64_t crossed = lines->column.first_entry != lines->column.end_entry ? row : row_met_by_diagonal(lines, row);
    lines->row = shdi_min(whole, crossed);
    if (lines->row >= lines->rows) {
        return 0;
    }
    lines->next = 0;
    lines->row_kind = lines->row == whole ? IN_WHOLE_ROW : IN_CROSSED_ROW;
    (void)row_met_by_diagonal(lines, lines->row);
    lines->diagonal = lines->lowest;
    lines->column.entry = lines->column.first_entry;
    lines->column.line = 0;
    return 1;
}

/* The next column in a row that columns and diagonals cross, or lines->columns. */
static uint64_t merge(shdi_lines *lines) {
    uint64_t column = lines->columns, diagonal = lines->columns;
    if (!at_end(&lines->column)) {
        column = (uint64_t)current(lines, &lines->column);
    }
    if (!at_end(&lines->diagonal)) {
        diagonal = (uint64_t)(current(lines, &lines->diagonal) + (int64_t)lines->row);
    }
    uint64_t least = shdi_min(shdi_min(column, diagonal), lines->columns);
    if (least < lines->columns && column == least) {
        step(lines, &lines->column);
    }
    if (least < lines->columns && diagonal == least) {
        step(lines, &lines->diagonal);
    }
    return least;
}

/* The next element's position, or UINT64_MAX. */
static uint64_t next_position(shdi_lines *lines) {
    for (;;) {
        if (lines->row_kind == SEEK_ROW && !seek_row(lines)) {
            return UINT64_MAX;
        }
        uint64_t column = lines->row_kind == IN_WHOLE_ROW ? lines->next++ : merge(lines);
        if (column < lines->columns) {
            return lines->row * lines->columns + column;
        }
        lines->row++;
        lines->row_kind = SEEK_ROW;
    }
}

SHDI_ONCE static shdi_fault open_lines(shdi_lines *lines, const shd_delta *delta) {
    const shd_tensor *tensor = &delta->tensor;
    uint32_t entries = (uint32_t)((tensor->index.decoded - SHDI_SLACK) / sizeof lines->entries[0]);
    memcpy(lines->entries, delta->index, entries * sizeof lines->entries[0]);
    lines->rows = tensor->rank < 2 ? 1 : tensor->dims[0];
    lines->columns = tensor->numel / lines->rows;
    uint64_t elements = 0;
    for (uint32_t i = 0; i < entries; i++) {
        const shdi_progression *last = i == 0 ? NULL : &lines->entries[i - 1];
        shdi_fault fault = check_entry(lines, &lines->entries[i], last, &elements, tensor->nnz,
                                       i * sizeof lines->entries[0]);
        if (fault.code != SHD_OK) {
            return fault;
        }
    }
    lines->row = 0;
    lines->next = 0;
    lines->row_kind = SEEK_ROW;
    lines->whole = first_of_kind(lines, entries, ROW);
    lines->column = first_of_kind(lines, entries, COLUMN);
    lines->lowest = first_of_kind(lines, entries, DIAGONAL);
    lines->lowest.entry = lines->lowest.end_entry;
    lines->diagonal = lines->lowest;
    lines->position = next_position(lines);
    return shdi_ok();
}

/* The next piece, of at most `limit` positions. */
static void next_of_lines(shdi_lines *lines, uint64_t limit, shdi_piece *piece) {
    const uint64_t most = shdi_min(limit, SHDI_BLOCK);
    piece->count = 0;
    piece->base = lines->position;
    while (piece->count < most && lines->position != UINT64_MAX && lines->position - piece->base <= UINT32_MAX) {
        piece->offset[piece->count++] = (uint32_t)(lines->position - piece->base);
        lines->position = next_position(lines);
    }
}

/* ---- The codec ---- */

static int size_is_possible(const shd_tensor *tensor, uint64_t decoded) {
    (void)tensor;
    return decoded >= sizeof(shdi_progression) + SHDI_SLACK &&
           decoded <= SHDI_MAX_LINES * sizeof(shdi_progression) + SHDI_SLACK &&
           (decoded - SHDI_SLACK) % sizeof(shdi_progression) == 0;
}

static shdi_fault open_section(shd_delta *delta) {
    delta->block_count = 1;
    return shdi_ok();
}

static shdi_fault check(const shd_delta *delta) {
    const uint64_t nnz = delta->tensor.nnz;
    shdi_lines lines;
    shdi_fault fault = open_lines(&lines, delta);
    if (fault.code != SHD_OK) {
        return fault;
    }
    uint64_t elements = 0;
    shdi_piece piece;
    do {
        next_of_lines(&lines, nnz + 1 - elements, &piece);
        elements += piece.count;
    } while (piece.count != 0 && elements <= nnz);
    if (elements != nnz) {
        return shdi_fault_at(SHD_BAD_INDEX, 0);
    }
    uint64_t size = delta->tensor.index.decoded;
    return shdi_check_zeros(delta->index, 8 * (size - SHDI_SLACK), size);
}

static shdi_fault start(shdi_cursor *cursor) {
    cursor->rank = 0;
    return open_lines(&cursor->lines, cursor->delta);
}

static shdi_fault next(shdi_cursor *cursor, shdi_piece *piece) {
    uint64_t left = cursor->delta->tensor.nnz - cursor->rank;
    piece->count = 0;
    if (cursor->block == cursor->last) {
        return shdi_ok();
    }
    next_of_lines(&cursor->lines, left, piece);
    piece->rank = cursor->rank;
    cursor->rank += piece->count;
    if (piece->count == left) {
        cursor->block = cursor->last;
    }
    int contradicts = piece->count == left ? cursor->lines.position != UINT64_MAX : piece->count == 0;
    return contradicts ? shdi_fault_at(SHD_BAD_INDEX, 0) : shdi_ok();
}

static uint64_t block_rank(const shd_delta *delta, uint64_t block) {
    (void)delta;
    (void)block; /* 0, the only one */
    return 0;
}

static uint64_t least_position(const shd_delta *delta, uint64_t block) {
    (void)delta;
    (void)block;
    return 0;
}

const shdi_index_codec shdi_index_struct = {
    .size_is_possible = size_is_possible,
    .open = open_section,
    .check = check,
    .start = start,
    .next = next,
    .block_rank = block_rank,
    .least_position = least_position,
};
