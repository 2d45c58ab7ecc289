/* The value codecs with parameters for each group: I8, I4 and SIGN. */
#include "bytes.h"
#include "floats.h"
#include "kernels.h"
#include "values.h"

/* ---- Parameters ---- */

/* Reads the bf16 at `p`. Returns 0 if it is not finite or has its sign bit set. */
static int read_parameter(const uint8_t *p, float *parameter) {
    uint16_t bits = shdi_load16(p);
    *parameter = shdi_from_bf16(bits);
    return bits < 0x7F80u;
}

/* Rounds a parameter to bf16 and writes it. *parameter becomes the rounded one. Returns 0 if it becomes infinite. */
static int write_parameter(float *parameter, uint8_t *p) {
    uint16_t bits = shdi_to_bf16(*parameter);
    shdi_store16(p, bits);
    *parameter = shdi_from_bf16(bits);
    return bits < 0x7F80u;
}

static void range_of(const float *values, uint64_t count, float *least, float *most) {
    *least = *most = shdi_magnitude(values[0]);
    for (uint64_t i = 1; i < count; i++) {
        float m = shdi_magnitude(values[i]);
        *least = m < *least ? m : *least;
        *most = m > *most ? m : *most;
    }
}

/* ---- Elements ---- */

static uint32_t is_negative(float v) { return shdi_bits(v) >> 31; }

/* Rounds to the nearest integer, ties to even, for |x| < 2^22: beyond 1.5 * 2^23 floats are integers. */
static float round_to_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

static float clamp(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

/* ---- I8 ---- */

shdi_fault shdi_decode_i8(const shd_delta *delta, const uint8_t *elements, uint64_t rank, uint64_t count,
                          float *values) {
    const uint64_t offset = rank / SHDI_GROUP * 2;
    float scale;
    if (!read_parameter(delta->values + offset, &scale) || !shdi_is_finite(scale * 128.0f)) {
        return shdi_fault_at(SHD_BAD_VALUE, offset);
    }
    shdi_kernels_of(delta)->scale_i8(elements + rank, (uint32_t)count, scale, values);
    return shdi_ok();
}

int shdi_encode_i8(const float *values, uint64_t rank, uint64_t count, uint8_t *parameters, uint8_t *elements) {
    float least, scale;
    range_of(values, count, &least, &scale);
    scale /= 127.0f;
    if (!write_parameter(&scale, parameters) || !shdi_is_finite(scale * 128.0f)) {
        return 0;
    }
    for (uint64_t i = 0; i < count && scale > 0.0f; i++) {
        elements[rank + i] = (uint8_t)(int8_t)round_to_even(clamp(values[i] / scale, -127.0f, 127.0f));
    }
    return 1;
}

/* ---- I4 ---- */

shdi_fault shdi_decode_i4(const shd_delta *delta, const uint8_t *elements, uint64_t rank, uint64_t count,
                          float *values) {
    const uint64_t offset = rank / SHDI_GROUP * 4;
    float lo, step, magnitude[8];
    if (!read_parameter(delta->values + offset, &lo) || !read_parameter(delta->values + offset + 2, &step) ||
        !shdi_is_finite(lo + step * 7.0f)) {
        return shdi_fault_at(SHD_BAD_VALUE, offset);
    }
    for (uint32_t code = 0; code < 8; code++) {
        magnitude[code] = lo + step * (float)code;
    }
    shdi_kernels_of(delta)->look_up_i4(elements, rank, (uint32_t)count, magnitude, values);
    return shdi_ok();
}

int shdi_encode_i4(const float *values, uint64_t rank, uint64_t count, uint8_t *parameters, uint8_t *elements) {
    float lo, most;
    range_of(values, count, &lo, &most);
    if (!write_parameter(&lo, parameters)) {
        return 0;
    }
    /* Rounded up, lo may lie above all values. The step is 0 then. */
    float step = (most - lo) / 7.0f;
    step = step > 0.0f ? step : 0.0f;
    if (!write_parameter(&step, parameters + 2) || !shdi_is_finite(lo + step * 7.0f)) {
        return 0;
    }
    for (uint64_t i = 0; i < count; i++) {
        float code = step > 0.0f ? clamp((shdi_magnitude(values[i]) - lo) / step, 0.0f, 7.0f) : 0.0f;
        uint32_t nibble = (uint32_t)round_to_even(code) | is_negative(values[i]) << 3;
        elements[(rank + i) / 2] |= (uint8_t)(nibble << ((rank + i) % 2 * 4));
    }
    return 1;
}

/* ---- SIGN ---- */

shdi_fault shdi_decode_sign(const shd_delta *delta, const uint8_t *elements, uint64_t rank, uint64_t count,
                            float *values) {
    const uint64_t offset = rank / SHDI_GROUP * 2;
    float lo;
    if (!read_parameter(delta->values + offset, &lo)) {
        return shdi_fault_at(SHD_BAD_VALUE, offset);
    }
    for (uint64_t i = 0; i < count; i++) {
        uint32_t sign = (uint32_t)elements[(rank + i) / 8] >> ((rank + i) % 8) & 1;
        values[i] = shdi_float(shdi_bits(lo) | sign << 31);
    }
    return shdi_ok();
}

int shdi_encode_sign(const float *values, uint64_t rank, uint64_t count, uint8_t *parameters, uint8_t *elements) {
    double sum = 0.0;
    for (uint64_t i = 0; i < count; i++) {
        sum += (double)shdi_magnitude(values[i]);
        elements[(rank + i) / 8] |= (uint8_t)(is_negative(values[i]) << ((rank + i) % 8));
    }
    float lo = (float)(sum / (double)count);
    return write_parameter(&lo, parameters);
}
