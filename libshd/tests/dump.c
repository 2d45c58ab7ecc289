/* Prints what files hold, a line of JSON each, or the reason code of a refusal as a JSON string: for comparing libshd
 * with other readers. Ids are those of spec/REGISTRY.md, floats are given by their bits.
 *
 *     dump [--without-zstd] FILE...
 *
 * zstd is taken from the system's libzstd, if it has one; the last line of the output tells. */
#include <shd.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

/* ---- zstd ---- */

typedef struct zstd_library {
    unsigned long long (*content_size)(const void *, size_t);
    size_t (*frame_size)(const void *, size_t);
    size_t (*decompress)(void *, size_t, const void *, size_t);
} zstd_library;

static int unzstd(void *context, const void *source, size_t source_size, void *result, size_t size) {
    const zstd_library *zstd = context;
    return zstd->content_size(source, source_size) != size || zstd->frame_size(source, source_size) != source_size ||
           zstd->decompress(result, size, source, source_size) != size;
}

#if defined(__unix__) || defined(__APPLE__)
static int find_zstd(zstd_library *zstd) {
    void *library = dlopen("libzstd.so.1", RTLD_NOW);
    if (library == NULL) {
        library = dlopen("libzstd.1.dylib", RTLD_NOW);
    }
    if (library == NULL) {
        return 0;
    }
    /* ISO C has no cast from an object pointer to a function pointer. */
    *(void **)&zstd->content_size = dlsym(library, "ZSTD_getFrameContentSize");
    *(void **)&zstd->frame_size = dlsym(library, "ZSTD_findFrameCompressedSize");
    *(void **)&zstd->decompress = dlsym(library, "ZSTD_decompress");
    return zstd->content_size != NULL && zstd->frame_size != NULL && zstd->decompress != NULL;
}
#else
static int find_zstd(zstd_library *zstd) {
    (void)zstd;
    return 0;
}
#endif

/* ---- Memory ---- */

static void *take(uint64_t size) {
    void *memory = size <= SIZE_MAX ? malloc((size_t)size + (size == 0)) : NULL;
    if (memory == NULL) {
        fprintf(stderr, "out of memory\n");
        exit(2);
    }
    return memory;
}

/* ---- JSON ---- */

static void print_string(const char *text, uint32_t size) {
    putchar('"');
    for (uint32_t i = 0; i < size; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c < 0x20 || c == '"' || c == '\\') {
            printf("\\u%04x", c);
        } else {
            putchar(c);
        }
    }
    putchar('"');
}

static void print_metadata(const shd_file *file) {
    uint64_t cursor = 0;
    const char *key, *value, *comma = "";
    uint32_t key_size, value_size;
    printf("\"metadata\": {");
    while (shd_metadata_next(file, &cursor, &key, &key_size, &value, &value_size) == SHD_OK) {
        printf("%s", comma);
        print_string(key, key_size);
        printf(": ");
        print_string(value, value_size);
        comma = ", ";
    }
    printf("}");
}

static int print_positions(const shd_delta *delta) {
    uint64_t nnz = delta->tensor.nnz, count;
    int64_t *positions = take(nnz * sizeof *positions);
    int code = shd_positions(delta, 0, delta->block_count, positions, nnz, &count, NULL);
    printf("\"positions\": [");
    for (uint64_t i = 0; code == SHD_OK && i < count; i++) {
        printf("%s%" PRId64, i == 0 ? "" : ", ", positions[i]);
    }
    printf("]");
    free(positions);
    return code;
}

static int print_values(const shd_delta *delta) {
    const shd_tensor *t = &delta->tensor;
    uint32_t size = t->op == SHD_OP_ADD ? 4 : shd_dtype_size(t->dtype);
    uint8_t *bits = take(t->nnz * size);
    int code = t->op == SHD_OP_ADD ? shd_values(delta, 0, t->nnz, (float *)(void *)bits, NULL)
                                   : shd_elements(delta, 0, t->nnz, bits, NULL);
    printf("\"values\": [");
    for (uint64_t i = 0; code == SHD_OK && i < t->nnz; i++) {
        uint64_t element = 0;
        memcpy(&element, bits + i * size, size);
        printf("%s%" PRIu64, i == 0 ? "" : ", ", element);
    }
    printf("]");
    free(bits);
    return code;
}

static void print_fingerprint(const char *name, int is_there, uint64_t fingerprint) {
    if (is_there) {
        printf("\"%s\": %" PRIu64, name, fingerprint);
    } else {
        printf("\"%s\": null", name);
    }
}

/* `t` is the tensor in the file: a loaded one may have another index codec. */
static int print_tensor(const shd_tensor *t, const shd_delta *delta) {
    printf("{\"name\": ");
    print_string(t->name, t->name_size);
    printf(", \"dtype\": %d, \"op\": %d, \"index_codec\": %d, \"value_codec\": %d, \"shape\": [", t->dtype, t->op,
           t->index_codec, t->value_codec);
    for (uint32_t i = 0; i < t->rank; i++) {
        printf("%s%" PRIu64, i == 0 ? "" : ", ", t->dims[i]);
    }
    printf("], ");
    int code = print_positions(delta);
    printf(", ");
    code = code != SHD_OK ? code : print_values(delta);
    printf(", ");
    print_fingerprint("base_fingerprint", t->flags & SHD_HAS_BASE_FINGERPRINT, t->base_fingerprint);
    printf(", ");
    print_fingerprint("result_fingerprint", t->flags & SHD_HAS_RESULT_FINGERPRINT, t->result_fingerprint);
    printf("}");
    return code;
}

static int print_file(const shd_file *file, void *scratch, uint64_t scratch_size) {
    printf("{\"minor\": %d, \"digest\": \"", file->minor);
    for (size_t i = 0; i < sizeof file->digest; i++) {
        printf("%02x", file->digest[i]);
    }
    printf("\", ");
    print_metadata(file);
    printf(", \"tensors\": [");
    int code = SHD_OK;
    for (uint32_t i = 0; code == SHD_OK && i < file->tensor_count; i++) {
        shd_tensor tensor;
        shd_delta delta;
        printf("%s", i == 0 ? "" : ", ");
        code = shd_tensor_at(file, i, &tensor, NULL);
        code = code != SHD_OK ? code : shd_load(file, i, SHD_CHECK_ALL, scratch, scratch_size, &delta, NULL);
        code = code != SHD_OK ? code : print_tensor(&tensor, &delta);
    }
    printf("]}\n");
    return code;
}

/* ---- Files ---- */

static uint64_t scratch_of_all(const shd_file *file) {
    uint64_t most = 0;
    for (uint32_t i = 0; i < file->tensor_count; i++) {
        shd_tensor tensor;
        uint64_t size = shd_tensor_at(file, i, &tensor, NULL) == SHD_OK ? shd_scratch_size(file, &tensor) : 0;
        most = size > most ? size : most;
    }
    return most;
}

/* 0 for a file that was printed or refused; anything else is a fault of the library, since verified files decode. */
static int dump(const void *data, uint64_t size, zstd_library *zstd) {
    shd_file file = {0};
    int code = SHD_OK;
    uint64_t room = shd_unpack_size(data, size);
    void *unpacked = room != 0 ? take(room) : NULL;
    if (room != 0) {
        code = shd_unpack(data, size, zstd != NULL ? unzstd : NULL, zstd, unpacked, room, &size, NULL);
    }
    code = code != SHD_OK ? code : shd_open(&file, room != 0 ? unpacked : data, size, NULL);
    if (zstd != NULL) {
        shd_set_zstd(&file, unzstd, zstd);
    }
    uint64_t scratch_size = scratch_of_all(&file);
    void *scratch = take(scratch_size);
    code = code != SHD_OK ? code : shd_verify(&file, scratch, scratch_size, NULL);
    if (code != SHD_OK) {
        printf("\"%s\"\n", shd_error_name(code));
        code = SHD_OK;
    } else {
        code = print_file(&file, scratch, scratch_size);
    }
    free(scratch);
    free(unpacked);
    return code;
}

static void *read_file(const char *path, uint64_t *size) {
    FILE *stream = fopen(path, "rb");
    long end;
    if (stream == NULL || fseek(stream, 0, SEEK_END) != 0 || (end = ftell(stream)) < 0) {
        perror(path);
        exit(2);
    }
    rewind(stream);
    *size = (uint64_t)end;
    void *data = take(*size);
    if (fread(data, 1, (size_t)*size, stream) != *size) {
        perror(path);
        exit(2);
    }
    fclose(stream);
    return data;
}

int main(int count, char **arguments) {
    zstd_library library, *zstd = NULL;
    int first = 1;
    if (count > 1 && strcmp(arguments[1], "--without-zstd") == 0) {
        first = 2;
    } else if (find_zstd(&library)) {
        zstd = &library;
    }
    int code = SHD_OK;
    for (int i = first; i < count; i++) {
        uint64_t size;
        void *data = read_file(arguments[i], &size);
        int result = dump(data, size, zstd);
        code = result != SHD_OK ? result : code;
        free(data);
    }
    printf("{\"zstd\": %s}\n", zstd != NULL ? "true" : "false");
    if (code != SHD_OK) {
        fprintf(stderr, "a file that was verified does not decode: %s\n", shd_error_name(code));
    }
    return code != SHD_OK;
}
