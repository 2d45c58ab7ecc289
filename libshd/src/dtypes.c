/* The dtypes of REGISTRY.md, one row each. */
#include "dtypes.h"

static const struct row {
    uint8_t size;    /* of one element in bytes; 0 for an unknown id */
    uint8_t addable; /* shdi_add() has a kernel for it */
    uint8_t order;   /* enum shdi_order */
} rows[] = {
    [SHD_F32] = {4, 1, SHDI_SIGN_AND_MAGNITUDE},
    [SHD_F16] = {2, 1, SHDI_SIGN_AND_MAGNITUDE},
    [SHD_BF16] = {2, 1, SHDI_SIGN_AND_MAGNITUDE},
    [SHD_F64] = {8, 0, SHDI_SIGN_AND_MAGNITUDE},
    [SHD_F8_E4M3] = {1, 0, SHDI_SIGN_AND_MAGNITUDE},
    [SHD_F8_E5M2] = {1, 0, SHDI_SIGN_AND_MAGNITUDE},
    [SHD_F8_E8M0] = {1, 0, SHDI_UNSIGNED},
    [SHD_BOOL] = {1, 0, SHDI_UNSIGNED},
    [SHD_U8] = {1, 0, SHDI_UNSIGNED},
    [SHD_I8] = {1, 0, SHDI_SIGNED},
    [SHD_U16] = {2, 0, SHDI_UNSIGNED},
    [SHD_I16] = {2, 0, SHDI_SIGNED},
    [SHD_U32] = {4, 0, SHDI_UNSIGNED},
    [SHD_I32] = {4, 0, SHDI_SIGNED},
    [SHD_U64] = {8, 0, SHDI_UNSIGNED},
    [SHD_I64] = {8, 0, SHDI_SIGNED},
    [SHD_F8_E4M3FNUZ] = {1, 0, SHDI_SIGN_AND_MAGNITUDE},
    [SHD_F8_E5M2FNUZ] = {1, 0, SHDI_SIGN_AND_MAGNITUDE},
    [SHD_C64] = {8, 0, SHDI_NO_ORDER},
};

static int has_row(int dtype) { return dtype >= 0 && dtype < (int)(sizeof rows / sizeof rows[0]); }

uint32_t shd_dtype_size(int dtype) { return has_row(dtype) ? rows[dtype].size : 0; }

int shdi_dtype_is_known(int dtype) { return dtype == SHD_UNSPECIFIED || shd_dtype_size(dtype) != 0; }

int shdi_dtype_is_addable(int dtype) { return has_row(dtype) && rows[dtype].addable; }

int shdi_dtype_order(int dtype) { return has_row(dtype) ? rows[dtype].order : SHDI_NO_ORDER; }
