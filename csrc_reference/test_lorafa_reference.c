/*
 * lorafa_reference against numbers worked by hand: `make test`, and `make sanitize` under the sanitizers.
 */
#include "lorafa_reference.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>

static int failures = 0;

/* The same number, zeros told apart by sign; any NaN is the same as any other. */
static int same(double got, double expected)
{
    if (isnan(got) || isnan(expected))
        return isnan(got) && isnan(expected);
    return got == expected && !signbit(got) == !signbit(expected);
}

static void expect(const char *what, int line, int64_t count, const double *got, const double *expected)
{
    for (int64_t i = 0; i < count; i++)
        if (!same(got[i], expected[i])) {
            printf("line %d: %s[%lld] is %a (%g), expected %a (%g)\n", line, what, (long long)i, got[i],
                   got[i], expected[i], expected[i]);
            failures++;
        }
}

static void expect_status(int line, int got, int expected)
{
    if (got != expected) {
        printf("line %d: status \"%s\", expected \"%s\"\n", line, lorafa_strerror(got),
               lorafa_strerror(expected));
        failures++;
    }
}

static void expect_round(int line, enum lorafa_dtype dtype, double value, double expected)
{
    const double rounded = lorafa_round(value, dtype), mirrored = lorafa_round(-value, dtype),
                 negative = -expected;
    expect("round(value)", line, 1, &rounded, &expected);
    expect("round(-value)", line, 1, &mirrored, &negative);
}

static void expect_words(int line, const uint32_t *got, const uint32_t *expected)
{
    for (int i = 0; i < 4; i++)
        if (got[i] != expected[i]) {
            printf("line %d: word %d is %08" PRIx32 ", expected %08" PRIx32 "\n", line, i, got[i],
                   expected[i]);
            failures++;
        }
}

static void expect_integers(const char *what, int line, int64_t count, const uint8_t *got,
                            const uint8_t *expected)
{
    for (int64_t i = 0; i < count; i++)
        if (got[i] != expected[i]) {
            printf("line %d: %s[%lld] is %d, expected %d\n", line, what, (long long)i, got[i], expected[i]);
            failures++;
        }
}

#define EXPECT(count, got, ...) expect(#got, __LINE__, count, got, (const double[]){__VA_ARGS__})
#define EXPECT_STATUS(got, expected) expect_status(__LINE__, got, expected)
#define EXPECT_WORDS(got, ...) expect_words(__LINE__, got, (const uint32_t[]){__VA_ARGS__})
#define EXPECT_BITS(count, got, ...)                                                                         \
    expect_integers(#got, __LINE__, count, got, (const uint8_t[]){__VA_ARGS__})
#define EXPECT_TRUE(condition)                                                                               \
    expect_integers(#condition, __LINE__, 1, &(const uint8_t){condition}, &(const uint8_t){1})
#define EXPECT_ROUND(dtype, value, expected) expect_round(__LINE__, dtype, value, expected)

static void test_round(void)
{
    const enum lorafa_dtype all[] = {LORAFA_FP64, LORAFA_FP32, LORAFA_BF16, LORAFA_FP16};
    for (int i = 0; i < 4; i++) {
        EXPECT_ROUND(all[i], 0.0, 0.0);
        EXPECT_ROUND(all[i], 1.5, 1.5);
        EXPECT_ROUND(all[i], INFINITY, INFINITY);
        EXPECT_ROUND(all[i], NAN, NAN);
    }
    EXPECT_ROUND(LORAFA_FP64, 0.1, 0.1);
    EXPECT_ROUND(LORAFA_FP64, DBL_TRUE_MIN, DBL_TRUE_MIN);
    EXPECT_ROUND((enum lorafa_dtype)4, 1.0, NAN);

    /* Halfway between neighbours, to the even one: below, then above. */
    EXPECT_ROUND(LORAFA_FP32, 1 + 0x1p-24, 1);
    EXPECT_ROUND(LORAFA_FP32, 1 + 0x3p-24, 1 + 0x1p-22);
    EXPECT_ROUND(LORAFA_BF16, 1 + 0x1p-8, 1);
    EXPECT_ROUND(LORAFA_BF16, 1 + 0x3p-8, 1 + 0x1p-6);
    EXPECT_ROUND(LORAFA_FP16, 1 + 0x1p-11, 1);
    EXPECT_ROUND(LORAFA_FP16, 1 + 0x3p-11, 1 + 0x1p-9);

    /* Just above halfway by less than float can see: a detour through float would turn these into ties. */
    EXPECT_ROUND(LORAFA_BF16, 1 + 0x1p-8 + 0x1p-40, 1 + 0x1p-7);
    EXPECT_ROUND(LORAFA_FP16, 1 + 0x1p-11 + 0x1p-40, 1 + 0x1p-10);

    /* A carry into the next binade. */
    EXPECT_ROUND(LORAFA_BF16, 2 - 0x1p-8, 2);
    EXPECT_ROUND(LORAFA_FP16, 2 - 0x1p-11, 2);

    /* The largest finite number, halfway to the next power of two, and just below that. */
    EXPECT_ROUND(LORAFA_FP16, 65504, 65504);
    EXPECT_ROUND(LORAFA_FP16, 65520, INFINITY);
    EXPECT_ROUND(LORAFA_FP16, 65520 - 0x1p-36, 65504);
    EXPECT_ROUND(LORAFA_BF16, 0x1.fep127, 0x1.fep127);
    EXPECT_ROUND(LORAFA_BF16, 0x1.ffp127, INFINITY);
    EXPECT_ROUND(LORAFA_BF16, 0x1.fefffffffffffp127, 0x1.fep127);
    EXPECT_ROUND(LORAFA_FP32, FLT_MAX, FLT_MAX);
    EXPECT_ROUND(LORAFA_FP32, 0x1.ffffffp127, INFINITY);
    EXPECT_ROUND(LORAFA_FP32, DBL_MAX, INFINITY);

    /* The smallest subnormal, ties beside it, and what vanishes with its sign. */
    EXPECT_ROUND(LORAFA_FP16, 0x1p-24, 0x1p-24);
    EXPECT_ROUND(LORAFA_FP16, 0x1p-25, 0);
    EXPECT_ROUND(LORAFA_FP16, 0x1.0000000000001p-25, 0x1p-24);
    EXPECT_ROUND(LORAFA_FP16, 0x3p-25, 0x1p-23);
    EXPECT_ROUND(LORAFA_BF16, 0x1p-133, 0x1p-133);
    EXPECT_ROUND(LORAFA_BF16, 0x1p-134, 0);
    EXPECT_ROUND(LORAFA_BF16, 0x3p-134, 0x1p-132);
    EXPECT_ROUND(LORAFA_FP32, 0x1p-149, 0x1p-149);
    EXPECT_ROUND(LORAFA_FP32, 0x1p-150, 0);
    EXPECT_ROUND(LORAFA_FP32, DBL_TRUE_MIN, 0);

    /* The largest subnormal rounds up into the normal numbers. */
    EXPECT_ROUND(LORAFA_FP16, 0x1p-14 - 0x1p-25, 0x1p-14);
}

/* M = 2, N = 2, K = 3, R = 1, s = 1/2: every intermediate is exact, so no dtype rounds anything. */
static const double x[] = {1, 2, 3, 4, 5, 6};       /* (2, 3) */
static const double weight[] = {1, 0, -1, 2, 1, 0}; /* (2, 3) */
static const double lora_A[] = {1, 1, 1};           /* (1, 3) */
static const double lora_B[] = {1, -1};             /* (2, 1) */
static const double bias[] = {10, 20};              /* (2,) */
static const double dy[] = {1, 2, 3, -1};           /* (2, 2) */

static void test_exact(void)
{
    for (int dtype = LORAFA_FP64; dtype <= LORAFA_FP16; dtype++) {
        double z[2], y[4], dz[2], dx[6], dB[2];
        EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x, weight, lora_A, lora_B, bias, 0.5, 0, 0, dtype, z, y),
                      LORAFA_OK);
        EXPECT(2, z, 3, 7.5);
        EXPECT(4, y, 11, 21, 15.5, 25.5);

        EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x, weight, lora_A, lora_B, NULL, 0.5, 0, 0, dtype, z, y),
                      LORAFA_OK);
        EXPECT(4, y, 1, 1, 5.5, 5.5);

        EXPECT_STATUS(
            lorafa_backward(2, 2, 3, 1, dy, z, weight, lora_A, lora_B, 0.5, 0, 0, dtype, dtype, dz, dx, dB),
            LORAFA_OK);
        EXPECT(2, dz, -0.5, 2);
        EXPECT(6, dx, 4.5, 1.5, -1.5, 3, 1, -1);
        EXPECT(2, dB, 25.5, -1.5);
    }
}

/* M = N = R = 1, bf16: the spacing of neighbours is 2^-7 in [1, 2) and 2^-6 in [2, 4). */
static void test_where_rounding_happens(void)
{
    const double x_row[] = {1, 0x1p-8}, weight_row[] = {0, -0x1p-8}; /* (1, 2) */
    const double A_row[] = {1 + 0x1p-8, 1},
                 B_row[] = {1 + 0x3p-8}; /* (1, 2), (1, 1): ties, A = (1, 1), B = 1 + 2^-6 */
    double z[1], y[1], dz[1], dx[2], dB[1];

    /* x A^T = 1 + 2^-8, a tie: z = 1. From the unrounded lora_A it would be 1 + 2^-7.
       x weight^T + z B = -2^-16 + 1 + 2^-6: y = 1 + 2^-6. From the unrounded lora_B it would be 1 + 2^-7, and
       from the unrounded z 1 + 3 * 2^-7. */
    EXPECT_STATUS(
        lorafa_forward(1, 1, 2, 1, x_row, weight_row, A_row, B_row, NULL, 1, 0, 0, LORAFA_BF16, z, y),
        LORAFA_OK);
    EXPECT(1, z, 1);
    EXPECT(1, y, 1 + 0x1p-6);

    /* s is applied before the rounding: 3 (1 + 2^-8) = 3 + 3 * 2^-8 lies nearer to 3 + 2^-6 than to 3. */
    EXPECT_STATUS(
        lorafa_forward(1, 1, 2, 1, x_row, weight_row, A_row, B_row, NULL, 3, 0, 0, LORAFA_BF16, z, NULL),
        LORAFA_OK);
    EXPECT(1, z, 3 + 0x1p-6);

    /* dy B = 3 + 3 * 2^-6 = dz. From the unrounded lora_B it would be 3 + 9 * 2^-8 -> 3 + 2^-5.
       dx = (dz, dz - 3 * 2^-8), the second nearer to the neighbour below dz.
       dy z = 3 (3 + 2^-6) = 9 + 3 * 2^-6, which fp32 keeps; bf16's nearest is 9 + 2^-4. */
    const double dy_row[] = {3};
    EXPECT_STATUS(lorafa_backward(1, 1, 2, 1, dy_row, z, weight_row, A_row, B_row, 1, 0, 0, LORAFA_BF16,
                                  LORAFA_FP32, dz, dx, dB),
                  LORAFA_OK);
    EXPECT(1, dz, 3 + 0x3p-6);
    EXPECT(2, dx, 3 + 0x3p-6, 3 + 0x2p-6);
    EXPECT(1, dB, 9 + 0x3p-6);
    EXPECT_STATUS(lorafa_backward(1, 1, 2, 1, dy_row, z, weight_row, A_row, B_row, 1, 0, 0, LORAFA_BF16,
                                  LORAFA_BF16, NULL, NULL, dB),
                  LORAFA_OK);
    EXPECT(1, dB, 9 + 0x1p-4);
}

static void test_wanted_outputs(void)
{
    double z[2], y[4], dz[2], dx[6], dB[2];
    EXPECT_STATUS(
        lorafa_forward(2, 2, 3, 1, x, weight, lora_A, lora_B, bias, 0.5, 0, 0, LORAFA_FP64, NULL, y),
        LORAFA_OK);
    EXPECT(4, y, 11, 21, 15.5, 25.5);
    EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x, NULL, lora_A, NULL, NULL, 0.5, 0, 0, LORAFA_FP64, z, NULL),
                  LORAFA_OK);
    EXPECT(2, z, 3, 7.5);
    EXPECT_STATUS(
        lorafa_forward(2, 2, 3, 1, NULL, NULL, NULL, NULL, NULL, 0.5, 0, 0, LORAFA_FP64, NULL, NULL),
        LORAFA_OK);

    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, NULL, weight, lora_A, lora_B, 0.5, 0, 0, LORAFA_FP64,
                                  LORAFA_FP64, NULL, dx, NULL),
                  LORAFA_OK);
    EXPECT(6, dx, 4.5, 1.5, -1.5, 3, 1, -1);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, NULL, NULL, NULL, lora_B, 0.5, 0, 0, LORAFA_FP64,
                                  LORAFA_FP64, dz, NULL, NULL),
                  LORAFA_OK);
    EXPECT(2, dz, -0.5, 2);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, z, NULL, NULL, NULL, 0.5, 0, 0, LORAFA_FP64, LORAFA_FP64,
                                  NULL, NULL, dB),
                  LORAFA_OK);
    EXPECT(2, dB, 25.5, -1.5);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, NULL, NULL, NULL, NULL, NULL, 0.5, 0, 0, LORAFA_FP64,
                                  LORAFA_FP64, NULL, NULL, NULL),
                  LORAFA_OK);
}

static void test_empty(void)
{
    /* M = 0: nothing is read from the NULL arrays, nothing written to z or y, and dB is a sum of nothing. */
    double z[1] = {7}, y[1] = {7}, dz[1] = {7}, dx[1] = {7}, dB[2] = {7, 7};
    EXPECT_STATUS(
        lorafa_forward(0, 2, 3, 1, NULL, weight, lora_A, lora_B, bias, 0.5, 0, 0, LORAFA_FP32, z, y),
        LORAFA_OK);
    EXPECT_STATUS(lorafa_backward(0, 2, 3, 1, NULL, NULL, weight, lora_A, lora_B, 0.5, 0, 0, LORAFA_FP32,
                                  LORAFA_FP32, dz, dx, dB),
                  LORAFA_OK);
    EXPECT(1, z, 7);
    EXPECT(1, y, 7);
    EXPECT(1, dz, 7);
    EXPECT(1, dx, 7);
    EXPECT(2, dB, 0, 0);

    /* K = 0: y is the bias. */
    double y_bias[2];
    EXPECT_STATUS(
        lorafa_forward(1, 2, 0, 1, NULL, NULL, NULL, lora_B, bias, 0.5, 0, 0, LORAFA_FP32, NULL, y_bias),
        LORAFA_OK);
    EXPECT(2, y_bias, 10, 20);
}

static void test_not_finite(void)
{
    const double x_nan[] = {1, NAN, 3, 4, 5, 6}, dy_inf[] = {INFINITY, 2, 3, -1};
    double z[2], y[4], dz[2], dx[6], dB[2];
    EXPECT_STATUS(
        lorafa_forward(2, 2, 3, 1, x_nan, weight, lora_A, lora_B, bias, 0.5, 0, 0, LORAFA_BF16, z, y),
        LORAFA_OK);
    EXPECT(2, z, NAN, 7.5);
    EXPECT(4, y, NAN, NAN, 15.5, 25.5); /* y[0] too, although the NaN meets a weight of 0 */

    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy_inf, z, weight, lora_A, lora_B, 0.5, 0, 0, LORAFA_BF16,
                                  LORAFA_FP32, dz, dx, dB),
                  LORAFA_OK);
    EXPECT(2, dz, INFINITY, 2);
    EXPECT(6, dx, INFINITY, NAN, NAN, 3, 1, -1); /* Inf * 0 and Inf - Inf */
    EXPECT(2, dB, NAN, NAN);

    /* Overflow of z alone: 2^15 + 2^15 is beyond fp16, and y inherits it. */
    const double large[] = {0x1p15, 0x1p15}, zeros[] = {0, 0}, ones[] = {1, 1};
    EXPECT_STATUS(lorafa_forward(1, 1, 2, 1, large, zeros, ones, ones, NULL, 1, 0, 0, LORAFA_FP16, z, y),
                  LORAFA_OK);
    EXPECT(1, z, INFINITY);
    EXPECT(1, y, INFINITY);
}

static void test_errors(void)
{
    const enum lorafa_dtype bad = (enum lorafa_dtype)4, fp64 = LORAFA_FP64;
    double z[2], y[4], dz[2], dx[6], dB[2];
    EXPECT_STATUS(lorafa_forward(-1, 2, 3, 1, x, weight, lora_A, lora_B, bias, 1, 0, 0, fp64, z, y),
                  LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_forward(2, -1, 3, 1, x, weight, lora_A, lora_B, bias, 1, 0, 0, fp64, z, y),
                  LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_forward(2, 2, -1, 1, x, weight, lora_A, lora_B, bias, 1, 0, 0, fp64, z, y),
                  LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_forward(2, 2, 3, -1, x, weight, lora_A, lora_B, bias, 1, 0, 0, fp64, z, y),
                  LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_forward(INT64_MAX, 2, 3, 1, x, weight, lora_A, lora_B, bias, 1, 0, 0, fp64, z, y),
                  LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x, weight, lora_A, lora_B, bias, 1, 0, 0, bad, z, y),
                  LORAFA_ERROR_DTYPE);
    EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, NULL, weight, lora_A, lora_B, bias, 1, 0, 0, fp64, z, y),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x, NULL, lora_A, lora_B, bias, 1, 0, 0, fp64, z, y),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x, weight, NULL, lora_B, bias, 1, 0, 0, fp64, z, y),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x, weight, lora_A, NULL, bias, 1, 0, 0, fp64, z, y),
                  LORAFA_ERROR_NULL);

    EXPECT_STATUS(
        lorafa_backward(2, -1, 3, 1, dy, x, weight, lora_A, lora_B, 1, 0, 0, fp64, fp64, dz, dx, dB),
        LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, x, weight, lora_A, lora_B, 1, 0, 0, bad, fp64, dz, dx, dB),
                  LORAFA_ERROR_DTYPE);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, x, weight, lora_A, lora_B, 1, 0, 0, fp64, bad, dz, dx, dB),
                  LORAFA_ERROR_DTYPE);
    EXPECT_STATUS(
        lorafa_backward(2, 2, 3, 1, NULL, x, weight, lora_A, lora_B, 1, 0, 0, fp64, fp64, dz, dx, dB),
        LORAFA_ERROR_NULL);
    EXPECT_STATUS(
        lorafa_backward(2, 2, 3, 1, dy, NULL, weight, lora_A, lora_B, 1, 0, 0, fp64, fp64, dz, dx, dB),
        LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, x, NULL, lora_A, lora_B, 1, 0, 0, fp64, fp64, dz, dx, dB),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, x, weight, NULL, lora_B, 1, 0, 0, fp64, fp64, dz, dx, dB),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, x, weight, lora_A, NULL, 1, 0, 0, fp64, fp64, dz, dx, dB),
                  LORAFA_ERROR_NULL);

    EXPECT_STATUS(lorafa_round_array(-1, x, LORAFA_FP32, z), LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_round_array(1, x, bad, z), LORAFA_ERROR_DTYPE);
    EXPECT_STATUS(lorafa_round_array(1, NULL, LORAFA_FP32, z), LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_round_array(0, NULL, LORAFA_FP32, NULL), LORAFA_OK);
}

/* The known answers that the authors of Philox publish with it. */
static void test_philox(void)
{
    uint32_t word[4];
    lorafa_philox4x32((const uint32_t[]){0, 0, 0, 0}, (const uint32_t[]){0, 0}, word);
    EXPECT_WORDS(word, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8);
    lorafa_philox4x32((const uint32_t[]){0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
                      (const uint32_t[]){0xffffffff, 0xffffffff}, word);
    EXPECT_WORDS(word, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd);
    lorafa_philox4x32((const uint32_t[]){0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
                      (const uint32_t[]){0xa4093822, 0x299f31d0}, word);
    EXPECT_WORDS(word, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1);
}

static void test_keep(void)
{
    EXPECT_TRUE(lorafa_threshold(0.0) == 0);
    EXPECT_TRUE(lorafa_threshold(0.5) == 0x80000000);
    EXPECT_TRUE(lorafa_threshold(0x1p-33) == 0); /* ties, to the even one */
    EXPECT_TRUE(lorafa_threshold(0x3p-33) == 2);
    EXPECT_TRUE(lorafa_threshold(1 - 0x1p-32) == 0xffffffff);
    EXPECT_TRUE(lorafa_threshold(1 - 0x1p-53) == 0xffffffff);

    /* Row 0 of seed 0 and of four columns is the first known answer; a word at the threshold is kept. */
    const uint32_t words[] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
    for (int column = 0; column < 4; column++) {
        EXPECT_TRUE(lorafa_keep(0, 0, column, 4, words[column]) == 1);
        EXPECT_TRUE(lorafa_keep(0, 0, column, 4, words[column] + 1) == 0);
    }

    /* K = 5: two calls a row, so row 2^33 + 3, column 4 is call 2^34 + 7, word 0. The seed's low word is
     * key[0]. */
    uint32_t word[4];
    lorafa_philox4x32((const uint32_t[]){7, 4, 0, 0}, (const uint32_t[]){0x89abcdef, 0x01234567}, word);
    const uint64_t seed = 0x0123456789abcdef, row = (UINT64_C(1) << 33) + 3;
    EXPECT_TRUE(lorafa_keep(seed, row, 4, 5, word[0]) == 1);
    EXPECT_TRUE(lorafa_keep(seed, row, 4, 5, word[0] + 1) == 0);
    /* K = 4: one call a row, the same call as row 2^34 + 7, column 3. */
    EXPECT_TRUE(lorafa_keep(seed, 2 * row + 1, 3, 4, word[3]) == 1);
    EXPECT_TRUE(lorafa_keep(seed, 2 * row + 1, 3, 4, word[3] + 1) == 0);

    uint8_t keep[8] = {7, 7, 7, 7, 7, 7, 7, 7}, far[4];
    EXPECT_STATUS(lorafa_keep_mask(2, 3, 0, 0.5, 0, keep), LORAFA_OK); /* f8e4cca4 5cb200db b1a574eb below */
    EXPECT_BITS(8, keep, 0, 1, 1, 1, 0, 1, 7, 7);
    EXPECT_STATUS(lorafa_keep_mask(1, 4, 5, 0.5, 0, keep),
                  LORAFA_OK); /* c417681d 11d85194 fbd62c3b f739e278 */
    EXPECT_BITS(4, keep, 1, 0, 1, 1);
    EXPECT_STATUS(lorafa_keep_mask(1, 4, 5, 0, 0, keep), LORAFA_OK);
    EXPECT_BITS(4, keep, 1, 1, 1, 1);
    EXPECT_STATUS(lorafa_keep_mask(4, 1, 0, 0.5, UINT64_MAX - 1, far),
                  LORAFA_OK); /* from the last rows on to the first */
    EXPECT_STATUS(lorafa_keep_mask(2, 1, 0, 0.5, 0, keep), LORAFA_OK);
    EXPECT_BITS(2, far + 2, keep[0], keep[1]);

    EXPECT_STATUS(lorafa_keep_mask(0, 4, 5, 0.5, 0, NULL), LORAFA_OK);
    EXPECT_STATUS(lorafa_keep_mask(-1, 4, 5, 0.5, 0, keep), LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_keep_mask(1, -4, 5, 0.5, 0, keep), LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_keep_mask(INT64_MAX, 2, 5, 0.5, 0, keep), LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_keep_mask(1, 4, 5, 1, 0, keep), LORAFA_ERROR_DROPOUT);
    EXPECT_STATUS(lorafa_keep_mask(1, 4, 5, NAN, 0, keep), LORAFA_ERROR_DROPOUT);
    EXPECT_STATUS(lorafa_keep_mask(1, 4, 5, 0.5, 0, NULL), LORAFA_ERROR_NULL);
}

/* p = 1/2 and seed 0 keep (0, 1, 1) of row 0; s / (1 - p) is 1. */
static void test_dropout(void)
{
    for (int dtype = LORAFA_FP64; dtype <= LORAFA_FP16; dtype++) {
        double z[1], y[2], dz[1], dx[3], dB[2];
        EXPECT_STATUS(lorafa_forward(1, 2, 3, 1, x, weight, lora_A, lora_B, bias, 0.5, 0.5, 0, dtype, z, y),
                      LORAFA_OK);
        EXPECT(1, z, 5);      /* 2 + 3 */
        EXPECT(2, y, 13, 19); /* -2 + 5 + 10 and 4 - 5 + 20: the base product has no dropout */
        EXPECT_STATUS(
            lorafa_backward(1, 2, 3, 1, dy, z, weight, lora_A, lora_B, 0.5, 0.5, 0, dtype, dtype, dz, dx, dB),
            LORAFA_OK);
        EXPECT(1, dz, -0.5);
        EXPECT(3, dx, 5, 1, -2); /* (5, 2, -1) + keep 2 (-0.5) */
        EXPECT(2, dB, 5, 10);
    }

    /* 1 / (1 - p) meets the accumulator: 4/3 (1 + 2^-7) = 1 + 44 * 2^-7 is in bf16, 4/3 alone is not. */
    const double ones[] = {1, 1}, x_row[] = {0x1p-7, 1};
    double z[1], y[1], dx[2];
    EXPECT_STATUS(lorafa_forward(1, 1, 2, 1, x_row, ones, ones, ones, NULL, 1, 0.25, 0, LORAFA_BF16, z, NULL),
                  LORAFA_OK);
    EXPECT(1, z, 1 + 0x2cp-7);

    /* dz has no 1 / (1 - p): 49152 is in fp16, twice that is not. seed 0 keeps (0, 1). */
    double dz[1];
    const double dy_large[] = {32768}, sixteenths[] = {0x1p-4, 0x1p-4}, none[] = {0, 0};
    EXPECT_STATUS(lorafa_backward(1, 1, 2, 1, dy_large, NULL, none, sixteenths, ones, 1.5, 0.5, 0, LORAFA_FP16,
                                  LORAFA_FP16, dz, dx, NULL),
                  LORAFA_OK);
    EXPECT(1, dz, 49152);
    EXPECT(2, dx, 0, 6144);

    /* What is dropped is multiplied by 0, not forgotten. */
    const double x_nan[] = {NAN, 1};
    EXPECT_STATUS(lorafa_forward(1, 1, 2, 1, x_nan, ones, ones, ones, NULL, 1, 0.5, 0, LORAFA_BF16, z, y),
                  LORAFA_OK);
    EXPECT(1, z, NAN);
    const double dy_inf[] = {INFINITY}, zeros[] = {0, 0}, finite[] = {1};
    EXPECT_STATUS(lorafa_backward(1, 1, 2, 1, dy_inf, NULL, zeros, ones, finite, 1, 0.5, 0, LORAFA_FP64,
                                  LORAFA_FP64, NULL, dx, NULL),
                  LORAFA_OK);
    EXPECT(2, dx, NAN, NAN);

    const double wrong[] = {1, -0.1, NAN, INFINITY};
    for (int i = 0; i < 4; i++) {
        EXPECT_STATUS(
            lorafa_forward(1, 1, 2, 1, x_row, ones, ones, ones, NULL, 1, wrong[i], 0, LORAFA_FP64, z, y),
            LORAFA_ERROR_DROPOUT);
        EXPECT_STATUS(lorafa_backward(1, 1, 2, 1, ones, z, ones, ones, ones, 1, wrong[i], 0, LORAFA_FP64,
                                      LORAFA_FP64, NULL, dx, NULL),
                      LORAFA_ERROR_DROPOUT);
    }
}

/* Three members on x = (1, 2): an adapter of rank 1, none, one of rank 2. Everything is exact. */
static const double group_x[] = {1, 2}, group_bias[] = {10, 20};
static const double weight_0[] = {1, 1}, A_0[] = {1, 0}, B_0[] = {2};           /* (1, 2), (1, 2), (1, 1) */
static const double weight_1[] = {1, 0, 0, 1};                                  /* (2, 2) */
static const double weight_2[] = {2, -1}, A_2[] = {1, 0, 0, 1}, B_2[] = {1, 1}; /* (1, 2), (2, 2), (1, 2) */
static const struct lorafa_linear group[] = {
    {.N = 1, .R = 1, .weight = weight_0, .lora_A = A_0, .lora_B = B_0, .scaling = 1},
    {.N = 2, .R = 0, .weight = weight_1, .bias = group_bias, .scaling = 1},
    {.N = 1, .R = 2, .weight = weight_2, .lora_A = A_2, .lora_B = B_2, .scaling = 2},
};
static const double group_dy_0[] = {1}, group_dy_1[] = {1, -1}, group_dy_2[] = {2};
static const double *const group_dy[] = {group_dy_0, group_dy_1, group_dy_2};

static void test_group(void)
{
    double z_0[1], z_2[2], y_0[1], y_1[2], y_2[1], dz_0[1], dz_2[2], dx[2], dB_0[1], dB_2[2];
    double *const z[] = {z_0, NULL, z_2}, *const y[] = {y_0, y_1, y_2};
    double *const dz[] = {dz_0, NULL, dz_2}, *const dB[] = {dB_0, NULL, dB_2};
    const double *const z_in[] = {z_0, NULL, z_2};
    for (int dtype = LORAFA_FP64; dtype <= LORAFA_FP16; dtype++) {
        EXPECT_STATUS(lorafa_group_forward(1, 2, 3, group_x, group, 0, dtype, z, y), LORAFA_OK);
        EXPECT(1, z_0, 1);
        EXPECT(2, z_2, 2, 4);
        EXPECT(1, y_0, 5);
        EXPECT(2, y_1, 11, 22);
        EXPECT(1, y_2, 6);
        EXPECT_STATUS(lorafa_group_backward(1, 2, 3, group_dy, z_in, group, 0, dtype, dz, dx, dB), LORAFA_OK);
        EXPECT(1, dz_0, 2);
        EXPECT(2, dz_2, 4, 4);
        EXPECT(2, dx, 12, 2); /* (1, 1) + (1, -1) + (4, -2) + (2, 0) + (4, 4) */
        EXPECT(1, dB_0, 1);
        EXPECT(2, dB_2, 4, 8);
    }

    /* An output that nobody used is a gradient of zeros; its B, weight and z are not read. */
    struct lorafa_linear members[] = {group[0], group[1], group[2]};
    members[2].lora_B = members[2].weight = NULL;
    const double *const dy_some[] = {group_dy_0, group_dy_1, NULL}, *const z_some[] = {z_0, NULL, NULL};
    EXPECT_STATUS(lorafa_group_backward(1, 2, 3, dy_some, z_some, members, 0, LORAFA_FP64, dz, dx, dB),
                  LORAFA_OK);
    EXPECT(2, dz_2, 0, 0);
    EXPECT(2, dx, 4, 0);
    EXPECT(2, dB_2, 0, 0);

    /* Each member has a mask of its own: p = 1/2 keeps (0, 1) of seed 0 and (1, 0) of seed 5. */
    const struct lorafa_linear dropping[] = {
        {.N = 1,
         .R = 1,
         .weight = weight_0,
         .lora_A = weight_0,
         .lora_B = B_0,
         .scaling = 0.5,
         .dropout_p = 0.5,
         .seed = 0},
        {.N = 1,
         .R = 1,
         .weight = weight_0,
         .lora_A = weight_0,
         .lora_B = B_0,
         .scaling = 0.5,
         .dropout_p = 0.5,
         .seed = 5},
    };
    double z_a[1], z_b[1];
    double *const z_drop[] = {z_a, z_b}, *const y_drop[] = {y_0, y_2};
    const double *const dy_drop[] = {group_dy_0, group_dy_2};
    EXPECT_STATUS(lorafa_group_forward(1, 2, 2, group_x, dropping, 0, LORAFA_BF16, z_drop, y_drop),
                  LORAFA_OK);
    EXPECT(1, z_a, 2);
    EXPECT(1, z_b, 1);
    EXPECT(1, y_0, 7);
    EXPECT(1, y_2, 5);
    EXPECT_STATUS(lorafa_group_backward(1, 2, 2, dy_drop, NULL, dropping, 0, LORAFA_BF16, NULL, dx, NULL),
                  LORAFA_OK);
    EXPECT(2, dx, 7, 5); /* (1, 1) + (2, 2) + (0, 2) + (4, 0) */

    /* No members at all: dx is a sum of nothing. */
    EXPECT_STATUS(lorafa_group_forward(1, 2, 0, group_x, NULL, 0, LORAFA_FP32, NULL, NULL), LORAFA_OK);
    EXPECT_STATUS(lorafa_group_backward(1, 2, 0, NULL, NULL, NULL, 1, LORAFA_FP32, NULL, dx, NULL),
                  LORAFA_OK);
    EXPECT(2, dx, 0, 0);
}

/* bf16: 1 + 2^-8 + 2^-8 is 1 + 2^-7 when it is rounded once, and 1 when it is rounded after each step. */
static void test_group_rounds_a_sum_over_members_once(void)
{
    const double one[] = {1}, small[] = {0x1p-8}, zero[] = {0};
    const double *const dy[] = {one, one, one};
    double dx[1], dz[1];
    const struct lorafa_linear plain[] = {
        {.N = 1, .weight = one}, {.N = 1, .weight = small}, {.N = 1, .weight = small}};
    EXPECT_STATUS(lorafa_group_backward(1, 1, 3, dy, NULL, plain, 0, LORAFA_BF16, NULL, dx, NULL), LORAFA_OK);
    EXPECT(1, dx, 1 + 0x1p-7);

    const struct lorafa_linear adapted[] = {
        {.N = 1, .R = 1, .weight = zero, .lora_A = one, .lora_B = one, .scaling = 1},
        {.N = 1, .R = 1, .weight = zero, .lora_A = one, .lora_B = small, .scaling = 1},
        {.N = 1, .R = 1, .weight = zero, .lora_A = one, .lora_B = small, .scaling = 1},
    };
    EXPECT_STATUS(lorafa_group_backward(1, 1, 3, dy, NULL, adapted, 0, LORAFA_BF16, NULL, dx, NULL),
                  LORAFA_OK);
    EXPECT(1, dx, 1 + 0x1p-7);
    double *const dz_shared[] = {dz};
    EXPECT_STATUS(lorafa_group_backward(1, 1, 3, dy, NULL, adapted, 1, LORAFA_BF16, dz_shared, dx, NULL),
                  LORAFA_OK);
    EXPECT(1, dz, 1 + 0x1p-7);
    EXPECT(1, dx, 1 + 0x1p-7);
}

/* Two members with lora_A (1, 1) in common and one without an adapter; p = 1/2 and seed 0 keep (0, 1). */
static void test_shared_A(void)
{
    const double B[] = {3};
    struct lorafa_linear members[] = {
        {.N = 1,
         .R = 1,
         .weight = weight_0,
         .lora_A = weight_0,
         .lora_B = B_0,
         .scaling = 0.5,
         .dropout_p = 0.5},
        {.N = 2, .R = 0, .weight = weight_1},
        {.N = 1, .R = 1, .weight = weight_2, .lora_B = B, .scaling = 0.5, .dropout_p = 0.5},
    };
    double z_0[1], y_0[1], y_1[2], y_2[1], dz_0[1], dx[2], dB_0[1], dB_2[1];
    double *const z[] = {z_0}, *const y[] = {y_0, y_1, y_2}, *const dz[] = {dz_0},
                  *const dB[] = {dB_0, NULL, dB_2};
    const double *const z_in[] = {z_0};
    EXPECT_STATUS(lorafa_group_forward(1, 2, 3, group_x, members, 1, LORAFA_BF16, z, y), LORAFA_OK);
    EXPECT(1, z_0, 2);
    EXPECT(1, y_0, 7);
    EXPECT(2, y_1, 1, 2);
    EXPECT(1, y_2, 6);
    EXPECT_STATUS(lorafa_group_backward(1, 2, 3, group_dy, z_in, members, 1, LORAFA_BF16, dz, dx, dB),
                  LORAFA_OK);
    EXPECT(1, dz_0, 4);  /* 0.5 (1 * 2 + 2 * 3) */
    EXPECT(2, dx, 6, 6); /* (1, 1) + (1, -1) + (4, -2) + 2 (0, 4) */
    EXPECT(1, dB_0, 2);
    EXPECT(1, dB_2, 4);

    struct lorafa_linear *last = &members[2];
    last->seed = 1;
    EXPECT_STATUS(lorafa_group_forward(1, 2, 3, group_x, members, 1, LORAFA_BF16, z, y), LORAFA_ERROR_SHARED);
    last->seed = 0, last->scaling = 1;
    EXPECT_STATUS(lorafa_group_forward(1, 2, 3, group_x, members, 1, LORAFA_BF16, z, y), LORAFA_ERROR_SHARED);
    last->scaling = 0.5, last->dropout_p = 0;
    EXPECT_STATUS(lorafa_group_forward(1, 2, 3, group_x, members, 1, LORAFA_BF16, z, y), LORAFA_ERROR_SHARED);
    last->dropout_p = 0.5, last->R = 2;
    EXPECT_STATUS(lorafa_group_backward(1, 2, 3, group_dy, z_in, members, 1, LORAFA_BF16, dz, dx, dB),
                  LORAFA_ERROR_SHARED);
}

static void test_group_errors(void)
{
    double z_0[1] = {7}, y_0[2] = {7, 7}, dx[2] = {7, 7}, dB_0[1] = {7};
    double *const z[] = {z_0, NULL, NULL}, *const y[] = {y_0, NULL, NULL},
                  *const last_y[] = {NULL, NULL, y_0};
    double *const dB[] = {dB_0, NULL, NULL};
    const double *const z_in[] = {NULL, NULL, NULL};
    const enum lorafa_dtype fp64 = LORAFA_FP64, bad = (enum lorafa_dtype)4;
    struct lorafa_linear members[3];

#define WITH(change, expected_forward, expected_backward)                                                    \
    do {                                                                                                     \
        for (int i = 0; i < 3; i++)                                                                          \
            members[i] = group[i];                                                                           \
        change;                                                                                              \
        EXPECT_STATUS(lorafa_group_forward(1, 2, 3, group_x, members, 0, fp64, z, last_y),                   \
                      expected_forward);                                                                     \
        EXPECT_STATUS(lorafa_group_backward(1, 2, 3, group_dy, z_in, members, 0, fp64, NULL, dx, NULL),      \
                      expected_backward);                                                                    \
        z_0[0] = y_0[0] = dx[0] = dx[1] = 7;                                                                 \
    } while (0)
    WITH((void)0, LORAFA_OK, LORAFA_OK);
    WITH(members[2].N = -1, LORAFA_ERROR_SIZE, LORAFA_ERROR_SIZE);
    WITH(members[2].R = -1, LORAFA_ERROR_SIZE, LORAFA_ERROR_SIZE);
    WITH(members[1].N = INT64_MAX, LORAFA_ERROR_SIZE, LORAFA_ERROR_SIZE);
    WITH(members[2].R = INT64_MAX, LORAFA_ERROR_SIZE, LORAFA_ERROR_SIZE);
    WITH(members[2].dropout_p = 1, LORAFA_ERROR_DROPOUT, LORAFA_ERROR_DROPOUT);
    WITH(members[2].lora_B_dtype = bad, LORAFA_ERROR_DTYPE, LORAFA_ERROR_DTYPE);
    WITH(members[2].weight = NULL, LORAFA_ERROR_NULL, LORAFA_ERROR_NULL);
    WITH(members[2].lora_B = NULL, LORAFA_ERROR_NULL, LORAFA_ERROR_NULL);
    WITH(members[0].lora_A = NULL, LORAFA_ERROR_NULL, LORAFA_ERROR_NULL);
    WITH(members[1].weight = NULL, LORAFA_OK, LORAFA_ERROR_NULL);
#undef WITH

    EXPECT_STATUS(lorafa_group_forward(-1, 2, 3, group_x, group, 0, fp64, z, y), LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_group_forward(1, -2, 3, group_x, group, 0, fp64, z, y), LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_group_forward(1, 2, -3, group_x, group, 0, fp64, z, y), LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_group_forward(1, 2, 3, group_x, NULL, 0, fp64, z, y), LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_group_forward(1, 2, 3, NULL, group, 0, fp64, z, y), LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_group_forward(1, 2, 3, group_x, group, 0, bad, z, y), LORAFA_ERROR_DTYPE);
    EXPECT_STATUS(lorafa_group_forward(1, 2, 3, NULL, group, 0, fp64, NULL, NULL), LORAFA_OK);
    EXPECT_STATUS(lorafa_group_backward(1, 2, 3, NULL, z_in, group, 0, fp64, NULL, dx, NULL),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_group_backward(1, 2, 3, group_dy, z_in, group, 0, fp64, NULL, NULL, dB),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_group_backward(1, 2, 3, group_dy, NULL, group, 0, fp64, NULL, NULL, dB),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_group_backward(1, 2, 3, NULL, NULL, group, 0, fp64, NULL, NULL, NULL), LORAFA_OK);
    EXPECT(1, z_0, 7);
    EXPECT(2, y_0, 7, 7);
    EXPECT(2, dx, 7, 7);
    EXPECT(1, dB_0, 7);
}

static void test_gated_product(void)
{
    const double g[] = {1, 2, 0, 1, -40}, u[] = {1, 1, 5, 3, 1}, dh[] = {1, 1, 3, -2, 1}, one[] = {1},
                 two[] = {2};
    double h[5], dg[5], du[5];

    /* silu(1) = 0.731058579, silu'(1) = 0.927670512, silu(2) = 1.761594156, silu'(2) = 1.090784242 */
    EXPECT_STATUS(lorafa_gated_product(5, g, u, LORAFA_SILU, LORAFA_BF16, h), LORAFA_OK);
    EXPECT(4, h, 187 / 256.0, 225 / 128.0, 0, 140 / 64.0);
    EXPECT_STATUS(lorafa_gated_product_backward(5, dh, g, u, LORAFA_SILU, LORAFA_BF16, dg, du), LORAFA_OK);
    EXPECT(4, dg, 237 / 256.0, 140 / 128.0, 7.5, -178 / 32.0);
    EXPECT(4, du, 187 / 256.0, 225 / 128.0, 0, -187 / 128.0);

    /* gelu(1) = 0.841344746, gelu'(1) = 1.083315471, gelu(2) = 1.954499736, gelu'(2) = 1.085231811 */
    EXPECT_STATUS(lorafa_gated_product(5, g, u, LORAFA_GELU, LORAFA_FP16, h), LORAFA_OK);
    EXPECT(4, h, 1723 / 2048.0, 2001 / 1024.0, 0, 1292 / 512.0);
    EXPECT_STATUS(lorafa_gated_product_backward(5, dh, g, u, LORAFA_GELU, LORAFA_FP16, dg, du), LORAFA_OK);
    EXPECT(4, dg, 1109 / 1024.0, 1111 / 1024.0, 7.5, -1664 / 256.0);
    EXPECT(4, du, 1723 / 2048.0, 2001 / 1024.0, 0, -1723 / 1024.0);

    /* By tanh: 0.841191991, 1.082964084, 1.954597694, 1.086099257 */
    EXPECT_STATUS(lorafa_gated_product(5, g, u, LORAFA_GELU_TANH, LORAFA_FP16, h), LORAFA_OK);
    EXPECT(4, h, 1723 / 2048.0, 2002 / 1024.0, 0, 1292 / 512.0);
    EXPECT_STATUS(lorafa_gated_product_backward(5, dh, g, u, LORAFA_GELU_TANH, LORAFA_FP16, dg, du),
                  LORAFA_OK);
    EXPECT(4, dg, 1109 / 1024.0, 1112 / 1024.0, 7.5, -1663 / 256.0);
    EXPECT(4, du, 1723 / 2048.0, 2002 / 1024.0, 0, -1723 / 1024.0);

    /* Far from 0 they are g, or 0 with its sign, and do not overflow on the way. */
    for (int a = LORAFA_SILU; a <= LORAFA_GELU_TANH; a++) {
        const double far[] = {1e30, -1e30}, ones[] = {1, 1}, nan[] = {NAN};
        EXPECT_STATUS(lorafa_gated_product(2, far, ones, a, LORAFA_FP64, h), LORAFA_OK);
        EXPECT(2, h, 1e30, -0.0);
        EXPECT_STATUS(lorafa_gated_product_backward(2, ones, far, ones, a, LORAFA_FP32, dg, du), LORAFA_OK);
        EXPECT(1, dg, 1);
        EXPECT_TRUE(dg[1] == 0);
        EXPECT_STATUS(lorafa_gated_product(1, nan, ones, a, LORAFA_BF16, h), LORAFA_OK);
        EXPECT(1, h, NAN);
    }

    const enum lorafa_activation no = (enum lorafa_activation)3;
    EXPECT_STATUS(lorafa_gated_product(-1, one, two, LORAFA_SILU, LORAFA_FP64, h), LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_gated_product(1, one, two, no, LORAFA_FP64, h), LORAFA_ERROR_KIND);
    EXPECT_STATUS(lorafa_gated_product(1, one, two, LORAFA_SILU, (enum lorafa_dtype)4, h),
                  LORAFA_ERROR_DTYPE);
    EXPECT_STATUS(lorafa_gated_product(1, NULL, two, LORAFA_SILU, LORAFA_FP64, h), LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_gated_product(1, one, NULL, LORAFA_SILU, LORAFA_FP64, h), LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_gated_product(0, NULL, NULL, LORAFA_SILU, LORAFA_FP64, NULL), LORAFA_OK);
    EXPECT_STATUS(lorafa_gated_product_backward(1, one, one, two, no, LORAFA_FP64, dg, du),
                  LORAFA_ERROR_KIND);
    EXPECT_STATUS(lorafa_gated_product_backward(1, NULL, one, two, LORAFA_SILU, LORAFA_FP64, dg, du),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_gated_product_backward(1, one, one, two, LORAFA_SILU, LORAFA_FP64, dg, NULL),
                  LORAFA_ERROR_NULL);
    EXPECT_TRUE(isnan(lorafa_activate(no, 1)) && isnan(lorafa_activate_derivative(no, 1)));
}

/*
 * M = 2 and every other size 1. gate(x) = x + 1 - 2 x, up(x) = 2 x + x, down(h) = 4 h + 2 h + 7, so x = 1 and
 * -39 give g = 0 and 40, where each activation and its slope are 0, 1/2 and 40, 1 to all of double's digits.
 */
static void test_mlp(void)
{
    const double x[] = {1, -39}, dy[] = {3, 1}, one[] = {1}, two[] = {2}, four[] = {4}, seven[] = {7};
    const struct lorafa_linear layers[] = {
        {.N = 1, .R = 1, .weight = one, .bias = one, .lora_A = one, .lora_B = one, .scaling = -2},
        {.N = 1, .R = 1, .weight = two, .lora_A = one, .lora_B = one, .scaling = 1},
        {.N = 1, .R = 1, .weight = four, .bias = seven, .lora_A = one, .lora_B = two, .scaling = 1},
    };
    double z_g[2], z_u[2], z_d[2], g[2], u[2], h[2], y[2], dh[2], dg[2], du[2], dx[2], dB_g[1], dB_u[1],
        dB_d[1];
    double *const z[] = {z_g, z_u, z_d}, *const dB[] = {dB_g, dB_u, dB_d};
    const double *const z_in[] = {z_g, z_u, z_d};
    for (int a = LORAFA_SILU; a <= LORAFA_GELU_TANH; a++)
        for (int dtype = LORAFA_FP64; dtype <= LORAFA_FP32; dtype++) {
            EXPECT_STATUS(lorafa_mlp_forward(2, 1, x, layers, a, dtype, z, g, u, h, y), LORAFA_OK);
            EXPECT(2, z_g, -2, 78);
            EXPECT(2, z_u, 1, -39);
            EXPECT(2, g, 0, 40);
            EXPECT(2, u, 3, -117);
            EXPECT(2, h, 0, -4680);
            EXPECT(2, z_d, 0, -4680);
            EXPECT(2, y, 7, -28073);

            EXPECT_STATUS(lorafa_mlp_backward(2, 1, dy, g, u, z_in, layers, a, dtype, dh, dg, du, dx, dB),
                          LORAFA_OK);
            EXPECT(2, dh, 18, 6);
            EXPECT(2, dg, 27, -702);
            EXPECT(2, du, 0, 240);
            EXPECT(2, dx, -27, 1422); /* 27 - 54, and -702 + 1404 + 480 + 240 */
            EXPECT(1, dB_g, -54810);
            EXPECT(1, dB_u, -9360);
            EXPECT(1, dB_d, -4680);
        }

    /* Some outputs alone; without dB no z is needed. */
    double alone[2];
    EXPECT_STATUS(
        lorafa_mlp_forward(2, 1, x, layers, LORAFA_SILU, LORAFA_FP64, NULL, NULL, NULL, NULL, alone),
        LORAFA_OK);
    EXPECT(2, alone, 7, -28073);
    EXPECT_STATUS(lorafa_mlp_backward(2, 1, dy, g, u, NULL, layers, LORAFA_SILU, LORAFA_FP64, NULL, NULL,
                                      NULL, alone, NULL),
                  LORAFA_OK);
    EXPECT(2, alone, -27, 1422);

    /* No rows. */
    EXPECT_STATUS(
        lorafa_mlp_forward(0, 1, NULL, layers, LORAFA_GELU, LORAFA_FP64, z, NULL, NULL, NULL, alone),
        LORAFA_OK);
    EXPECT_STATUS(lorafa_mlp_backward(0, 1, NULL, NULL, NULL, z_in, layers, LORAFA_GELU, LORAFA_FP64, NULL,
                                      NULL, NULL, NULL, dB),
                  LORAFA_OK);
    EXPECT(1, dB_g, 0);
    EXPECT(1, dB_d, 0);

    /* bf16: g = 1, u = 1 + 2^-7, and h = 0.731058579 (1 + 2^-7) = 188.61 / 256 is rounded before down reads
     * it. */
    const double bf16_u[] = {1 + 0x1p-7}, three[] = {3};
    const struct lorafa_linear plain[] = {
        {.N = 1, .weight = one}, {.N = 1, .weight = bf16_u}, {.N = 1, .weight = three}};
    EXPECT_STATUS(lorafa_mlp_forward(1, 1, one, plain, LORAFA_SILU, LORAFA_BF16, NULL, g, u, h, y),
                  LORAFA_OK);
    EXPECT(1, h, 189 / 256.0);
    EXPECT(1, y, 142 / 64.0); /* 567 / 256 = 141.75 / 64; 3 * 188.61 / 256 would be 141.46 / 64 */

    EXPECT_STATUS(lorafa_mlp_forward(2, 1, x, NULL, LORAFA_SILU, LORAFA_FP64, z, g, u, h, alone),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_mlp_forward(2, 1, NULL, layers, LORAFA_SILU, LORAFA_FP64, z, g, u, h, alone),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_mlp_forward(-2, 1, x, layers, LORAFA_SILU, LORAFA_FP64, z, g, u, h, alone),
                  LORAFA_ERROR_SIZE);
    EXPECT_STATUS(
        lorafa_mlp_forward(2, 1, x, layers, (enum lorafa_activation)3, LORAFA_FP64, z, g, u, h, alone),
        LORAFA_ERROR_KIND);
    EXPECT_STATUS(
        lorafa_mlp_backward(2, 1, NULL, g, u, z_in, layers, LORAFA_SILU, LORAFA_FP64, dh, dg, du, alone, dB),
        LORAFA_ERROR_NULL);
    EXPECT_STATUS(
        lorafa_mlp_backward(2, 1, dy, NULL, u, z_in, layers, LORAFA_SILU, LORAFA_FP64, dh, dg, du, alone, dB),
        LORAFA_ERROR_NULL);
    EXPECT_STATUS(
        lorafa_mlp_backward(2, 1, dy, g, NULL, z_in, layers, LORAFA_SILU, LORAFA_FP64, dh, dg, du, alone, dB),
        LORAFA_ERROR_NULL);
    EXPECT_STATUS(
        lorafa_mlp_backward(2, 1, dy, g, u, NULL, layers, LORAFA_SILU, LORAFA_FP64, dh, dg, du, alone, dB),
        LORAFA_ERROR_NULL);
    struct lorafa_linear members[] = {layers[0], layers[1], layers[2]};
    members[1].N = 2; /* gate and up of different widths */
    EXPECT_STATUS(lorafa_mlp_forward(2, 1, x, members, LORAFA_SILU, LORAFA_FP64, z, g, u, h, alone),
                  LORAFA_ERROR_SIZE);
    members[1].N = 1, members[2].weight = NULL;
    EXPECT_STATUS(lorafa_mlp_forward(2, 1, x, members, LORAFA_SILU, LORAFA_FP64, z, g, u, h, alone),
                  LORAFA_ERROR_NULL);
    EXPECT(2, alone, -27, 1422);
}

/* Mean of squares 3 and eps 1: rstd is 1/2, n = (3/2, 1/2, 1/2, 1/2), and all is exact. */
static void test_rms_norm(void)
{
    const double x[] = {3, 1, 1, 1}, weight[] = {2, 4, 1, -1}, dy[] = {1, 1, 2, 2};
    double y[4], dx[4];
    for (int dtype = LORAFA_FP64; dtype <= LORAFA_FP16; dtype++) {
        EXPECT_STATUS(lorafa_rms_norm(1, 4, x, weight, 1, LORAFA_NORM_LLAMA, dtype, y), LORAFA_OK);
        EXPECT(4, y, 3, 2, 0.5, -0.5);
        EXPECT_STATUS(lorafa_rms_norm(1, 4, x, weight, 1, LORAFA_NORM_GEMMA, dtype, y), LORAFA_OK);
        EXPECT(4, y, 4.5, 2.5, 1, 0);
        /* dn = (2, 4, 2, -2), the mean of dn n 5/4; for Gemma (3, 5, 4, 0) and 9/4. */
        EXPECT_STATUS(lorafa_rms_norm_backward(1, 4, dy, x, weight, 1, LORAFA_NORM_LLAMA, dtype, dx),
                      LORAFA_OK);
        EXPECT(4, dx, 0.0625, 1.6875, 0.6875, -1.3125);
        EXPECT_STATUS(lorafa_rms_norm_backward(1, 4, dy, x, weight, 1, LORAFA_NORM_GEMMA, dtype, dx),
                      LORAFA_OK);
        EXPECT(4, dx, -0.1875, 1.9375, 1.4375, -0.5625);
    }

    /* bf16, rstd 1/3: Llama's n is 171 / 512, five times it 213.75 / 128; Gemma's 5/3 is 213.33 / 128. */
    const double one[] = {1}, four[] = {4}, five[] = {5};
    EXPECT_STATUS(lorafa_rms_norm(1, 1, one, five, 8, LORAFA_NORM_LLAMA, LORAFA_BF16, y), LORAFA_OK);
    EXPECT(1, y, 214 / 128.0);
    EXPECT_STATUS(lorafa_rms_norm(1, 1, one, four, 8, LORAFA_NORM_GEMMA, LORAFA_BF16, y), LORAFA_OK);
    EXPECT(1, y, 213 / 128.0);

    /* Rows of zeros without eps have no norm. */
    const double zeros[] = {0, 0};
    EXPECT_STATUS(lorafa_rms_norm(1, 2, zeros, weight, 0, LORAFA_NORM_LLAMA, LORAFA_FP32, y), LORAFA_OK);
    EXPECT(2, y, NAN, NAN);

    EXPECT_STATUS(lorafa_rms_norm(0, 4, NULL, weight, 1, LORAFA_NORM_LLAMA, LORAFA_FP32, NULL), LORAFA_OK);
    EXPECT_STATUS(lorafa_rms_norm(-1, 4, x, weight, 1, LORAFA_NORM_LLAMA, LORAFA_FP32, y), LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_rms_norm(1, 4, x, weight, 1, (enum lorafa_norm_form)2, LORAFA_FP32, y),
                  LORAFA_ERROR_KIND);
    EXPECT_STATUS(lorafa_rms_norm(1, 4, x, weight, 1, LORAFA_NORM_LLAMA, (enum lorafa_dtype)4, y),
                  LORAFA_ERROR_DTYPE);
    EXPECT_STATUS(lorafa_rms_norm(1, 4, NULL, weight, 1, LORAFA_NORM_LLAMA, LORAFA_FP32, y),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_rms_norm(1, 4, x, NULL, 1, LORAFA_NORM_LLAMA, LORAFA_FP32, y), LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_rms_norm_backward(1, 4, NULL, x, weight, 1, LORAFA_NORM_GEMMA, LORAFA_FP32, dx),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_rms_norm_backward(1, 4, dy, x, weight, 1, (enum lorafa_norm_form)2, LORAFA_FP32, dx),
                  LORAFA_ERROR_KIND);
}

static void test_correct(void)
{
    /* A A^T is (5, 2; 2, 8) and its inverse (8, -2; -2, 5) / 36; s^2 is 1/4. */
    const double A[] = {1, 2, 0, 2, 0, 2}, dB[] = {9, 18, 0, 9}, halves[] = {1, 0, 0, 1, 0, 0};
    double corrected[4];
    EXPECT_STATUS(lorafa_correct(2, 3, 2, dB, A, 0.5, 0, LORAFA_BF16, corrected), LORAFA_OK);
    EXPECT(4, corrected, 4, 8, -2, 5);
    /* epsilon 1 beside rows of length 0 and 1: 1 and 1/2. */
    EXPECT_STATUS(lorafa_correct(1, 1, 2, dB, halves + 2, 1, 1, LORAFA_FP32, corrected), LORAFA_OK);
    EXPECT(2, corrected, 9, 9);
    EXPECT_STATUS(lorafa_correct(1, 1, 2, dB, halves + 2, 1, 0, LORAFA_FP32, corrected), LORAFA_ERROR_SINGULAR);
    EXPECT_STATUS(lorafa_correct(0, 3, 2, NULL, A, 1, 0, LORAFA_FP32, NULL), LORAFA_OK);
    EXPECT_STATUS(lorafa_correct(-1, 3, 2, dB, A, 1, 0, LORAFA_FP32, corrected), LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_correct(2, 3, 2, NULL, A, 1, 0, LORAFA_FP32, corrected), LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_correct(2, 3, 2, dB, NULL, 1, 0, LORAFA_FP32, corrected), LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_correct(2, 3, 2, dB, A, 1, 0, (enum lorafa_dtype)4, corrected), LORAFA_ERROR_DTYPE);
}

int main(void)
{
    test_round();
    test_exact();
    test_where_rounding_happens();
    test_wanted_outputs();
    test_empty();
    test_not_finite();
    test_errors();
    test_philox();
    test_keep();
    test_dropout();
    test_group();
    test_group_rounds_a_sum_over_members_once();
    test_shared_A();
    test_group_errors();
    test_gated_product();
    test_mlp();
    test_rms_norm();
    test_correct();
    if (failures > 0) {
        printf("test_lorafa_reference: %d failures\n", failures);
        return 1;
    }
    printf("test_lorafa_reference: ok\n");
    return 0;
}
