/* The choice among the kernels. */
#include "kernels.h"
#include "cpu.h"

const shdi_kernels *shdi_kernels_best(void) {
#if SHDI_NEON
    return &shdi_neon;
#elif SHDI_AVX2
    if ((shdi_cpu & SHDI_HAS_AVX2) != 0) {
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
