/* The table of index codecs, and what all of them have in common. */
#include "index.h"

const shdi_index_codec *shdi_index_codec_of(uint32_t id) {
    static const shdi_index_codec *const codecs[] = {
        [SHD_INDEX_NONE] = &shdi_index_none,
        [SHD_INDEX_RICE] = &shdi_index_rice,
        [SHD_INDEX_RAW] = &shdi_index_raw,
        [SHD_INDEX_BITMAP] = &shdi_index_bitmap,
        [SHD_INDEX_STRUCT] = &shdi_index_struct,
        [SHD_INDEX_ALL] = &shdi_index_all,
        [SHD_INDEX_TILED] = &shdi_index_tiled,
        [SHD_INDEX_SEEDED] = &shdi_index_seeded,
        [SHD_INDEX_FROM_BASE] = &shdi_index_from_base,
    };
    return id < sizeof codecs / sizeof codecs[0] ? codecs[id] : NULL;
}

int shd_knows_index_codec(int index_codec) {
    return index_codec >= 0 && shdi_index_codec_of((uint32_t)index_codec) != NULL;
}

static const shdi_index_codec *codec_of(const shd_delta *delta) {
    return shdi_index_codec_of(delta->tensor.index_codec);
}

static shdi_fault unknown(void) { return shdi_fault_at(SHD_UNKNOWN_INDEX_CODEC, 0); }

shdi_fault shdi_index_open(shd_delta *delta) {
    const shdi_index_codec *codec = codec_of(delta);
    delta->word = shdi_word(delta->tensor.numel);
    return codec == NULL ? unknown() : codec->open(delta);
}

shdi_fault shdi_index_check(const shd_delta *delta) {
    const shdi_index_codec *codec = codec_of(delta);
    return codec == NULL ? unknown() : codec->check(delta);
}

/* ---- The walk ---- */

shdi_fault shdi_cursor_open(shdi_cursor *cursor, const shd_delta *delta, uint64_t first_block, uint64_t last_block) {
    const shdi_index_codec *codec = codec_of(delta);
    cursor->delta = delta;
    cursor->block = first_block;
    cursor->last = last_block;
    cursor->rank = shdi_min(first_block * SHDI_BLOCK, delta->tensor.nnz);
    cursor->base = 0;
    if (codec == NULL) {
        return unknown();
    }
    return codec->start == NULL ? shdi_ok() : codec->start(cursor);
}

shdi_fault shdi_cursor_next(shdi_cursor *cursor, shdi_piece *piece) {
    const shdi_index_codec *codec = codec_of(cursor->delta);
    piece->base = piece->rank = piece->count = 0; /* at the end codecs set the count alone */
    return codec == NULL ? unknown() : codec->next(cursor, piece);
}

/* ---- Blocks ---- */

uint64_t shd_block_rank(const shd_delta *delta, uint64_t block) {
    const shdi_index_codec *codec = codec_of(delta);
    return codec == NULL || block >= delta->block_count ? delta->tensor.nnz : codec->block_rank(delta, block);
}

/* The number of blocks whose least position is not above `position`. */
SHDI_ONCE static uint64_t blocks_from(const shdi_index_codec *codec, const shd_delta *delta, uint64_t position) {
    uint64_t low = 0, high = delta->block_count;
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        if (codec->least_position(delta, middle) <= position) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

SHDI_ONCE int shd_find_blocks(const shd_delta *delta, uint64_t first_position, uint64_t end_position,
                              uint64_t *first_block, uint64_t *last_block) {
    if (delta == NULL || first_block == NULL || last_block == NULL || first_position > end_position) {
        return SHD_INVALID_ARGUMENT;
    }
    const shdi_index_codec *codec = codec_of(delta);
    if (codec == NULL) {
        return SHD_UNKNOWN_INDEX_CODEC;
    }
    uint64_t first = blocks_from(codec, delta, first_position);
    *first_block = first == 0 ? 0 : first - 1;
    *last_block = first_position == end_position ? *first_block : blocks_from(codec, delta, end_position - 1);
    if (*last_block < *first_block) { /* the directory is wrong */
        *last_block = *first_block;
    }
    return SHD_OK;
}
