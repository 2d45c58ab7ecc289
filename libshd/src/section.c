/* The bytes of a section: where they are, and that those that stand for nothing are zero. */
#include "section.h"

const uint8_t *shdi_view(const shd_file *file, uint64_t offset, uint64_t size, void *buffer) {
    /* A file that is read through a callback has its front in memory. */
    uint64_t resident = file->read == NULL ? file->size : file->front_size;
    if (file->data != NULL && offset <= resident && size <= resident - offset) {
        return file->data + offset;
    }
    if (file->read == NULL || file->read(file->read_context, offset, buffer, (size_t)size) != 0) {
        return NULL;
    }
    return buffer;
}

int shdi_check_padding(const shd_file *file, uint64_t end, uint32_t tensor, shd_status *status) {
    uint8_t buffer[64];
    uint64_t size = shdi_align64(end) - end;
    const uint8_t *bytes = size == 0 ? buffer : shdi_view(file, end, size, buffer);
    if (bytes == NULL) {
        return shdi_fail(status, SHD_READ_FAILED, tensor, end);
    }
    for (uint64_t i = 0; i < size; i++) {
        if (bytes[i] != 0) {
            return shdi_fail(status, SHD_PADDING_NOT_ZERO, tensor, end + i);
        }
    }
    return SHD_OK;
}

shdi_fault shdi_check_zeros(const uint8_t *section, uint64_t first_bit, uint64_t end) {
    uint64_t byte = first_bit / 8;
    uint8_t used = (uint8_t)((1u << (first_bit % 8)) - 1);
    for (; byte < end; byte++, used = 0) {
        if ((section[byte] & ~used) != 0) {
            return shdi_fault_at(SHD_PADDING_NOT_ZERO, byte);
        }
    }
    return shdi_ok();
}
