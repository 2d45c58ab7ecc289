/* The choice among the kernels. */
#include "kernels.h"

const shdi_kernels *shdi_kernels_best(void) {
#if SHDI_NEON
    return &shdi_neon;
#elif SHDI_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt")) {
        return &shdi_avx2;
    }
    return &shdi_scalar;
#else
    return &shdi_scalar;
#endif
}

const shdi_kernels *shdi_kernels_of(const shd_delta *delta) {
    return delta->scalar ? &shdi_scalar : shdi_kernels_best();
}

const char *shd_simd(void) { return shdi_kernels_best()->name; }
