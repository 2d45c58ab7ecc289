#include "fuzz.h"

void *exactly(uint64_t size) {
    void *memory = malloc(size);
    if (memory == NULL && size != 0) {
        exit(0); /* out of memory is no finding */
    }
    return memory;
}

int fake_zstd(void *context, const void *source, size_t source_size, void *result, size_t size) {
    const uint8_t *from = source;
    uint8_t *to = result;
    (void)context;
    for (size_t i = 0; i < size; i++) {
        to[i] = from[i % source_size];
    }
    return source_size == 0 || from[0] == 0xFF;
}

loaded load(const shd_file *file, uint32_t number, int check) {
    loaded t = {.code = SHD_BUFFER_TOO_SMALL};
    shd_tensor tensor;
    PROMISE(shd_tensor_at(file, number, &tensor, NULL) == SHD_OK);
    uint64_t size = shd_scratch_size(file, &tensor);
    if (size <= 1 << 20) {
        t.scratch = exactly(size);
        t.code = shd_load(file, number, check, t.scratch, size, &t.delta, &t.status);
    }
    return t;
}

/* The bytes [start, start + size) of the input that a record of it, or a section, takes. */
typedef struct extent {
    uint64_t start, size;
} extent;

static extent random_part(const uint8_t *file, size_t size, unsigned int seed) {
    extent part = {0, size};
    uint32_t tensors;
    if (file[16] & 4) { /* packed: the header, or what follows */
        part.start = seed / 4 % 4 != 0 && size > 128 ? 128 : 0;
        part.size -= part.start;
        return part;
    }
    memcpy(&tensors, file + 12, sizeof tensors);
    if (tensors == 0 || tensors > (size - 128) / 160) {
        return part;
    }
    uint64_t record = 128 + 160 * (uint64_t)(seed / 16 % tensors);
    if (seed / 4 % 4 != 0) { /* INDEX or VALUES */
        memcpy(&part, file + record + (seed / 4 % 2 ? 40 : 64), sizeof part);
    }
    if (part.size == 0 || part.start >= size || part.size > size - part.start) {
        part.start = record;
        part.size = 160;
    }
    return part;
}

/* Nearly every change would be refused for its checksum, or for moving what lies behind it. So three of four change
 * the inside of a part in place, and seven of eight files get right checksums. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed) {
    if (size >= 128 && seed % 4 != 0) {
        extent part = random_part(data, size, seed);
        (void)LLVMFuzzerMutate(data + part.start, (size_t)part.size, (size_t)part.size);
    } else {
        size = LLVMFuzzerMutate(data, size, max_size);
    }
    if (size >= 128 && seed / 65536 % 8 != 0) {
        bytes file = {data, size};
        memcpy(data + 32, &file.size, sizeof file.size);
        if (data[16] & 4) {
            fix_packed_checksums(file);
        } else {
            fix_all_checksums(file);
        }
    }
    return size;
}
