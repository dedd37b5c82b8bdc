/* Rows of integer_experts.c times tokens in 16 bits, for AVX2: 16 products and their sums in pairs are one instruction.
 *
 * A token's block is its numbers over scale = (the largest magnitude) / 32767, so what is lost is at most 1/65534 of the
 * block's largest: a hundredth of what bfloat16 loses. Sums within a block are exact integers: of the products of int8,
 * 128 * 32767 * 256 / 8 at most in a lane, and half of that for int4.
 *
 * int4: 64 weights are sixteen 16-bit words, and weight 16 * n + w of them is nibble n of word w, with 8 added. */

#define VARIANT shorts
#define SHORTEST 1e-30f /* a block without a larger number than that is 0 */

/* shorts, scales and offsets of vector n, from its floats. A number that is not finite makes its block's scale NaN. */
static void shorten(const struct vectors *v, const struct stack *s, int64_t n)
{
    const int64_t blocks = s->columns / s->block;
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    for (int64_t b = n * blocks; b < (n + 1) * blocks; b++) {
        const float *x = v->numbers + b * s->block;
        int16_t *out = v->shorts + b * s->block;
        __m256i most = _mm256_setzero_si256(), sums = most;
        for (int64_t i = 0; i < s->block; i += 8)
            most = _mm256_max_epi32(most, _mm256_and_si256(magnitude, _mm256_loadu_si256((const __m256i *)(x + i))));
        int32_t lanes[8], largest = 0, sum = 0;
        _mm256_storeu_si256((__m256i *)lanes, most);
        for (int i = 0; i < 8; i++)
            largest = lanes[i] > largest ? lanes[i] : largest;
        float limit;
        memcpy(&limit, &largest, sizeof limit);
        const int is_finite = largest < 0x7F800000, is_zero = is_finite && limit < SHORTEST;
        const __m256 factor = _mm256_set1_ps(!is_finite || is_zero ? 0 : 32767.0f / limit);
        for (int64_t i = 0; i < s->block; i += 16) {
            const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(factor, _mm256_loadu_ps(x + i)));
            const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(factor, _mm256_loadu_ps(x + i + 8)));
            const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
            _mm256_storeu_si256((__m256i *)(out + i), both);
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(both, _mm256_set1_epi16(1)));
        }
        _mm256_storeu_si256((__m256i *)lanes, sums);
        for (int i = 0; i < 8; i++)
            sum += lanes[i];
        v->scales[b] = is_finite ? (is_zero ? 0 : limit / 32767.0f) : NAN;
        v->offsets[b] = -8 * sum;
    }
}

static void shorten_x(void *data)
{
    struct call *c = data;
    for (int64_t t; (t = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED)) < c->num_tokens;)
        shorten(&c->x, &c->layer->w13, t);
}

static void shorten_inner(void *data)
{
    struct call *c = data;
    for (int64_t p; (p = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED)) < c->num_tokens * c->top_k;)
        shorten(&c->inner, &c->layer->w2, p);
}

INLINE __m256i load(const void *from)
{
    return _mm256_loadu_si256(from);
}

/* sums[t]: in eight lanes the products of a block of a row and of token t, up to TILE of them. */
INLINE void int8_block(const uint8_t *row, int64_t block, const int16_t *const *x, __m256i *sums, const int tokens)
{
    for (int t = 0; t < tokens; t++)
        sums[t] = _mm256_setzero_si256();
    for (int64_t i = 0; i < block; i += 16) {
        const __m256i weights = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(row + i)));
        for (int t = 0; t < tokens; t++)
            sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(weights, load(x[t] + i)));
    }
}

/* The same of int4; the sums begin with what makes up for the 8 that are added. */
INLINE void int4_block(const uint8_t *row, int64_t block, const int16_t *const *x, const int32_t *offsets, __m256i *sums,
                       const int tokens)
{
    const __m256i low = _mm256_set1_epi16(15);
    for (int t = 0; t < tokens; t++)
        sums[t] = _mm256_zextsi128_si256(_mm_cvtsi32_si128(offsets[t]));
    for (int64_t i = 0; i < block; i += 64) {
        const __m256i words = load(row + i / 2);
        for (int nibble = 0; nibble < 4; nibble++) {
            const __m256i shifted = nibble ? _mm256_srli_epi16(words, 4 * nibble) : words;
            const __m256i weights = nibble < 3 ? _mm256_and_si256(shifted, low) : shifted;
            for (int t = 0; t < tokens; t++)
                sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(weights, load(x[t] + i + 16 * nibble)));
        }
    }
}

INLINE float total(__m256 lanes)
{
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

INLINE void row_times_tokens_of_bits(const struct stack *s, int64_t number, const struct vectors *v, const int64_t *which,
                                     float *out, const int bits, const int tokens)
{
    const int64_t blocks = s->columns / s->block, per_scale = s->group / s->block, num_scales = s->columns / s->group;
    const uint8_t *integers = s->integers + number * s->columns * bits / 8;
    const uint16_t *scales = s->scales + number * num_scales;
    const int16_t *x[TILE];
    __m256 memory[TILE], *sums = memory;
    __asm__("" : "+r"(sums)); /* so that the compiler keeps registers for the inner loop */
    for (int t = 0; t < tokens; t++) {
        x[t] = v->shorts + which[t] * s->columns;
        sums[t] = _mm256_setzero_ps();
    }
    for (int64_t first = 0; first < blocks; first += per_scale, scales++)
        for (int64_t b = first; b < first + per_scale; b++) {
            __m256i found[TILE];
            if (bits == 8) {
                int8_block(integers, s->block, x, found, tokens);
            } else {
                int32_t offsets[TILE];
                for (int t = 0; t < tokens; t++)
                    offsets[t] = v->offsets[which[t] * blocks + b];
                int4_block(integers, s->block, x, offsets, found, tokens);
            }
            integers += s->block * bits / 8;
            for (int t = 0; t < tokens; t++) {
                const __m256 scale = _mm256_set1_ps(from_bfloat16(*scales) * v->scales[which[t] * blocks + b]);
                sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(found[t]), scale, sums[t]);
                x[t] += s->block;
            }
        }
    for (int t = 0; t < tokens; t++)
        out[t] = total(sums[t]);
}

/* As in integer_rows.h. More rows at once would load a token less often, but the processor reads ahead in few places. */
INLINE void row_times_tokens_shorts(const struct layer *l, const struct stack *s, int64_t expert, int64_t row,
                                    const struct vectors *v, const int64_t *which, float *out, const int tokens)
{
    if (l->bits == 8)
        row_times_tokens_of_bits(s, expert * s->rows + row, v, which, out, 8, tokens);
    else
        row_times_tokens_of_bits(s, expert * s->rows + row, v, which, out, 4, tokens);
}

#include "integer_blocks.h"
