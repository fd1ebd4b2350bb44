/*
 * The formulas stand in lorafa_reference.h; this file spells them out.
 *
 *     cc -O2 -std=c11 -ffp-contract=off -fPIC -shared lorafa_reference.c -o liblorafa_reference.so -lm
 */
#include "lorafa_reference.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>

const char *lorafa_strerror(int status)
{
    switch (status) {
    case LORAFA_OK:
        return "success";
    case LORAFA_ERROR_SIZE:
        return "a size is negative, or too large for an array of double";
    case LORAFA_ERROR_NULL:
        return "an input that a wanted output needs is NULL";
    case LORAFA_ERROR_DTYPE:
        return "unknown dtype: fp64 is 0, fp32 is 1, bf16 is 2, fp16 is 3";
    case LORAFA_ERROR_MEMORY:
        return "out of memory";
    default:
        return "unknown status";
    }
}

static int known(enum lorafa_dtype dtype)
{
    return dtype == LORAFA_FP64 || dtype == LORAFA_FP32 || dtype == LORAFA_BF16 || dtype == LORAFA_FP16;
}

/* ---- rounding ---- */

double lorafa_round(double value, enum lorafa_dtype dtype)
{
    int precision;    /* bits of the significand, the leading one included */
    int min_exponent; /* of the smallest normal number, 2^min_exponent */
    int max_exponent; /* of the largest finite number, just below 2^(max_exponent + 1) */

    switch (dtype) {
    case LORAFA_FP64:
        return value;
    case LORAFA_FP32:
        precision = 24, min_exponent = -126, max_exponent = 127;
        break;
    case LORAFA_BF16:
        precision = 8, min_exponent = -126, max_exponent = 127;
        break;
    case LORAFA_FP16:
        precision = 11, min_exponent = -14, max_exponent = 15;
        break;
    default:
        return NAN;
    }
    if (!isfinite(value))
        return value;

    int exponent; /* 2^exponent <= |value| < 2^(exponent + 1), unless value is 0: then any will do */
    (void)frexp(value, &exponent);
    exponent -= 1;
    if (exponent < min_exponent)
        exponent = min_exponent; /* subnormal numbers share the spacing of the smallest normal ones */

    /* Neighbours are 2^spacing apart here. Both ldexp are exact, so nearbyint is the only rounding. */
    const int spacing = exponent - (precision - 1);
    const double rounded = ldexp(nearbyint(ldexp(value, -spacing)), spacing);

    if (fabs(rounded) >= ldexp(1.0, max_exponent + 1))
        return copysign(INFINITY, value);
    return rounded;
}

int lorafa_round_array(int64_t count, const double *restrict values, enum lorafa_dtype dtype,
                       double *restrict rounded)
{
    if (count < 0)
        return LORAFA_ERROR_SIZE;
    if (!known(dtype))
        return LORAFA_ERROR_DTYPE;
    if (count > 0 && (values == NULL || rounded == NULL))
        return LORAFA_ERROR_NULL;
    for (int64_t i = 0; i < count; i++)
        rounded[i] = lorafa_round(values[i], dtype);
    return LORAFA_OK;
}

/* ---- arguments and scratch ---- */

/* Whether rows * cols doubles could be addressed, both being nonnegative. */
static int addressable(int64_t rows, int64_t cols)
{
    return cols == 0 || rows <= PTRDIFF_MAX / (int64_t)sizeof(double) / cols;
}

static int sizes_fit(int64_t M, int64_t N, int64_t K, int64_t R)
{
    return M >= 0 && N >= 0 && K >= 0 && R >= 0 && addressable(M, K) && addressable(M, N) &&
           addressable(M, R) && addressable(N, K) && addressable(N, R) && addressable(R, K);
}

/* An array without elements has nothing to point to. */
static int missing(const double *array, int64_t rows, int64_t cols)
{
    return array == NULL && rows > 0 && cols > 0;
}

/* Never NULL for want of elements: malloc(0) may be. */
static double *new_array(int64_t rows, int64_t cols)
{
    const int64_t count = rows * cols;
    return malloc((size_t)(count > 0 ? count : 1) * sizeof(double));
}

static double *rounded_copy(int64_t rows, int64_t cols, const double *restrict values,
                            enum lorafa_dtype dtype)
{
    double *copy = new_array(rows, cols);
    if (copy != NULL)
        (void)lorafa_round_array(rows * cols, values, dtype, copy);
    return copy;
}

/* ---- forward ---- */

/* z = round( s * (x A^T) ) */
static void compute_z(int64_t M, int64_t K, int64_t R, const double *restrict x, const double *restrict A,
                      double scaling, enum lorafa_dtype dtype, double *restrict z)
{
    for (int64_t m = 0; m < M; m++)
        for (int64_t r = 0; r < R; r++) {
            double sum = 0.0;
            for (int64_t k = 0; k < K; k++)
                sum += x[m * K + k] * A[r * K + k];
            z[m * R + r] = lorafa_round(scaling * sum, dtype);
        }
}

/* y = round( x weight^T + z B^T + bias ) */
static void compute_y(int64_t M, int64_t N, int64_t K, int64_t R, const double *restrict x,
                      const double *restrict weight, const double *restrict z, const double *restrict B,
                      const double *restrict bias, enum lorafa_dtype dtype, double *restrict y)
{
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
            double sum = 0.0;
            for (int64_t k = 0; k < K; k++)
                sum += x[m * K + k] * weight[n * K + k];
            for (int64_t r = 0; r < R; r++)
                sum += z[m * R + r] * B[n * R + r];
            if (bias != NULL)
                sum += bias[n];
            y[m * N + n] = lorafa_round(sum, dtype);
        }
}

int lorafa_forward(int64_t M, int64_t N, int64_t K, int64_t R, const double *restrict x,
                   const double *restrict weight, const double *restrict lora_A,
                   const double *restrict lora_B, const double *restrict bias, double scaling,
                   enum lorafa_dtype dtype, double *restrict z, double *restrict y)
{
    if (!sizes_fit(M, N, K, R))
        return LORAFA_ERROR_SIZE;
    if (!known(dtype))
        return LORAFA_ERROR_DTYPE;
    if (z == NULL && y == NULL)
        return LORAFA_OK;
    if (missing(x, M, K) || missing(lora_A, R, K))
        return LORAFA_ERROR_NULL;
    if (y != NULL && (missing(weight, N, K) || missing(lora_B, N, R)))
        return LORAFA_ERROR_NULL;

    int status = LORAFA_ERROR_MEMORY;
    double *A = rounded_copy(R, K, lora_A, dtype);                    /* (R, K) */
    double *B = y != NULL ? rounded_copy(N, R, lora_B, dtype) : NULL; /* (N, R) */
    double *z_scratch = z == NULL ? new_array(M, R) : NULL;           /* (M, R): y needs z, wanted or not */
    if (A == NULL || (y != NULL && B == NULL) || (z == NULL && z_scratch == NULL))
        goto done;
    if (z == NULL)
        z = z_scratch;

    compute_z(M, K, R, x, A, scaling, dtype, z);
    if (y != NULL)
        compute_y(M, N, K, R, x, weight, z, B, bias, dtype, y);
    status = LORAFA_OK;

done:
    free(z_scratch);
    free(B);
    free(A);
    return status;
}

/* ---- backward ---- */

/* dz = round( s * (dy B) ) */
static void compute_dz(int64_t M, int64_t N, int64_t R, const double *restrict dy, const double *restrict B,
                       double scaling, enum lorafa_dtype dtype, double *restrict dz)
{
    for (int64_t m = 0; m < M; m++)
        for (int64_t r = 0; r < R; r++) {
            double sum = 0.0;
            for (int64_t n = 0; n < N; n++)
                sum += dy[m * N + n] * B[n * R + r];
            dz[m * R + r] = lorafa_round(scaling * sum, dtype);
        }
}

/* dB = dy^T z, stored in lora_B's dtype */
static void compute_dB(int64_t M, int64_t N, int64_t R, const double *restrict dy, const double *restrict z,
                       enum lorafa_dtype lora_B_dtype, double *restrict dB)
{
    for (int64_t n = 0; n < N; n++)
        for (int64_t r = 0; r < R; r++) {
            double sum = 0.0;
            for (int64_t m = 0; m < M; m++)
                sum += dy[m * N + n] * z[m * R + r];
            dB[n * R + r] = lorafa_round(sum, lora_B_dtype);
        }
}

/* dx = round( dy weight + dz A ) */
static void compute_dx(int64_t M, int64_t N, int64_t K, int64_t R, const double *restrict dy,
                       const double *restrict weight, const double *restrict dz, const double *restrict A,
                       enum lorafa_dtype dtype, double *restrict dx)
{
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k++) {
            double sum = 0.0;
            for (int64_t n = 0; n < N; n++)
                sum += dy[m * N + n] * weight[n * K + k];
            for (int64_t r = 0; r < R; r++)
                sum += dz[m * R + r] * A[r * K + k];
            dx[m * K + k] = lorafa_round(sum, dtype);
        }
}

int lorafa_backward(int64_t M, int64_t N, int64_t K, int64_t R, const double *restrict dy,
                    const double *restrict z, const double *restrict weight, const double *restrict lora_A,
                    const double *restrict lora_B, double scaling, enum lorafa_dtype dtype,
                    enum lorafa_dtype lora_B_dtype, double *restrict dz, double *restrict dx,
                    double *restrict dB)
{
    const int want_dz = dz != NULL || dx != NULL; /* dx is made from dz */
    if (!sizes_fit(M, N, K, R))
        return LORAFA_ERROR_SIZE;
    if (!known(dtype) || !known(lora_B_dtype))
        return LORAFA_ERROR_DTYPE;
    if ((want_dz || dB != NULL) && missing(dy, M, N))
        return LORAFA_ERROR_NULL;
    if (want_dz && missing(lora_B, N, R))
        return LORAFA_ERROR_NULL;
    if (dx != NULL && (missing(weight, N, K) || missing(lora_A, R, K)))
        return LORAFA_ERROR_NULL;
    if (dB != NULL && missing(z, M, R))
        return LORAFA_ERROR_NULL;

    int status = LORAFA_ERROR_MEMORY;
    const int use_scratch = want_dz && dz == NULL;
    double *B = want_dz ? rounded_copy(N, R, lora_B, dtype) : NULL;    /* (N, R) */
    double *A = dx != NULL ? rounded_copy(R, K, lora_A, dtype) : NULL; /* (R, K) */
    double *dz_scratch = use_scratch ? new_array(M, R) : NULL;         /* (M, R) */
    if ((want_dz && B == NULL) || (dx != NULL && A == NULL) || (use_scratch && dz_scratch == NULL))
        goto done;
    if (use_scratch)
        dz = dz_scratch;

    if (want_dz)
        compute_dz(M, N, R, dy, B, scaling, dtype, dz);
    if (dB != NULL)
        compute_dB(M, N, R, dy, z, lora_B_dtype, dB);
    if (dx != NULL)
        compute_dx(M, N, K, R, dy, weight, dz, A, dtype, dx);
    status = LORAFA_OK;

done:
    free(dz_scratch);
    free(A);
    free(B);
    return status;
}
