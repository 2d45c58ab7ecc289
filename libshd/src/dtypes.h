/* The dtypes of REGISTRY.md. */
#ifndef SHD_DTYPES_H
#define SHD_DTYPES_H

#include "internal.h"

SHDI_BEGIN

/* A file may have this dtype: one of the registry's, SHD_UNSPECIFIED included. */
int shdi_dtype_is_known(int dtype);

/* ADD applies to weights of this dtype. */
int shdi_dtype_is_addable(int dtype);

/* How the bits of an element are seen as an integer that grows with the element (FORMAT.md, 6.1, ULP). */
enum shdi_order { SHDI_NO_ORDER = 0, SHDI_SIGNED, SHDI_UNSIGNED, SHDI_SIGN_AND_MAGNITUDE };

/* One of enum shdi_order. */
int shdi_dtype_order(int dtype);

SHDI_END

#endif
