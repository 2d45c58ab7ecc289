/* The content digest, and the full check of a file (FORMAT.md, section 7). */
#include "bytes.h"
#include "floats.h"
#include "index.h"
#include "sha256.h"
#include "values.h"
#include "values_ulp.h"

static void add_integer(shdi_sha256 *hash, uint64_t value, size_t size) {
    uint8_t bytes[8];
    shdi_store64(bytes, value);
    shdi_sha256_add(hash, bytes, size);
}

static shdi_fault add_positions(shdi_sha256 *hash, const shd_delta *delta) {
    shdi_cursor cursor;
    shdi_piece piece;
    shdi_fault fault = shdi_cursor_open(&cursor, delta, 0, delta->block_count);
    while (fault.code == SHD_OK) {
        fault = shdi_cursor_next(&cursor, &piece);
        if (fault.code != SHD_OK || piece.count == 0) {
            break;
        }
        for (uint32_t i = 0; i < piece.count; i++) {
            add_integer(hash, piece.base + piece.offset[i], 8);
        }
    }
    return fault;
}

static shdi_fault add_shifts(shdi_sha256 *hash, const shd_delta *delta) {
    const uint64_t nnz = delta->tensor.nnz;
    shdi_ulp ulp;
    shdi_fault fault = shdi_ulp_open(&ulp, delta);
    for (uint64_t rank = 0; rank < nnz && fault.code == SHD_OK; rank += SHDI_GROUP) {
        uint8_t shifts[SHDI_GROUP * 8];
        uint64_t count = shdi_min(nnz - rank, SHDI_GROUP);
        fault = shdi_ulp_read(&ulp, rank, count, shifts);
        shdi_sha256_add(hash, shifts, (size_t)count * ulp.size);
    }
    return fault;
}

static shdi_fault add_values(shdi_sha256 *hash, const shd_delta *delta) {
    const shd_tensor *tensor = &delta->tensor;
    if (shdi_values_are_elements(tensor->value_codec)) {
        shdi_sha256_add(hash, delta->values, (size_t)(tensor->nnz * shd_dtype_size(tensor->dtype)));
        return shdi_ok();
    }
    if (shdi_values_are_shifts(tensor->value_codec)) {
        return add_shifts(hash, delta);
    }
    for (uint64_t rank = 0; rank < tensor->nnz;) {
        float values[SHDI_GROUP];
        uint64_t count = shdi_min(tensor->nnz - rank, SHDI_GROUP);
        shdi_fault fault = shdi_values_decode(delta, rank, count, values);
        if (fault.code != SHD_OK) {
            return fault;
        }
        shdi_sha256_add(hash, values, (size_t)count * sizeof values[0]);
        rank += count;
    }
    return shdi_ok();
}

SHDI_ONCE static int digest_tensor(const shd_delta *delta, uint8_t digest[32], shd_status *status) {
    const shd_tensor *tensor = &delta->tensor;
    shdi_sha256 hash;
    shdi_sha256_start(&hash);
    add_integer(&hash, tensor->op, 1);
    add_integer(&hash, tensor->dtype, 1);
    add_integer(&hash, tensor->rank, 1);
    for (uint32_t i = 0; i < tensor->rank; i++) {
        add_integer(&hash, tensor->dims[i], 8);
    }
    add_integer(&hash, tensor->nnz, 8);
    shdi_fault fault = add_positions(&hash, delta);
    if (fault.code != SHD_OK) {
        return shdi_fail_in(status, fault, tensor, &tensor->index);
    }
    fault = add_values(&hash, delta);
    if (fault.code != SHD_OK) {
        return shdi_fail_in(status, fault, tensor, &tensor->values);
    }
    shdi_sha256_end(&hash, digest);
    return SHD_OK;
}

SHDI_ONCE static int digest_file(const shd_file *file, void *scratch, uint64_t scratch_size, uint8_t digest[32],
                                 shd_status *status) {
    shdi_sha256 hash;
    shdi_sha256_start(&hash);
    shdi_sha256_add(&hash, "shiradelta 1", 12);
    add_integer(&hash, file->tensor_count, 4);
    for (uint32_t number = 0; number < file->tensor_count; number++) {
        shd_delta delta;
        uint8_t of_tensor[32];
        int code = shd_load(file, number, SHD_CHECK_ALL, scratch, scratch_size, &delta, status);
        if (code == SHD_OK) {
            code = digest_tensor(&delta, of_tensor, status);
        }
        if (code != SHD_OK) {
            return code;
        }
        add_integer(&hash, delta.tensor.name_size, 2);
        shdi_sha256_add(&hash, delta.tensor.name, delta.tensor.name_size);
        shdi_sha256_add(&hash, of_tensor, sizeof of_tensor);
    }
    shdi_sha256_end(&hash, digest);
    return SHD_OK;
}

SHDI_ONCE int shd_verify(const shd_file *file, void *scratch, uint64_t scratch_size, shd_status *status) {
    uint8_t digest[32];
    if (file == NULL) {
        return shdi_fail(status, SHD_INVALID_ARGUMENT, SHD_NO_TENSOR, 0);
    }
    shdi_float_environment environment = shdi_float_enter();
    int code = digest_file(file, scratch, scratch_size, digest, status);
    shdi_float_leave(environment);
    if (code != SHD_OK) {
        return code;
    }
    code = memcmp(digest, file->digest, sizeof digest) == 0 ? SHD_OK : SHD_DIGEST_MISMATCH;
    return shdi_fail(status, code, SHD_NO_TENSOR, code == SHD_OK ? 0 : 80);
}
