// shd.h can be included and linked from C++.
#include <shd.h>

int main() {
    shd_file file;
    shd_status status;
    return shd_open(&file, "", 0, &status) == SHD_BAD_MAGIC && status.code == SHD_BAD_MAGIC ? 0 : 1;
}
