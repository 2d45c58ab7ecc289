/* RICE (FORMAT.md, section 4.2): gaps in a unary part and low bits, and a directory of blocks. */
#include "bytes.h"
#include "index.h"
#include "section.h"

/* A directory entry: the position and the rank that a nonzero right at the block's start would have. */
typedef struct entry {
    uint64_t base;
    uint64_t rank;
} entry;

static uint64_t entry_offset(const shd_delta *delta, uint64_t block) {
    return delta->directory_offset + block * 2 * delta->word;
}

static entry read_entry(const shd_delta *delta, uint64_t block) {
    const uint8_t *p = delta->index + entry_offset(delta, block);
    entry e = {shdi_load_word(p, delta->word), shdi_load_word(p + delta->word, delta->word)};
    return e;
}

static uint32_t bits_in(const shd_delta *delta, uint64_t block) {
    return (uint32_t)shdi_min(delta->unary_bits - block * SHDI_BLOCK, SHDI_BLOCK);
}

static int size_is_possible(const shd_tensor *tensor, uint64_t decoded) {
    (void)tensor;
    return decoded >= 16 + SHDI_SLACK; /* the rest is checked with the section's header */
}

SHDI_ONCE static shdi_fault open_section(shd_delta *delta) {
    const uint8_t *section = delta->index;
    const shd_tensor *tensor = &delta->tensor;
    uint64_t start = shdi_load64(section);
    if (start > SHDI_MAX_RICE_K) { /* this covers the seven zero bytes after k */
        return shdi_fault_at(SHD_BAD_INDEX, 0);
    }
    delta->k = (uint32_t)start;
    delta->unary_bits = shdi_load64(section + 8);
    if (delta->unary_bits / 8 > tensor->index.decoded) {
        return shdi_fault_at(SHD_BAD_SIZE, 8); /* the sums below cannot overflow now */
    }
    delta->block_count = shdi_ceil_div(delta->unary_bits, SHDI_BLOCK);
    delta->directory_offset = 16;
    delta->low_offset = entry_offset(delta, delta->block_count);
    delta->unary_offset = delta->low_offset + 4 * shdi_ceil_div(tensor->nnz * delta->k, 32);
    if (delta->unary_offset + 4 * shdi_ceil_div(delta->unary_bits, 32) + SHDI_SLACK != tensor->index.decoded) {
        return shdi_fault_at(SHD_BAD_SIZE, 8);
    }
    if (delta->unary_bits < tensor->nnz) {
        return shdi_fault_at(SHD_BAD_INDEX, 8);
    }
    return shdi_ok();
}

/* Decodes a block whose offsets fit 32 bits. On success *next is what the next directory entry must be. */
static shdi_fault decode_narrow(const shd_delta *delta, uint64_t block, entry at, shdi_piece *piece, entry *next) {
    const shdi_kernels *kernels = shdi_kernels_of(delta);
    const uint64_t nnz = delta->tensor.nnz, numel = delta->tensor.numel;
    const uint64_t bitmap = delta->unary_offset + block * (SHDI_BLOCK / 8);
    const uint32_t bits = bits_in(delta, block);
    const uint32_t ones = kernels->ones(delta->index + bitmap, bits, piece->offset);
    if (at.rank > nnz || ones > nnz - at.rank) {
        return shdi_fault_at(SHD_BAD_INDEX, bitmap);
    }
    const uint64_t low_bit = at.rank * delta->k;
    const uint64_t low = delta->low_offset + low_bit / 8;
    const uint64_t low_sum = kernels->rice_offsets(piece->offset, ones, delta->k, 0, delta->index + low,
                                                   delta->tensor.index.decoded - low, low_bit % 8);
    /* Offsets increase, so the check of the last one is enough. */
    if (ones != 0 && (at.base >= numel || piece->offset[ones - 1] >= numel - at.base)) {
        return shdi_fault_at(SHD_POSITION_RANGE, bitmap);
    }
    piece->base = at.base;
    piece->rank = at.rank;
    piece->count = ones;
    next->base = at.base + ((uint64_t)(bits - ones) << delta->k) + low_sum + ones;
    next->rank = at.rank + ones;
    return shdi_ok();
}

static uint64_t low_bits(const shd_delta *delta, uint64_t rank) {
    uint64_t bit = rank * delta->k;
    uint64_t word = shdi_load64(delta->index + delta->low_offset + bit / 8) >> (bit % 8);
    return word & ((UINT64_C(1) << delta->k) - 1);
}

/* The index of the first one at or after `bit`, or `bits` if there is none. */
static uint32_t next_one(const uint8_t *bitmap, uint32_t bit, uint32_t bits) {
    while (bit < bits) {
        uint64_t word = shdi_load64(bitmap + bit / 64 * 8) >> (bit % 64);
        if (word != 0) {
            return (uint32_t)shdi_min(bit + shdi_lowest_one(word), bits);
        }
        bit = (bit / 64 + 1) * 64;
    }
    return bits;
}

/* Goes on decoding a block of any k, up to its end or to where an offset would not fit 32 bits. *done tells which. */
static shdi_fault decode_wide(const shd_delta *delta, uint64_t block, entry at, shdi_wide *wide, shdi_piece *piece,
                              entry *next, int *done) {
    const uint64_t nnz = delta->tensor.nnz, numel = delta->tensor.numel;
    const uint64_t bitmap = delta->unary_offset + block * (SHDI_BLOCK / 8);
    const uint32_t bits = bits_in(delta, block);
    piece->count = 0;
    for (uint32_t t; (t = next_one(delta->index + bitmap, wide->bit, bits)) < bits; wide->bit = t + 1) {
        if (at.rank >= nnz || wide->ones >= nnz - at.rank) {
            return shdi_fault_at(SHD_BAD_INDEX, bitmap);
        }
        uint64_t low_sum = wide->low_sum + low_bits(delta, at.rank + wide->ones);
        uint64_t offset = ((uint64_t)(t - wide->ones) << delta->k) + low_sum + wide->ones;
        if (at.base >= numel || offset >= numel - at.base) {
            return shdi_fault_at(SHD_POSITION_RANGE, bitmap);
        }
        if (piece->count == 0) {
            piece->base = at.base + offset;
            piece->rank = at.rank + wide->ones;
        } else if (at.base + offset - piece->base > UINT32_MAX) {
            *done = 0;
            return shdi_ok();
        }
        piece->offset[piece->count++] = (uint32_t)(at.base + offset - piece->base);
        wide->low_sum = low_sum;
        wide->ones++;
    }
    next->base = at.base + ((uint64_t)(bits - wide->ones) << delta->k) + wide->low_sum + wide->ones;
    next->rank = at.rank + wide->ones;
    *done = 1;
    return shdi_ok();
}

/* The next piece of a block that starts at `at`. *done tells if it is the block's last. */
static shdi_fault decode(const shd_delta *delta, uint64_t block, entry at, shdi_wide *wide, shdi_piece *piece,
                         entry *next, int *done) {
    if (delta->k > SHDI_NARROW_K) {
        return decode_wide(delta, block, at, wide, piece, next, done);
    }
    *done = 1;
    return decode_narrow(delta, block, at, piece, next);
}

static int ends_with_a_one(const shd_delta *delta) {
    uint64_t last = delta->unary_bits - 1;
    return delta->index[delta->unary_offset + last / 8] >> (last % 8) & 1;
}

/* Checks as much of the directory as one block alone can show. */
static shdi_fault check_neighbours(const shd_delta *delta, uint64_t block, entry at, entry next) {
    if (block == 0 && (at.base != 0 || at.rank != 0)) {
        return shdi_fault_at(SHD_BAD_DIRECTORY, entry_offset(delta, block));
    }
    if (block + 1 == delta->block_count) {
        return next.rank == delta->tensor.nnz && ends_with_a_one(delta)
                   ? shdi_ok()
                   : shdi_fault_at(SHD_BAD_INDEX, delta->unary_offset);
    }
    entry stored = read_entry(delta, block + 1);
    return stored.base == next.base && stored.rank == next.rank
               ? shdi_ok()
               : shdi_fault_at(SHD_BAD_DIRECTORY, entry_offset(delta, block + 1));
}

static shdi_fault start(shdi_cursor *cursor) {
    memset(&cursor->wide, 0, sizeof cursor->wide);
    return shdi_ok();
}

static shdi_fault next_piece(shdi_cursor *cursor, shdi_piece *piece) {
    const shd_delta *delta = cursor->delta;
    piece->count = 0;
    while (piece->count == 0 && cursor->block < cursor->last) {
        if (cursor->wide.bit == 0) { /* a new block; its entry is read once, because the file may change */
            entry at = read_entry(delta, cursor->block);
            cursor->base = at.base;
            cursor->rank = at.rank;
        }
        entry at = {cursor->base, cursor->rank}, next = {0, 0};
        int done = 0;
        shdi_fault fault = decode(delta, cursor->block, at, &cursor->wide, piece, &next, &done);
        if (fault.code == SHD_OK && done) {
            fault = check_neighbours(delta, cursor->block, at, next);
            cursor->block++;
            memset(&cursor->wide, 0, sizeof cursor->wide);
        }
        if (fault.code != SHD_OK) {
            return fault;
        }
    }
    return shdi_ok();
}

/* Decodes all blocks by the definition, without the directory, and compares the directory with that. A wrong position
 * is reported before a wrong entry. */
static shdi_fault check_blocks(const shd_delta *delta) {
    shdi_fault directory = shdi_ok();
    entry at = {0, 0};
    for (uint64_t block = 0; block < delta->block_count; block++) {
        entry stored = read_entry(delta, block), next = at;
        if (directory.code == SHD_OK && (stored.base != at.base || stored.rank != at.rank)) {
            directory = shdi_fault_at(SHD_BAD_DIRECTORY, entry_offset(delta, block));
        }
        shdi_wide wide = {0, 0, 0};
        for (int done = 0; !done;) {
            shdi_piece piece;
            shdi_fault fault = decode(delta, block, at, &wide, &piece, &next, &done);
            if (fault.code != SHD_OK) {
                return fault;
            }
        }
        at = next;
        if (at.base >= delta->tensor.numel && block + 1 < delta->block_count) {
            /* The unary part ends with a one, and its position is even larger. */
            return shdi_fault_at(SHD_POSITION_RANGE, delta->unary_offset + (block + 1) * (SHDI_BLOCK / 8));
        }
    }
    return directory;
}

/* Whether check_blocks() would find nothing, by counts and sums, which tell what the directory has to say: positions
 * increase, so that the last one alone has to be below numel. 0 if it cannot tell. */
SHDI_OFTEN static int blocks_are_fine(const shd_delta *delta) {
    const shdi_kernels *kernels = shdi_kernels_of(delta);
    const uint64_t nnz = delta->tensor.nnz, numel = delta->tensor.numel;
    const uint32_t k = delta->k;
    entry at = {0, 0};
    if (k > SHDI_NARROW_K) {
        return 0;
    }
    for (uint64_t block = 0; block < delta->block_count; block++) {
        const entry stored = read_entry(delta, block);
        const uint32_t bits = bits_in(delta, block);
        const uint64_t bitmap = delta->unary_offset + block * (SHDI_BLOCK / 8);
        const uint64_t ones = kernels->count_ones(delta->index + bitmap, bits);
        if (stored.base != at.base || stored.rank != at.rank || ones > nnz - at.rank) {
            return 0;
        }
        at.base += ((bits - ones) << k) + ones;
        if (k != 0) {
            const uint64_t low = delta->low_offset + at.rank * k / 8;
            at.base += kernels->sum_fields(delta->index + low, delta->tensor.index.decoded - low, at.rank * k % 8, k,
                                           (uint32_t)ones);
        }
        at.rank += ones;
        if (at.base > numel) {
            return 0;
        }
    }
    return at.rank == nnz && ends_with_a_one(delta); /* so the last position is at.base - 1 */
}

static shdi_fault check_positions(const shd_delta *delta) {
    if (blocks_are_fine(delta)) {
        return shdi_ok();
    }
    if (shdi_kernels_of(delta)->count_ones(delta->index + delta->unary_offset, delta->unary_bits) !=
            delta->tensor.nnz ||
        !ends_with_a_one(delta)) {
        return shdi_fault_at(SHD_BAD_INDEX, delta->unary_offset);
    }
    return check_blocks(delta);
}

static shdi_fault check(const shd_delta *delta) {
    const uint8_t *section = delta->index;
    shdi_fault fault = check_positions(delta);
    if (fault.code == SHD_OK) {
        fault = shdi_check_zeros(section, 8 * delta->low_offset + delta->tensor.nnz * delta->k, delta->unary_offset);
    }
    if (fault.code == SHD_OK) {
        fault = shdi_check_zeros(section, 8 * delta->unary_offset + delta->unary_bits, delta->tensor.index.decoded);
    }
    return fault;
}

static uint64_t block_rank(const shd_delta *delta, uint64_t block) { return read_entry(delta, block).rank; }

static uint64_t least_position(const shd_delta *delta, uint64_t block) { return read_entry(delta, block).base; }

const shdi_index_codec shdi_index_rice = {
    .size_is_possible = size_is_possible,
    .open = open_section,
    .check = check,
    .start = start,
    .next = next_piece,
    .block_rank = block_rank,
    .least_position = least_position,
};
