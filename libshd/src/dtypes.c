/* The dtypes of REGISTRY.md. */
#include "internal.h"

uint32_t shd_dtype_size(int dtype) {
    static const uint8_t size[] = {0, 4, 2, 2, 8, 1, 1, 1, 1, 1, 1, 2, 2, 4, 4, 8, 8, 1, 1, 8};
    return dtype >= 0 && dtype < (int)sizeof size ? size[dtype] : 0;
}
