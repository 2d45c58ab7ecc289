/* Well-formed UTF-8 by table 3-7 of the Unicode standard: no surrogates, no overlong forms, nothing over U+10FFFF. */
#include "utf8.h"

int shdi_valid_utf8(const uint8_t *text, uint64_t size) {
    uint64_t i = 0;
    while (i < size) {
        uint8_t lead = text[i++];
        uint64_t more = lead < 0x80 ? 0 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
        if (more == 0) {
            continue;
        }
        if (lead < 0xC2 || lead > 0xF4 || more > size - i) {
            return 0;
        }
        uint8_t second_least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        uint8_t second_most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (text[i] < second_least || text[i] > second_most) {
            return 0;
        }
        for (uint64_t j = 1; j < more; j++) {
            if ((text[i + j] & 0xC0) != 0x80) {
                return 0;
            }
        }
        i += more;
    }
    return 1;
}
