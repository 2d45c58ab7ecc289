/* Decoding: whole and in parts, with SIMD and without, through memory and through a callback, the results are the
 * same; what passes the full check holds to it. */
#include "fuzz.h"

static int read_bytes(void *context, uint64_t offset, void *buffer, size_t size) {
    memcpy(buffer, (const uint8_t *)context + offset, size);
    return 0;
}

/* Room for `nnz` positions, and no more. */
static uint64_t decode_positions(const shd_delta *delta, int64_t *positions, int *code) {
    uint64_t count = 0;
    *code = shd_positions(delta, 0, delta->block_count, positions, delta->tensor.nnz, &count, NULL);
    return count;
}

static void check_order(const shd_delta *delta, const int64_t *positions) {
    for (uint64_t i = 0; i < delta->tensor.nnz; i++) {
        PROMISE(positions[i] > (i == 0 ? -1 : positions[i - 1]));
        PROMISE((uint64_t)positions[i] < delta->tensor.numel);
    }
}

static void check_blocks(const shd_delta *delta, const int64_t *positions) {
    uint64_t rank = 0;
    int64_t *part = exactly(delta->tensor.nnz * sizeof *part);
    for (uint64_t block = 0; block < delta->block_count; block++) {
        uint64_t end = shd_block_rank(delta, block + 1), count;
        PROMISE(shd_block_rank(delta, block) == rank && end >= rank && end <= delta->tensor.nnz);
        PROMISE(shd_positions(delta, block, block + 1, part, end - rank, &count, NULL) == SHD_OK);
        PROMISE(count == end - rank && memcmp(part, positions + rank, count * sizeof *part) == 0);
        rank = end;
    }
    PROMISE(rank == delta->tensor.nnz);
    free(part);
}

/* A range of positions; without the full check it may hold anything, but there is room for nnz positions only. */
static void check_between(const shd_delta *delta, const int64_t *positions, uint64_t start, uint64_t end) {
    const uint64_t nnz = delta->tensor.nnz;
    uint64_t rank = 0, count = 0;
    int64_t *part = exactly(nnz * sizeof *part);
    int code = shd_positions_between(delta, start, end, part, nnz, &rank, &count, NULL);
    PROMISE(code != SHD_OK || (rank <= nnz && count <= nnz - rank));
    if (positions != NULL) {
        uint64_t first = 0, last = 0;
        while (first < nnz && (uint64_t)positions[first] < start) first++;
        for (last = first; last < nnz && (uint64_t)positions[last] < end; last++) {
        }
        PROMISE(code == SHD_OK && count == last - first && (count == 0 || rank == first));
        PROMISE(count == 0 || memcmp(part, positions + first, count * sizeof *part) == 0);
    }
    free(part);
}

static void check_values(const shd_delta *delta, const shd_delta *scalar, int is_checked) {
    const uint64_t nnz = delta->tensor.nnz, third = nnz / 3;
    if (delta->tensor.op != SHD_OP_ADD) {
        uint64_t size = nnz * shd_dtype_size(delta->tensor.dtype);
        void *elements = exactly(size);
        int code = shd_elements(delta, 0, nnz, elements, NULL);
        PROMISE(code == SHD_OK || (delta->tensor.op == SHD_OP_ULP && !is_checked));
        if (code == SHD_OK && delta->tensor.op == SHD_OP_ULP) { /* in parts, from within a block */
            uint64_t rest = (nnz - third) * shd_dtype_size(delta->tensor.dtype);
            uint8_t *part = exactly(rest);
            PROMISE(shd_elements(delta, third, nnz - third, part, NULL) == SHD_OK);
            PROMISE(rest == 0 || memcmp(part, (uint8_t *)elements + size - rest, rest) == 0);
            free(part);
        }
        free(elements);
        return;
    }
    float *values = exactly(nnz * sizeof *values), *other = exactly(nnz * sizeof *values);
    int code = shd_values(delta, 0, nnz, values, NULL);
    PROMISE(shd_values(scalar, 0, nnz, other, NULL) == code && (!is_checked || code == SHD_OK));
    if (code == SHD_OK) {
        PROMISE(memcmp(values, other, nnz * sizeof *values) == 0);
        PROMISE(shd_values(delta, third, nnz - third, other, NULL) == SHD_OK);
        PROMISE(memcmp(values + third, other, (nnz - third) * sizeof *values) == 0);
    }
    free(values);
    free(other);
}

static void decode(const shd_delta *delta, const shd_delta *scalar, int is_checked) {
    const uint64_t nnz = delta->tensor.nnz, numel = delta->tensor.numel;
    int code, other_code;
    int64_t *positions = exactly(nnz * sizeof *positions), *other = exactly(nnz * sizeof *positions);
    uint64_t count = decode_positions(delta, positions, &code);
    PROMISE(decode_positions(scalar, other, &other_code) == count && code == other_code);
    if (code == SHD_OK) {
        PROMISE(memcmp(positions, other, count * sizeof *positions) == 0);
    }
    if (is_checked) {
        PROMISE(code == SHD_OK && count == nnz);
        check_order(delta, positions);
        check_blocks(delta, positions);
    }
    check_between(delta, is_checked ? positions : NULL, numel / 3, numel - numel / 3);
    check_between(delta, is_checked ? positions : NULL, 0, numel);
    check_values(delta, scalar, is_checked);
    free(positions);
    free(other);
}

static void load_and_decode(const shd_file *file, const shd_file *through_callback, uint32_t number, int check) {
    loaded simd = load(file, number, check), scalar = load(file, number, check | SHD_SCALAR);
    loaded other = load(through_callback, number, check);
    if (simd.code != SHD_BUFFER_TOO_SMALL && other.code != SHD_BUFFER_TOO_SMALL) { /* load()'s own limit */
        PROMISE(simd.code == scalar.code && memcmp(&simd.status, &scalar.status, sizeof simd.status) == 0);
        PROMISE(simd.code == other.code && memcmp(&simd.status, &other.status, sizeof simd.status) == 0);
    }
    if (simd.code == SHD_OK && simd.delta.tensor.nnz <= FUZZ_MOST) {
        decode(&simd.delta, &scalar.delta, check == SHD_CHECK_ALL);
    }
    if (other.code == SHD_OK && other.delta.tensor.nnz <= FUZZ_MOST) {
        decode(&other.delta, &other.delta, check == SHD_CHECK_ALL);
    }
    free(simd.scratch);
    free(scalar.scratch);
    free(other.scratch);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    shd_file file, through_callback;
    if (shd_open(&file, data, size, NULL) != SHD_OK) {
        return 0;
    }
    void *front = exactly(file.front_size);
    PROMISE(shd_open_callback(&through_callback, read_bytes, (void *)(uintptr_t)data, size, front, file.front_size,
                              NULL) == SHD_OK);
    shd_set_zstd(&file, fake_zstd, NULL);
    shd_set_zstd(&through_callback, fake_zstd, NULL);
    for (uint32_t number = 0; number < file.tensor_count && number < 32; number++) {
        load_and_decode(&file, &through_callback, number, SHD_CHECK_ALL);
        load_and_decode(&file, &through_callback, number, SHD_CHECK_SIZES);
    }
    (void)shd_verify(&file, NULL, 0, NULL);
    free(front);
    return 0;
}
