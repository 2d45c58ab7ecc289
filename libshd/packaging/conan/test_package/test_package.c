#include <shd.h>
#include <stdio.h>
#include <string.h>

/* The library that is linked is that of the header, and refuses what is no file. */
int main(void) {
    static const unsigned char nothing[128];
    shd_file file;
    int code = shd_open(&file, nothing, sizeof nothing, NULL);
    printf("libshd %s, %s: %s\n", shd_version(), shd_simd(), shd_error_name(code));
    return code == SHD_BAD_MAGIC && shd_abi() == SHD_ABI && strcmp(shd_version(), SHD_VERSION) == 0 ? 0 : 1;
}
