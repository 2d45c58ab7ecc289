/* What the processor can do, where kernels depend on it. */
#ifndef SHD_CPU_H
#define SHD_CPU_H

#include "internal.h"

#if SHDI_AVX2

SHDI_BEGIN

#define SHDI_HAS_CLMUL 1u /* PCLMULQDQ and SSE4.1 */
#define SHDI_HAS_AVX2 2u  /* AVX2, whose registers the system saves, BMI, BMI2 and POPCNT */

/* Set when the library is loaded, and 0 before. */
extern uint32_t shdi_cpu;

SHDI_END

#endif

#endif
