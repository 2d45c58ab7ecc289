/* The dtypes of REGISTRY.md. */
#ifndef SHD_DTYPES_H
#define SHD_DTYPES_H

#include "internal.h"

SHDI_BEGIN

/* A file may have this dtype: one of the registry's, SHD_UNSPECIFIED included. */
int shdi_dtype_is_known(int dtype);

/* ADD applies to weights of this dtype. */
int shdi_dtype_is_addable(int dtype);

SHDI_END

#endif
