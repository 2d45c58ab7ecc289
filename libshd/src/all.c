/* NONE and ALL (FORMAT.md, section 4.1): no position, or every position. Neither has a section. */
#include "index.h"

static int is_empty(const shd_tensor *tensor, uint64_t decoded) {
    (void)tensor;
    return decoded == 0;
}

static shdi_fault no_blocks(shd_delta *delta) {
    delta->block_count = 0;
    return shdi_ok();
}

static shdi_fault blocks_of_all(shd_delta *delta) {
    delta->block_count = shdi_ceil_div(delta->tensor.numel, SHDI_BLOCK);
    return shdi_ok();
}

static shdi_fault check_nothing(const shd_delta *delta) {
    (void)delta;
    return shdi_ok();
}

static shdi_fault next_of_none(shdi_cursor *cursor, shdi_piece *piece) {
    (void)cursor;
    piece->count = 0;
    return shdi_ok();
}

static shdi_fault next_of_all(shdi_cursor *cursor, shdi_piece *piece) {
    uint64_t end = shdi_min(cursor->last * SHDI_BLOCK, cursor->delta->tensor.numel);
    piece->base = piece->rank = cursor->rank;
    piece->count = (uint32_t)shdi_min(end - cursor->rank, SHDI_BLOCK);
    for (uint32_t i = 0; i < piece->count; i++) {
        piece->offset[i] = i;
    }
    cursor->rank += piece->count;
    return shdi_ok();
}

static uint64_t block_rank(const shd_delta *delta, uint64_t block) {
    return shdi_min(block * SHDI_BLOCK, delta->tensor.nnz);
}

static uint64_t least_position(const shd_delta *delta, uint64_t block) {
    (void)delta;
    return block * SHDI_BLOCK;
}

const shdi_index_codec shdi_index_none = {
    .size_is_possible = is_empty,
    .open = no_blocks,
    .check = check_nothing,
    .next = next_of_none,
    .block_rank = block_rank,
    .least_position = least_position,
};

const shdi_index_codec shdi_index_all = {
    .size_is_possible = is_empty,
    .open = blocks_of_all,
    .check = check_nothing,
    .next = next_of_all,
    .block_rank = block_rank,
    .least_position = least_position,
};
