/* Section 5 of FORMAT.md: value codecs. */
#include "bytes.h"
#include "floats.h"
#include "kernels.h"
#include "section.h"
#include "values.h"

uint64_t shdi_values_size(uint32_t value_codec, uint32_t dtype, uint64_t count) {
    const uint64_t groups = shdi_ceil_div(count, SHDI_GROUP);
    switch (value_codec) {
    case SHD_VALUES_F32: return 4 * count + SHDI_SLACK;
    case SHD_VALUES_F16:
    case SHD_VALUES_BF16: return shdi_align4(2 * count) + SHDI_SLACK;
    case SHD_VALUES_I8: return shdi_align4(2 * groups) + shdi_align4(count) + SHDI_SLACK;
    case SHD_VALUES_I4: return 4 * groups + shdi_align4(shdi_ceil_div(count, 2)) + SHDI_SLACK;
    case SHD_VALUES_SIGN: return shdi_align4(2 * groups) + 4 * shdi_ceil_div(count, 32) + SHDI_SLACK;
    case SHD_VALUES_BITS: return shdi_align4(count * shd_dtype_size((int)dtype)) + SHDI_SLACK;
    default: return 0;
    }
}

uint64_t shd_values_size(int value_codec, int dtype, uint64_t count) {
    return value_codec < 0 ? 0 : shdi_values_size((uint32_t)value_codec, (uint32_t)dtype, count);
}

/* Where the part after the groups' parameters starts. */
static uint64_t elements_offset(const shd_tensor *tensor) {
    uint64_t groups = shdi_ceil_div(tensor->nnz, SHDI_GROUP);
    switch (tensor->value_codec) {
    case SHD_VALUES_I8:
    case SHD_VALUES_SIGN: return shdi_align4(2 * groups);
    case SHD_VALUES_I4: return 4 * groups;
    default: return 0;
    }
}

/* ---- Parameters of a group ---- */

/* Reads the bf16 at `p`; 0 if it is not finite or negative, zero included. */
static int read_parameter(const uint8_t *p, float *parameter) {
    uint16_t bits = shdi_load16(p);
    *parameter = shdi_from_bf16(bits);
    return bits < 0x7F80u;
}

static int read_scale(const uint8_t *section, uint64_t group, float *scale) {
    return read_parameter(section + 2 * group, scale) && shdi_is_finite(*scale * 128.0f);
}

static int read_affine(const uint8_t *section, uint64_t group, float *lo, float *step) {
    return read_parameter(section + 4 * group, lo) && read_parameter(section + 4 * group + 2, step) &&
           shdi_is_finite(*lo + *step * 7.0f);
}

/* ---- Decoding within a group ---- */

static shdi_fault decode_i8(const shd_delta *delta, uint64_t rank, uint32_t count, float *values) {
    const uint64_t group = rank / SHDI_GROUP;
    float scale;
    if (!read_scale(delta->values, group, &scale)) {
        return shdi_fault_at(SHD_BAD_VALUE, 2 * group);
    }
    const uint8_t *q = delta->values + elements_offset(&delta->tensor) + rank;
    shdi_kernels_of(delta)->scale_i8(q, count, scale, values);
    return shdi_ok();
}

static shdi_fault decode_i4(const shd_delta *delta, uint64_t rank, uint32_t count, float *values) {
    const uint64_t group = rank / SHDI_GROUP;
    float lo, step, magnitude[8];
    if (!read_affine(delta->values, group, &lo, &step)) {
        return shdi_fault_at(SHD_BAD_VALUE, 4 * group);
    }
    for (uint32_t code = 0; code < 8; code++) {
        magnitude[code] = lo + step * (float)code;
    }
    const uint8_t *nibbles = delta->values + elements_offset(&delta->tensor);
    shdi_kernels_of(delta)->look_up_i4(nibbles, rank, count, magnitude, values);
    return shdi_ok();
}

static shdi_fault decode_sign(const shd_delta *delta, uint64_t rank, uint32_t count, float *values) {
    const uint64_t group = rank / SHDI_GROUP;
    float lo;
    if (!read_parameter(delta->values + 2 * group, &lo)) {
        return shdi_fault_at(SHD_BAD_VALUE, 2 * group);
    }
    const uint8_t *signs = delta->values + elements_offset(&delta->tensor);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t sign = (uint32_t)signs[(rank + i) / 8] >> ((rank + i) % 8) & 1;
        values[i] = shdi_float(shdi_bits(lo) | sign << 31);
    }
    return shdi_ok();
}

/* ---- Decoding of values that stand for themselves ---- */

static shdi_fault decode_plain(const shd_delta *delta, uint64_t rank, uint64_t count, float *values) {
    const uint32_t size = delta->tensor.value_codec == SHD_VALUES_F32 ? 4 : 2;
    const uint8_t *p = delta->values + rank * size;
    uint32_t infinite = 0;
    if (delta->tensor.value_codec == SHD_VALUES_F32) {
        memcpy(values, p, (size_t)(4 * count));
    } else if (delta->tensor.value_codec == SHD_VALUES_BF16) {
        for (uint64_t i = 0; i < count; i++) {
            values[i] = shdi_from_bf16(shdi_load16(p + 2 * i));
        }
    } else {
        for (uint64_t i = 0; i < count; i++) {
            values[i] = shdi_from_f16(shdi_load16(p + 2 * i));
        }
    }
    for (uint64_t i = 0; i < count; i++) {
        infinite |= !shdi_is_finite(values[i]);
    }
    return infinite ? shdi_fault_at(SHD_BAD_VALUE, rank * size) : shdi_ok();
}

shdi_fault shdi_values_decode(const shd_delta *delta, uint64_t rank, uint64_t count, float *values) {
    shdi_fault (*decode_in_group)(const shd_delta *, uint64_t, uint32_t, float *);
    switch (delta->tensor.value_codec) {
    case SHD_VALUES_NONE: return shdi_ok();
    case SHD_VALUES_I8: decode_in_group = decode_i8; break;
    case SHD_VALUES_I4: decode_in_group = decode_i4; break;
    case SHD_VALUES_SIGN: decode_in_group = decode_sign; break;
    default: return decode_plain(delta, rank, count, values);
    }
    while (count > 0) {
        uint32_t take = (uint32_t)shdi_min(count, SHDI_GROUP - rank % SHDI_GROUP);
        shdi_fault fault = decode_in_group(delta, rank, take, values);
        if (fault.code != SHD_OK) {
            return fault;
        }
        rank += take;
        values += take;
        count -= take;
    }
    return shdi_ok();
}

/* ---- The whole section ---- */

/* Bits of one nonzero in the part after the parameters. */
static uint32_t element_bits(const shd_tensor *tensor) {
    switch (tensor->value_codec) {
    case SHD_VALUES_F32: return 32;
    case SHD_VALUES_F16:
    case SHD_VALUES_BF16: return 16;
    case SHD_VALUES_I8: return 8;
    case SHD_VALUES_I4: return 4;
    case SHD_VALUES_SIGN: return 1;
    case SHD_VALUES_BITS: return 8 * shd_dtype_size(tensor->dtype);
    default: return 0;
    }
}

static uint32_t parameter_bytes(const shd_tensor *tensor) {
    switch (tensor->value_codec) {
    case SHD_VALUES_I8:
    case SHD_VALUES_SIGN: return 2;
    case SHD_VALUES_I4: return 4;
    default: return 0;
    }
}

shdi_fault shdi_values_check(const shd_delta *delta) {
    const shd_tensor *tensor = &delta->tensor;
    if (tensor->value_codec == SHD_VALUES_NONE) {
        return shdi_ok();
    }
    for (uint64_t rank = 0; rank < tensor->nnz && tensor->value_codec != SHD_VALUES_BITS;) {
        float values[SHDI_GROUP];
        uint64_t count = shdi_min(tensor->nnz - rank, SHDI_GROUP);
        shdi_fault fault = shdi_values_decode(delta, rank, count, values);
        if (fault.code != SHD_OK) {
            return fault;
        }
        rank += count;
    }
    const uint64_t elements = elements_offset(tensor);
    const uint64_t parameters = shdi_ceil_div(tensor->nnz, SHDI_GROUP) * parameter_bytes(tensor);
    shdi_fault fault = shdi_check_zeros(delta->values, 8 * parameters, elements);
    if (fault.code == SHD_OK) {
        fault = shdi_check_zeros(delta->values, 8 * elements + tensor->nnz * element_bits(tensor),
                                 tensor->values.decoded);
    }
    return fault;
}
