/* What an attacker's file is put through, by tests and fuzzers. */
#ifndef USE_H
#define USE_H

#include "support.h"

/* Does all that can be done with a file, loading its tensors with `check`. Returns 1 if the library kept what it
 * promises: no write beyond the weights, and no failure to apply what passed the full check. */
int use_file(const uint8_t *data, uint64_t size, int check);

#endif
