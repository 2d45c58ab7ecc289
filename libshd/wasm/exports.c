/* What shd.mjs calls: libshd with numbers that JavaScript has, and without structs. Whole tensors, fully checked.
 * Addresses of structs come from there; shd_struct_size() says how large they are. Counts are doubles: exact, up to
 * 2^53, which is more than a memory of 32 bits holds. */
#include <shd.h>

#define EXPORT(name) __attribute__((export_name(name)))

EXPORT("struct_size") uint32_t struct_size(int which) { return (uint32_t)shd_struct_size(which); }
EXPORT("error_name") const char *error_name(int code) { return shd_error_name(code); }
EXPORT("dtype_size") uint32_t dtype_size(int dtype) { return shd_dtype_size(dtype); }

/* A packed file is refused, since there is no zstd here; nothing is written then. */
EXPORT("open") int open_file(shd_file *file, const void *data, uint32_t size) {
    uint64_t unpacked;
    return shd_unpack_size(data, size) == 0 ? shd_open(file, data, size, NULL)
                                            : shd_unpack(data, size, NULL, NULL, file, 0, &unpacked, NULL);
}

EXPORT("tensor_count") uint32_t tensor_count(const shd_file *file) { return file->tensor_count; }
EXPORT("tensor_at") int tensor_at(const shd_file *file, uint32_t number, shd_tensor *tensor) {
    return shd_tensor_at(file, number, tensor, NULL);
}

EXPORT("name") const char *tensor_name(const shd_tensor *tensor) { return tensor->name; }
EXPORT("name_size") uint32_t tensor_name_size(const shd_tensor *tensor) { return tensor->name_size; }
EXPORT("rank") uint32_t tensor_rank(const shd_tensor *tensor) { return tensor->rank; }
EXPORT("dim") double tensor_dim(const shd_tensor *tensor, uint32_t i) { return (double)tensor->dims[i]; }
EXPORT("numel") double tensor_numel(const shd_tensor *tensor) { return (double)tensor->numel; }
EXPORT("nnz") double tensor_nnz(const shd_tensor *tensor) { return (double)tensor->nnz; }
EXPORT("dtype") int tensor_dtype(const shd_tensor *tensor) { return tensor->dtype; }
EXPORT("op") int tensor_op(const shd_tensor *tensor) { return tensor->op; }

/* There is no zstd here, but files with it are to be refused for that. */
EXPORT("scratch_size") double scratch_size(const shd_file *file, const shd_tensor *tensor) {
    return (double)shd_scratch_size(file, tensor);
}

EXPORT("load") int load(const shd_file *file, uint32_t number, void *scratch, uint32_t size, shd_delta *delta) {
    return shd_load(file, number, SHD_CHECK_ALL, scratch, size, delta, NULL);
}

EXPORT("positions") int positions(const shd_delta *delta, int64_t *result) {
    uint64_t count;
    return shd_positions(delta, 0, delta->block_count, result, delta->tensor.nnz, &count, NULL);
}

EXPORT("values") int values(const shd_delta *delta, float *result) {
    return shd_values(delta, 0, delta->tensor.nnz, result, NULL);
}

/* 1 if the weights are the base that the delta was made against, or it does not say. */
EXPORT("fits") int fits(const shd_delta *delta, void *data, uint32_t count, int dtype) {
    shd_weights weights = {data, 0, count, dtype, 0};
    uint64_t fingerprint;
    return shd_fingerprint(delta, &weights, 0, delta->block_count, &fingerprint, NULL) == SHD_OK &&
           (!(delta->tensor.flags & SHD_HAS_BASE_FINGERPRINT) || fingerprint == delta->tensor.base_fingerprint);
}

EXPORT("apply") int apply(const shd_delta *delta, void *data, uint32_t count, int dtype, double strength, void *saved) {
    shd_weights weights = {data, 0, count, dtype, 0};
    return delta->tensor.numel != count
               ? SHD_WRONG_SHAPE
               : shd_apply(delta, &weights, strength, 0, delta->block_count, saved, NULL);
}

EXPORT("revert") int revert(const shd_delta *delta, void *data, uint32_t count, int dtype, const void *saved) {
    shd_weights weights = {data, 0, count, dtype, 0};
    return delta->tensor.numel != count ? SHD_WRONG_SHAPE
                                        : shd_revert(delta, &weights, 0, delta->block_count, saved, NULL);
}
