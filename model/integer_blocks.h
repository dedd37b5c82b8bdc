/* The work of integer_experts.c that threads share, by way of row_times_tokens_<VARIANT>. Included once for each variant. */

INLINE void NAMED(gate_and_up)(struct call *c, int64_t expert, int64_t row, const int32_t *pairs, int count, const int tokens)
{
    const struct layer *l = c->layer;
    const int64_t inner = l->w2.columns;
    int64_t which[TILE];
    for (int t = 0; t < tokens; t++)
        which[t] = pairs[t < count ? t : 0] / c->top_k;
    for (int64_t end = row + ROWS < inner ? row + ROWS : inner; row < end; row++) {
        float gate[TILE], up[TILE];
        NAMED(row_times_tokens)(l, &l->w13, expert, row, &c->x, which, gate, tokens);
        NAMED(row_times_tokens)(l, &l->w13, expert, inner + row, &c->x, which, up, tokens);
        for (int t = 0; t < count; t++)
            c->inner.numbers[pairs[t] * inner + row] = activated(gate[t], l->activation) * up[t];
    }
}

INLINE void NAMED(down)(struct call *c, int64_t expert, int64_t row, const int32_t *pairs, int count, const int tokens)
{
    const struct layer *l = c->layer;
    const int64_t hidden = l->w2.rows;
    int64_t which[TILE];
    for (int t = 0; t < tokens; t++)
        which[t] = pairs[t < count ? t : 0];
    for (int64_t end = row + ROWS < hidden ? row + ROWS : hidden; row < end; row++) {
        float out[TILE];
        NAMED(row_times_tokens)(l, &l->w2, expert, row, &c->inner, which, out, tokens);
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

#undef VARIANT
