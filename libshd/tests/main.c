/* Runs all tests; with SHD_TEST_BRIEF in the environment, fewer damaged files and sums. The library is linked with
 * --wrap where the linker can: any allocation in it then fails. */
#include "check.h"

#include <stddef.h>
#include <stdlib.h>

unsigned long checks_made, checks_failed;
int is_brief;

void test_container(void);
void test_index(void);
void test_values(void);
void test_apply(void);
void test_sum(void);
void test_encode(void);
void test_from_base(void);
void test_kernels(void);
void test_hostile(void);

#ifdef WRAP_MALLOC
/* What is linked here calls these in place of malloc() and its like. */
static unsigned long allocations;

void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *memory, size_t size);

void *__wrap_malloc(size_t size) {
    (void)size;
    allocations++;
    return NULL;
}

void *__wrap_calloc(size_t count, size_t size) {
    (void)count;
    return __wrap_malloc(size);
}

void *__wrap_realloc(void *memory, size_t size) {
    (void)memory;
    return __wrap_malloc(size);
}
#endif

int main(void) {
    is_brief = getenv("SHD_TEST_BRIEF") != NULL;
    test_container();
    test_index();
    test_values();
    test_apply();
    test_sum();
    test_encode();
    test_from_base();
    test_kernels();
    test_hostile();
#ifdef WRAP_MALLOC
    CHECK(allocations == 0);
#endif
    printf("%lu checks, %lu failed\n", checks_made, checks_failed);
    return checks_failed != 0;
}
