/* The whole test framework: CHECK counts, and says where and what. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>

extern unsigned long checks_made, checks_failed;
extern int is_brief; /* try fewer damaged files and sums */

#define CHECK(condition)                                                              \
    do {                                                                              \
        checks_made++;                                                                \
        if (!(condition)) {                                                           \
            checks_failed++;                                                          \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);   \
        }                                                                             \
    } while (0)

/* For codes of libshd: says both by name. */
#define CHECK_CODE(expression, expected)                                                                \
    do {                                                                                                \
        int code_ = (expression), expected_ = (expected);                                               \
        checks_made++;                                                                                  \
        if (code_ != expected_) {                                                                       \
            checks_failed++;                                                                            \
            fprintf(stderr, "%s:%d: %s is %s, not %s\n", __FILE__, __LINE__, #expression,               \
                    shd_error_name(code_), shd_error_name(expected_));                                  \
        }                                                                                               \
    } while (0)

#endif
