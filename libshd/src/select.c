/* The selection of the elements with the largest magnitudes. */
#include "kernels.h"

uint64_t shd_count_at_least(const float *x, uint64_t n, float threshold) {
    const shdi_kernels *kernels = shdi_kernels_best();
    uint64_t count = 0;
    for (uint64_t start = 0; start < n; start += SHDI_BLOCK) {
        uint32_t index[SHDI_BLOCK_ROOM];
        count += kernels->at_least(x + start, (uint32_t)shdi_min(n - start, SHDI_BLOCK), threshold, index);
    }
    return count;
}

int shd_select_at_least(const float *x, uint64_t n, float threshold, uint64_t first_position, int64_t *positions,
                        uint64_t capacity, uint64_t *count) {
    if ((x == NULL && n != 0) || (positions == NULL && capacity != 0) || count == NULL) {
        return SHD_INVALID_ARGUMENT;
    }
    const shdi_kernels *kernels = shdi_kernels_best();
    *count = 0;
    for (uint64_t start = 0; start < n; start += SHDI_BLOCK) {
        uint32_t index[SHDI_BLOCK_ROOM];
        uint32_t found = kernels->at_least(x + start, (uint32_t)shdi_min(n - start, SHDI_BLOCK), threshold, index);
        if (found > capacity - *count) {
            return SHD_BUFFER_TOO_SMALL;
        }
        kernels->widen(index, found, first_position + start, positions + *count);
        *count += found;
    }
    return SHD_OK;
}
