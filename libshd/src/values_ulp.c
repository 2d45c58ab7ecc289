/* The value codec ULP: shifts, in blocks that decode independently (FORMAT.md, 5.1). */
#include "values_ulp.h"

#include "bytes.h"
#include "section.h"
#include "tiles.h"

#define HEAD 24u

uint64_t shdi_ulp_size(uint64_t count) {
    return HEAD + 8 * shdi_ceil_div(count, SHDI_ULP_BLOCK) + 4 * shdi_ceil_div(count, 32) + SHDI_SLACK;
}

shdi_fault shdi_ulp_open(shdi_ulp *ulp, const shd_delta *delta) {
    const uint8_t *section = delta->values;
    const uint64_t nnz = delta->tensor.nnz, blocks = shdi_ceil_div(nnz, SHDI_ULP_BLOCK);
    memset(ulp, 0, sizeof *ulp);
    ulp->nnz = nnz;
    ulp->size = shd_dtype_size(delta->tensor.dtype);
    ulp->most = (UINT64_C(1) << (8 * ulp->size - 1)) - 1;
    if (nnz == 0) {
        return shdi_ok();
    }
    uint64_t head = shdi_load64(section);
    SHDI_PIN(head);
    ulp->bits = shdi_load64(section + 8);
    SHDI_PIN(ulp->bits);
    ulp->listed = shdi_load64(section + 16);
    SHDI_PIN(ulp->listed);
    ulp->k = (uint32_t)(head & 0xFF);
    ulp->j = (uint32_t)(head >> 8 & 0xFF);
    if (ulp->k > SHDI_ULP_MAX_K || ulp->j > SHDI_ULP_MAX_J || head >> 16 != 0) {
        return shdi_fault_at(SHD_BAD_VALUE, 0);
    }
    ulp->word = shdi_word(ulp->bits > ulp->listed ? ulp->bits : ulp->listed);
    /* nnz is bounded by the section's size, so only the stream's size could overflow. */
    const uint64_t fixed = HEAD + blocks * 2 * ulp->word + 4 * shdi_ceil_div(nnz, 32);
    const uint64_t decoded = delta->tensor.values.decoded;
    if (decoded < fixed + SHDI_SLACK || (decoded - fixed - SHDI_SLACK) % 4 != 0 ||
        (decoded - fixed - SHDI_SLACK) / 4 != shdi_ceil_div(ulp->bits, 32)) {
        return shdi_fault_at(SHD_BAD_SIZE, 8);
    }
    ulp->directory = section + HEAD;
    ulp->signs = ulp->directory + blocks * 2 * ulp->word;
    ulp->stream = section + fixed;
    return ulp->listed > nnz ? shdi_fault_at(SHD_BAD_DIRECTORY, 16) : shdi_ok();
}

/* What the directory says of a block, which may be the one behind the last. */
static void entry(const shdi_ulp *ulp, uint64_t block, uint64_t *bit, uint64_t *before) {
    *bit = ulp->bits;
    *before = ulp->listed;
    if (block * SHDI_ULP_BLOCK < ulp->nnz) {
        *bit = shdi_load_word(ulp->directory + block * 2 * ulp->word, ulp->word);
        *before = shdi_load_word(ulp->directory + (block * 2 + 1) * ulp->word, ulp->word);
    }
}

/* ---- Bits ---- */

/* The zeros before the next one, of which there is one before `end` unless the file changes; moves `at` behind it. */
static uint64_t zeros_before_one(const shdi_ulp *ulp, uint64_t *at, uint64_t end) {
    shdi_unary reader = {ulp->stream, *at, end};
    const uint64_t zeros = shdi_read_zeros(&reader);
    *at = reader.bit;
    return zeros;
}

/* ---- Blocks ---- */

/* Reads the next shift of the block's list. */
static int next_listed(shdi_ulp *ulp, uint64_t after) {
    if (ulp->left == 0) {
        ulp->listed_rank = ulp->end_rank;
        return ulp->field == ulp->end ? SHD_OK : SHD_BAD_VALUE;
    }
    ulp->left--;
    uint64_t quotient = zeros_before_one(ulp, &ulp->gap, ulp->end);
    uint64_t width = ulp->j + zeros_before_one(ulp, &ulp->unary, ulp->end);
    if (quotient > SHDI_ULP_BLOCK || width > SHDI_ULP_MAX_WIDTH || ulp->field > ulp->end || width > ulp->end - ulp->field) {
        return SHD_BAD_VALUE;
    }
    uint64_t rank = after + (quotient << ulp->k) + shdi_ulp_field(ulp->stream, ulp->low, ulp->k);
    /* The magnitude less 2: at most 2^64 - 2. */
    uint64_t beyond =
        (UINT64_C(1) << width) - (UINT64_C(1) << ulp->j) + shdi_ulp_field(ulp->stream, ulp->field, (uint32_t)width);
    if (rank >= ulp->end_rank || beyond > ulp->most - 2) {
        return SHD_BAD_VALUE;
    }
    ulp->low += ulp->k;
    ulp->field += width;
    ulp->listed_rank = rank;
    ulp->listed_value = beyond + 2;
    return SHD_OK;
}

static int open_block(shdi_ulp *ulp, uint64_t block) {
    uint64_t before, next;
    entry(ulp, block, &ulp->gap, &before);
    entry(ulp, block + 1, &ulp->end, &next);
    if (ulp->gap > ulp->end || ulp->end > ulp->bits || before > next || next > ulp->listed) {
        return SHD_BAD_DIRECTORY;
    }
    ulp->rank = block * SHDI_ULP_BLOCK;
    ulp->end_rank = shdi_min(ulp->rank + SHDI_ULP_BLOCK, ulp->nnz);
    ulp->left = next - before;
    ulp->low = ulp->gap;
    if (ulp->left > SHDI_ULP_BLOCK || !shdi_skip_ones(ulp->stream, &ulp->low, ulp->end, ulp->left) ||
        ulp->left * ulp->k > ulp->end - ulp->low) {
        return SHD_BAD_VALUE;
    }
    ulp->unary = ulp->low + ulp->left * ulp->k;
    ulp->field = ulp->unary;
    if (!shdi_skip_ones(ulp->stream, &ulp->field, ulp->end, ulp->left)) {
        return SHD_BAD_VALUE;
    }
    return next_listed(ulp, ulp->rank);
}

shdi_fault shdi_ulp_read(shdi_ulp *ulp, uint64_t rank, uint64_t count, uint8_t *shifts) {
    int code = SHD_OK;
    while (count > 0 && code == SHD_OK) {
        if (ulp->rank > rank || rank >= ulp->end_rank) {
            code = open_block(ulp, rank / SHDI_ULP_BLOCK);
        }
        while (code == SHD_OK && ulp->listed_rank < rank) {
            code = next_listed(ulp, ulp->listed_rank + 1);
        }
        if (code != SHD_OK) {
            break;
        }
        uint64_t end = shdi_min(rank + count, ulp->end_rank), plain = shdi_min(end, ulp->listed_rank);
        count -= end - rank;
        while (rank < end && code == SHD_OK) {
            for (; rank < plain; rank++, shifts += ulp->size) {
                /* 1, or -1 where the bit is one */
                shdi_put_shift(shifts, ulp->size, 1 - (uint64_t)(ulp->signs[rank / 8] >> (rank % 8) & 1) * 2);
            }
            if (rank < end) {
                uint64_t minus = 0 - (uint64_t)(ulp->signs[rank / 8] >> (rank % 8) & 1);
                shdi_put_shift(shifts, ulp->size, (ulp->listed_value ^ minus) - minus);
                rank++;
                shifts += ulp->size;
                code = next_listed(ulp, rank);
                plain = shdi_min(end, ulp->listed_rank);
            }
        }
        ulp->rank = rank;
    }
    if (code != SHD_OK) {
        ulp->end_rank = 0; /* whoever goes on opens a block anew */
    }
    return shdi_fault_at(code, 0);
}

shdi_fault shdi_ulp_check(const shd_delta *delta) {
    shdi_ulp ulp;
    const uint64_t nnz = delta->tensor.nnz;
    shdi_fault fault = shdi_ulp_open(&ulp, delta);
    if (fault.code != SHD_OK) {
        return fault;
    }
    uint64_t last_bit = 0, last_before = 0;
    for (uint64_t block = 0; block * SHDI_ULP_BLOCK < nnz; block++) {
        uint64_t bit, before;
        entry(&ulp, block, &bit, &before);
        if (bit < last_bit || before < last_before || bit > ulp.bits || before > ulp.listed ||
            (block == 0 && (bit != 0 || before != 0))) {
            return shdi_fault_at(SHD_BAD_DIRECTORY, HEAD + block * 2 * ulp.word);
        }
        last_bit = bit;
        last_before = before;
    }
    for (uint64_t rank = 0; rank < nnz && fault.code == SHD_OK;) {
        uint8_t shifts[SHDI_GROUP * 8];
        uint64_t count = shdi_min(nnz - rank, SHDI_GROUP);
        fault = shdi_ulp_read(&ulp, rank, count, shifts);
        rank += count;
    }
    const uint64_t signs = (uint64_t)(ulp.signs - delta->values), stream = (uint64_t)(ulp.stream - delta->values);
    if (fault.code == SHD_OK) {
        fault = shdi_check_zeros(delta->values, 8 * signs + nnz, stream);
    }
    return fault.code == SHD_OK ? shdi_check_zeros(delta->values, 8 * stream + ulp.bits, delta->tensor.values.decoded)
                                : fault;
}
