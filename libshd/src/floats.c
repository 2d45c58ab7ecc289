/* Half precision and the floating point environment. */
#include "floats.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

float shdi_from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = h >> 10 & 0x1Fu;
    uint32_t fraction = h & 0x3FFu;
    if (exponent == 0x1F) { /* infinity, NaN */
        return shdi_float(sign | 0x7F800000u | fraction << 13);
    }
    if (exponent != 0) {
        return shdi_float(sign | (exponent + 112) << 23 | fraction << 13);
    }
    float magnitude = (float)fraction * 0x1p-24f; /* exact */
    return shdi_float(sign | shdi_bits(magnitude));
}

uint16_t shdi_to_f16(float f) {
    uint32_t bits = shdi_bits(f);
    uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7FFFFFFFu;
    uint32_t rounded;
    if (magnitude >= 0x47800000u) { /* 65536 and more */
        rounded = 0x7C00u;
    } else if (magnitude >= 0x38800000u) { /* normal; a carry out of the fraction raises the exponent, up to infinity */
        rounded = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
    } else { /* denormal: the last place of 0.5f is the least denormal half, so the sum rounds to it */
        rounded = shdi_bits(shdi_float(magnitude) + 0.5f) - shdi_bits(0.5f);
    }
    return (uint16_t)(sign | rounded);
}

shdi_float_environment shdi_float_enter(void) {
    shdi_float_environment environment = {0};
#if defined(__SSE__)
    environment.saved = _mm_getcsr();
    _mm_setcsr(0x1F80); /* to nearest, denormals kept, no exception trapped */
#endif
    return environment;
}

void shdi_float_leave(shdi_float_environment environment) {
#if defined(__SSE__)
    _mm_setcsr(environment.saved);
#else
    (void)environment;
#endif
}
