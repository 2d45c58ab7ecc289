#include "arithmetic.h"

#include <math.h>
#include <string.h>

float float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

uint32_t bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

float widen(int dtype, uint32_t bits) {
    if (dtype == SHD_F32) {
        return float_of(bits);
    }
    if (dtype == SHD_BF16) {
        return float_of(bits << 16);
    }
    int exponent = (int)(bits >> 10 & 31), fraction = (int)(bits & 1023);
    float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                      : exponent == 0 ? ldexpf((float)fraction, -24)
                                      : ldexpf((float)(1024 + fraction), exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

/* Rounds to a float of `precision` bits whose least exponent is `least`, and with infinity from `limit` on. */
static double round_to(double y, int precision, int least, double limit) {
    int exponent;
    frexp(y, &exponent);
    int place = exponent - precision > least ? exponent - precision : least;
    double rounded = ldexp(nearbyint(ldexp(y, -place)), place);
    return fabs(rounded) >= limit ? copysign(INFINITY, y) : rounded;
}

uint32_t narrow(int dtype, float y) {
    if (isnan(y)) {
        return dtype == SHD_F32 ? 0x7FC00000 : dtype == SHD_BF16 ? 0x7FC0 : 0x7E00;
    }
    if (dtype == SHD_F32) {
        return bits_of(y);
    }
    if (isinf(y) || y == 0) {
        uint32_t sign = signbit(y) ? 0x8000 : 0;
        return sign | (y == 0 ? 0 : dtype == SHD_BF16 ? 0x7F80u : 0x7C00u);
    }
    if (dtype == SHD_BF16) {
        return bits_of((float)round_to(y, 8, -133, 0x1p128)) >> 16;
    }
    double rounded = round_to(y, 11, -24, 65536);
    uint32_t sign = signbit(y) ? 0x8000 : 0;
    double magnitude = fabs(rounded);
    if (isinf(magnitude)) {
        return sign | 0x7C00;
    }
    if (magnitude < 0x1p-14) {
        return sign | (uint32_t)ldexp(magnitude, 24);
    }
    int exponent;
    double fraction = frexp(magnitude, &exponent); /* in [0.5, 1) */
    return sign | (uint32_t)(exponent + 14) << 10 | ((uint32_t)ldexp(fraction, 11) & 1023);
}

uint32_t add_sum_to(int dtype, uint32_t weight, float sum) {
    float w = widen(dtype, weight);
    volatile float y = w + sum;
    return isnan(w) ? weight : narrow(dtype, y);
}

uint32_t add_to(int dtype, uint32_t weight, float value, float alpha) {
    volatile float s = alpha * value;
    return add_sum_to(dtype, weight, s);
}

uint32_t element(const void *weights, uint32_t size, uint64_t i) {
    uint32_t bits = 0;
    memcpy(&bits, (const uint8_t *)weights + i * size, size);
    return bits;
}

void fill_with_anything(random_state *r, uint8_t *weights, uint64_t count, uint32_t size, int dtype) {
    for (uint64_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)random_bits(r); /* NaN, infinities and denormals, too */
        if (random_bits(r) % 4 != 0) {
            bits = narrow(dtype, (float)(random_unit(r) - 0.5) * 0.05f);
        }
        memcpy(weights + i * size, &bits, size);
    }
}
