/* For libFuzzer; cmake -DSHD_FUZZ=ON with clang builds it. The first byte of an input says how, the rest is a file. Its
 * checksums are made right first, as otherwise no change would get past them. */
#include "../tests/use.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) {
        return 0;
    }
    bytes file = {NULL, size - 1};
    int check = data[0] & 1 ? SHD_CHECK_ALL : SHD_CHECK_SIZES;
    file.data = malloc(file.size + (file.size == 0)); /* exactly, for the address sanitizer */
    if (file.data == NULL) {
        return 0;
    }
    memcpy(file.data, data + 1, file.size);
    if (file.size >= 128 && (data[0] & 4) == 0) {
        uint64_t stated = file.size;
        memcpy(file.data + 32, &stated, sizeof stated);
        fix_all_checksums(file);
    }
    if (!use_file(file.data, file.size, check | (data[0] & 2 ? SHD_SCALAR : 0))) {
        abort();
    }
    free(file.data);
    return 0;
}
