/* Value codecs: what each of them does, and a VALUES section of any. */
#ifndef SHD_VALUES_H
#define SHD_VALUES_H

#include "errors.h"

SHDI_BEGIN

/* Decodes ranks [rank, rank + count), and refuses the values that section 5 does. The ranks exist, and lie in one group
 * if the codec has groups. The elements of the section start at `elements`. */
typedef shdi_fault shdi_decode_fn(const shd_delta *delta, const uint8_t *elements, uint64_t rank, uint64_t count,
                                  float *values);

/* Encodes finite values of such ranks: the group's parameters to `parameters`, the rest to its place in `elements`. All
 * of the section is zero before. Returns 0 if the values do not fit. */
typedef int shdi_encode_fn(const float *values, uint64_t rank, uint64_t count, uint8_t *parameters, uint8_t *elements);

shdi_decode_fn shdi_decode_f32, shdi_decode_f16, shdi_decode_bf16, shdi_decode_i8, shdi_decode_i4, shdi_decode_sign;
shdi_encode_fn shdi_encode_f32, shdi_encode_f16, shdi_encode_bf16, shdi_encode_i8, shdi_encode_i4, shdi_encode_sign;

/* The id is one of the registry's, SHD_VALUES_NONE included. */
int shdi_value_codec_is_known(uint32_t id);

/* The codec stores elements as bits of the tensor's dtype, not floats. */
int shdi_values_are_elements(uint32_t id);

/* The codec stores shifts, which values_ulp.h reads, or only the base's elements tell. */
int shdi_values_are_shifts(uint32_t id);

/* Only the base's elements tell the values. */
int shdi_values_need_base(uint32_t id);

/* A section of the codec may have `size` bytes, judged by the table alone. */
int shdi_values_size_is_possible(const shd_tensor *tensor, uint64_t size);

/* Values of ranks [rank, rank + count), which exist, as binary32. Refuses those that section 5 does. Values that are no
 * floats are SHD_WRONG_OPERATION, an unknown codec is SHD_UNKNOWN_VALUE_CODEC. */
shdi_fault shdi_values_decode(const shd_delta *delta, uint64_t rank, uint64_t count, float *values);

/* Makes every check of section 5. */
shdi_fault shdi_values_check(const shd_delta *delta);

SHDI_END

#endif
