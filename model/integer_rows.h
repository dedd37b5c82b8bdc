/* Rows of integer_experts.c times tokens in float32, for one kind of processor: VARIANT is its name, LANES how many floats
 * a register has. floats_<variant> is such a register; int8_<variant>(row, scale) and int4_.. make one of the LANES
 * integers that begin at `row`. Included once for each kind. */

#define STEP (CHAINS * LANES)
#define floats NAMED(floats)
#define words NAMED(words)
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

INLINE floats NAMED(weights_of)(const uint8_t *row, float scale, const int bits, const int rounds)
{
    const floats value = bits == 8 ? NAMED(int8)(row, scale) : NAMED(int4)(row, scale);
    const words word = (words)value;
    return rounds ? (floats)((word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000u) : value; /* as rounded() does */
}

INLINE float NAMED(total)(floats sum)
{
    float lanes[LANES];
    memcpy(lanes, &sum, sizeof lanes);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return lanes[0];
}

/* out[t] = row . x[t]. What is left of a group after whole registers goes one by one. */
INLINE void NAMED(dot)(const uint8_t *row, const uint16_t *scales, int64_t columns, int64_t group,
                       const float *const *x, float *out, const int bits, const int rounds, const int tokens)
{
    floats sums[CHAINS][TILE] = {0};
    float rest[TILE] = {0};
    for (int64_t begin = 0, g = 0; begin < columns; begin += group, g++) {
        const float scale = from_bfloat16(scales[g]);
        int64_t i = begin;
        const int64_t end = begin + group, whole = end - group % STEP;
        for (; i < whole; i += STEP)
            for (int chain = 0; chain < CHAINS; chain++) {
                const int64_t at = i + chain * LANES;
                const floats w = NAMED(weights_of)(row + at * bits / 8, scale, bits, rounds);
                for (int t = 0; t < tokens; t++)
                    sums[chain][t] += w * *(const floats *)(x[t] + at);
            }
        for (; i < end; i++) {
            const float product = (float)integer_at(row, i, bits) * scale, w = rounds ? rounded(product) : product;
            for (int t = 0; t < tokens; t++)
                rest[t] += w * x[t][i];
        }
    }
    for (int t = 0; t < tokens; t++)
        out[t] = rest[t] + NAMED(total)(sums[0][t] + sums[1][t]);
}

/* out[t] = row `row` of an expert's matrix times vector which[t], up to TILE of them. */
INLINE void NAMED(row_times_tokens)(const struct layer *l, const struct stack *s, int64_t expert, int64_t row,
                                    const struct vectors *v, const int64_t *which, float *out, const int tokens)
{
    const int64_t number = expert * s->rows + row;
    const uint8_t *integers = s->integers + number * s->columns * l->bits / 8;
    const uint16_t *scales = s->scales + number * (s->columns / s->group);
    const float *x[TILE];
    for (int t = 0; t < tokens; t++)
        x[t] = v->numbers + which[t] * s->columns;
    if (l->bits == 4)
        NAMED(dot)(integers, scales, s->columns, s->group, x, out, 4, 0, tokens);
    else if (l->rounds)
        NAMED(dot)(integers, scales, s->columns, s->group, x, out, 8, 1, tokens);
    else
        NAMED(dot)(integers, scales, s->columns, s->group, x, out, 8, 0, tokens);
}

#include "integer_blocks.h"

#undef floats
#undef words
#undef STEP
#undef LANES
