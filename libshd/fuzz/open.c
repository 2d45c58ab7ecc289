/* Opening and looking around: a file in memory and the same one through a callback are judged alike; and what a packed
 * one stands for. */
#include "fuzz.h"

static int read_bytes(void *context, uint64_t offset, void *buffer, size_t size) {
    const bytes *file = context;
    PROMISE(offset <= file->size && size <= file->size - offset);
    memcpy(buffer, file->data + offset, size);
    return 0;
}

static void look_around(const shd_file *file) {
    uint64_t cursor = 0;
    const char *key, *value;
    uint32_t key_size, value_size, number;
    while (shd_metadata_next(file, &cursor, &key, &key_size, &value, &value_size) == SHD_OK) {
        PROMISE(key_size != 0 && cursor <= file->metadata_size);
    }
    for (uint32_t i = 0; i < file->tensor_count; i++) {
        shd_tensor tensor;
        PROMISE(shd_tensor_at(file, i, &tensor, NULL) == SHD_OK);
        PROMISE(shd_find(file, tensor.name, tensor.name_size, &number) == SHD_OK && number == i);
        PROMISE(tensor.nnz <= tensor.numel);
    }
    PROMISE(shd_find(file, "", 0, &number) == SHD_NOT_FOUND);
}

static void unpack(const uint8_t *data, size_t size) {
    uint64_t room = shd_unpack_size(data, size), unpacked = 0;
    if (room == 0 || room > 1 << 22) {
        return;
    }
    PROMISE(room <= 195 * size);
    uint8_t *result = exactly(room);
    int code = shd_unpack(data, size, fake_zstd, NULL, result, room, &unpacked, NULL);
    PROMISE(code < SHD_INVALID_ARGUMENT);
    if (code == SHD_OK) {
        shd_file file;
        PROMISE(unpacked <= room && unpacked % 64 == 0);
        code = shd_open(&file, result, unpacked, NULL);
        PROMISE(code != SHD_UNKNOWN_FEATURE && code != SHD_HEADER_CHECKSUM && code != SHD_SECTION_CHECKSUM);
        look_around(&file);
    }
    free(result);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    unpack(data, size);
    shd_file file, other;
    shd_status status, other_status;
    uint8_t least[128];
    bytes source = {(uint8_t *)(uintptr_t)data, size};
    int code = shd_open(&file, data, size, &status);
    int other_code = shd_open_callback(&other, read_bytes, &source, size, least, sizeof least, &other_status);
    void *front = NULL;
    if (other_code == SHD_BUFFER_TOO_SMALL && other.front_size <= size) {
        uint64_t front_size = other.front_size;
        front = exactly(front_size);
        other_code = shd_open_callback(&other, read_bytes, &source, size, front, front_size, &other_status);
    }
    PROMISE(code == other_code && memcmp(&status, &other_status, sizeof status) == 0);
    PROMISE(code < SHD_INVALID_ARGUMENT);
    look_around(&file);
    if (code == SHD_OK) {
        look_around(&other);
    }
    free(front);
    return 0;
}
