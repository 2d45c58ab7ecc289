/* Versions, error names, dtypes: the tables of REGISTRY.md. */
#include "internal.h"

const char *shd_version(void) { return SHD_VERSION; }

int shd_abi(void) { return SHD_ABI; }

const char *shd_error_name(int code) {
    static const char *const file[] = {
        "ok",
        "bad_magic",
        "truncated",
        "unsupported_version",
        "header_checksum",
        "unknown_feature",
        "reserved_not_zero",
        "trailing_data",
        "limit_exceeded",
        "section_layout",
        "section_checksum",
        "padding_not_zero",
        "bad_metadata",
        "name_layout",
        "bad_name",
        "duplicate_name",
        "name_order",
        "unknown_dtype",
        "unknown_op",
        "unknown_index_codec",
        "unknown_value_codec",
        "bad_shape",
        "bad_count",
        "bad_combination",
        "zstd_ratio",
        "bad_size",
        "zstd_unavailable",
        "bad_zstd",
        "bad_index",
        "position_order",
        "position_range",
        "bad_directory",
        "bad_value",
        "digest_mismatch",
    };
    static const char *const call[] = {
        "invalid_argument", "buffer_too_small", "misaligned",  "wrong_dtype", "wrong_shape",
        "wrong_operation",  "bad_strength",     "read_failed", "not_found",   "values_do_not_fit",
    };
    const int file_codes = (int)(sizeof file / sizeof file[0]);
    const int call_codes = (int)(sizeof call / sizeof call[0]);
    if (code >= 0 && code < file_codes) {
        return file[code];
    }
    if (code >= SHD_INVALID_ARGUMENT && code < SHD_INVALID_ARGUMENT + call_codes) {
        return call[code - SHD_INVALID_ARGUMENT];
    }
    return "unknown_error";
}

uint32_t shd_dtype_size(int dtype) {
    static const uint8_t size[] = {0, 4, 2, 2, 8, 1, 1, 1, 1, 1, 1, 2, 2, 4, 4, 8, 8, 1, 1, 8};
    return dtype >= 0 && dtype < (int)sizeof size ? size[dtype] : 0;
}

size_t shd_struct_size(int which) {
    switch (which) {
    case SHD_STRUCT_STATUS: return sizeof(shd_status);
    case SHD_STRUCT_FILE: return sizeof(shd_file);
    case SHD_STRUCT_TENSOR: return sizeof(shd_tensor);
    case SHD_STRUCT_DELTA: return sizeof(shd_delta);
    case SHD_STRUCT_WEIGHTS: return sizeof(shd_weights);
    case SHD_STRUCT_RICE: return sizeof(shd_rice);
    default: return 0;
    }
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
    /* Within a zstd frame an offset of the decoded bytes means nothing: the section's own stands for it. */
    uint64_t inside = section->zstd ? 0 : fault.offset;
    return shdi_fail(status, fault.code, tensor->number, fault.code == SHD_OK ? 0 : section->offset + inside);
}
