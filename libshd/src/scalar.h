/* The scalar kernels that other sets of kernels use too. */
#ifndef SHD_SCALAR_H
#define SHD_SCALAR_H

#include "kernels.h"

SHDI_BEGIN

uint64_t shdi_scalar_count_ones(const uint8_t *bitmap, uint64_t bits);
uint32_t shdi_scalar_sum_fields(const uint8_t *low, uint64_t low_size, uint64_t low_bit, uint32_t k, uint32_t count);
void shdi_scalar_lines(const uint32_t *order, uint32_t count, const shdi_cell **at, uint32_t *row, uint32_t *column);
uint32_t shdi_scalar_words(const uint8_t *bitmap, uint32_t count, uint32_t *index);
uint32_t shdi_scalar_take_ones(uint8_t *bitmap, const uint32_t *index, uint32_t *at, uint32_t count, uint32_t *one);
void shdi_scalar_drawn(const struct shdi_draw *draw, uint32_t base, uint32_t *number, uint32_t count);
uint32_t shdi_scalar_rice_gaps(struct shdi_rice_writer *w, const uint32_t *offset, uint32_t count);
void shdi_scalar_widen(const uint32_t *offset, uint32_t count, uint64_t base, int64_t *positions);
void shdi_scalar_scale_i8(const uint8_t *q, uint32_t count, float scale, float *values);
void shdi_scalar_look_up_i4(const uint8_t *nibbles, uint64_t first, uint32_t count, const float magnitude[8],
                            float *values);
void shdi_scalar_add_f32(uint32_t *result, const uint32_t *weight, const float *value, float alpha, uint32_t count);
void shdi_scalar_add_f16(uint16_t *result, const uint16_t *weight, const float *value, float alpha, uint32_t count);
void shdi_scalar_add_bf16(uint16_t *result, const uint16_t *weight, const float *value, float alpha, uint32_t count);
uint32_t shdi_scalar_at_least(const float *x, uint32_t count, float threshold, uint32_t *index);
uint64_t shdi_scalar_sum_shifted(const uint64_t *gap, uint32_t count, uint32_t k);

SHDI_END

#endif
