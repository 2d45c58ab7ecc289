/* Sections that are decoded beside a base: whatever they hold, the caller's buffers stay whole, and positions increase.
 * The base is made up: one that fits is not needed to come far into a section. */
#include "fuzz.h"

static uint8_t *made_up(uint64_t size, uint64_t seed) {
    uint8_t *elements = exactly(size);
    random_state r = {seed};
    for (uint64_t i = 0; i < size; i++) {
        elements[i] = (uint8_t)random_bits(&r);
    }
    return elements;
}

static void decode_positions(const uint8_t *section, const shd_tensor *tensor, uint32_t element_size) {
    const uint64_t size = tensor->index.decoded, room = shd_from_base_scratch_size(section, size);
    uint8_t *base = made_up(tensor->numel * element_size, tensor->nnz);
    int64_t *positions = exactly(tensor->nnz * sizeof *positions);
    void *scratch = exactly(room);
    shd_from_base reader;
    int code = shd_from_base_open(&reader, section, size, tensor->numel, tensor->nnz, scratch, room);
    uint64_t rank = 0;
    while (code == SHD_OK && reader.next_count != 0) {
        uint64_t count;
        code = shd_from_base_next(&reader, base + reader.next_position * element_size, element_size,
                                  positions == NULL ? NULL : positions + rank, tensor->nnz - rank, &count);
        rank += count;
        PROMISE(rank <= tensor->nnz);
    }
    PROMISE(code < SHD_INVALID_ARGUMENT && (code != SHD_OK || rank == tensor->nnz));
    for (uint64_t i = 0; code == SHD_OK && i < rank; i++) {
        PROMISE(positions[i] > (i == 0 ? -1 : positions[i - 1]) && (uint64_t)positions[i] < tensor->numel);
    }
    free(base);
    free(positions);
    free(scratch);
}

static void decode_shifts(const uint8_t *section, const shd_tensor *tensor, uint32_t element_size) {
    const uint64_t size = tensor->nnz * element_size;
    uint8_t *base = made_up(size, tensor->nnz), *shifts = exactly(size);
    PROMISE(shd_ulp_from_base_decode(section, tensor->values.decoded, base, element_size, tensor->nnz, shifts) <
            SHD_INVALID_ARGUMENT);
    free(base);
    free(shifts);
}

/* A section in exactly its bytes. */
static uint8_t *copy_of(const uint8_t *data, const shd_section *section) {
    uint8_t *copy = exactly(section->decoded);
    memcpy(copy, data + section->offset, section->decoded);
    return copy;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    shd_file file;
    if (shd_open(&file, data, size, NULL) != SHD_OK) {
        return 0;
    }
    for (uint32_t number = 0; number < file.tensor_count && number < 32; number++) {
        shd_tensor tensor;
        PROMISE(shd_tensor_at(&file, number, &tensor, NULL) == SHD_OK);
        const uint32_t element_size = shd_dtype_size(tensor.dtype);
        if (tensor.numel > FUZZ_MOST || tensor.index.zstd || tensor.values.zstd) {
            continue;
        }
        if (tensor.index_codec == SHD_INDEX_FROM_BASE) {
            uint8_t *section = copy_of(data, &tensor.index);
            decode_positions(section, &tensor, element_size);
            free(section);
        }
        if (tensor.value_codec == SHD_VALUES_ULP_FROM_BASE) {
            uint8_t *section = copy_of(data, &tensor.values);
            decode_shifts(section, &tensor, element_size);
            free(section);
        }
    }
    return 0;
}
