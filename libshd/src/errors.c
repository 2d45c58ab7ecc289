/* Names of errors, and how an error reaches the caller. */
#include "errors.h"

const char *shd_error_name(int code) {
    static const char *const names[] = {
        [SHD_OK] = "ok",
        [SHD_BAD_MAGIC] = "bad_magic",
        [SHD_TRUNCATED] = "truncated",
        [SHD_UNSUPPORTED_VERSION] = "unsupported_version",
        [SHD_HEADER_CHECKSUM] = "header_checksum",
        [SHD_UNKNOWN_FEATURE] = "unknown_feature",
        [SHD_RESERVED_NOT_ZERO] = "reserved_not_zero",
        [SHD_TRAILING_DATA] = "trailing_data",
        [SHD_LIMIT_EXCEEDED] = "limit_exceeded",
        [SHD_SECTION_LAYOUT] = "section_layout",
        [SHD_SECTION_CHECKSUM] = "section_checksum",
        [SHD_PADDING_NOT_ZERO] = "padding_not_zero",
        [SHD_BAD_METADATA] = "bad_metadata",
        [SHD_NAME_LAYOUT] = "name_layout",
        [SHD_BAD_NAME] = "bad_name",
        [SHD_DUPLICATE_NAME] = "duplicate_name",
        [SHD_NAME_ORDER] = "name_order",
        [SHD_UNKNOWN_DTYPE] = "unknown_dtype",
        [SHD_UNKNOWN_OP] = "unknown_op",
        [SHD_UNKNOWN_INDEX_CODEC] = "unknown_index_codec",
        [SHD_UNKNOWN_VALUE_CODEC] = "unknown_value_codec",
        [SHD_BAD_SHAPE] = "bad_shape",
        [SHD_BAD_COUNT] = "bad_count",
        [SHD_BAD_COMBINATION] = "bad_combination",
        [SHD_ZSTD_RATIO] = "zstd_ratio",
        [SHD_BAD_SIZE] = "bad_size",
        [SHD_ZSTD_UNAVAILABLE] = "zstd_unavailable",
        [SHD_BAD_ZSTD] = "bad_zstd",
        [SHD_BAD_INDEX] = "bad_index",
        [SHD_POSITION_ORDER] = "position_order",
        [SHD_POSITION_RANGE] = "position_range",
        [SHD_BAD_DIRECTORY] = "bad_directory",
        [SHD_BAD_VALUE] = "bad_value",
        [SHD_DIGEST_MISMATCH] = "digest_mismatch",
        [SHD_BASE_NEEDED] = "base_needed",
        [SHD_WRONG_BASE] = "wrong_base",

        [SHD_INVALID_ARGUMENT] = "invalid_argument",
        [SHD_BUFFER_TOO_SMALL] = "buffer_too_small",
        [SHD_MISALIGNED] = "misaligned",
        [SHD_WRONG_DTYPE] = "wrong_dtype",
        [SHD_WRONG_SHAPE] = "wrong_shape",
        [SHD_WRONG_OPERATION] = "wrong_operation",
        [SHD_BAD_STRENGTH] = "bad_strength",
        [SHD_READ_FAILED] = "read_failed",
        [SHD_NOT_FOUND] = "not_found",
        [SHD_VALUES_DO_NOT_FIT] = "values_do_not_fit",
        [SHD_OUT_OF_RANGE] = "out_of_range",
    };
    const int known = code >= 0 && code < (int)(sizeof names / sizeof names[0]) && names[code] != NULL;
    return known ? names[code] : "unknown_error";
}

int shdi_fail(shd_status *status, int code, uint32_t tensor, uint64_t offset) {
    if (status != NULL) {
        status->code = code;
        status->tensor = tensor;
        status->offset = offset;
    }
    return code;
}

int shdi_fail_in(shd_status *status, shdi_fault fault, const shd_tensor *tensor, const shd_section *section) {
    /* An offset in the decoded bytes of a zstd frame means nothing in the file. The section's own stands for it. */
    uint64_t inside = section->zstd ? 0 : fault.offset;
    return shdi_fail(status, fault.code, tensor->number, fault.code == SHD_OK ? 0 : section->offset + inside);
}
