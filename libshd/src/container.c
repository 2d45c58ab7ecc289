/* Opening a file: the header and the four sections of the whole file, in the order of the checks (FORMAT.md,
 * section 2). */
#include "container.h"

#include "bytes.h"
#include "section.h"
#include "table.h"
#include "utf8.h"

static const uint8_t magic[8] = {0x89, 'S', 'H', 'D', '\r', '\n', 0x1A, '\n'};

SHDI_ONCE int shdi_check_header(const shd_file *file, const uint8_t *header, uint64_t available, shd_status *status) {
    if (available < sizeof magic || memcmp(header, magic, sizeof magic) != 0) {
        return shdi_fail(status, SHD_BAD_MAGIC, SHD_NO_TENSOR, 0);
    }
    if (available < SHDI_HEADER_SIZE) {
        return shdi_fail(status, SHD_TRUNCATED, SHD_NO_TENSOR, available);
    }
    if (shdi_load16(header + AT_MAJOR) != 1) {
        return shdi_fail(status, SHD_UNSUPPORTED_VERSION, SHD_NO_TENSOR, AT_MAJOR);
    }
    if (shd_crc32(0, header, AT_HEADER_CRC) != shdi_load32(header + AT_HEADER_CRC)) {
        return shdi_fail(status, SHD_HEADER_CHECKSUM, SHD_NO_TENSOR, AT_HEADER_CRC);
    }
    uint64_t features = shdi_load64(header + AT_INCOMPATIBLE);
    if ((features & ~(uint64_t)(SHDI_FEATURE_ZSTD | SHDI_FEATURE_PACKED)) != 0) {
        return shdi_fail(status, SHD_UNKNOWN_FEATURE, SHD_NO_TENSOR, AT_INCOMPATIBLE);
    }
    int is_packed = (features & SHDI_FEATURE_PACKED) != 0;
    for (uint64_t i = is_packed ? AT_METADATA_CRC : AT_CONTROL_STORED; i < AT_HEADER_CRC; i++) {
        int has_meaning = is_packed && i >= AT_DIGEST && i < AT_ZERO;
        if (header[i] != 0 && !has_meaning) {
            return shdi_fail(status, SHD_RESERVED_NOT_ZERO, SHD_NO_TENSOR, i);
        }
    }
    uint64_t file_size = shdi_load64(header + AT_FILE_SIZE);
    if (file->size < file_size) {
        return shdi_fail(status, SHD_TRUNCATED, SHD_NO_TENSOR, file->size);
    }
    if (file->size > file_size) {
        return shdi_fail(status, SHD_TRAILING_DATA, SHD_NO_TENSOR, file_size);
    }
    static const struct {
        uint32_t offset;
        uint64_t most;
    } limits[] = {
        {AT_NAMES_SIZE, SHDI_MAX_NAMES_SIZE},
        {AT_METADATA_SIZE, SHDI_MAX_METADATA_SIZE},
        {AT_EXTENSION_SIZE, SHDI_MAX_EXTENSION_SIZE},
    };
    if (shdi_load32(header + AT_TENSOR_COUNT) > SHDI_MAX_TENSORS) {
        return shdi_fail(status, SHD_LIMIT_EXCEEDED, SHD_NO_TENSOR, AT_TENSOR_COUNT);
    }
    for (size_t i = 0; i < sizeof limits / sizeof limits[0]; i++) {
        if (shdi_load64(header + limits[i].offset) > limits[i].most) {
            return shdi_fail(status, SHD_LIMIT_EXCEEDED, SHD_NO_TENSOR, limits[i].offset);
        }
    }
    return SHD_OK;
}

SHDI_ONCE uint64_t shdi_lay_out(const uint8_t *header, shdi_part parts[4]) {
    parts[0].size = (uint64_t)SHDI_RECORD_SIZE * shdi_load32(header + AT_TENSOR_COUNT);
    parts[1].size = shdi_load64(header + AT_NAMES_SIZE);
    parts[2].size = shdi_load64(header + AT_METADATA_SIZE);
    parts[3].size = shdi_load64(header + AT_EXTENSION_SIZE);
    uint64_t offset = SHDI_HEADER_SIZE;
    for (uint32_t i = 0; i < 4; i++) {
        parts[i].offset = offset;
        parts[i].crc = shdi_load32(header + AT_TABLE_CRC + 4 * i);
        offset = shdi_align64(offset + parts[i].size);
    }
    return offset;
}

SHDI_ONCE static int check_part(const shd_file *file, const shdi_part *section, shd_status *status) {
    uint8_t buffer[4096]; /* for EXTENSION, which no caller keeps in memory */
    uint32_t crc = 0;
    for (uint64_t done = 0; done < section->size;) {
        uint64_t size = shdi_min(section->size - done, sizeof buffer);
        const uint8_t *bytes = shdi_view(file, section->offset + done, size, buffer);
        if (bytes == NULL) {
            return shdi_fail(status, SHD_READ_FAILED, SHD_NO_TENSOR, section->offset + done);
        }
        crc = shd_crc32(crc, bytes, (size_t)size);
        done += size;
    }
    if (crc != section->crc) {
        return shdi_fail(status, SHD_SECTION_CHECKSUM, SHD_NO_TENSOR, section->offset);
    }
    return shdi_check_padding(file, section->offset + section->size, SHD_NO_TENSOR, status);
}

SHDI_ONCE int shd_metadata_next(const shd_file *file, uint64_t *cursor, const char **key, uint32_t *key_size,
                                const char **value, uint32_t *value_size) {
    if (file == NULL || cursor == NULL || key == NULL || key_size == NULL || value == NULL || value_size == NULL) {
        return SHD_INVALID_ARGUMENT;
    }
    if (*cursor >= file->metadata_size) {
        return SHD_NOT_FOUND;
    }
    uint64_t left = file->metadata_size - *cursor;
    if (left < 8) {
        return SHD_BAD_METADATA;
    }
    const uint8_t *pair = file->data + file->metadata_offset + *cursor;
    uint32_t key_bytes = shdi_load32(pair);
    uint32_t value_bytes = shdi_load32(pair + 4);
    if ((uint64_t)key_bytes + value_bytes > left - 8) {
        return SHD_BAD_METADATA;
    }
    *key = (const char *)pair + 8;
    *key_size = key_bytes;
    *value = (const char *)pair + 8 + key_bytes;
    *value_size = value_bytes;
    *cursor += 8 + (uint64_t)key_bytes + value_bytes;
    return SHD_OK;
}

static int strictly_less(const char *a, uint32_t a_size, const char *b, uint32_t b_size) {
    int order = memcmp(a, b, a_size < b_size ? a_size : b_size);
    return order < 0 || (order == 0 && a_size < b_size);
}

SHDI_ONCE static int check_metadata(const shd_file *file, shd_status *status) {
    const char *last_key = "";
    uint32_t last_key_size = 0;
    uint64_t cursor = 0;
    for (;;) {
        const char *key, *value;
        uint32_t key_size, value_size;
        uint64_t start = cursor;
        int code = shd_metadata_next(file, &cursor, &key, &key_size, &value, &value_size);
        if (code == SHD_NOT_FOUND) {
            return SHD_OK;
        }
        if (code != SHD_OK || key_size == 0 || !strictly_less(last_key, last_key_size, key, key_size) ||
            !shdi_valid_utf8((const uint8_t *)key, key_size) ||
            !shdi_valid_utf8((const uint8_t *)value, value_size)) {
            return shdi_fail(status, SHD_BAD_METADATA, SHD_NO_TENSOR, file->metadata_offset + start);
        }
        last_key = key;
        last_key_size = key_size;
    }
}

/* Checks everything after the header, once the front is in memory. */
SHDI_ONCE static int check_sections(shd_file *file, const shdi_part parts[4], uint64_t sections_offset, shd_status *status) {
    for (int i = 0; i < 4; i++) {
        int code = check_part(file, &parts[i], status);
        if (code != SHD_OK) {
            return code;
        }
    }
    int code = check_metadata(file, status);
    return code != SHD_OK ? code : shdi_check_table(file, sections_offset, status);
}

SHDI_ONCE static void take_header(shd_file *file, const uint8_t *header, const shdi_part parts[4]) {
    file->front_size = parts[3].offset;
    file->incompatible = shdi_load64(header + AT_INCOMPATIBLE);
    file->compatible = shdi_load64(header + AT_COMPATIBLE);
    file->names_offset = parts[1].offset;
    file->names_size = parts[1].size;
    file->metadata_offset = parts[2].offset;
    file->metadata_size = parts[2].size;
    file->tensor_count = shdi_load32(header + AT_TENSOR_COUNT);
    file->minor = shdi_load16(header + AT_MINOR);
    memcpy(file->digest, header + AT_DIGEST, sizeof file->digest);
}

SHDI_ONCE static int open_any(shd_file *file, void *front, uint64_t front_size, shd_status *status) {
    uint8_t header[SHDI_HEADER_SIZE];
    uint64_t available = shdi_min(file->size, SHDI_HEADER_SIZE);
    const uint8_t *bytes = available == 0 ? header : shdi_view(file, 0, available, header);
    if (bytes == NULL) {
        return shdi_fail(status, SHD_READ_FAILED, SHD_NO_TENSOR, 0);
    }
    if (bytes != header) {
        memcpy(header, bytes, (size_t)available);
    }
    int code = shdi_check_header(file, header, available, status);
    if (code != SHD_OK) {
        return code;
    }
    if ((shdi_load64(header + AT_INCOMPATIBLE) & SHDI_FEATURE_PACKED) != 0) {
        return shdi_fail(status, SHD_UNKNOWN_FEATURE, SHD_NO_TENSOR, AT_INCOMPATIBLE); /* shd_unpack() knows it */
    }
    shdi_part parts[4];
    uint64_t sections_offset = shdi_lay_out(header, parts);
    if (sections_offset > file->size) {
        return shdi_fail(status, SHD_SECTION_LAYOUT, SHD_NO_TENSOR, AT_EXTENSION_SIZE);
    }
    take_header(file, header, parts);
    if (file->read != NULL) {
        if (front_size < file->front_size) {
            return shdi_fail(status, SHD_BUFFER_TOO_SMALL, SHD_NO_TENSOR, 0);
        }
        if (file->read(file->read_context, 0, front, (size_t)file->front_size) != 0) {
            return shdi_fail(status, SHD_READ_FAILED, SHD_NO_TENSOR, 0);
        }
        file->data = front;
    }
    return check_sections(file, parts, sections_offset, status);
}

/* A file that was refused has no tensors, so callers may go on. */
SHDI_ONCE static int finish(shd_file *file, int code, shd_status *status) {
    if (code != SHD_OK) {
        file->tensor_count = 0;
        file->metadata_size = 0;
        return code;
    }
    return shdi_fail(status, SHD_OK, SHD_NO_TENSOR, 0);
}

SHDI_ONCE int shd_open(shd_file *file, const void *data, uint64_t size, shd_status *status) {
    if (file == NULL || (data == NULL && size != 0) || size > (uint64_t)PTRDIFF_MAX) {
        return shdi_fail(status, SHD_INVALID_ARGUMENT, SHD_NO_TENSOR, 0);
    }
    memset(file, 0, sizeof *file);
    file->data = data;
    file->size = size;
    return finish(file, open_any(file, NULL, 0, status), status);
}

SHDI_ONCE int shd_open_callback(shd_file *file, shd_read_fn read, void *context, uint64_t size, void *front,
                                uint64_t front_size, shd_status *status) {
    if (file == NULL || read == NULL || front == NULL || size > (uint64_t)INT64_MAX) {
        return shdi_fail(status, SHD_INVALID_ARGUMENT, SHD_NO_TENSOR, 0);
    }
    memset(file, 0, sizeof *file);
    file->read = read;
    file->read_context = context;
    file->size = size;
    return finish(file, open_any(file, front, front_size, status), status);
}

void shd_set_zstd(shd_file *file, shd_zstd_fn zstd, void *context) {
    file->zstd = zstd;
    file->zstd_context = context;
}
