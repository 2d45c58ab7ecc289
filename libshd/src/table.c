/* The tensor table, in the order of its checks (FORMAT.md, section 3). */
#include "table.h"

#include "bytes.h"
#include "dtypes.h"
#include "index.h"
#include "operations.h"
#include "section.h"
#include "utf8.h"
#include "values.h"

/* Where a record's name and sections must start, and the name that comes before its own. */
typedef struct place {
    uint64_t name_offset;
    const char *last_name;
    uint32_t last_name_size;
    uint64_t section_offset;
} place;

/* Why a record is refused: the code, and the offset of the field in the record. */
typedef shdi_fault refusal;

SHDI_ONCE static refusal check_name(const shd_file *file, const uint8_t *record, const place *expected,
                                    shd_tensor *tensor) {
    uint64_t offset = shdi_load32(record + AT_NAME_OFFSET);
    tensor->name_size = shdi_load16(record + AT_NAME_SIZE);
    if (offset != expected->name_offset || offset > file->names_size ||
        tensor->name_size > file->names_size - offset) {
        return shdi_fault_at(SHD_NAME_LAYOUT, AT_NAME_OFFSET);
    }
    const uint8_t *name = file->data + file->names_offset + offset;
    tensor->name = (const char *)name;
    if (tensor->name_size == 0 || tensor->name_size > SHDI_MAX_NAME_SIZE ||
        !shdi_valid_utf8(name, tensor->name_size)) {
        return shdi_fault_at(SHD_BAD_NAME, AT_NAME_OFFSET);
    }
    for (uint32_t i = 0; i < tensor->name_size; i++) {
        if (name[i] < 0x20 || name[i] == 0x7F) {
            return shdi_fault_at(SHD_BAD_NAME, AT_NAME_OFFSET);
        }
    }
    if (expected->last_name != NULL) {
        uint32_t last_size = expected->last_name_size;
        uint32_t common = last_size < tensor->name_size ? last_size : tensor->name_size;
        int order = memcmp(expected->last_name, name, common);
        if (order == 0 && last_size == tensor->name_size) {
            return shdi_fault_at(SHD_DUPLICATE_NAME, AT_NAME_OFFSET);
        }
        if (order > 0 || (order == 0 && last_size > tensor->name_size)) {
            return shdi_fault_at(SHD_NAME_ORDER, AT_NAME_OFFSET);
        }
    }
    return shdi_ok();
}

SHDI_ONCE static refusal check_ids(const uint8_t *record, shd_tensor *tensor) {
    tensor->dtype = record[AT_DTYPE];
    tensor->op = record[AT_OP];
    tensor->index_codec = record[AT_INDEX_CODEC];
    tensor->value_codec = record[AT_VALUE_CODEC];
    tensor->flags = record[AT_FLAGS];
    const uint32_t known_flags =
        SHD_HAS_BASE_FINGERPRINT | SHD_HAS_RESULT_FINGERPRINT | SHD_INDEX_ZSTD | SHD_VALUES_ZSTD;
    if (shdi_load32(record + AT_RECORD_ZERO) != 0) {
        return shdi_fault_at(SHD_RESERVED_NOT_ZERO, AT_RECORD_ZERO);
    }
    if ((tensor->flags & ~known_flags) != 0) {
        return shdi_fault_at(SHD_RESERVED_NOT_ZERO, AT_FLAGS);
    }
    if (!shdi_dtype_is_known(tensor->dtype)) {
        return shdi_fault_at(SHD_UNKNOWN_DTYPE, AT_DTYPE);
    }
    if (shdi_operation_of(tensor->op) == NULL) {
        return shdi_fault_at(SHD_UNKNOWN_OP, AT_OP);
    }
    if (shdi_index_codec_of(tensor->index_codec) == NULL) {
        return shdi_fault_at(SHD_UNKNOWN_INDEX_CODEC, AT_INDEX_CODEC);
    }
    if (!shdi_value_codec_is_known(tensor->value_codec)) {
        return shdi_fault_at(SHD_UNKNOWN_VALUE_CODEC, AT_VALUE_CODEC);
    }
    return shdi_ok();
}

SHDI_ONCE static refusal check_shape(const uint8_t *record, shd_tensor *tensor) {
    tensor->rank = record[AT_RANK];
    if (tensor->rank > SHDI_MAX_RANK) {
        return shdi_fault_at(SHD_BAD_SHAPE, AT_RANK);
    }
    int empty = 0;
    for (uint32_t i = 0; i < SHDI_MAX_RANK; i++) {
        tensor->dims[i] = shdi_load64(record + AT_DIMS + 8 * i);
        if (i < tensor->rank ? tensor->dims[i] > SHDI_MAX_NUMEL : tensor->dims[i] != 0) {
            return shdi_fault_at(SHD_BAD_SHAPE, AT_DIMS + 8 * i);
        }
        empty |= i < tensor->rank && tensor->dims[i] == 0;
    }
    tensor->numel = empty ? 0 : 1;
    for (uint32_t i = 0; i < tensor->rank && !empty; i++) {
        if (tensor->numel > SHDI_MAX_NUMEL / tensor->dims[i]) {
            return shdi_fault_at(SHD_BAD_SHAPE, AT_DIMS);
        }
        tensor->numel *= tensor->dims[i];
    }
    return shdi_ok();
}

/* Section 3.1: operation, dtype, codecs, flags and count go together. */
SHDI_ONCE static int goes_together(const shd_tensor *tensor) {
    int no_nonzeros = tensor->nnz == 0;
    int no_values = tensor->value_codec == SHD_VALUES_NONE;
    if (no_nonzeros != (tensor->index_codec == SHD_INDEX_NONE) || no_nonzeros != no_values) {
        return 0;
    }
    if (tensor->index_codec == SHD_INDEX_ALL && tensor->nnz != tensor->numel) {
        return 0;
    }
    int is_unspecified = tensor->dtype == SHD_UNSPECIFIED;
    int are_elements = shdi_values_are_elements(tensor->value_codec);
    int are_shifts = shdi_values_are_shifts(tensor->value_codec);
    if ((tensor->index_codec == SHD_INDEX_FROM_BASE || shdi_values_need_base(tensor->value_codec)) &&
        shdi_dtype_order(tensor->dtype) != SHDI_SIGN_AND_MAGNITUDE) {
        return 0;
    }
    const shdi_operation *operation = shdi_operation_of(tensor->op);
    if (operation == NULL) {
        return 0; /* check_ids() has refused it as SHD_UNKNOWN_OP */
    }
    if (operation->adds &&
        (!(is_unspecified || shdi_dtype_is_addable(tensor->dtype)) || are_elements || are_shifts)) {
        return 0;
    }
    if (operation->shifts) {
        return shdi_dtype_order(tensor->dtype) != SHDI_NO_ORDER && (no_values || are_shifts);
    }
    if (!shdi_is_in_result(operation) && !no_nonzeros) {
        return 0;
    }
    if (!operation->adds && shdi_is_in_result(operation) && (is_unspecified || !(no_values || are_elements))) {
        return 0;
    }
    if (operation->creates &&
        (tensor->nnz != tensor->numel || (tensor->numel != 0 && tensor->index_codec != SHD_INDEX_ALL))) {
        return 0;
    }
    uint32_t fingerprints = tensor->flags & (SHD_HAS_BASE_FINGERPRINT | SHD_HAS_RESULT_FINGERPRINT);
    return !((is_unspecified && fingerprints != 0) ||
             (!shdi_is_in_base(operation) && (fingerprints & SHD_HAS_BASE_FINGERPRINT) != 0) ||
             (!shdi_is_in_result(operation) && (fingerprints & SHD_HAS_RESULT_FINGERPRINT) != 0));
}

SHDI_ONCE static refusal check_fingerprints(const uint8_t *record, shd_tensor *tensor) {
    tensor->base_fingerprint = shdi_load64(record + AT_BASE_FINGERPRINT);
    tensor->result_fingerprint = shdi_load64(record + AT_RESULT_FINGERPRINT);
    if ((tensor->flags & SHD_HAS_BASE_FINGERPRINT) == 0 && tensor->base_fingerprint != 0) {
        return shdi_fault_at(SHD_RESERVED_NOT_ZERO, AT_BASE_FINGERPRINT);
    }
    if ((tensor->flags & SHD_HAS_RESULT_FINGERPRINT) == 0 && tensor->result_fingerprint != 0) {
        return shdi_fault_at(SHD_RESERVED_NOT_ZERO, AT_RESULT_FINGERPRINT);
    }
    return shdi_ok();
}

SHDI_ONCE static void take_section(const uint8_t *record, uint32_t at, uint32_t at_crc, uint32_t zstd,
                                   shd_section *section) {
    section->offset = shdi_load64(record + at);
    section->stored = shdi_load64(record + at + 8);
    section->decoded = shdi_load64(record + at + 16);
    section->crc = shdi_load32(record + at_crc);
    section->zstd = zstd != 0;
}

/* Makes check 10 up to the decoded size. */
SHDI_ONCE static int check_section(const shd_file *file, const shd_section *section, uint64_t expected_offset) {
    if (section->offset != expected_offset || section->offset > file->size ||
        section->stored > file->size - section->offset ||
        shdi_align64(section->offset + section->stored) > file->size) {
        return SHD_SECTION_LAYOUT;
    }
    if (!section->zstd && section->decoded != section->stored) {
        return SHD_SECTION_LAYOUT;
    }
    int has_zstd = (file->incompatible & SHDI_FEATURE_ZSTD) != 0;
    if (section->zstd && (!has_zstd || section->stored == 0 || section->decoded == 0)) {
        return SHD_BAD_COMBINATION;
    }
    if (section->stored == 0 && section->crc != 0) {
        return SHD_SECTION_CHECKSUM;
    }
    if (section->zstd && shdi_ceil_div(section->decoded, SHDI_MAX_ZSTD_RATIO) > section->stored) {
        return SHD_ZSTD_RATIO;
    }
    return SHD_OK;
}

SHDI_ONCE static int sizes_are_possible(const shd_tensor *tensor, int values) {
    if (values) {
        return shdi_values_size_is_possible(tensor, tensor->values.decoded);
    }
    const shdi_index_codec *codec = shdi_index_codec_of(tensor->index_codec);
    return codec != NULL && codec->size_is_possible(tensor, tensor->index.decoded);
}

/* Makes checks 1 to 9. */
SHDI_ONCE static refusal check_fields(const shd_file *file, const uint8_t *record, const place *expected,
                                      shd_tensor *tensor) {
    refusal why = check_name(file, record, expected, tensor);
    if (why.code == SHD_OK) {
        why = check_ids(record, tensor);
    }
    if (why.code == SHD_OK) {
        why = check_shape(record, tensor);
    }
    if (why.code != SHD_OK) {
        return why;
    }
    tensor->nnz = shdi_load64(record + AT_NNZ);
    if (tensor->nnz > tensor->numel) {
        return shdi_fault_at(SHD_BAD_COUNT, AT_NNZ);
    }
    if (!goes_together(tensor)) {
        return shdi_fault_at(SHD_BAD_COMBINATION, AT_OP);
    }
    return check_fingerprints(record, tensor);
}

/* Reads and checks one record. `expected` moves on to the next. */
SHDI_ONCE static int check_record(const shd_file *file, uint32_t number, place *expected, shd_tensor *tensor,
                                  shd_status *status) {
    uint64_t record_offset = SHDI_HEADER_SIZE + (uint64_t)number * SHDI_RECORD_SIZE;
    uint8_t record[SHDI_RECORD_SIZE]; /* a copy, so that it stays as it was checked */
    memcpy(record, file->data + record_offset, sizeof record);
    memset(tensor, 0, sizeof *tensor);
    tensor->number = number;
    refusal why = check_fields(file, record, expected, tensor);
    if (why.code != SHD_OK) {
        return shdi_fail(status, why.code, number, record_offset + why.offset);
    }
    take_section(record, AT_INDEX, AT_INDEX_CRC, tensor->flags & SHD_INDEX_ZSTD, &tensor->index);
    take_section(record, AT_VALUES, AT_VALUES_CRC, tensor->flags & SHD_VALUES_ZSTD, &tensor->values);
    for (int values = 0; values < 2; values++) {
        const shd_section *section = values ? &tensor->values : &tensor->index;
        int code = check_section(file, section, expected->section_offset);
        if (code == SHD_OK && !sizes_are_possible(tensor, values)) {
            code = SHD_BAD_SIZE;
        }
        if (code != SHD_OK) {
            return shdi_fail(status, code, number, record_offset + (values ? AT_VALUES : AT_INDEX));
        }
        code = shdi_check_padding(file, section->offset + section->stored, number, status);
        if (code != SHD_OK) {
            return code;
        }
        expected->section_offset = shdi_align64(section->offset + section->stored);
    }
    expected->name_offset += tensor->name_size;
    expected->last_name = tensor->name;
    expected->last_name_size = tensor->name_size;
    return SHD_OK;
}

SHDI_ONCE int shdi_check_table(const shd_file *file, uint64_t sections_offset, shd_status *status) {
    place expected = {0, NULL, 0, sections_offset};
    for (uint32_t number = 0; number < file->tensor_count; number++) {
        shd_tensor tensor;
        int code = check_record(file, number, &expected, &tensor, status);
        if (code != SHD_OK) {
            return code;
        }
    }
    if (expected.name_offset != file->names_size) {
        return shdi_fail(status, SHD_NAME_LAYOUT, SHD_NO_TENSOR, file->names_offset + expected.name_offset);
    }
    if (expected.section_offset != file->size) {
        return shdi_fail(status, SHD_SECTION_LAYOUT, SHD_NO_TENSOR, expected.section_offset);
    }
    return SHD_OK;
}

SHDI_ONCE int shd_tensor_at(const shd_file *file, uint32_t number, shd_tensor *tensor, shd_status *status) {
    if (file == NULL || tensor == NULL || number >= file->tensor_count) {
        return shdi_fail(status, SHD_INVALID_ARGUMENT, SHD_NO_TENSOR, 0);
    }
    /* The file may have changed, so all checks are made again, but for the record's place among the others. */
    const uint8_t *record = file->data + SHDI_HEADER_SIZE + (uint64_t)number * SHDI_RECORD_SIZE;
    place own = {shdi_load32(record + AT_NAME_OFFSET), NULL, 0, shdi_load64(record + AT_INDEX)};
    int code = check_record(file, number, &own, tensor, status);
    return code != SHD_OK ? code : shdi_fail(status, SHD_OK, number, 0);
}

SHDI_ONCE int shd_find(const shd_file *file, const char *name, size_t name_size, uint32_t *number) {
    if (file == NULL || name == NULL || number == NULL) {
        return SHD_INVALID_ARGUMENT;
    }
    uint32_t low = 0, high = file->tensor_count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const uint8_t *record = file->data + SHDI_HEADER_SIZE + (uint64_t)middle * SHDI_RECORD_SIZE;
        uint64_t offset = shdi_load32(record + AT_NAME_OFFSET);
        uint64_t size = shdi_load16(record + AT_NAME_SIZE);
        if (offset > file->names_size || size > file->names_size - offset) {
            return SHD_NAME_LAYOUT; /* the file has changed */
        }
        int order = memcmp(file->data + file->names_offset + offset, name, (size_t)shdi_min(size, name_size));
        if (order == 0 && size == name_size) {
            *number = middle;
            return SHD_OK;
        }
        if (order < 0 || (order == 0 && size < name_size)) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return SHD_NOT_FOUND;
}
