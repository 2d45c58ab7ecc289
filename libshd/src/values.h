/* Value codecs: what each of them does, and a VALUES section of any. */
#ifndef SHD_VALUES_H
#define SHD_VALUES_H

#include "errors.h"

SHDI_BEGIN

#define SHDI_BITS_OF_DTYPE UINT32_MAX

/* A VALUES section has the parameters of all groups of SHDI_GROUP nonzeros first, then the elements. */
typedef struct shdi_value_codec {
    uint32_t parameter_bytes; /* of a group; 0 if there are no groups */
    uint32_t element_bits;    /* of a nonzero, or SHDI_BITS_OF_DTYPE; 0 if there is no section */

    /* Decodes ranks [rank, rank + count), and refuses the values that section 5 does. The ranks exist, and lie in one
     * group if there are groups. The elements start at `elements`. NULL if the values are no floats. */
    shdi_fault (*decode)(const shd_delta *delta, const uint8_t *elements, uint64_t rank, uint64_t count, float *values);

    /* Encodes finite values of such ranks: the group's parameters to `parameters`, the rest to its place in `elements`.
     * All of the section is zero before. Returns 0 if the values do not fit. NULL if the values are no floats. */
    int (*encode)(const float *values, uint64_t rank, uint64_t count, uint8_t *parameters, uint8_t *elements);
} shdi_value_codec;

extern const shdi_value_codec shdi_values_none;
extern const shdi_value_codec shdi_values_f32;
extern const shdi_value_codec shdi_values_f16;
extern const shdi_value_codec shdi_values_bf16;
extern const shdi_value_codec shdi_values_i8;
extern const shdi_value_codec shdi_values_i4;
extern const shdi_value_codec shdi_values_sign;
extern const shdi_value_codec shdi_values_bits;

/* The codec of an id. NULL for an unknown id. */
const shdi_value_codec *shdi_value_codec_of(uint32_t id);

/* Values of ranks [rank, rank + count), which exist, as binary32. Refuses those that section 5 does. Values that are no
 * floats are SHD_WRONG_OPERATION, an unknown codec is SHD_UNKNOWN_VALUE_CODEC. */
shdi_fault shdi_values_decode(const shd_delta *delta, uint64_t rank, uint64_t count, float *values);

/* Makes every check of section 5. */
shdi_fault shdi_values_check(const shd_delta *delta);

SHDI_END

#endif
