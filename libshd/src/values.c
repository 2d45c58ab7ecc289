/* The table of value codecs, and the VALUES section of any of them: its size, reading, checking, writing. */
#include "values.h"

#include "floats.h"
#include "section.h"
#include "values_ulp.h"

#define BITS_OF_DTYPE UINT32_MAX
#define SHIFTS (UINT32_MAX - 1)
#define SHIFTS_FROM_BASE (UINT32_MAX - 2)

/* A VALUES section has the parameters of all groups of SHDI_GROUP nonzeros first, then the elements. */
typedef struct codec_row {
    uint32_t parameter_bytes; /* of a group; 0 if there are no groups */
    uint32_t element_bits;    /* of a nonzero, or BITS_OF_DTYPE, or SHIFTS or SHIFTS_FROM_BASE; 0 if there is no section */
    shdi_decode_fn *decode;   /* NULL if the values are no floats */
    shdi_encode_fn *encode;   /* NULL if the values are no floats */
} codec_row;

/* The codec of an id. NULL for an unknown id. */
static const codec_row *codec_of(uint32_t id) {
    static const codec_row codecs[] = {
        [SHD_VALUES_NONE] = {0, 0, NULL, NULL},
        [SHD_VALUES_F32] = {0, 32, shdi_decode_f32, shdi_encode_f32},
        [SHD_VALUES_F16] = {0, 16, shdi_decode_f16, shdi_encode_f16},
        [SHD_VALUES_BF16] = {0, 16, shdi_decode_bf16, shdi_encode_bf16},
        [SHD_VALUES_I8] = {2, 8, shdi_decode_i8, shdi_encode_i8},
        [SHD_VALUES_I4] = {4, 4, shdi_decode_i4, shdi_encode_i4},
        [SHD_VALUES_SIGN] = {2, 1, shdi_decode_sign, shdi_encode_sign},
        [SHD_VALUES_BITS] = {0, BITS_OF_DTYPE, NULL, NULL},
        [SHD_VALUES_ULP] = {0, SHIFTS, NULL, NULL},
        [SHD_VALUES_ULP_FROM_BASE] = {0, SHIFTS_FROM_BASE, NULL, NULL},
    };
    if (id >= sizeof codecs / sizeof codecs[0] || (codecs[id].element_bits == 0 && id != SHD_VALUES_NONE)) {
        return NULL;
    }
    return &codecs[id];
}

int shdi_value_codec_is_known(uint32_t id) { return codec_of(id) != NULL; }

int shdi_values_are_elements(uint32_t id) {
    const codec_row *codec = codec_of(id);
    return codec != NULL && codec->element_bits == BITS_OF_DTYPE;
}

int shdi_values_are_shifts(uint32_t id) {
    const codec_row *codec = codec_of(id);
    return codec != NULL && (codec->element_bits == SHIFTS || codec->element_bits == SHIFTS_FROM_BASE);
}

int shdi_values_need_base(uint32_t id) {
    const codec_row *codec = codec_of(id);
    return codec != NULL && codec->element_bits == SHIFTS_FROM_BASE;
}

/* ---- Layout ---- */

static uint64_t parameters_size(const codec_row *codec, uint64_t count) {
    return shdi_ceil_div(count, SHDI_GROUP) * codec->parameter_bytes;
}

static uint64_t elements_offset(const codec_row *codec, uint64_t count) {
    return shdi_align4(parameters_size(codec, count));
}

static uint32_t element_bits(const codec_row *codec, int dtype) {
    return codec->element_bits == BITS_OF_DTYPE ? 8 * shd_dtype_size(dtype) : codec->element_bits;
}

SHDI_ONCE uint64_t shd_values_size(int value_codec, int dtype, uint64_t count) {
    const codec_row *codec = value_codec < 0 ? NULL : codec_of((uint32_t)value_codec);
    if (codec == NULL || codec->element_bits == 0) {
        return 0;
    }
    if (codec->element_bits == SHIFTS) {
        return shdi_ulp_size(count);
    }
    if (codec->element_bits == SHIFTS_FROM_BASE) {
        return shdi_ulp_from_base_size(count);
    }
    const uint32_t bits = element_bits(codec, dtype);
    const uint64_t elements = count / 8 * bits + shdi_ceil_div(count % 8 * bits, 8);
    return elements_offset(codec, count) + shdi_align4(elements) + SHDI_SLACK;
}

int shdi_values_size_is_possible(const shd_tensor *tensor, uint64_t size) {
    const uint64_t own = shd_values_size(tensor->value_codec, tensor->dtype, tensor->nnz);
    return shdi_values_are_shifts(tensor->value_codec) ? size >= own : size == own;
}

/* ---- Reading ---- */

/* How many of `count` nonzeros from `rank` on a codec takes at a time: those of one group, or all. */
static uint64_t at_a_time(const codec_row *codec, uint64_t rank, uint64_t count) {
    return codec->parameter_bytes == 0 ? count : shdi_min(count, SHDI_GROUP - rank % SHDI_GROUP);
}

shdi_fault shdi_values_decode(const shd_delta *delta, uint64_t rank, uint64_t count, float *values) {
    const codec_row *codec = codec_of(delta->tensor.value_codec);
    if (codec == NULL) {
        return shdi_fault_at(SHD_UNKNOWN_VALUE_CODEC, 0);
    }
    if (count == 0) {
        return shdi_ok(); /* NONE has no others */
    }
    if (codec->decode == NULL) {
        return shdi_fault_at(SHD_WRONG_OPERATION, 0);
    }
    const uint8_t *elements = delta->values + elements_offset(codec, delta->tensor.nnz);
    while (count > 0) {
        uint64_t take = at_a_time(codec, rank, count);
        shdi_fault fault = codec->decode(delta, elements, rank, take, values);
        if (fault.code != SHD_OK) {
            return fault;
        }
        rank += take;
        values += take;
        count -= take;
    }
    return shdi_ok();
}

static shdi_fault check_floats(const shd_delta *delta, const codec_row *codec, const uint8_t *elements) {
    const uint64_t nnz = delta->tensor.nnz;
    for (uint64_t rank = 0; rank < nnz; rank += SHDI_GROUP) {
        float values[SHDI_GROUP];
        /* Where a group has parameters, these alone can be wrong, so none of its values is decoded. */
        const uint64_t count = codec->parameter_bytes != 0 ? 0 : shdi_min(nnz - rank, SHDI_GROUP);
        shdi_fault fault = codec->decode(delta, elements, rank, count, values);
        if (fault.code != SHD_OK) {
            return fault;
        }
    }
    return shdi_ok();
}

shdi_fault shdi_values_check(const shd_delta *delta) {
    const shd_tensor *tensor = &delta->tensor;
    const codec_row *codec = codec_of(tensor->value_codec);
    if (codec == NULL) {
        return shdi_fault_at(SHD_UNKNOWN_VALUE_CODEC, 0);
    }
    if (codec->element_bits == 0) {
        return shdi_ok();
    }
    if (codec->element_bits == SHIFTS) {
        return shdi_ulp_check(delta);
    }
    if (codec->element_bits == SHIFTS_FROM_BASE) {
        return shdi_fault_at(SHD_BASE_NEEDED, 0);
    }
    const uint64_t elements = elements_offset(codec, tensor->nnz);
    const uint64_t end_bit = 8 * elements + tensor->nnz * element_bits(codec, tensor->dtype);
    shdi_fault fault = codec->decode == NULL ? shdi_ok() : check_floats(delta, codec, delta->values + elements);
    if (fault.code == SHD_OK) {
        fault = shdi_check_zeros(delta->values, 8 * parameters_size(codec, tensor->nnz), elements);
    }
    return fault.code == SHD_OK ? shdi_check_zeros(delta->values, end_bit, tensor->values.decoded) : fault;
}

/* ---- Writing: the canonical sections (FORMAT.md, section 8) ---- */

static int all_finite(const float *values, uint64_t count) {
    uint32_t infinite = 0;
    for (uint64_t i = 0; i < count; i++) {
        infinite |= !shdi_is_finite(values[i]);
    }
    return !infinite;
}

static int encode(const codec_row *codec, const float *values, uint64_t count, uint8_t *section) {
    uint8_t *elements = section + elements_offset(codec, count);
    for (uint64_t rank = 0; rank < count;) {
        uint64_t take = at_a_time(codec, rank, count - rank);
        uint8_t *parameters = section + rank / SHDI_GROUP * codec->parameter_bytes;
        if (!codec->encode(values + rank, rank, take, parameters, elements)) {
            return 0;
        }
        rank += take;
    }
    return 1;
}

int shd_values_encode(int value_codec, const float *values, uint64_t count, void *section, uint64_t capacity) {
    if (values == NULL || section == NULL || count == 0 || count > SHDI_MAX_NUMEL) {
        return SHD_INVALID_ARGUMENT;
    }
    const codec_row *codec = value_codec < 0 ? NULL : codec_of((uint32_t)value_codec);
    if (codec == NULL || codec->encode == NULL) {
        return SHD_WRONG_OPERATION;
    }
    uint64_t size = shd_values_size(value_codec, SHD_UNSPECIFIED, count);
    if (capacity < size || size > (uint64_t)PTRDIFF_MAX) {
        return SHD_BUFFER_TOO_SMALL;
    }
    memset(section, 0, (size_t)size);
    shdi_float_environment environment = shdi_float_enter();
    int fits = all_finite(values, count) && encode(codec, values, count, section);
    shdi_float_leave(environment);
    return fits ? SHD_OK : SHD_VALUES_DO_NOT_FIT;
}
