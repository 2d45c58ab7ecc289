/* Walking over the positions of any index codec, and what concerns all of them. */
#include "bytes.h"
#include "index.h"
#include "kernels.h"
#include "section.h"

int shdi_index_size_is_possible(const shd_tensor *tensor, uint64_t decoded) {
    uint64_t word = shdi_word(tensor->numel);
    switch (tensor->index_codec) {
    case SHD_INDEX_RICE: return decoded >= 24;
    case SHD_INDEX_RAW: return decoded == tensor->nnz * word + SHDI_SLACK;
    case SHD_INDEX_BITMAP:
        return decoded == shdi_ceil_div(tensor->numel, SHDI_BLOCK) * word + 4 * shdi_ceil_div(tensor->numel, 32) +
                              SHDI_SLACK;
    case SHD_INDEX_STRUCT:
        return decoded >= sizeof(shdi_progression) + SHDI_SLACK &&
               decoded <= SHDI_MAX_LINES * sizeof(shdi_progression) + SHDI_SLACK &&
               (decoded - SHDI_SLACK) % sizeof(shdi_progression) == 0;
    default: return decoded == 0; /* NONE and ALL */
    }
}

shdi_fault shdi_index_open(shd_delta *delta) {
    const shd_tensor *tensor = &delta->tensor;
    delta->word = shdi_word(tensor->numel);
    switch (tensor->index_codec) {
    case SHD_INDEX_RICE: return shdi_rice_open(delta);
    case SHD_INDEX_RAW: delta->block_count = shdi_ceil_div(tensor->nnz, SHDI_BLOCK); break;
    case SHD_INDEX_BITMAP:
        delta->block_count = shdi_ceil_div(tensor->numel, SHDI_BLOCK);
        delta->unary_offset = delta->block_count * delta->word; /* of the bitmap */
        break;
    case SHD_INDEX_STRUCT: delta->block_count = 1; break;
    case SHD_INDEX_ALL: delta->block_count = shdi_ceil_div(tensor->numel, SHDI_BLOCK); break;
    default: delta->block_count = 0; break;
    }
    return shdi_ok();
}

/* ---- RAW ---- */

static uint64_t raw_position(const shd_delta *delta, uint64_t rank) {
    return shdi_load_word(delta->index + rank * delta->word, delta->word);
}

static shdi_fault raw_next(shdi_cursor *cursor, shdi_piece *piece) {
    const shd_delta *delta = cursor->delta;
    const uint64_t end = shdi_min(cursor->last * SHDI_BLOCK, delta->tensor.nnz);
    piece->count = 0;
    piece->rank = cursor->rank;
    while (piece->count < SHDI_BLOCK && cursor->rank < end) {
        uint64_t position = raw_position(delta, cursor->rank);
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
        cursor->base = position; /* here: the position before */
        cursor->rank++;
    }
    return shdi_ok();
}

static shdi_fault raw_check(const shd_delta *delta) {
    const uint64_t nnz = delta->tensor.nnz;
    for (uint64_t rank = 1; rank < nnz; rank++) {
        if (raw_position(delta, rank) <= raw_position(delta, rank - 1)) {
            return shdi_fault_at(SHD_POSITION_ORDER, rank * delta->word);
        }
    }
    if (raw_position(delta, nnz - 1) >= delta->tensor.numel) {
        return shdi_fault_at(SHD_POSITION_RANGE, (nnz - 1) * delta->word);
    }
    return shdi_check_zeros(delta->index, 8 * nnz * delta->word, delta->tensor.index.decoded);
}

/* ---- BITMAP ---- */

static uint32_t bitmap_bits(const shd_delta *delta, uint64_t block) {
    return (uint32_t)shdi_min(delta->tensor.numel - block * SHDI_BLOCK, SHDI_BLOCK);
}

static uint64_t bitmap_rank(const shd_delta *delta, uint64_t block) {
    return shdi_load_word(delta->index + block * delta->word, delta->word);
}

static uint32_t bitmap_ones(const shd_delta *delta, uint64_t block, uint32_t *index) {
    const uint8_t *bitmap = delta->index + delta->unary_offset + block * (SHDI_BLOCK / 8);
    return shdi_kernels_of(delta)->ones(bitmap, bitmap_bits(delta, block), index);
}

static shdi_fault bitmap_next(shdi_cursor *cursor, shdi_piece *piece) {
    const shd_delta *delta = cursor->delta;
    const uint64_t nnz = delta->tensor.nnz;
    piece->count = 0;
    while (piece->count == 0 && cursor->block < cursor->last) {
        uint64_t block = cursor->block++;
        piece->base = block * SHDI_BLOCK;
        piece->rank = bitmap_rank(delta, block);
        piece->count = bitmap_ones(delta, block, piece->offset);
        if (piece->rank > nnz || piece->count > nnz - piece->rank) {
            return shdi_fault_at(SHD_BAD_INDEX, block * delta->word);
        }
        uint64_t after = block + 1 < delta->block_count ? bitmap_rank(delta, block + 1) : nnz;
        if ((block == 0 && piece->rank != 0) || piece->rank + piece->count != after) {
            return shdi_fault_at(SHD_BAD_DIRECTORY, block * delta->word);
        }
    }
    return shdi_ok();
}

static shdi_fault bitmap_check(const shd_delta *delta) {
    shdi_fault directory = shdi_ok();
    uint64_t ones = 0;
    for (uint64_t block = 0; block < delta->block_count; block++) {
        uint32_t index[SHDI_BLOCK + 16];
        if (directory.code == SHD_OK && bitmap_rank(delta, block) != ones) {
            directory = shdi_fault_at(SHD_BAD_DIRECTORY, block * delta->word);
        }
        ones += bitmap_ones(delta, block, index);
    }
    if (ones != delta->tensor.nnz) {
        return shdi_fault_at(SHD_BAD_INDEX, delta->unary_offset);
    }
    if (directory.code != SHD_OK) {
        return directory;
    }
    return shdi_check_zeros(delta->index, 8 * delta->unary_offset + delta->tensor.numel, delta->tensor.index.decoded);
}

/* ---- ALL and STRUCT ---- */

static shdi_fault all_next(shdi_cursor *cursor, shdi_piece *piece) {
    uint64_t end = shdi_min(cursor->last * SHDI_BLOCK, cursor->delta->tensor.numel);
    piece->base = piece->rank = cursor->rank;
    piece->count = (uint32_t)shdi_min(end - cursor->rank, SHDI_BLOCK);
    for (uint32_t i = 0; i < piece->count; i++) {
        piece->offset[i] = i;
    }
    cursor->rank += piece->count;
    return shdi_ok();
}

static shdi_fault struct_next(shdi_cursor *cursor, shdi_piece *piece) {
    uint64_t left = cursor->delta->tensor.nnz - cursor->rank;
    piece->count = 0;
    if (cursor->block == cursor->last) {
        return shdi_ok();
    }
    shdi_lines_next(&cursor->lines, left, piece);
    piece->rank = cursor->rank;
    cursor->rank += piece->count;
    if (piece->count == left) {
        cursor->block = cursor->last;
    }
    int contradicts = piece->count == left ? cursor->lines.position != UINT64_MAX : piece->count == 0;
    return contradicts ? shdi_fault_at(SHD_BAD_INDEX, 0) : shdi_ok();
}

/* ---- All codecs ---- */

shdi_fault shdi_cursor_open(shdi_cursor *cursor, const shd_delta *delta, uint64_t first_block, uint64_t last_block) {
    cursor->delta = delta;
    cursor->block = first_block;
    cursor->last = last_block;
    cursor->rank = shdi_min(first_block * SHDI_BLOCK, delta->tensor.nnz);
    cursor->base = 0;
    memset(&cursor->wide, 0, sizeof cursor->wide);
    if (delta->tensor.index_codec == SHD_INDEX_RAW && cursor->rank > 0) {
        cursor->base = raw_position(delta, cursor->rank - 1);
    }
    if (delta->tensor.index_codec == SHD_INDEX_STRUCT) {
        cursor->rank = 0;
        return shdi_lines_open(&cursor->lines, delta);
    }
    return shdi_ok();
}

shdi_fault shdi_cursor_next(shdi_cursor *cursor, shdi_piece *piece) {
    switch (cursor->delta->tensor.index_codec) {
    case SHD_INDEX_RICE: return shdi_rice_next(cursor, piece);
    case SHD_INDEX_RAW: return raw_next(cursor, piece);
    case SHD_INDEX_BITMAP: return bitmap_next(cursor, piece);
    case SHD_INDEX_STRUCT: return struct_next(cursor, piece);
    case SHD_INDEX_ALL: return all_next(cursor, piece);
    default: piece->count = 0; return shdi_ok();
    }
}

shdi_fault shdi_index_check(const shd_delta *delta) {
    switch (delta->tensor.index_codec) {
    case SHD_INDEX_RICE: return shdi_rice_check(delta);
    case SHD_INDEX_RAW: return raw_check(delta);
    case SHD_INDEX_BITMAP: return bitmap_check(delta);
    case SHD_INDEX_STRUCT: return shdi_lines_check(delta);
    default: return shdi_ok();
    }
}

uint64_t shd_block_rank(const shd_delta *delta, uint64_t block) {
    const uint64_t nnz = delta->tensor.nnz;
    if (block >= delta->block_count) {
        return nnz;
    }
    switch (delta->tensor.index_codec) {
    case SHD_INDEX_RICE:
        return shdi_load_word(delta->index + delta->directory_offset + (block * 2 + 1) * delta->word, delta->word);
    case SHD_INDEX_BITMAP: return bitmap_rank(delta, block);
    default: return shdi_min(block * SHDI_BLOCK, nnz); /* STRUCT has block 0 only */
    }
}

/* ---- Position ranges ---- */

/* The least position that can lie in a block or after it. */
static uint64_t least_position(const shd_delta *delta, uint64_t block) {
    switch (delta->tensor.index_codec) {
    case SHD_INDEX_RICE:
        return shdi_load_word(delta->index + delta->directory_offset + block * 2 * delta->word, delta->word);
    case SHD_INDEX_RAW: return raw_position(delta, block * SHDI_BLOCK);
    case SHD_INDEX_STRUCT: return 0;
    default: return block * SHDI_BLOCK;
    }
}

/* The number of blocks whose least position is not above `position`. */
static uint64_t blocks_from(const shd_delta *delta, uint64_t position) {
    uint64_t low = 0, high = delta->block_count;
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        if (least_position(delta, middle) <= position) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

int shd_find_blocks(const shd_delta *delta, uint64_t first_position, uint64_t end_position, uint64_t *first_block,
                    uint64_t *last_block) {
    if (delta == NULL || first_block == NULL || last_block == NULL || first_position > end_position) {
        return SHD_INVALID_ARGUMENT;
    }
    uint64_t first = blocks_from(delta, first_position);
    *first_block = first == 0 ? 0 : first - 1;
    *last_block = first_position == end_position ? *first_block : blocks_from(delta, end_position - 1);
    if (*last_block < *first_block) { /* the directory is wrong */
        *last_block = *first_block;
    }
    return SHD_OK;
}
