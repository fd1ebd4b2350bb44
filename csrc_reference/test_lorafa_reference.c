/*
 * lorafa_reference against numbers worked by hand: `make test`, and `make sanitize` under the sanitizers.
 */
#include "lorafa_reference.h"

#include <float.h>
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

#define EXPECT(count, got, ...) expect(#got, __LINE__, count, got, (const double[]){__VA_ARGS__})
#define EXPECT_STATUS(got, expected) expect_status(__LINE__, got, expected)
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
        EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x, weight, lora_A, lora_B, bias, 0.5, dtype, z, y),
                      LORAFA_OK);
        EXPECT(2, z, 3, 7.5);
        EXPECT(4, y, 11, 21, 15.5, 25.5);

        EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x, weight, lora_A, lora_B, NULL, 0.5, dtype, z, y),
                      LORAFA_OK);
        EXPECT(4, y, 1, 1, 5.5, 5.5);

        EXPECT_STATUS(
            lorafa_backward(2, 2, 3, 1, dy, z, weight, lora_A, lora_B, 0.5, dtype, dtype, dz, dx, dB),
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
    EXPECT_STATUS(lorafa_forward(1, 1, 2, 1, x_row, weight_row, A_row, B_row, NULL, 1, LORAFA_BF16, z, y),
                  LORAFA_OK);
    EXPECT(1, z, 1);
    EXPECT(1, y, 1 + 0x1p-6);

    /* s is applied before the rounding: 3 (1 + 2^-8) = 3 + 3 * 2^-8 lies nearer to 3 + 2^-6 than to 3. */
    EXPECT_STATUS(lorafa_forward(1, 1, 2, 1, x_row, weight_row, A_row, B_row, NULL, 3, LORAFA_BF16, z, NULL),
                  LORAFA_OK);
    EXPECT(1, z, 3 + 0x1p-6);

    /* dy B = 3 + 3 * 2^-6 = dz. From the unrounded lora_B it would be 3 + 9 * 2^-8 -> 3 + 2^-5.
       dx = (dz, dz - 3 * 2^-8), the second nearer to the neighbour below dz.
       dy z = 3 (3 + 2^-6) = 9 + 3 * 2^-6, which fp32 keeps; bf16's nearest is 9 + 2^-4. */
    const double dy_row[] = {3};
    EXPECT_STATUS(lorafa_backward(1, 1, 2, 1, dy_row, z, weight_row, A_row, B_row, 1, LORAFA_BF16,
                                  LORAFA_FP32, dz, dx, dB),
                  LORAFA_OK);
    EXPECT(1, dz, 3 + 0x3p-6);
    EXPECT(2, dx, 3 + 0x3p-6, 3 + 0x2p-6);
    EXPECT(1, dB, 9 + 0x3p-6);
    EXPECT_STATUS(lorafa_backward(1, 1, 2, 1, dy_row, z, weight_row, A_row, B_row, 1, LORAFA_BF16,
                                  LORAFA_BF16, NULL, NULL, dB),
                  LORAFA_OK);
    EXPECT(1, dB, 9 + 0x1p-4);
}

static void test_wanted_outputs(void)
{
    double z[2], y[4], dz[2], dx[6], dB[2];
    EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x, weight, lora_A, lora_B, bias, 0.5, LORAFA_FP64, NULL, y),
                  LORAFA_OK);
    EXPECT(4, y, 11, 21, 15.5, 25.5);
    EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x, NULL, lora_A, NULL, NULL, 0.5, LORAFA_FP64, z, NULL),
                  LORAFA_OK);
    EXPECT(2, z, 3, 7.5);
    EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, NULL, NULL, NULL, NULL, NULL, 0.5, LORAFA_FP64, NULL, NULL),
                  LORAFA_OK);

    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, NULL, weight, lora_A, lora_B, 0.5, LORAFA_FP64, LORAFA_FP64,
                                  NULL, dx, NULL),
                  LORAFA_OK);
    EXPECT(6, dx, 4.5, 1.5, -1.5, 3, 1, -1);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, NULL, NULL, NULL, lora_B, 0.5, LORAFA_FP64, LORAFA_FP64, dz,
                                  NULL, NULL),
                  LORAFA_OK);
    EXPECT(2, dz, -0.5, 2);
    EXPECT_STATUS(
        lorafa_backward(2, 2, 3, 1, dy, z, NULL, NULL, NULL, 0.5, LORAFA_FP64, LORAFA_FP64, NULL, NULL, dB),
        LORAFA_OK);
    EXPECT(2, dB, 25.5, -1.5);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, NULL, NULL, NULL, NULL, NULL, 0.5, LORAFA_FP64, LORAFA_FP64,
                                  NULL, NULL, NULL),
                  LORAFA_OK);
}

static void test_empty(void)
{
    /* M = 0: nothing is read from the NULL arrays, nothing written to z or y, and dB is a sum of nothing. */
    double z[1] = {7}, y[1] = {7}, dz[1] = {7}, dx[1] = {7}, dB[2] = {7, 7};
    EXPECT_STATUS(lorafa_forward(0, 2, 3, 1, NULL, weight, lora_A, lora_B, bias, 0.5, LORAFA_FP32, z, y),
                  LORAFA_OK);
    EXPECT_STATUS(lorafa_backward(0, 2, 3, 1, NULL, NULL, weight, lora_A, lora_B, 0.5, LORAFA_FP32,
                                  LORAFA_FP32, dz, dx, dB),
                  LORAFA_OK);
    EXPECT(1, z, 7);
    EXPECT(1, y, 7);
    EXPECT(1, dz, 7);
    EXPECT(1, dx, 7);
    EXPECT(2, dB, 0, 0);

    /* K = 0: y is the bias. */
    double y_bias[2];
    EXPECT_STATUS(lorafa_forward(1, 2, 0, 1, NULL, NULL, NULL, lora_B, bias, 0.5, LORAFA_FP32, NULL, y_bias),
                  LORAFA_OK);
    EXPECT(2, y_bias, 10, 20);
}

static void test_not_finite(void)
{
    const double x_nan[] = {1, NAN, 3, 4, 5, 6}, dy_inf[] = {INFINITY, 2, 3, -1};
    double z[2], y[4], dz[2], dx[6], dB[2];
    EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x_nan, weight, lora_A, lora_B, bias, 0.5, LORAFA_BF16, z, y),
                  LORAFA_OK);
    EXPECT(2, z, NAN, 7.5);
    EXPECT(4, y, NAN, NAN, 15.5, 25.5); /* y[0] too, although the NaN meets a weight of 0 */

    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy_inf, z, weight, lora_A, lora_B, 0.5, LORAFA_BF16,
                                  LORAFA_FP32, dz, dx, dB),
                  LORAFA_OK);
    EXPECT(2, dz, INFINITY, 2);
    EXPECT(6, dx, INFINITY, NAN, NAN, 3, 1, -1); /* Inf * 0 and Inf - Inf */
    EXPECT(2, dB, NAN, NAN);

    /* Overflow of z alone: 2^15 + 2^15 is beyond fp16, and y inherits it. */
    const double large[] = {0x1p15, 0x1p15}, zeros[] = {0, 0}, ones[] = {1, 1};
    EXPECT_STATUS(lorafa_forward(1, 1, 2, 1, large, zeros, ones, ones, NULL, 1, LORAFA_FP16, z, y),
                  LORAFA_OK);
    EXPECT(1, z, INFINITY);
    EXPECT(1, y, INFINITY);
}

static void test_errors(void)
{
    const enum lorafa_dtype bad = (enum lorafa_dtype)4, fp64 = LORAFA_FP64;
    double z[2], y[4], dz[2], dx[6], dB[2];
    EXPECT_STATUS(lorafa_forward(-1, 2, 3, 1, x, weight, lora_A, lora_B, bias, 1, fp64, z, y),
                  LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_forward(2, -1, 3, 1, x, weight, lora_A, lora_B, bias, 1, fp64, z, y),
                  LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_forward(2, 2, -1, 1, x, weight, lora_A, lora_B, bias, 1, fp64, z, y),
                  LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_forward(2, 2, 3, -1, x, weight, lora_A, lora_B, bias, 1, fp64, z, y),
                  LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_forward(INT64_MAX, 2, 3, 1, x, weight, lora_A, lora_B, bias, 1, fp64, z, y),
                  LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x, weight, lora_A, lora_B, bias, 1, bad, z, y),
                  LORAFA_ERROR_DTYPE);
    EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, NULL, weight, lora_A, lora_B, bias, 1, fp64, z, y),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x, NULL, lora_A, lora_B, bias, 1, fp64, z, y),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x, weight, NULL, lora_B, bias, 1, fp64, z, y),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_forward(2, 2, 3, 1, x, weight, lora_A, NULL, bias, 1, fp64, z, y),
                  LORAFA_ERROR_NULL);

    EXPECT_STATUS(lorafa_backward(2, -1, 3, 1, dy, x, weight, lora_A, lora_B, 1, fp64, fp64, dz, dx, dB),
                  LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, x, weight, lora_A, lora_B, 1, bad, fp64, dz, dx, dB),
                  LORAFA_ERROR_DTYPE);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, x, weight, lora_A, lora_B, 1, fp64, bad, dz, dx, dB),
                  LORAFA_ERROR_DTYPE);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, NULL, x, weight, lora_A, lora_B, 1, fp64, fp64, dz, dx, dB),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, NULL, weight, lora_A, lora_B, 1, fp64, fp64, dz, dx, dB),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, x, NULL, lora_A, lora_B, 1, fp64, fp64, dz, dx, dB),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, x, weight, NULL, lora_B, 1, fp64, fp64, dz, dx, dB),
                  LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_backward(2, 2, 3, 1, dy, x, weight, lora_A, NULL, 1, fp64, fp64, dz, dx, dB),
                  LORAFA_ERROR_NULL);

    EXPECT_STATUS(lorafa_round_array(-1, x, LORAFA_FP32, z), LORAFA_ERROR_SIZE);
    EXPECT_STATUS(lorafa_round_array(1, x, bad, z), LORAFA_ERROR_DTYPE);
    EXPECT_STATUS(lorafa_round_array(1, NULL, LORAFA_FP32, z), LORAFA_ERROR_NULL);
    EXPECT_STATUS(lorafa_round_array(0, NULL, LORAFA_FP32, NULL), LORAFA_OK);
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
    if (failures > 0) {
        printf("test_lorafa_reference: %d failures\n", failures);
        return 1;
    }
    printf("test_lorafa_reference: ok\n");
    return 0;
}
