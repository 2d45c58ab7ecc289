/* What the processor can do. __builtin_cpu_supports() tells it too, with 4 KiB of code about other processors. */
#include "cpu.h"

#if SHDI_AVX2

#include <cpuid.h>

uint32_t shdi_cpu;

/* Before other constructors, which may call the library. */
__attribute__((constructor(101), cold)) static void look(void) {
    uint32_t a, b, c, d, saved, high;
    if (!__get_cpuid(1, &a, &b, &c, &d)) {
        return;
    }
    if ((c & bit_PCLMUL) != 0 && (c & bit_SSE4_1) != 0) {
        shdi_cpu |= SHDI_HAS_CLMUL;
    }
    if ((c & bit_OSXSAVE) == 0 || (c & bit_POPCNT) == 0) {
        return;
    }
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    const uint32_t both = 6; /* the lower and the upper halves of the registers */
    const uint32_t wanted = bit_AVX2 | bit_BMI | bit_BMI2;
    if ((saved & both) == both && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & wanted) == wanted) {
        shdi_cpu |= SHDI_HAS_AVX2;
    }
}

#else

typedef int shdi_no_cpu; /* C has no empty file */

#endif
