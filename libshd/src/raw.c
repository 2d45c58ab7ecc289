/* RAW (FORMAT.md, section 4.3): one word a position. */
#include "bytes.h"
#include "index.h"
#include "section.h"

static int size_is_possible(const shd_tensor *tensor, uint64_t decoded) {
    return decoded == tensor->nnz * shdi_word(tensor->numel) + SHDI_SLACK;
}

static shdi_fault open_section(shd_delta *delta) {
    delta->block_count = shdi_ceil_div(delta->tensor.nnz, SHDI_BLOCK);
    return shdi_ok();
}

static uint64_t position_of(const shd_delta *delta, uint64_t rank) {
    return shdi_load_word(delta->index + rank * delta->word, delta->word);
}

static shdi_fault check(const shd_delta *delta) {
    const uint64_t nnz = delta->tensor.nnz;
    for (uint64_t rank = 1; rank < nnz; rank++) {
        if (position_of(delta, rank) <= position_of(delta, rank - 1)) {
            return shdi_fault_at(SHD_POSITION_ORDER, rank * delta->word);
        }
    }
    if (position_of(delta, nnz - 1) >= delta->tensor.numel) {
        return shdi_fault_at(SHD_POSITION_RANGE, (nnz - 1) * delta->word);
    }
    return shdi_check_zeros(delta->index, 8 * nnz * delta->word, delta->tensor.index.decoded);
}

static shdi_fault start(shdi_cursor *cursor) {
    if (cursor->rank > 0) {
        cursor->base = position_of(cursor->delta, cursor->rank - 1);
    }
    return shdi_ok();
}

static shdi_fault next(shdi_cursor *cursor, shdi_piece *piece) {
    const shd_delta *delta = cursor->delta;
    const uint64_t end = shdi_min(cursor->last * SHDI_BLOCK, delta->tensor.nnz);
    piece->count = 0;
    piece->rank = cursor->rank;
    while (piece->count < SHDI_BLOCK && cursor->rank < end) {
        uint64_t position = position_of(delta, cursor->rank);
        if (piece->count == 0) {
            piece->base = position;
        }
        if (cursor->rank > 0 && position <= cursor->base) {
            return shdi_fault_at(SHD_POSITION_ORDER, cursor->rank * delta->word);
        }
        if (position >= delta->tensor.numel) {
            return shdi_fault_at(SHD_POSITION_RANGE, cursor->rank * delta->word);
        }
        if (position - piece->base > UINT32_MAX) {
            break;
        }
        piece->offset[piece->count++] = (uint32_t)(position - piece->base);
        cursor->base = position;
        cursor->rank++;
    }
    return shdi_ok();
}

static uint64_t block_rank(const shd_delta *delta, uint64_t block) {
    return shdi_min(block * SHDI_BLOCK, delta->tensor.nnz);
}

static uint64_t least_position(const shd_delta *delta, uint64_t block) {
    return position_of(delta, block * SHDI_BLOCK);
}

const shdi_index_codec shdi_index_raw = {
    .size_is_possible = size_is_possible,
    .open = open_section,
    .check = check,
    .start = start,
    .next = next,
    .block_rank = block_rank,
    .least_position = least_position,
};
