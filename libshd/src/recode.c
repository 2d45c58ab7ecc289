/* Recoding as RICE (FORMAT.md, section 4.2), and which codecs are recoded. */
#include "recode.h"
#include "index.h"
#include "rice_writer.h"
#include "seeded.h"
#include "tiled.h"

/* ---- The section ---- */

/* Where the parts of a RICE of any nnz positions are; its directory comes first. */
typedef struct layout {
    uint64_t low;
    uint64_t unary;
    uint64_t size;
    uint32_t k;
} layout;

SHDI_ONCE static layout layout_of(const shd_tensor *tensor) {
    layout r = {0, 0, 0, 0};
    while (r.k < SHDI_MAX_RICE_K && tensor->numel >> (r.k + 1) >= tensor->nnz) {
        r.k++;
    }
    /* numel / 2^k is below 2 nnz (or k is its largest), so that this bounds the unary bits. */
    const uint64_t unary_bits = tensor->nnz + (tensor->numel >> r.k);
    r.low = shdi_ceil_div(unary_bits, SHDI_BLOCK) * 2 * shdi_word(tensor->numel);
    r.unary = r.low + 4 * shdi_ceil_div(tensor->nnz * r.k, 32) + SHDI_SLACK; /* for pack_bytes() */
    r.size = r.unary + 4 * shdi_ceil_div(unary_bits, 32) + SHDI_SLACK;
    return r;
}

/* ---- Which codecs ---- */

SHDI_ONCE uint64_t shdi_recode_room(const shd_tensor *tensor) {
    const uint64_t rice = layout_of(tensor).size;
    switch (tensor->index_codec) { /* 64 bytes, since the buffer may start anywhere */
    case SHD_INDEX_TILED: return 64 + shdi_tiled_room(tensor, rice);
    case SHD_INDEX_SEEDED: return 64 + rice;
    default: return 0;
    }
}

SHDI_ONCE shdi_fault shdi_recode(shd_delta *delta, int check_all, uint8_t *memory) {
    shd_tensor *const tensor = &delta->tensor;
    const uint32_t codec = tensor->index_codec;
    if (codec == SHD_INDEX_FROM_BASE) {
        return shdi_fault_at(SHD_BASE_NEEDED, 0);
    }
    if (codec != SHD_INDEX_TILED && codec != SHD_INDEX_SEEDED) {
        shdi_fault fault = shdi_index_open(delta);
        return fault.code == SHD_OK && check_all ? shdi_index_check(delta) : fault;
    }
    const layout r = layout_of(tensor);
    memory += (64 - (uintptr_t)memory % 64) % 64;
    memset(memory, 0, (size_t)r.size);
    shdi_rice_writer w = {.directory = memory, .unary = memory + r.unary, .low = {memory + r.low, 0, 0},
                          .word = shdi_word(tensor->numel), .k = r.k};
    shdi_fault fault = codec == SHD_INDEX_TILED ? shdi_tiled_decode(delta, check_all, memory, r.size, &w)
                                                : shdi_seeded_decode(delta, check_all, &w);
    if (fault.code != SHD_OK) {
        return fault;
    }
    shdi_pack_rest(&w.low);
    delta->index = memory;
    tensor->index_codec = SHD_INDEX_RICE;
    tensor->index.decoded = r.size;
    delta->word = w.word;
    delta->k = r.k;
    delta->unary_bits = w.bit;
    delta->block_count = shdi_ceil_div(w.bit, SHDI_BLOCK);
    delta->directory_offset = 0;
    delta->low_offset = r.low;
    delta->unary_offset = r.unary;
    return fault;
}
