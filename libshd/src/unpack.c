/* Packed files: makes the file that one stands for (FORMAT.md, section 2.3). */
#include "bytes.h"
#include "container.h"
#include "table.h"

/* Bytes that are taken one after the other. */
typedef struct source {
    const uint8_t *next;
    uint64_t left;
} source;

/* What is written: all of it is in the caller's buffer, whose size shd_unpack_size() has told. */
typedef struct target {
    uint8_t *data;
    uint64_t size;
} target;

static void take(source *from, uint64_t size, target *to) {
    memcpy(to->data + to->size, from->next, (size_t)size);
    from->next += size;
    from->left -= size;
    to->size += size;
}

static void put_zeros(target *to, uint64_t size) {
    memset(to->data + to->size, 0, (size_t)size);
    to->size += size;
}

SHDI_ONCE uint64_t shd_unpack_size(const void *data, uint64_t size) {
    const uint8_t *header = data;
    if (data == NULL || size < SHDI_HEADER_SIZE || size > (uint64_t)PTRDIFF_MAX ||
        (shdi_load64(header + AT_INCOMPATIBLE) & SHDI_FEATURE_PACKED) == 0) {
        return 0;
    }
    /* Records and leads are as long as in CONTROL, slack and padding of a record's sections shorter than the record; and
     * CONTROL lies behind. */
    return size + 256 + 3 * shdi_min(shdi_load32(header + AT_CONTROL_DECODED), SHDI_MAX_ZSTD_RATIO * size);
}

/* Makes the section of a record, and completes the record. */
SHDI_ONCE static int unpack_section(uint8_t *record, int values, source *leads, source *rest, target *to) {
    uint8_t *fields = record + (values ? AT_VALUES : AT_INDEX), *crc = record + (values ? AT_VALUES_CRC : AT_INDEX_CRC);
    uint64_t lead = shdi_load64(fields), stored = shdi_load64(fields + 8);
    int is_zstd = (record[AT_FLAGS] & (values ? SHD_VALUES_ZSTD : SHD_INDEX_ZSTD)) != 0;
    if (shdi_load32(crc) != 0 || (!is_zstd && shdi_load64(fields + 16) != 0)) {
        return SHD_RESERVED_NOT_ZERO;
    }
    uint64_t tail = stored == 0 || is_zstd ? 0 : SHDI_SLACK;
    if (lead > stored || stored - lead < tail || lead > leads->left) {
        return SHD_BAD_SIZE;
    }
    if (stored - lead - tail > rest->left) {
        return SHD_SECTION_LAYOUT;
    }
    uint64_t offset = to->size;
    take(leads, lead, to);
    take(rest, stored - lead - tail, to);
    put_zeros(to, tail);
    shdi_store32(crc, shd_crc32(0, to->data + offset, (size_t)stored));
    put_zeros(to, shdi_align64(to->size) - to->size);
    shdi_store64(fields, offset);
    if (!is_zstd) {
        shdi_store64(fields + 16, stored);
    }
    return SHD_OK;
}

/* Makes the records and their sections, of which `to` has what comes before. */
SHDI_ONCE static int unpack_records(uint64_t count, const uint8_t *columns, source *leads, source *rest, target *to) {
    uint32_t name_offset = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint8_t *record = to->data + SHDI_HEADER_SIZE + SHDI_RECORD_SIZE * i;
        for (uint64_t j = 0; j < SHDI_RECORD_SIZE; j++) {
            record[j] = columns[count * j + i];
        }
        if (shdi_load32(record + AT_NAME_OFFSET) != 0) {
            return SHD_RESERVED_NOT_ZERO;
        }
        shdi_store32(record + AT_NAME_OFFSET, name_offset);
        name_offset += shdi_load16(record + AT_NAME_SIZE);
        for (int values = 0; values < 2; values++) {
            int code = unpack_section(record, values, leads, rest, to);
            if (code != SHD_OK) {
                return code;
            }
        }
    }
    return leads->left != 0 ? SHD_BAD_SIZE : rest->left != 0 ? SHD_SECTION_LAYOUT : SHD_OK;
}

/* Makes the header and, once TABLE is there, the padding behind it and what follows. */
SHDI_ONCE static void unpack_front(const uint8_t *header, const shdi_part parts[4], const uint8_t *names, uint8_t *data,
                                   uint64_t size) {
    source from = {names, UINT64_MAX};
    target to = {data, parts[0].offset + parts[0].size};
    memcpy(data, header, SHDI_HEADER_SIZE);
    for (uint32_t i = 0; i < 4; i++) {
        if (i > 0) {
            take(&from, parts[i].size, &to);
        }
        shdi_store32(data + AT_TABLE_CRC + 4 * i, shd_crc32(0, data + parts[i].offset, (size_t)parts[i].size));
        put_zeros(&to, shdi_align64(to.size) - to.size);
    }
    shdi_store64(data + AT_INCOMPATIBLE, shdi_load64(header + AT_INCOMPATIBLE) & ~(uint64_t)SHDI_FEATURE_PACKED);
    shdi_store64(data + AT_FILE_SIZE, size);
    shdi_store64(data + AT_CONTROL_STORED, 0);
    shdi_store32(data + AT_HEADER_CRC, shd_crc32(0, data, AT_HEADER_CRC));
}

/* The checks from the header to CONTROL. */
SHDI_ONCE static shdi_fault check_control(const uint8_t *header, const uint8_t *data, uint64_t size, uint64_t front) {
    uint64_t stored = shdi_load32(header + AT_CONTROL_STORED), decoded = shdi_load32(header + AT_CONTROL_DECODED);
    uint64_t rest = SHDI_HEADER_SIZE + stored;
    if (rest > size) {
        return shdi_fault_at(SHD_SECTION_LAYOUT, SHDI_HEADER_SIZE);
    }
    if (shd_crc32(0, data + SHDI_HEADER_SIZE, (size_t)stored) != shdi_load32(header + AT_TABLE_CRC)) {
        return shdi_fault_at(SHD_SECTION_CHECKSUM, SHDI_HEADER_SIZE);
    }
    if (shd_crc32(0, data + rest, (size_t)(size - rest)) != shdi_load32(header + AT_NAMES_CRC)) {
        return shdi_fault_at(SHD_SECTION_CHECKSUM, rest);
    }
    if (decoded > stored * SHDI_MAX_ZSTD_RATIO) {
        return shdi_fault_at(SHD_ZSTD_RATIO, SHDI_HEADER_SIZE);
    }
    return decoded < front ? shdi_fault_at(SHD_BAD_SIZE, SHDI_HEADER_SIZE) : shdi_ok();
}

SHDI_ONCE int shd_unpack(const void *data, uint64_t size, shd_zstd_fn zstd, void *context, void *result,
                         uint64_t capacity, uint64_t *unpacked, shd_status *status) {
    const uint8_t *bytes = data;
    uint8_t header[SHDI_HEADER_SIZE]; /* a copy, so that it stays as it was checked */
    shd_file file;
    if (unpacked == NULL || result == NULL || (data == NULL && size != 0) || size > (uint64_t)PTRDIFF_MAX) {
        return shdi_fail(status, SHD_INVALID_ARGUMENT, SHD_NO_TENSOR, 0);
    }
    file.size = size;
    memset(header, 0, sizeof header);
    memcpy(header, bytes, (size_t)shdi_min(size, sizeof header));
    int code = shdi_check_header(&file, header, size, status);
    if (code != SHD_OK) {
        return code;
    }
    uint64_t room = shd_unpack_size(data, size);
    if ((shdi_load64(header + AT_INCOMPATIBLE) & SHDI_FEATURE_PACKED) == 0) {
        return shdi_fail(status, SHD_INVALID_ARGUMENT, SHD_NO_TENSOR, 0);
    }
    shdi_part parts[4];
    target to = {result, shdi_lay_out(header, parts)};
    uint64_t front = parts[0].size + parts[1].size + parts[2].size + parts[3].size;
    shdi_fault fault = check_control(header, bytes, size, front);
    if (fault.code == SHD_OK && zstd == NULL) {
        fault = shdi_fault_at(SHD_ZSTD_UNAVAILABLE, SHDI_HEADER_SIZE);
    }
    if (fault.code == SHD_OK && (room == 0 || room > capacity)) {
        return shdi_fail(status, SHD_BUFFER_TOO_SMALL, SHD_NO_TENSOR, 0);
    }
    if (fault.code == SHD_OK) {
        uint64_t stored = shdi_load32(header + AT_CONTROL_STORED), decoded = shdi_load32(header + AT_CONTROL_DECODED);
        uint8_t *control = to.data + room - decoded;
        source leads = {control + front, decoded - front};
        source rest = {bytes + SHDI_HEADER_SIZE + stored, size - SHDI_HEADER_SIZE - stored};
        fault.offset = SHDI_HEADER_SIZE;
        fault.code = zstd(context, bytes + SHDI_HEADER_SIZE, (size_t)stored, control, (size_t)decoded) == 0
                         ? unpack_records(parts[0].size / SHDI_RECORD_SIZE, control, &leads, &rest, &to)
                         : SHD_BAD_ZSTD;
    }
    if (fault.code == SHD_OK) {
        unpack_front(header, parts, to.data + room - shdi_load32(header + AT_CONTROL_DECODED) + parts[0].size, to.data,
                     to.size);
        *unpacked = to.size;
    }
    return shdi_fail(status, fault.code, SHD_NO_TENSOR, fault.code == SHD_OK ? 0 : fault.offset);
}
