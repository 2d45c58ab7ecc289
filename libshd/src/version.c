/* What a binding asks before it uses the library: the version, the ABI, the sizes of structs. */
#include "internal.h"

const char *shd_version(void) { return SHD_VERSION; }

int shd_abi(void) { return SHD_ABI; }

size_t shd_struct_size(int which) {
    switch (which) {
    case SHD_STRUCT_STATUS: return sizeof(shd_status);
    case SHD_STRUCT_FILE: return sizeof(shd_file);
    case SHD_STRUCT_TENSOR: return sizeof(shd_tensor);
    case SHD_STRUCT_DELTA: return sizeof(shd_delta);
    case SHD_STRUCT_WEIGHTS: return sizeof(shd_weights);
    case SHD_STRUCT_RICE: return sizeof(shd_rice);
    case SHD_STRUCT_TILED: return sizeof(shd_tiled);
    case SHD_STRUCT_FROM_BASE: return sizeof(shd_from_base);
    case SHD_STRUCT_BASE_GRID: return sizeof(shd_base_grid);
    default: return 0; /* unknown */
    }
}
