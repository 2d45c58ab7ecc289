/* Index codecs: what each of them does, and the walk over the positions of any. */
#ifndef SHD_INDEX_H
#define SHD_INDEX_H

#include "errors.h"
#include "kernels.h"

SHDI_BEGIN

/* ---- The walk ---- */

/* A run of up to SHDI_BLOCK positions in increasing order: base + offset[i] has rank rank + i. */
typedef struct shdi_piece {
    uint64_t base;
    uint64_t rank;
    uint32_t count;
    uint32_t offset[SHDI_BLOCK_ROOM];
} shdi_piece;

/* An entry of a STRUCT: a progression of rows, columns or diagonals. */
typedef struct shdi_progression {
    uint64_t kind;
    int64_t start;
    uint64_t step;
    uint64_t count;
} shdi_progression;

/* A place in the progressions of one kind: line `line` of entry `entry`. */
typedef struct shdi_line_cursor {
    uint32_t first_entry;
    uint32_t end_entry;
    uint32_t entry;
    uint64_t line;
} shdi_line_cursor;

/* A walk over the positions of a STRUCT. It works on a copy of the entries, so that they stay as they were checked. */
typedef struct shdi_lines {
    shdi_progression entries[SHDI_MAX_LINES];
    uint64_t rows;
    uint64_t columns;
    uint64_t position; /* the next position, or UINT64_MAX at the end */
    uint64_t row;      /* the row that the walk is in */
    uint64_t next;     /* the next column, in a whole row */
    uint32_t row_kind; /* 0: no row is found yet, 1: a whole row, 2: a row that columns and diagonals cross */
    shdi_line_cursor whole;    /* the first whole row at or after `row` */
    shdi_line_cursor column;   /* the next column in this row */
    shdi_line_cursor diagonal; /* the next diagonal in this row */
    shdi_line_cursor lowest;   /* the lowest diagonal that meets this row or an earlier one */
} shdi_lines;

/* A place within a RICE block whose k is too large for 32-bit offsets. */
typedef struct shdi_wide {
    uint32_t bit;
    uint32_t ones;
    uint64_t low_sum;
} shdi_wide;

/* A walk over the positions of blocks [block, last). */
typedef struct shdi_cursor {
    const shd_delta *delta;
    uint64_t block;
    uint64_t last;
    uint64_t rank;    /* of the next position; of the block in work in RICE; unused in BITMAP */
    uint64_t base;    /* RICE: that of the block in work; RAW: the position before */
    shdi_wide wide;   /* RICE */
    shdi_lines lines; /* STRUCT */
} shdi_cursor;

shdi_fault shdi_cursor_open(shdi_cursor *cursor, const shd_delta *delta, uint64_t first_block, uint64_t last_block);

/* The next piece. Its count is 0 at the end and only there; then its base and its rank are 0, too. All positions are below numel, all ranks below nnz. */
shdi_fault shdi_cursor_next(shdi_cursor *cursor, shdi_piece *piece);

/* ---- The codecs ---- */

typedef struct shdi_index_codec {
    /* A decoded section of this tensor may have `decoded` bytes. */
    int (*size_is_possible)(const shd_tensor *tensor, uint64_t decoded);

    /* Takes the blocks, and what the section's own header says. Checks that header. */
    shdi_fault (*open)(shd_delta *delta);

    /* Makes every check of section 4 after zstd. */
    shdi_fault (*check)(const shd_delta *delta);

    /* Brings a cursor to its first block. Its delta, block, last and rank are set, and its base is 0. NULL if nothing
     * is left to do. */
    shdi_fault (*start)(shdi_cursor *cursor);

    /* As shdi_cursor_next(). */
    shdi_fault (*next)(shdi_cursor *cursor, shdi_piece *piece);

    /* How many nonzeros lie before a block that exists. */
    uint64_t (*block_rank)(const shd_delta *delta, uint64_t block);

    /* The least position that can lie in a block that exists, or after it. */
    uint64_t (*least_position)(const shd_delta *delta, uint64_t block);
} shdi_index_codec;

extern const shdi_index_codec shdi_index_none;
extern const shdi_index_codec shdi_index_rice;
extern const shdi_index_codec shdi_index_raw;
extern const shdi_index_codec shdi_index_bitmap;
extern const shdi_index_codec shdi_index_struct;
extern const shdi_index_codec shdi_index_all;
/* These have `size_is_possible` alone: loading makes two of them RICE, and refuses the other. */
extern const shdi_index_codec shdi_index_tiled;
extern const shdi_index_codec shdi_index_seeded;
extern const shdi_index_codec shdi_index_from_base;

/* The codec of an id. NULL for an unknown id. */
const shdi_index_codec *shdi_index_codec_of(uint32_t id);

/* As `open` and `check` of the tensor's codec. An unknown codec is SHD_UNKNOWN_INDEX_CODEC. */
shdi_fault shdi_index_open(shd_delta *delta);
shdi_fault shdi_index_check(const shd_delta *delta);

SHDI_END

#endif
