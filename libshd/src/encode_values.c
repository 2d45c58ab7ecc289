/* The canonical VALUES sections (FORMAT.md, section 8). */
#include "bytes.h"
#include "floats.h"
#include "values.h"

static float magnitude_of(float v) { return shdi_float(shdi_bits(v) & 0x7FFFFFFFu); }

static uint32_t is_negative(float v) { return shdi_bits(v) >> 31; }

/* To the nearest integer, ties to even, for |x| < 2^22: beyond 1.5 * 2^23 floats are integers. */
static float round_to_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

static float clamp(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

/* Rounds a parameter to bf16; the rounded one is *parameter. 0 if it becomes infinite. */
static int round_parameter(float *parameter, uint8_t *p) {
    uint16_t bits = shdi_to_bf16(*parameter);
    shdi_store16(p, bits);
    *parameter = shdi_from_bf16(bits);
    return bits < 0x7F80u;
}

static void range_of(const float *values, uint32_t count, float *least, float *most) {
    *least = *most = magnitude_of(values[0]);
    for (uint32_t i = 1; i < count; i++) {
        float m = magnitude_of(values[i]);
        *least = m < *least ? m : *least;
        *most = m > *most ? m : *most;
    }
}

/* Each of these encodes one group: its parameters at `p`, the rest at its rank in `elements`. They return 0 if the
 * values do not fit. */

static int encode_i8(const float *values, uint64_t rank, uint32_t count, uint8_t *p, uint8_t *elements) {
    float least, scale;
    range_of(values, count, &least, &scale);
    scale /= 127.0f;
    if (!round_parameter(&scale, p) || !shdi_is_finite(scale * 128.0f)) {
        return 0;
    }
    for (uint32_t i = 0; i < count && scale > 0.0f; i++) {
        elements[rank + i] = (uint8_t)(int8_t)round_to_even(clamp(values[i] / scale, -127.0f, 127.0f));
    }
    return 1;
}

static int encode_i4(const float *values, uint64_t rank, uint32_t count, uint8_t *p, uint8_t *elements) {
    float lo, most;
    range_of(values, count, &lo, &most);
    if (!round_parameter(&lo, p)) {
        return 0;
    }
    /* Rounded up, lo may lie above all values: the step is 0 then. */
    float step = (most - lo) / 7.0f;
    step = step > 0.0f ? step : 0.0f;
    if (!round_parameter(&step, p + 2) || !shdi_is_finite(lo + step * 7.0f)) {
        return 0;
    }
    for (uint32_t i = 0; i < count; i++) {
        float code = step > 0.0f ? clamp((magnitude_of(values[i]) - lo) / step, 0.0f, 7.0f) : 0.0f;
        uint32_t nibble = (uint32_t)round_to_even(code) | is_negative(values[i]) << 3;
        elements[(rank + i) / 2] |= (uint8_t)(nibble << ((rank + i) % 2 * 4));
    }
    return 1;
}

static int encode_sign(const float *values, uint64_t rank, uint32_t count, uint8_t *p, uint8_t *elements) {
    double sum = 0.0;
    for (uint32_t i = 0; i < count; i++) {
        sum += (double)magnitude_of(values[i]);
        elements[(rank + i) / 8] |= (uint8_t)(is_negative(values[i]) << ((rank + i) % 8));
    }
    float lo = (float)(sum / (double)count);
    return round_parameter(&lo, p);
}

typedef int (*group_encoder)(const float *values, uint64_t rank, uint32_t count, uint8_t *p, uint8_t *elements);

static int encode_groups(group_encoder encode, uint32_t parameter_bytes, const float *values, uint64_t count,
                         uint8_t *section) {
    uint8_t *elements = section + shdi_align4(shdi_ceil_div(count, SHDI_GROUP) * parameter_bytes);
    for (uint64_t rank = 0; rank < count; rank += SHDI_GROUP) {
        uint32_t size = (uint32_t)shdi_min(count - rank, SHDI_GROUP);
        uint8_t *parameters = section + rank / SHDI_GROUP * parameter_bytes;
        if (!encode(values + rank, rank, size, parameters, elements)) {
            return 0;
        }
    }
    return 1;
}

static int encode_halves(int value_codec, const float *values, uint64_t count, uint8_t *section) {
    const uint16_t infinity = value_codec == SHD_VALUES_F16 ? 0x7C00u : 0x7F80u;
    int fits = 1;
    for (uint64_t i = 0; i < count; i++) {
        uint16_t bits = value_codec == SHD_VALUES_F16 ? shdi_to_f16(values[i]) : shdi_to_bf16(values[i]);
        fits &= (bits & infinity) != infinity;
        shdi_store16(section + 2 * i, bits);
    }
    return fits;
}

static int all_finite(const float *values, uint64_t count) {
    uint32_t infinite = 0;
    for (uint64_t i = 0; i < count; i++) {
        infinite |= !shdi_is_finite(values[i]);
    }
    return !infinite;
}

static int encode(int value_codec, const float *values, uint64_t count, uint8_t *section) {
    switch (value_codec) {
    case SHD_VALUES_F32: memcpy(section, values, (size_t)(4 * count)); return 1;
    case SHD_VALUES_F16:
    case SHD_VALUES_BF16: return encode_halves(value_codec, values, count, section);
    case SHD_VALUES_I8: return encode_groups(encode_i8, 2, values, count, section);
    case SHD_VALUES_I4: return encode_groups(encode_i4, 4, values, count, section);
    default: return encode_groups(encode_sign, 2, values, count, section);
    }
}

int shd_values_encode(int value_codec, const float *values, uint64_t count, void *section, uint64_t capacity) {
    if (values == NULL || section == NULL || count == 0 || count > SHDI_MAX_NUMEL) {
        return SHD_INVALID_ARGUMENT;
    }
    if (value_codec < SHD_VALUES_F32 || value_codec > SHD_VALUES_SIGN) {
        return SHD_WRONG_OPERATION;
    }
    uint64_t size = shd_values_size(value_codec, SHD_F32, count);
    if (capacity < size || size > (uint64_t)PTRDIFF_MAX) {
        return SHD_BUFFER_TOO_SMALL;
    }
    memset(section, 0, (size_t)size);
    shdi_float_environment environment = shdi_float_enter();
    int fits = all_finite(values, count) && encode(value_codec, values, count, section);
    shdi_float_leave(environment);
    return fits ? SHD_OK : SHD_VALUES_DO_NOT_FIT;
}
