/* The kernels of integer_experts.c for one kind of processor: VARIANT is its name, LANES how many floats a register has.
 * floats_<variant> is such a register; int8_<variant>(row, scale) and int4_.. make one of the LANES integers that begin at
 * `row`. Included once for each kind. */

#define STEP (CHAINS * LANES)
#define floats NAMED(floats)
#define words NAMED(words)
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

/* ---- one row of weights times up to TILE tokens ---- */

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

/* ---- a block of rows of one expert, for all its tokens ---- */

INLINE void NAMED(row_times_tokens)(const struct layer *l, const struct stack *s, int64_t expert, int64_t row,
                             const float *const *x, float *out, const int tokens)
{
    const int64_t number = expert * s->rows + row;
    const uint8_t *integers = s->integers + number * s->columns * l->bits / 8;
    const uint16_t *scales = s->scales + number * (s->columns / s->group);
    if (l->bits == 4)
        NAMED(dot)(integers, scales, s->columns, s->group, x, out, 4, 0, tokens);
    else if (l->rounds)
        NAMED(dot)(integers, scales, s->columns, s->group, x, out, 8, 1, tokens);
    else
        NAMED(dot)(integers, scales, s->columns, s->group, x, out, 8, 0, tokens);
}

INLINE void NAMED(gate_and_up)(struct call *c, int64_t expert, int64_t row, const int32_t *pairs, int count, const int tokens)
{
    const struct layer *l = c->layer;
    const int64_t inner = l->w2.columns, hidden = l->w13.columns;
    const float *x[TILE];
    for (int t = 0; t < tokens; t++)
        x[t] = c->x_TD + pairs[t < count ? t : 0] / c->top_k * hidden;
    for (int64_t end = row + ROWS < inner ? row + ROWS : inner; row < end; row++) {
        float gate[TILE], up[TILE];
        NAMED(row_times_tokens)(l, &l->w13, expert, row, x, gate, tokens);
        NAMED(row_times_tokens)(l, &l->w13, expert, inner + row, x, up, tokens);
        for (int t = 0; t < count; t++)
            c->inner_PF[pairs[t] * inner + row] = activated(gate[t], l->activation) * up[t];
    }
}

INLINE void NAMED(down)(struct call *c, int64_t expert, int64_t row, const int32_t *pairs, int count, const int tokens)
{
    const struct layer *l = c->layer;
    const int64_t inner = l->w2.columns, hidden = l->w2.rows;
    const float *x[TILE];
    for (int t = 0; t < tokens; t++)
        x[t] = c->inner_PF + pairs[t < count ? t : 0] * inner;
    for (int64_t end = row + ROWS < hidden ? row + ROWS : hidden; row < end; row++) {
        float out[TILE];
        NAMED(row_times_tokens)(l, &l->w2, expert, row, x, out, tokens);
        for (int t = 0; t < count; t++)
            c->sum_TD[pairs[t] / c->top_k * hidden + row] += c->weights_TK[pairs[t]] * out[t];
    }
}

static void NAMED(all_gate_and_up)(void *data)
{
    struct call *c = data;
    const int64_t blocks = (c->layer->w2.columns + ROWS - 1) / ROWS, end = blocks * c->layer->num_experts;
    for (int64_t i; (i = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED)) < end;)
        FOR_TILES(NAMED(gate_and_up), c, i / blocks, i % blocks * ROWS)
}

/* The experts of a block of rows one after the other: two of them may belong to one token. */
static void NAMED(all_down)(void *data)
{
    struct call *c = data;
    const int64_t end = (c->layer->w2.rows + ROWS - 1) / ROWS;
    for (int64_t i; (i = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED)) < end;)
        for (int64_t expert = 0; expert < c->layer->num_experts; expert++)
            FOR_TILES(NAMED(down), c, expert, i * ROWS)
}

#undef floats
#undef words
#undef STEP
#undef VARIANT
#undef LANES
