/* Routed experts whose weights are integers with scales, on the CPU. See model/integer_experts.py.
 *
 * A weight is integer * scale, which is exact in float32, or that rounded to bfloat16; it exists in registers only.
 * Everything else is float32; or, where a stack has blocks, tokens are 16 bits wide while they meet the weights, and what
 * is summed within a block are integers. A token's result depends on no other token and on no number of threads.
 *
 * T tokens, D hidden, F inner, K chosen experts per token, P = T * K pairs, E experts.
 */

#include "../cluster/team.h"
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define TILE 4   /* tokens that share a weight's conversion */
#define CHAINS 2 /* sums per token that do not wait for one another */
#define ROWS 32  /* rows of a matrix that a thread takes at once */

#define INLINE static inline __attribute__((always_inline))

enum activation { SILU, GELU, GELU_TANH };

/* One of a layer's two stacks of matrices: [E, rows, columns] integers, [E, rows, columns / group] bfloat16 scales.
 * block: 0, or how many columns are summed as integers; int4 then lies as integer_shorts.h says. */
struct stack {
    const uint8_t *integers;
    const uint16_t *scales;
    int64_t rows, columns, group, block;
};

struct layer {
    struct stack w13, w2; /* gate above up [2F, D]; down [D, F] */
    int64_t num_experts;
    int32_t bits, rounds, activation;
};

/* [N, columns] numbers that a stack is multiplied with. */
struct vectors {
    float *numbers;
    int16_t *shorts;  /* with blocks, [N, columns]: number / scale */
    float *scales;    /* with blocks, [N, columns / block] */
    int32_t *offsets; /* with blocks, [N, columns / block]: minus 8 * their sum, for int4 is stored with 8 added */
};

struct call {
    const struct layer *layer;
    struct vectors x, inner; /* [T, D] and [P, F] */
    const float *weights_TK;
    float *sum_TD;
    int32_t *pairs_P; /* pair numbers t * K + k by expert; expert e has first[e] .. first[e + 1] */
    int64_t *first;
    int64_t num_tokens, top_k, next; /* next: the first piece of work that nobody has taken */
};

INLINE float from_bfloat16(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

INLINE float rounded(float value) /* to bfloat16, ties to even */
{
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    word = (word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000u;
    memcpy(&value, &word, sizeof word);
    return value;
}

INLINE int32_t integer_at(const uint8_t *row, int64_t column, int bits)
{
    if (bits == 8)
        return (int8_t)row[column];
    return ((row[column / 2] >> (column % 2 * 4)) & 15) - 8;
}

INLINE float activated(float gate, int activation)
{
    if (activation == SILU)
        return gate / (1.0f + expf(-gate));
    if (activation == GELU)
        return 0.5f * gate * (1.0f + erff(gate * 0.70710678f));
    return 0.5f * gate * (1.0f + tanhf(0.79788456f * (gate + 0.044715f * gate * gate * gate)));
}

/* `of` the expert's tokens, TILE by TILE; a tile that is not full repeats a token. */
#define FOR_TILES(of, c, expert, row)                                            \
    for (int64_t p = (c)->first[expert]; p < (c)->first[expert + 1]; p += TILE) { \
        const int64_t left = (c)->first[expert + 1] - p;                         \
        if (left == 1)                                                           \
            of(c, expert, row, (c)->pairs_P + p, 1, 1);                          \
        else if (left == 2)                                                      \
            of(c, expert, row, (c)->pairs_P + p, 2, 2);                          \
        else                                                                     \
            of(c, expert, row, (c)->pairs_P + p, left < TILE ? (int)left : TILE, TILE); \
    }

/* ---- the kernels, for what the processor has ---- */

#define NAMED_(name, variant) name##_##variant
#define NAMED__(name, variant) NAMED_(name, variant)
#define NAMED(name) NAMED__(name, VARIANT)

typedef void (*work_fn)(void *);

#define VARIANT plain
#define LANES 4
typedef float floats_plain __attribute__((vector_size(16), aligned(4)));

INLINE floats_plain int8_plain(const uint8_t *row, float scale)
{
    const int8_t *q = (const int8_t *)row;
    return (floats_plain){q[0], q[1], q[2], q[3]} * scale;
}

INLINE floats_plain int4_plain(const uint8_t *row, float scale)
{
    return (floats_plain){(row[0] & 15) - 8, (row[0] >> 4) - 8, (row[1] & 15) - 8, (row[1] >> 4) - 8} * scale;
}

#include "integer_rows.h"

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "integer_shorts.h"
#define VARIANT avx2
#define LANES 8
typedef float floats_avx2 __attribute__((vector_size(32), aligned(4)));

INLINE floats_avx2 int8_avx2(const uint8_t *row, float scale)
{
    return (floats_avx2)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)row))) * scale;
}

/* One fused (integer + 8) * scale - 8 * scale is exact, as (integer) * scale is. */
INLINE floats_avx2 int4_avx2(const uint8_t *row, float scale)
{
    int32_t word;
    memcpy(&word, row, sizeof word);
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i nibbles = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), shifts), _mm256_set1_epi32(15));
    return (floats_avx2)_mm256_fmsub_ps(_mm256_cvtepi32_ps(nibbles), _mm256_set1_ps(scale), _mm256_set1_ps(8 * scale));
}

#include "integer_rows.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define VARIANT avx512
#define LANES 16
typedef float floats_avx512 __attribute__((vector_size(64), aligned(4)));

INLINE floats_avx512 int8_avx512(const uint8_t *row, float scale)
{
    return (floats_avx512)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)row))) * scale;
}

INLINE floats_avx512 int4_avx512(const uint8_t *row, float scale) /* see int4_avx2 */
{
    int32_t word[2];
    memcpy(word, row, sizeof word);
    const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i words = _mm512_inserti64x4(_mm512_set1_epi32(word[0]), _mm256_set1_epi32(word[1]), 1);
    const __m512i nibbles = _mm512_and_si512(_mm512_srlv_epi32(words, shifts), _mm512_set1_epi32(15));
    return (floats_avx512)_mm512_fmsub_ps(
        _mm512_cvtepi32_ps(nibbles), _mm512_set1_ps(scale), _mm512_set1_ps(8 * scale));
}

#include "integer_rows.h"
#pragma GCC pop_options
#endif

struct kernels {
    work_fn prepare, multiply; /* prepare: before it, or 0 */
};

struct both_kernels {
    struct kernels gate_and_up, down;
};

static void run(struct kernels kernels, struct call *c, int num_threads)
{
    if (kernels.prepare) {
        c->next = 0;
        run_in_team(kernels.prepare, c, num_threads);
    }
    c->next = 0;
    run_in_team(kernels.multiply, c, num_threads);
}

static int has_avx2(void)
{
#ifdef __x86_64__
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

static struct both_kernels choose(const struct layer *l)
{
    struct both_kernels chosen = {{0, all_gate_and_up_plain}, {0, all_down_plain}};
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        chosen = (struct both_kernels){{0, all_gate_and_up_avx512}, {0, all_down_avx512}};
    else if (has_avx2())
        chosen = (struct both_kernels){{0, all_gate_and_up_avx2}, {0, all_down_avx2}};
    if (l->w13.block)
        chosen.gate_and_up = (struct kernels){shorten_x, all_gate_and_up_shorts};
    if (l->w2.block)
        chosen.down = (struct kernels){shorten_inner, all_down_shorts};
#else
    (void)l;
#endif
    return chosen;
}

/* Whether stacks may have blocks on this processor. */
int switchyard_integer_blocks(void)
{
    return has_avx2();
}

/* Pairs by expert, in ascending order (a counting sort); pairs of experts that are not here (id -1) are left out. */
static void sort_pairs(const int32_t *ids_TK, int64_t pairs, int64_t experts, int32_t *pairs_P, int64_t *first)
{
    memset(first, 0, (size_t)(experts + 2) * sizeof *first);
    for (int64_t p = 0; p < pairs; p++)
        if (ids_TK[p] >= 0)
            first[ids_TK[p] + 2]++;
    for (int64_t e = 2; e < experts + 2; e++)
        first[e] += first[e - 1];
    for (int64_t p = 0; p < pairs; p++)
        if (ids_TK[p] >= 0)
            pairs_P[first[ids_TK[p] + 1]++] = (int32_t)p;
}

/* Where the call's arrays begin in `scratch`; returns the bytes that they take. */
static size_t place(struct call *c, uint8_t *scratch)
{
    const struct layer *l = c->layer;
    const int64_t tokens = c->num_tokens, pairs = tokens * c->top_k;
    size_t used = 0;
#define PLACE(pointer, count)                                           \
    do {                                                                \
        pointer = (void *)(scratch + used);                             \
        used += ((size_t)(count) * sizeof *pointer + 63) / 64 * 64;     \
    } while (0)
#define PLACE_VECTORS(v, n, s)                                          \
    do {                                                                \
        PLACE(v.numbers, (n) * (s)->columns);                            \
        if ((s)->block) {                                               \
            PLACE(v.shorts, (n) * (s)->columns);                        \
            PLACE(v.scales, (n) * (s)->columns / (s)->block);           \
            PLACE(v.offsets, (n) * (s)->columns / (s)->block);          \
        }                                                               \
    } while (0)
    PLACE_VECTORS(c->x, tokens, &l->w13);
    PLACE_VECTORS(c->inner, pairs, &l->w2);
    PLACE(c->sum_TD, tokens * l->w2.rows);
    PLACE(c->first, l->num_experts + 2);
    PLACE(c->pairs_P, pairs);
    return used;
}

/* How many bytes `scratch` needs, aligned to 64. */
int64_t switchyard_integer_experts_scratch(const struct layer *l, int64_t tokens, int64_t top_k)
{
    struct call c = {.layer = l, .num_tokens = tokens, .top_k = top_k};
    return (int64_t)place(&c, 0);
}

/* out[t] = sum of weights[t, k] * expert ids[t, k](x[t]) over the experts that are here. x and out: float32, or bfloat16. */
void switchyard_integer_experts(const struct layer *l, const void *x, const float *weights_TK, const int32_t *ids_TK,
                                void *out, int64_t tokens, int64_t top_k, int is_bfloat16, void *scratch, int num_threads)
{
    const int64_t size = tokens * l->w13.columns;
    struct call c = {.layer = l, .weights_TK = weights_TK, .num_tokens = tokens, .top_k = top_k};
    place(&c, scratch);
    for (int64_t i = 0; i < size; i++)
        c.x.numbers[i] = is_bfloat16 ? from_bfloat16(((const uint16_t *)x)[i]) : ((const float *)x)[i];
    memset(c.sum_TD, 0, (size_t)size * sizeof *c.sum_TD);
    sort_pairs(ids_TK, tokens * top_k, l->num_experts, c.pairs_P, c.first);
    const struct both_kernels kernels = choose(l);
    run(kernels.gate_and_up, &c, num_threads);
    run(kernels.down, &c, num_threads);
    for (int64_t i = 0; i < size; i++) {
        if (!is_bfloat16) {
            ((float *)out)[i] = c.sum_TD[i];
            continue;
        }
        const float value = rounded(c.sum_TD[i]);
        uint32_t word;
        memcpy(&word, &value, sizeof word);
        ((uint16_t *)out)[i] = (uint16_t)(word >> 16);
    }
}
