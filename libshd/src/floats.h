/* Floats as bits, bf16, half precision, and the floating point environment. */
#ifndef SHD_FLOATS_H
#define SHD_FLOATS_H

#include "internal.h"

SHDI_BEGIN

static inline float shdi_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint32_t shdi_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static inline int shdi_is_finite(float f) { return (shdi_bits(f) & 0x7F800000u) != 0x7F800000u; }
static inline int shdi_is_nan(float f) { return (shdi_bits(f) & 0x7FFFFFFFu) > 0x7F800000u; }
static inline float shdi_magnitude(float f) { return shdi_float(shdi_bits(f) & 0x7FFFFFFFu); }
static inline float shdi_from_bf16(uint16_t h) { return shdi_float((uint32_t)h << 16); }

/* Rounds to nearest, ties to even. Not for NaN. */
static inline uint16_t shdi_to_bf16(float f) {
    uint32_t u = shdi_bits(f);
    return (uint16_t)((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

float shdi_from_f16(uint16_t h);

/* Rounds to nearest, ties to even. Not for NaN. */
uint16_t shdi_to_f16(float f);

/* The caller's floating point environment. A call that computes enters the one that the format's arithmetic is
 * defined in, and leaves it at its end. */
typedef struct shdi_float_environment {
    uint32_t saved;
} shdi_float_environment;

shdi_float_environment shdi_float_enter(void);
void shdi_float_leave(shdi_float_environment environment);

SHDI_END

#endif
