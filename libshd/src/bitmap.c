/* BITMAP (FORMAT.md, section 4.4): one bit an element, and a directory of ranks. */
#include "bytes.h"
#include "index.h"
#include "section.h"

static int size_is_possible(const shd_tensor *tensor, uint64_t decoded) {
    return decoded == shdi_ceil_div(tensor->numel, SHDI_BLOCK) * shdi_word(tensor->numel) +
                          4 * shdi_ceil_div(tensor->numel, 32) + SHDI_SLACK;
}

SHDI_ONCE static shdi_fault open_section(shd_delta *delta) {
    delta->block_count = shdi_ceil_div(delta->tensor.numel, SHDI_BLOCK);
    delta->unary_offset = delta->block_count * delta->word; /* of the bitmap */
    return shdi_ok();
}

/* The directory's entry of a block. */
static uint64_t block_rank(const shd_delta *delta, uint64_t block) {
    return shdi_load_word(delta->index + block * delta->word, delta->word);
}

static uint32_t ones_of_block(const shd_delta *delta, uint64_t block, uint32_t *index) {
    const uint8_t *bitmap = delta->index + delta->unary_offset + block * (SHDI_BLOCK / 8);
    const uint32_t bits = (uint32_t)shdi_min(delta->tensor.numel - block * SHDI_BLOCK, SHDI_BLOCK);
    return shdi_kernels_of(delta)->ones(bitmap, bits, index);
}

static shdi_fault check(const shd_delta *delta) {
    shdi_fault directory = shdi_ok();
    uint64_t ones = 0;
    for (uint64_t block = 0; block < delta->block_count; block++) {
        uint32_t index[SHDI_BLOCK_ROOM];
        if (directory.code == SHD_OK && block_rank(delta, block) != ones) {
            directory = shdi_fault_at(SHD_BAD_DIRECTORY, block * delta->word);
        }
        ones += ones_of_block(delta, block, index);
    }
    if (ones != delta->tensor.nnz) {
        return shdi_fault_at(SHD_BAD_INDEX, delta->unary_offset);
    }
    if (directory.code != SHD_OK) {
        return directory;
    }
    return shdi_check_zeros(delta->index, 8 * delta->unary_offset + delta->tensor.numel, delta->tensor.index.decoded);
}

static shdi_fault next(shdi_cursor *cursor, shdi_piece *piece) {
    const shd_delta *delta = cursor->delta;
    const uint64_t nnz = delta->tensor.nnz;
    piece->count = 0;
    while (piece->count == 0 && cursor->block < cursor->last) {
        uint64_t block = cursor->block++;
        piece->base = block * SHDI_BLOCK;
        piece->rank = block_rank(delta, block);
        piece->count = ones_of_block(delta, block, piece->offset);
        if (piece->rank > nnz || piece->count > nnz - piece->rank) {
            return shdi_fault_at(SHD_BAD_INDEX, block * delta->word);
        }
        uint64_t after = block + 1 < delta->block_count ? block_rank(delta, block + 1) : nnz;
        if ((block == 0 && piece->rank != 0) || piece->rank + piece->count != after) {
            return shdi_fault_at(SHD_BAD_DIRECTORY, block * delta->word);
        }
    }
    return shdi_ok();
}

static uint64_t least_position(const shd_delta *delta, uint64_t block) {
    (void)delta;
    return block * SHDI_BLOCK;
}

const shdi_index_codec shdi_index_bitmap = {
    .size_is_possible = size_is_possible,
    .open = open_section,
    .check = check,
    .next = next,
    .block_rank = block_rank,
    .least_position = least_position,
};
