/* What the files of the AVX2 kernels share. */
#ifndef SHD_AVX2_H
#define SHD_AVX2_H

#include "kernels.h"

#if SHDI_AVX2

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))

SHDI_BEGIN

/* The sum of the lanes up to and with each. */
AVX2 static inline __m256i shdi_sums(__m256i v) {
    v = _mm256_add_epi32(v, _mm256_slli_si256(v, 4));
    v = _mm256_add_epi32(v, _mm256_slli_si256(v, 8));     /* within each half */
    const __m256i totals = _mm256_shuffle_epi32(v, 0xFF); /* of each half */
    return _mm256_add_epi32(v, _mm256_permute2x128_si256(totals, totals, 0x08));
}

void shdi_avx2_lines(const uint32_t *order, uint32_t count, const shdi_cell **at, uint32_t *row, uint32_t *column);
uint32_t shdi_avx2_take_ones(uint8_t *bitmap, const uint32_t *index, uint32_t *at, uint32_t count, uint32_t *one);
void shdi_avx2_drawn(const struct shdi_draw *draw, uint32_t base, uint32_t *number, uint32_t count);
uint32_t shdi_avx2_rice_gaps(struct shdi_rice_writer *w, const uint32_t *offset, uint32_t count);

SHDI_END

#endif

#endif
