/* Whether numbers are finite, by their exponents alone. See cluster/finite.py. */

#include <stddef.h>
#include <stdint.h>

/* A float is infinite or NaN if and only if all bits of its exponent are set (IEEE 754). */
#define ALL_FINITE(name, word)                                \
    int name(const word *bits, size_t count, word exponent) { \
        word found = 0;                                       \
        for (size_t i = 0; i < count; i++)                    \
            found |= (bits[i] & exponent) == exponent;        \
        return !found;                                        \
    }

ALL_FINITE(switchyard_all_finite_32, uint32_t)
ALL_FINITE(switchyard_all_finite_16, uint16_t)
