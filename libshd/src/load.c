/* Loading a tensor: brings its sections to memory, checks them, and makes it ready. */
#include "recode.h"
#include "section.h"
#include "values.h"

/* What a section needs of the scratch buffer: room for the decoded bytes, and then for the stored ones. */
static uint64_t decoded_room(const shd_file *file, const shd_section *section) {
    return file->read != NULL || section->zstd ? shdi_align64(section->decoded) : 0;
}

static uint64_t stored_room(const shd_file *file, const shd_section *section) {
    return file->read != NULL && section->zstd ? section->stored : 0;
}

SHDI_ONCE uint64_t shd_scratch_size(const shd_file *file, const shd_tensor *tensor) {
    uint64_t index = stored_room(file, &tensor->index), values = stored_room(file, &tensor->values);
    return decoded_room(file, &tensor->index) + decoded_room(file, &tensor->values) +
           (index > values ? index : values) + shdi_recode_room(tensor);
}

SHDI_ONCE uint64_t shd_decoded_size(const shd_tensor *tensor) {
    int in_elements = shdi_values_are_elements(tensor->value_codec) || shdi_values_are_shifts(tensor->value_codec);
    uint64_t value = in_elements ? shd_dtype_size(tensor->dtype) : sizeof(float);
    return tensor->nnz * (sizeof(int64_t) + value); /* nnz is at most 2^56 */
}

/* Brings a section to memory. *bytes become its bytes after zstd. */
SHDI_ONCE static int load_section(const shd_file *file, const shd_section *section, int check, uint8_t *decoded,
                                  uint8_t *stored, const uint8_t **bytes) {
    if (section->stored == 0) {
        return SHD_OK;
    }
    const uint8_t *source = shdi_view(file, section->offset, section->stored, section->zstd ? stored : decoded);
    if (source == NULL) {
        return SHD_READ_FAILED;
    }
    if (check >= SHD_CHECK_CRC && shd_crc32(0, source, (size_t)section->stored) != section->crc) {
        return SHD_SECTION_CHECKSUM;
    }
    *bytes = source;
    if (!section->zstd) {
        return SHD_OK;
    }
    if (file->zstd == NULL) {
        return SHD_ZSTD_UNAVAILABLE;
    }
    *bytes = decoded;
    return file->zstd(file->zstd_context, source, (size_t)section->stored, decoded, (size_t)section->decoded) == 0
               ? SHD_OK
               : SHD_BAD_ZSTD;
}

SHDI_ONCE static int load_index(const shd_file *file, int check, uint8_t *decoded, uint8_t *stored, uint8_t *room,
                                shd_delta *delta, shd_status *status) {
    const shd_tensor *tensor = &delta->tensor;
    shdi_fault fault = {load_section(file, &tensor->index, check, decoded, stored, &delta->index), 0};
    if (fault.code == SHD_OK) {
        fault = shdi_recode(delta, check >= SHD_CHECK_ALL, room);
    }
    return fault.code == SHD_OK ? SHD_OK : shdi_fail_in(status, fault, tensor, &tensor->index);
}

SHDI_ONCE static int load_values(const shd_file *file, int check, uint8_t *decoded, uint8_t *stored, shd_delta *delta,
                                 shd_status *status) {
    const shd_tensor *tensor = &delta->tensor;
    shdi_fault fault = {load_section(file, &tensor->values, check, decoded, stored, &delta->values), 0};
    if (fault.code == SHD_OK && shdi_values_need_base(tensor->value_codec)) {
        fault.code = SHD_BASE_NEEDED;
    }
    if (fault.code == SHD_OK && check >= SHD_CHECK_ALL) {
        fault = shdi_values_check(delta);
    }
    return fault.code == SHD_OK ? SHD_OK : shdi_fail_in(status, fault, tensor, &tensor->values);
}

SHDI_ONCE int shd_load(const shd_file *file, uint32_t number, int check, void *scratch, uint64_t scratch_size,
                       shd_delta *delta, shd_status *status) {
    int level = check & ~SHD_SCALAR;
    if (file == NULL || delta == NULL || level < SHD_CHECK_SIZES || level > SHD_CHECK_ALL) {
        return shdi_fail(status, SHD_INVALID_ARGUMENT, SHD_NO_TENSOR, 0);
    }
    memset(delta, 0, sizeof *delta);
    int code = shd_tensor_at(file, number, &delta->tensor, status);
    if (code != SHD_OK) {
        return code;
    }
    delta->scalar = (check & SHD_SCALAR) != 0;
    uint64_t needed = shd_scratch_size(file, &delta->tensor);
    if (needed > scratch_size || needed > (uint64_t)PTRDIFF_MAX || (needed != 0 && scratch == NULL)) {
        return shdi_fail(status, SHD_BUFFER_TOO_SMALL, number, 0);
    }
    uint8_t nothing[1]; /* something to point to if no byte is needed */
    uint8_t *index = needed != 0 ? scratch : nothing;
    uint8_t *values = index + decoded_room(file, &delta->tensor.index);
    uint8_t *stored = values + decoded_room(file, &delta->tensor.values);
    uint8_t *recoded = index + needed - shdi_recode_room(&delta->tensor);
    code = load_index(file, level, index, stored, recoded, delta, status);
    if (code == SHD_OK) {
        code = load_values(file, level, values, stored, delta, status);
    }
    if (code != SHD_OK) {
        memset(delta, 0, sizeof *delta); /* no blocks and no nonzeros, so callers may go on */
        return code;
    }
    return shdi_fail(status, SHD_OK, number, 0);
}

SHDI_ONCE int shd_check(const shd_file *file, const uint32_t *numbers, uint32_t count, shd_status *status) {
    if (file == NULL || (numbers == NULL && count != 0)) {
        return shdi_fail(status, SHD_INVALID_ARGUMENT, SHD_NO_TENSOR, 0);
    }
    for (uint32_t i = 0; i < count; i++) {
        shd_delta delta;
        int code = shd_load(file, numbers[i], SHD_CHECK_ALL, NULL, 0, &delta, status);
        if (code != SHD_OK) {
            return code;
        }
    }
    return shdi_fail(status, SHD_OK, SHD_NO_TENSOR, 0);
}
