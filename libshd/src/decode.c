/* Decoding positions and values into the caller's buffers. */
#include "floats.h"
#include "index.h"
#include "values.h"
#include "values_ulp.h"

/* ---- Positions ---- */

int shd_positions(const shd_delta *delta, uint64_t first_block, uint64_t last_block, int64_t *positions,
                  uint64_t capacity, uint64_t *count, shd_status *status) {
    if (delta == NULL || count == NULL || (positions == NULL && capacity != 0) || first_block > last_block ||
        last_block > delta->block_count) {
        return shdi_fail(status, SHD_INVALID_ARGUMENT, SHD_NO_TENSOR, 0);
    }
    const shdi_kernels *kernels = shdi_kernels_of(delta);
    uint64_t written = 0;
    shdi_cursor cursor;
    shdi_piece piece;
    shdi_fault fault = shdi_cursor_open(&cursor, delta, first_block, last_block);
    while (fault.code == SHD_OK) {
        fault = shdi_cursor_next(&cursor, &piece);
        if (fault.code != SHD_OK || piece.count == 0) {
            break;
        }
        if (piece.count > capacity - written) {
            return shdi_fail(status, SHD_BUFFER_TOO_SMALL, delta->tensor.number, 0);
        }
        kernels->widen(piece.offset, piece.count, piece.base, positions + written);
        written += piece.count;
    }
    *count = written;
    return shdi_fail_in(status, fault, &delta->tensor, &delta->tensor.index);
}

int shd_positions_between(const shd_delta *delta, uint64_t first_position, uint64_t end_position, int64_t *positions,
                          uint64_t capacity, uint64_t *first_rank, uint64_t *count, shd_status *status) {
    uint64_t first_block, last_block;
    if (count == NULL || first_rank == NULL ||
        shd_find_blocks(delta, first_position, end_position, &first_block, &last_block) != SHD_OK) {
        return shdi_fail(status, SHD_INVALID_ARGUMENT, SHD_NO_TENSOR, 0);
    }
    uint64_t found = 0, rank = shd_block_rank(delta, first_block);
    shdi_cursor cursor;
    shdi_piece piece;
    shdi_fault fault = shdi_cursor_open(&cursor, delta, first_block, last_block);
    while (fault.code == SHD_OK) {
        fault = shdi_cursor_next(&cursor, &piece);
        if (fault.code != SHD_OK || piece.count == 0) {
            break;
        }
        for (uint32_t i = 0; i < piece.count; i++) {
            uint64_t position = piece.base + piece.offset[i];
            if (position < first_position) {
                rank = piece.rank + i + 1;
            } else if (position < end_position) {
                if (positions != NULL && found >= capacity) {
                    return shdi_fail(status, SHD_BUFFER_TOO_SMALL, delta->tensor.number, 0);
                }
                if (positions != NULL) {
                    positions[found] = (int64_t)position;
                }
                found++;
            }
        }
    }
    /* A block's entry may hold any rank. If nothing is found, no piece was compared with it. */
    if (fault.code == SHD_OK && (rank > delta->tensor.nnz || found > delta->tensor.nnz - rank)) {
        fault = shdi_fault_at(SHD_BAD_DIRECTORY, 0);
    }
    *first_rank = rank;
    *count = found;
    return shdi_fail_in(status, fault, &delta->tensor, &delta->tensor.index);
}

/* ---- Values ---- */

static int ranks_exist(const shd_delta *delta, uint64_t first_rank, uint64_t count) {
    return first_rank <= delta->tensor.nnz && count <= delta->tensor.nnz - first_rank;
}

int shd_values(const shd_delta *delta, uint64_t first_rank, uint64_t count, float *values, shd_status *status) {
    if (delta == NULL || (values == NULL && count != 0) || !ranks_exist(delta, first_rank, count)) {
        return shdi_fail(status, SHD_INVALID_ARGUMENT, SHD_NO_TENSOR, 0);
    }
    if (shdi_values_are_elements(delta->tensor.value_codec) || shdi_values_are_shifts(delta->tensor.value_codec)) {
        return shdi_fail(status, SHD_WRONG_OPERATION, delta->tensor.number, 0);
    }
    shdi_float_environment environment = shdi_float_enter();
    shdi_fault fault = shdi_values_decode(delta, first_rank, count, values);
    shdi_float_leave(environment);
    return shdi_fail_in(status, fault, &delta->tensor, &delta->tensor.values);
}

int shd_elements(const shd_delta *delta, uint64_t first_rank, uint64_t count, void *elements, shd_status *status) {
    if (delta == NULL || (elements == NULL && count != 0) || !ranks_exist(delta, first_rank, count)) {
        return shdi_fail(status, SHD_INVALID_ARGUMENT, SHD_NO_TENSOR, 0);
    }
    if (shdi_values_are_shifts(delta->tensor.value_codec)) {
        shdi_ulp ulp;
        shdi_fault fault = shdi_ulp_open(&ulp, delta);
        if (fault.code == SHD_OK) {
            fault = shdi_ulp_read(&ulp, first_rank, count, elements);
        }
        return shdi_fail_in(status, fault, &delta->tensor, &delta->tensor.values);
    }
    if (!shdi_values_are_elements(delta->tensor.value_codec) && delta->tensor.value_codec != SHD_VALUES_NONE) {
        return shdi_fail(status, SHD_WRONG_OPERATION, delta->tensor.number, 0);
    }
    uint32_t size = shd_dtype_size(delta->tensor.dtype);
    if (count != 0) {
        memcpy(elements, delta->values + first_rank * size, (size_t)(count * size));
    }
    return shdi_fail(status, SHD_OK, delta->tensor.number, 0);
}
