/* Patches a file that holds the weights of one tensor and nothing else, and takes the patch back.
 *
 *     patch_raw apply  DELTA.shd TENSOR WEIGHTS DTYPE UNDO [STRENGTH]
 *     patch_raw revert DELTA.shd TENSOR WEIGHTS DTYPE UNDO
 *
 * DTYPE is f32, f16 or bf16. UNDO receives what is overwritten; it is written first, and must not be there yet. */
#include <shd.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct buffer {
    void *data;
    uint64_t size;
} buffer;

static void fail(const char *what, const char *why) {
    fprintf(stderr, "patch_raw: %s: %s\n", what, why);
    exit(1);
}

static void must(int code, const char *what) {
    if (code != SHD_OK) {
        fail(what, shd_error_name(code));
    }
}

static buffer allocate(uint64_t size) {
    buffer b = {size < SIZE_MAX ? malloc((size_t)size + 1) : NULL, size};
    if (b.data == NULL) {
        fail("memory", "there is not enough");
    }
    return b;
}

static buffer read_file(const char *path) {
    FILE *stream = fopen(path, "rb");
    long size = -1;
    if (stream != NULL && fseek(stream, 0, SEEK_END) == 0) {
        size = ftell(stream);
    }
    if (size < 0) {
        fail(path, "cannot be read");
    }
    buffer b = allocate((uint64_t)size);
    rewind(stream);
    if (fread(b.data, 1, (size_t)b.size, stream) != b.size) {
        fail(path, "cannot be read");
    }
    fclose(stream);
    return b;
}

static void write_file(const char *path, const char *mode, buffer b) {
    FILE *stream = fopen(path, mode);
    int failed = stream == NULL || fwrite(b.data, 1, (size_t)b.size, stream) != b.size;
    if (stream == NULL || fclose(stream) != 0 || failed) {
        fail(path, "cannot be written");
    }
}

static double read_strength(const char *text) {
    char *end;
    double strength = strtod(text, &end);
    if (*text == '\0' || *end != '\0') {
        fail(text, "is no strength");
    }
    return strength;
}

static int dtype_of(const char *name) {
    static const struct {
        const char *name;
        int dtype;
    } dtypes[] = {{"f32", SHD_F32}, {"f16", SHD_F16}, {"bf16", SHD_BF16}};
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
        if (strcmp(name, dtypes[i].name) == 0) {
            return dtypes[i].dtype;
        }
    }
    fail(name, "is no dtype; take f32, f16 or bf16");
    return 0;
}

/* A wrong base, or one that is patched already, shows before anything is written. */
static void check_base(const shd_delta *delta, const shd_weights *target, const char *path) {
    uint64_t fingerprint;
    must(shd_fingerprint(delta, target, 0, delta->block_count, &fingerprint, NULL), path);
    if (delta->tensor.flags & SHD_HAS_BASE_FINGERPRINT && fingerprint != delta->tensor.base_fingerprint) {
        fail(path, "is not what the delta was made against, or is patched already");
    }
}

int main(int count, char **arguments) {
    int applies = count > 1 && strcmp(arguments[1], "apply") == 0;
    int reverts = count > 1 && strcmp(arguments[1], "revert") == 0;
    if (!(applies && (count == 7 || count == 8)) && !(reverts && count == 7)) {
        fprintf(stderr, "usage: patch_raw apply DELTA.shd TENSOR WEIGHTS DTYPE UNDO [STRENGTH]\n"
                        "       patch_raw revert DELTA.shd TENSOR WEIGHTS DTYPE UNDO\n");
        return 2;
    }
    const char *delta_path = arguments[2], *name = arguments[3], *path = arguments[4], *undo_path = arguments[6];
    double strength = count == 8 ? read_strength(arguments[7]) : 1.0;

    shd_file file;
    shd_delta delta;
    uint32_t number;
    buffer bytes = read_file(delta_path);
    must(shd_open(&file, bytes.data, bytes.size, NULL), delta_path);
    must(shd_find(&file, name, strlen(name), &number), name);
    must(shd_load(&file, number, SHD_CHECK_ALL, NULL, 0, &delta, NULL), name);

    buffer weights = read_file(path);
    shd_weights target = {.data = weights.data, .count = delta.tensor.numel, .dtype = dtype_of(arguments[5])};
    uint32_t size = shd_dtype_size(target.dtype);
    if (weights.size % size != 0 || weights.size / size != delta.tensor.numel) {
        fail(path, "is not of the tensor's size");
    }
    if (applies) {
        buffer saved = allocate(delta.tensor.nnz * size);
        check_base(&delta, &target, path);
        must(shd_apply(&delta, &target, strength, 0, delta.block_count, saved.data, NULL), path);
        write_file(undo_path, "wbx", saved);
        free(saved.data);
    } else {
        buffer saved = read_file(undo_path);
        if (saved.size != delta.tensor.nnz * size) {
            fail(undo_path, "is not of this delta");
        }
        must(shd_revert(&delta, &target, 0, delta.block_count, saved.data, NULL), path);
        free(saved.data);
    }
    write_file(path, "r+b", weights);
    free(weights.data);
    free(bytes.data);
    return 0;
}
