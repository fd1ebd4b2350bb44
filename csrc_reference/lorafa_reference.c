/*
 * The formulas stand in lorafa_reference.h; this file spells them out.
 *
 *     cc -O2 -std=c11 -ffp-contract=off -fPIC -shared lorafa_reference.c -o liblorafa_reference.so -lm
 */
#include "lorafa_reference.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

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
    case LORAFA_ERROR_DROPOUT:
        return "dropout_p is not in [0, 1)";
    case LORAFA_ERROR_SHARED:
        return "members that share lora_A disagree in R, scaling, dropout_p or seed";
    case LORAFA_ERROR_SINGULAR:
        return "A A^T + epsilon I has no inverse";
    case LORAFA_ERROR_KIND:
        return "unknown activation or form of norm";
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

/* ---- dropout ---- */

void lorafa_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t word[4])
{
    uint32_t a = counter[0], b = counter[1], c = counter[2], d = counter[3];
    uint32_t key0 = key[0], key1 = key[1];
    for (int round = 0; round < 10; round++) {
        const uint64_t product_a = UINT64_C(0xD2511F53) * a, product_c = UINT64_C(0xCD9E8D57) * c;
        a = (uint32_t)(product_c >> 32) ^ b ^ key0;
        b = (uint32_t)product_c;
        c = (uint32_t)(product_a >> 32) ^ d ^ key1;
        d = (uint32_t)product_a;
        key0 += UINT32_C(0x9E3779B9); /* modulo 2^32, as key1: the golden ratio and the root of 3, less 1 */
        key1 += UINT32_C(0xBB67AE85);
    }
    word[0] = a, word[1] = b, word[2] = c, word[3] = d;
}

static int is_probability(double dropout_p)
{
    return dropout_p >= 0.0 && dropout_p < 1.0; /* NaN is neither */
}

uint32_t lorafa_threshold(double dropout_p)
{
    const double threshold = nearbyint(ldexp(dropout_p, 32));
    if (!(threshold > 0.0))
        return 0;
    return threshold < 0x1p32 ? (uint32_t)threshold : UINT32_MAX;
}

int lorafa_keep(uint64_t seed, uint64_t row, uint64_t column, uint64_t K, uint32_t threshold)
{
    const uint64_t calls_per_row = K / 4 + (K % 4 != 0);
    const uint64_t call = row * calls_per_row + column / 4; /* modulo 2^64 */
    const uint32_t counter[4] = {(uint32_t)call, (uint32_t)(call >> 32), 0, 0};
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t word[4];
    lorafa_philox4x32(counter, key, word);
    return word[column % 4] >= threshold;
}

int lorafa_keep_mask(int64_t M, int64_t K, uint64_t seed, double dropout_p, uint64_t first_row, uint8_t *keep)
{
    if (M < 0 || K < 0 || (K > 0 && M > PTRDIFF_MAX / K))
        return LORAFA_ERROR_SIZE;
    if (!is_probability(dropout_p))
        return LORAFA_ERROR_DROPOUT;
    if (keep == NULL && M > 0 && K > 0)
        return LORAFA_ERROR_NULL;
    const uint32_t threshold = lorafa_threshold(dropout_p);
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k++)
            keep[m * K + k] =
                (uint8_t)lorafa_keep(seed, first_row + (uint64_t)m, (uint64_t)k, (uint64_t)K, threshold);
    return LORAFA_OK;
}

/* ---- arguments and scratch ---- */

/* Whether rows * cols doubles could be addressed, both being nonnegative. */
static int addressable(int64_t rows, int64_t cols)
{
    return cols == 0 || rows <= PTRDIFF_MAX / (int64_t)sizeof(double) / cols;
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

/* One of several outputs; NULL in place of all of them wants none. */
static double *entry(double *const *outputs, int64_t i)
{
    return outputs == NULL ? NULL : outputs[i];
}

static int any_wanted(double *const *outputs, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        if (entry(outputs, i) != NULL)
            return 1;
    return 0;
}

/* What was made, to the caller who wants it. */
static void hand_over(double *restrict wanted, const double *restrict made, int64_t rows, int64_t cols)
{
    if (wanted != NULL && made != NULL)
        memcpy(wanted, made, (size_t)(rows * cols) * sizeof(double));
}

/* ---- linear layers on one input ---- */

/* How many z a group has: that of each member, or the one of the first. */
static int64_t count_z(int64_t count, int share_A)
{
    return share_A && count > 1 ? 1 : count;
}

static int same_adapter_input(const struct lorafa_linear *a, const struct lorafa_linear *b)
{
    return a->R == b->R && a->scaling == b->scaling && a->dropout_p == b->dropout_p && a->seed == b->seed;
}

static int check_members(int64_t M, int64_t K, int64_t count, const struct lorafa_linear *members,
                         int share_A, enum lorafa_dtype dtype)
{
    if (M < 0 || K < 0 || count < 0 || !addressable(M, K))
        return LORAFA_ERROR_SIZE;
    if (count > 0 && members == NULL)
        return LORAFA_ERROR_NULL;
    for (int64_t i = 0; i < count; i++) {
        const int64_t N = members[i].N, R = members[i].R;
        if (N < 0 || R < 0 || !addressable(M, N) || !addressable(M, R) || !addressable(N, K) ||
            !addressable(N, R) || !addressable(R, K))
            return LORAFA_ERROR_SIZE;
    }
    if (!known(dtype))
        return LORAFA_ERROR_DTYPE;
    for (int64_t i = 0; i < count; i++) {
        if (!known(members[i].lora_B_dtype))
            return LORAFA_ERROR_DTYPE;
        if (!is_probability(members[i].dropout_p))
            return LORAFA_ERROR_DROPOUT;
        if (share_A && members[i].R > 0 && !same_adapter_input(&members[i], &members[0]))
            return LORAFA_ERROR_SHARED;
    }
    return LORAFA_OK;
}

/* What a call makes for itself of one member. */
struct scratch {
    double *A;    /* (R, K) rounded */
    double *keep; /* (M, K) of 0 and 1 */
    double *B;    /* (N, R) rounded */
    double *z;    /* (M, R) z in forward, dz in backward */
};

static struct scratch *new_scratch(int64_t count)
{
    return calloc((size_t)(count > 0 ? count : 1), sizeof(struct scratch));
}

static void free_scratch(struct scratch *scratch, int64_t count)
{
    for (int64_t i = 0; scratch != NULL && i < count; i++) {
        free(scratch[i].A);
        free(scratch[i].keep);
        free(scratch[i].B);
        free(scratch[i].z);
    }
    free(scratch);
}

static double *new_keep(int64_t M, int64_t K, const struct lorafa_linear *layer)
{
    double *keep = new_array(M, K);
    const uint32_t threshold = lorafa_threshold(layer->dropout_p);
    for (int64_t m = 0; keep != NULL && m < M; m++)
        for (int64_t k = 0; k < K; k++) /* no word lies below a threshold of 0: none need be drawn */
            keep[m * K + k] =
                threshold == 0 || lorafa_keep(layer->seed, (uint64_t)m, (uint64_t)k, (uint64_t)K, threshold);
    return keep;
}

static int prepare_A(int64_t M, int64_t K, const struct lorafa_linear *layer, enum lorafa_dtype dtype,
                     struct scratch *scratch)
{
    scratch->A = rounded_copy(layer->R, K, layer->lora_A, dtype);
    scratch->keep = scratch->A != NULL ? new_keep(M, K, layer) : NULL;
    return scratch->keep != NULL ? LORAFA_OK : LORAFA_ERROR_MEMORY;
}

static int prepare_B(const struct lorafa_linear *layer, enum lorafa_dtype dtype, struct scratch *scratch)
{
    scratch->B = rounded_copy(layer->N, layer->R, layer->lora_B, dtype);
    return scratch->B != NULL ? LORAFA_OK : LORAFA_ERROR_MEMORY;
}

static int prepare_z(int64_t M, const struct lorafa_linear *layer, struct scratch *scratch)
{
    scratch->z = new_array(M, layer->R);
    return scratch->z != NULL ? LORAFA_OK : LORAFA_ERROR_MEMORY;
}

/* z = round( s / (1 - p) * ((x keep) A^T) ) */
static void compute_z(int64_t M, int64_t K, const double *restrict x, const struct lorafa_linear *layer,
                      const struct scratch *scratch, enum lorafa_dtype dtype)
{
    const double *A = scratch->A, *keep = scratch->keep;
    const int64_t R = layer->R;
    for (int64_t m = 0; m < M; m++)
        for (int64_t r = 0; r < R; r++) {
            double sum = 0.0;
            for (int64_t k = 0; k < K; k++)
                sum += x[m * K + k] * keep[m * K + k] * A[r * K + k];
            scratch->z[m * R + r] = lorafa_round(layer->scaling / (1.0 - layer->dropout_p) * sum, dtype);
        }
}

/* y = round( x weight^T + z B^T + bias ) */
static void compute_y(int64_t M, int64_t K, const double *restrict x, const struct lorafa_linear *layer,
                      const double *restrict z, const double *restrict B, enum lorafa_dtype dtype,
                      double *restrict y)
{
    const int64_t N = layer->N, R = layer->R;
    const double *weight = layer->weight, *bias = layer->bias;
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

int lorafa_group_forward(int64_t M, int64_t K, int64_t count, const double *restrict x,
                         const struct lorafa_linear *members, int share_A, enum lorafa_dtype dtype,
                         double *const *z, double *const *y)
{
    int status = check_members(M, K, count, members, share_A, dtype);
    if (status != LORAFA_OK)
        return status;
    const int64_t z_count = count_z(count, share_A);
    const int want_y = any_wanted(y, count), want_z = want_y || any_wanted(z, z_count);
    if (want_z && missing(x, M, K))
        return LORAFA_ERROR_NULL;
    for (int64_t i = 0; i < z_count; i++)
        if (want_z && missing(members[i].lora_A, members[i].R, K))
            return LORAFA_ERROR_NULL;
    for (int64_t i = 0; i < count; i++)
        if (entry(y, i) != NULL && (missing(members[i].weight, members[i].N, K) ||
                                    missing(members[i].lora_B, members[i].N, members[i].R)))
            return LORAFA_ERROR_NULL;

    struct scratch *scratch = new_scratch(count);
    status = scratch != NULL ? LORAFA_OK : LORAFA_ERROR_MEMORY;
    for (int64_t i = 0; i < z_count && want_z && status == LORAFA_OK; i++) {
        status = prepare_A(M, K, &members[i], dtype, &scratch[i]);
        if (status == LORAFA_OK)
            status = prepare_z(M, &members[i], &scratch[i]);
    }
    for (int64_t i = 0; i < count && status == LORAFA_OK; i++)
        if (entry(y, i) != NULL)
            status = prepare_B(&members[i], dtype, &scratch[i]);

    if (status == LORAFA_OK) {
        for (int64_t i = 0; i < z_count && want_z; i++) {
            compute_z(M, K, x, &members[i], &scratch[i], dtype);
            hand_over(entry(z, i), scratch[i].z, M, members[i].R);
        }
        for (int64_t i = 0; i < count; i++)
            if (entry(y, i) != NULL)
                compute_y(M, K, x, &members[i], scratch[share_A ? 0 : i].z, scratch[i].B, dtype, y[i]);
    }
    free_scratch(scratch, count);
    return status;
}

/* dz = round( s * (dy B) ), summed over the `count` members that have this dz in common */
static void compute_dz(int64_t M, int64_t count, const double *const *dy, const struct lorafa_linear *members,
                       const struct scratch *scratch, enum lorafa_dtype dtype, double *restrict dz)
{
    const int64_t R = members[0].R;
    for (int64_t m = 0; m < M; m++)
        for (int64_t r = 0; r < R; r++) {
            double sum = 0.0;
            for (int64_t i = 0; i < count; i++) {
                const int64_t N = dy[i] != NULL && members[i].R > 0 ? members[i].N : 0;
                for (int64_t n = 0; n < N; n++)
                    sum += dy[i][m * N + n] * scratch[i].B[n * R + r];
            }
            dz[m * R + r] = lorafa_round(members[0].scaling * sum, dtype);
        }
}

/* dB = dy^T z, stored in lora_B's dtype */
static void compute_dB(int64_t M, const struct lorafa_linear *layer, const double *restrict dy,
                       const double *restrict z, double *restrict dB)
{
    const int64_t N = layer->N, R = layer->R, rows = dy != NULL ? M : 0;
    for (int64_t n = 0; n < N; n++)
        for (int64_t r = 0; r < R; r++) {
            double sum = 0.0;
            for (int64_t m = 0; m < rows; m++)
                sum += dy[m * N + n] * z[m * R + r];
            dB[n * R + r] = lorafa_round(sum, layer->lora_B_dtype);
        }
}

/* dx = round( sum of dy weight over the `count` members + sum of keep / (1 - p) (dz A) over the `z_count` dz ) */
static void compute_dx(int64_t M, int64_t K, int64_t count, int64_t z_count, const double *const *dy,
                       const struct lorafa_linear *members, const struct scratch *scratch,
                       enum lorafa_dtype dtype, double *restrict dx)
{
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k++) {
            double sum = 0.0;
            for (int64_t i = 0; i < count; i++) {
                const int64_t N = dy[i] != NULL ? members[i].N : 0;
                for (int64_t n = 0; n < N; n++)
                    sum += dy[i][m * N + n] * members[i].weight[n * K + k];
            }
            for (int64_t i = 0; i < z_count; i++) {
                const int64_t R = members[i].R;
                double low_rank = 0.0;
                for (int64_t r = 0; r < R; r++)
                    low_rank += scratch[i].z[m * R + r] * scratch[i].A[r * K + k];
                sum += scratch[i].keep[m * K + k] / (1.0 - members[i].dropout_p) * low_rank;
            }
            dx[m * K + k] = lorafa_round(sum, dtype);
        }
}

int lorafa_group_backward(int64_t M, int64_t K, int64_t count, const double *const *dy,
                          const double *const *z, const struct lorafa_linear *members, int share_A,
                          enum lorafa_dtype dtype, double *const *dz, double *restrict dx, double *const *dB)
{
    int status = check_members(M, K, count, members, share_A, dtype);
    if (status != LORAFA_OK)
        return status;
    const int64_t z_count = count_z(count, share_A);
    const int want_dz = dx != NULL || any_wanted(dz, z_count); /* dx is made from dz */
    if ((want_dz || any_wanted(dB, count)) && dy == NULL && count > 0)
        return LORAFA_ERROR_NULL;
    for (int64_t i = 0; i < count; i++) {
        const int64_t N = members[i].N, R = members[i].R;
        const int used = dy != NULL && dy[i] != NULL;
        if (want_dz && used && missing(members[i].lora_B, N, R))
            return LORAFA_ERROR_NULL;
        if (dx != NULL && used && missing(members[i].weight, N, K))
            return LORAFA_ERROR_NULL;
        if (dx != NULL && i < z_count && missing(members[i].lora_A, R, K))
            return LORAFA_ERROR_NULL;
        if (entry(dB, i) != NULL && used && (z == NULL || missing(z[share_A ? 0 : i], M, R)))
            return LORAFA_ERROR_NULL;
    }

    struct scratch *scratch = new_scratch(count);
    status = scratch != NULL ? LORAFA_OK : LORAFA_ERROR_MEMORY;
    for (int64_t i = 0; i < z_count && want_dz && status == LORAFA_OK; i++)
        status = prepare_z(M, &members[i], &scratch[i]);
    for (int64_t i = 0; i < count && want_dz && status == LORAFA_OK; i++)
        if (dy[i] != NULL)
            status = prepare_B(&members[i], dtype, &scratch[i]);
    for (int64_t i = 0; i < z_count && dx != NULL && status == LORAFA_OK; i++)
        status = prepare_A(M, K, &members[i], dtype, &scratch[i]);

    if (status == LORAFA_OK) {
        for (int64_t i = 0; i < z_count && want_dz; i++) {
            compute_dz(M, share_A ? count : 1, &dy[i], &members[i], &scratch[i], dtype, scratch[i].z);
            hand_over(entry(dz, i), scratch[i].z, M, members[i].R);
        }
        for (int64_t i = 0; i < count; i++)
            if (entry(dB, i) != NULL)
                compute_dB(M, &members[i], dy[i], dy[i] != NULL ? z[share_A ? 0 : i] : NULL, dB[i]);
        if (dx != NULL)
            compute_dx(M, K, count, z_count, dy, members, scratch, dtype, dx);
    }
    free_scratch(scratch, count);
    return status;
}

/* ---- one linear layer: a group of one ---- */

int lorafa_forward(int64_t M, int64_t N, int64_t K, int64_t R, const double *restrict x,
                   const double *restrict weight, const double *restrict lora_A,
                   const double *restrict lora_B, const double *restrict bias, double scaling,
                   double dropout_p, uint64_t seed, enum lorafa_dtype dtype, double *restrict z,
                   double *restrict y)
{
    const struct lorafa_linear layer = {N, R, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, dtype};
    double *const zs[1] = {z}, *const ys[1] = {y};
    return lorafa_group_forward(M, K, 1, x, &layer, 0, dtype, zs, ys);
}

int lorafa_backward(int64_t M, int64_t N, int64_t K, int64_t R, const double *restrict dy,
                    const double *restrict z, const double *restrict weight, const double *restrict lora_A,
                    const double *restrict lora_B, double scaling, double dropout_p, uint64_t seed,
                    enum lorafa_dtype dtype, enum lorafa_dtype lora_B_dtype, double *restrict dz,
                    double *restrict dx, double *restrict dB)
{
    const struct lorafa_linear layer = {N,      R,       weight,    NULL, lora_A,
                                        lora_B, scaling, dropout_p, seed, lora_B_dtype};
    /* In a group a NULL is an output that nobody used; the only output of a layer is not. */
    if ((dz != NULL || dx != NULL || dB != NULL) && missing(dy, M, N))
        return LORAFA_ERROR_NULL;
    const double *const dys[1] = {dy}, *const zs[1] = {z};
    double *const dzs[1] = {dz}, *const dBs[1] = {dB};
    return lorafa_group_backward(M, K, 1, dys, zs, &layer, 0, dtype, dzs, dx, dBs);
}

/* The lower triangle L of A A^T + epsilon I = L L^T, in place of a new (R, R) array. 0 if there is none. */
static int factor_gram(int64_t K, int64_t R, const double *restrict A, double epsilon, double *restrict L)
{
    for (int64_t i = 0; i < R; i++)
        for (int64_t j = 0; j <= i; j++) {
            double sum = i == j ? epsilon : 0.0;
            for (int64_t k = 0; k < K; k++)
                sum += A[i * K + k] * A[j * K + k];
            for (int64_t k = 0; k < j; k++)
                sum -= L[i * R + k] * L[j * R + k];
            if (i == j && !(sum > 0.0))
                return 0;
            L[i * R + j] = i == j ? sqrt(sum) : sum / L[j * R + j];
        }
    return 1;
}

int lorafa_correct(int64_t N, int64_t K, int64_t R, const double *restrict dB, const double *restrict lora_A,
                   double scaling, double epsilon, enum lorafa_dtype lora_B_dtype, double *restrict corrected)
{
    if (N < 0 || K < 0 || R < 0 || !addressable(N, R) || !addressable(R, K) || !addressable(R, R))
        return LORAFA_ERROR_SIZE;
    if (!known(lora_B_dtype))
        return LORAFA_ERROR_DTYPE;
    if (missing(dB, N, R) || missing(lora_A, R, K) || missing(corrected, N, R))
        return LORAFA_ERROR_NULL;
    double *L = new_array(R, R), *row = new_array(1, R);
    int status = L == NULL || row == NULL ? LORAFA_ERROR_MEMORY : LORAFA_OK;
    if (status == LORAFA_OK && !factor_gram(K, R, lora_A, epsilon, L))
        status = LORAFA_ERROR_SINGULAR;
    for (int64_t n = 0; status == LORAFA_OK && n < N; n++) {
        /* L L^T c = b: forward, then backward. */
        for (int64_t i = 0; i < R; i++) {
            row[i] = dB[n * R + i];
            for (int64_t k = 0; k < i; k++)
                row[i] -= L[i * R + k] * row[k];
            row[i] /= L[i * R + i];
        }
        for (int64_t i = R - 1; i >= 0; i--) {
            for (int64_t k = i + 1; k < R; k++)
                row[i] -= L[k * R + i] * row[k];
            row[i] /= L[i * R + i];
            corrected[n * R + i] = lorafa_round(row[i] / scaling / scaling, lora_B_dtype);
        }
    }
    free(L);
    free(row);
    return status;
}

/* ---- gated MLP ---- */

static int is_activation(enum lorafa_activation activation)
{
    return activation == LORAFA_SILU || activation == LORAFA_GELU || activation == LORAFA_GELU_TANH;
}

static const double SQRT_HALF = 0.70710678118654752440;
static const double SQRT_2_OVER_PI = 0.79788456080286535588;
static const double DENSITY_AT_0 = 0.39894228040143267794; /* of the normal distribution: 1 / sqrt(2 pi) */

double lorafa_activate(enum lorafa_activation activation, double g)
{
    switch (activation) {
    case LORAFA_SILU:
        return g / (1.0 + exp(-g));
    case LORAFA_GELU:
        return g * 0.5 * erfc(-SQRT_HALF * g);
    case LORAFA_GELU_TANH:
        return g * 0.5 * (1.0 + tanh(SQRT_2_OVER_PI * (g + 0.044715 * g * g * g)));
    default:
        return NAN;
    }
}

double lorafa_activate_derivative(enum lorafa_activation activation, double g)
{
    switch (activation) {
    case LORAFA_SILU: {
        const double sigmoid = 1.0 / (1.0 + exp(-g));
        return sigmoid * (1.0 + g * (1.0 - sigmoid));
    }
    case LORAFA_GELU:
        return 0.5 * erfc(-SQRT_HALF * g) + g * DENSITY_AT_0 * exp(-0.5 * g * g);
    case LORAFA_GELU_TANH: {
        const double t = tanh(SQRT_2_OVER_PI * (g + 0.044715 * g * g * g));
        const double slope = SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * g * g); /* of tanh's argument */
        return 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * slope;
    }
    default:
        return NAN;
    }
}

static int check_gated(int64_t count, enum lorafa_activation activation, enum lorafa_dtype dtype)
{
    if (count < 0)
        return LORAFA_ERROR_SIZE;
    if (!is_activation(activation))
        return LORAFA_ERROR_KIND;
    return known(dtype) ? LORAFA_OK : LORAFA_ERROR_DTYPE;
}

int lorafa_gated_product(int64_t count, const double *restrict g, const double *restrict u,
                         enum lorafa_activation activation, enum lorafa_dtype dtype, double *restrict h)
{
    const int status = check_gated(count, activation, dtype);
    if (status != LORAFA_OK)
        return status;
    if (count > 0 && (g == NULL || u == NULL || h == NULL))
        return LORAFA_ERROR_NULL;
    for (int64_t i = 0; i < count; i++)
        h[i] = lorafa_round(lorafa_activate(activation, g[i]) * u[i], dtype);
    return LORAFA_OK;
}

int lorafa_gated_product_backward(int64_t count, const double *restrict dh, const double *restrict g,
                                  const double *restrict u, enum lorafa_activation activation,
                                  enum lorafa_dtype dtype, double *restrict dg, double *restrict du)
{
    const int status = check_gated(count, activation, dtype);
    if (status != LORAFA_OK)
        return status;
    if (count > 0 && (dh == NULL || g == NULL || u == NULL || dg == NULL || du == NULL))
        return LORAFA_ERROR_NULL;
    for (int64_t i = 0; i < count; i++) {
        dg[i] = lorafa_round(dh[i] * u[i] * lorafa_activate_derivative(activation, g[i]), dtype);
        du[i] = lorafa_round(dh[i] * lorafa_activate(activation, g[i]), dtype);
    }
    return LORAFA_OK;
}

static int check_mlp(int64_t M, int64_t K, const struct lorafa_linear layers[3],
                     enum lorafa_activation activation, enum lorafa_dtype dtype)
{
    if (layers == NULL)
        return LORAFA_ERROR_NULL;
    int status = check_members(M, K, 2, layers, 0, dtype);
    if (status == LORAFA_OK)
        status = check_members(M, layers[0].N, 1, &layers[2], 0, dtype);
    if (status == LORAFA_OK && layers[0].N != layers[1].N)
        return LORAFA_ERROR_SIZE;
    if (status == LORAFA_OK && !is_activation(activation))
        return LORAFA_ERROR_KIND;
    return status;
}

int lorafa_mlp_forward(int64_t M, int64_t K, const double *restrict x, const struct lorafa_linear layers[3],
                       enum lorafa_activation activation, enum lorafa_dtype dtype, double *const *z,
                       double *restrict g, double *restrict u, double *restrict h, double *restrict y)
{
    int status = check_mlp(M, K, layers, activation, dtype);
    if (status != LORAFA_OK)
        return status;
    const int64_t I = layers[0].N, N = layers[2].N;
    double *made_z[3] = {NULL, NULL, NULL}; /* (M, R) of each */
    double *made_gu[2] = {new_array(M, I), new_array(M, I)};
    double *made_h = new_array(M, I), *made_y = new_array(M, N);
    int enough = made_gu[0] != NULL && made_gu[1] != NULL && made_h != NULL && made_y != NULL;
    for (int i = 0; i < 3; i++) {
        made_z[i] = new_array(M, layers[i].R);
        enough = enough && made_z[i] != NULL;
    }

    status = LORAFA_ERROR_MEMORY;
    if (enough)
        status = lorafa_group_forward(M, K, 2, x, layers, 0, dtype, made_z, made_gu);
    if (status == LORAFA_OK)
        status = lorafa_gated_product(M * I, made_gu[0], made_gu[1], activation, dtype, made_h);
    if (status == LORAFA_OK)
        status = lorafa_group_forward(M, I, 1, made_h, &layers[2], 0, dtype, &made_z[2], &made_y);
    if (status == LORAFA_OK) {
        for (int i = 0; i < 3; i++)
            hand_over(entry(z, i), made_z[i], M, layers[i].R);
        hand_over(g, made_gu[0], M, I);
        hand_over(u, made_gu[1], M, I);
        hand_over(h, made_h, M, I);
        hand_over(y, made_y, M, N);
    }
    for (int i = 0; i < 3; i++)
        free(made_z[i]);
    free(made_gu[0]);
    free(made_gu[1]);
    free(made_h);
    free(made_y);
    return status;
}

int lorafa_mlp_backward(int64_t M, int64_t K, const double *restrict dy, const double *restrict g,
                        const double *restrict u, const double *const *z,
                        const struct lorafa_linear layers[3], enum lorafa_activation activation,
                        enum lorafa_dtype dtype, double *restrict dh, double *restrict dg,
                        double *restrict du, double *restrict dx, double *const *dB)
{
    int status = check_mlp(M, K, layers, activation, dtype);
    if (status != LORAFA_OK)
        return status;
    const int64_t I = layers[0].N, N = layers[2].N;
    if (missing(dy, M, N) || missing(g, M, I) || missing(u, M, I))
        return LORAFA_ERROR_NULL;

    double *made_dh = new_array(M, I), *made_dx = new_array(M, K), *made_dg = new_array(M, I),
           *made_du = new_array(M, I), *made_dB[3] = {NULL, NULL, NULL};
    int enough = made_dh != NULL && made_dx != NULL && made_dg != NULL && made_du != NULL;
    for (int i = 0; i < 3; i++)
        if (entry(dB, i) != NULL) {
            made_dB[i] = new_array(layers[i].N, layers[i].R);
            enough = enough && made_dB[i] != NULL;
        }
    const double *const dys[1] = {dy}, *const dgus[2] = {made_dg, made_du};

    status = LORAFA_ERROR_MEMORY;
    if (enough)
        status = lorafa_group_backward(M, I, 1, dys, z != NULL ? &z[2] : NULL, &layers[2], 0, dtype, NULL,
                                       made_dh, &made_dB[2]);
    if (status == LORAFA_OK)
        status = lorafa_gated_product_backward(M * I, made_dh, g, u, activation, dtype, made_dg, made_du);
    if (status == LORAFA_OK)
        status = lorafa_group_backward(M, K, 2, dgus, z, layers, 0, dtype, NULL, made_dx, made_dB);
    if (status == LORAFA_OK) {
        hand_over(dh, made_dh, M, I);
        hand_over(dg, made_dg, M, I);
        hand_over(du, made_du, M, I);
        hand_over(dx, made_dx, M, K);
        for (int i = 0; i < 3; i++)
            hand_over(entry(dB, i), made_dB[i], layers[i].N, layers[i].R);
    }
    for (int i = 0; i < 3; i++)
        free(made_dB[i]);
    free(made_dh);
    free(made_dg);
    free(made_du);
    free(made_dx);
    return status;
}

/* ---- RMS norm ---- */

static int check_norm(int64_t M, int64_t K, enum lorafa_norm_form form, enum lorafa_dtype dtype)
{
    if (M < 0 || K < 0 || !addressable(M, K))
        return LORAFA_ERROR_SIZE;
    if (form != LORAFA_NORM_LLAMA && form != LORAFA_NORM_GEMMA)
        return LORAFA_ERROR_KIND;
    return known(dtype) ? LORAFA_OK : LORAFA_ERROR_DTYPE;
}

/* 1 / sqrt( mean of x^2 + eps ) */
static double reciprocal_norm(int64_t K, const double *x, double eps)
{
    double sum = 0.0;
    for (int64_t k = 0; k < K; k++)
        sum += x[k] * x[k];
    return 1.0 / sqrt(sum / (double)K + eps);
}

int lorafa_rms_norm(int64_t M, int64_t K, const double *restrict x, const double *restrict weight, double eps,
                    enum lorafa_norm_form form, enum lorafa_dtype dtype, double *restrict y)
{
    const int status = check_norm(M, K, form, dtype);
    if (status != LORAFA_OK)
        return status;
    if (missing(x, M, K) || missing(weight, 1, K) || missing(y, M, K))
        return LORAFA_ERROR_NULL;
    for (int64_t m = 0; m < M; m++) {
        const double rstd = reciprocal_norm(K, &x[m * K], eps);
        for (int64_t k = 0; k < K; k++) {
            const double n = x[m * K + k] * rstd;
            y[m * K + k] = form == LORAFA_NORM_LLAMA ? lorafa_round(weight[k] * lorafa_round(n, dtype), dtype)
                                                     : lorafa_round((1.0 + weight[k]) * n, dtype);
        }
    }
    return LORAFA_OK;
}

int lorafa_rms_norm_backward(int64_t M, int64_t K, const double *restrict dy, const double *restrict x,
                             const double *restrict weight, double eps, enum lorafa_norm_form form,
                             enum lorafa_dtype dtype, double *restrict dx)
{
    const int status = check_norm(M, K, form, dtype);
    if (status != LORAFA_OK)
        return status;
    if (missing(dy, M, K) || missing(x, M, K) || missing(weight, 1, K) || missing(dx, M, K))
        return LORAFA_ERROR_NULL;
    const double shift = form == LORAFA_NORM_GEMMA ? 1.0 : 0.0;
    for (int64_t m = 0; m < M; m++) {
        const double rstd = reciprocal_norm(K, &x[m * K], eps);
        double sum = 0.0;
        for (int64_t k = 0; k < K; k++) {
            const double dn = dy[m * K + k] * (shift + weight[k]), n = x[m * K + k] * rstd;
            sum += dn * n;
        }
        for (int64_t k = 0; k < K; k++) {
            const double dn = dy[m * K + k] * (shift + weight[k]), n = x[m * K + k] * rstd;
            dx[m * K + k] = lorafa_round(rstd * (dn - n * (sum / (double)K)), dtype);
        }
    }
    return LORAFA_OK;
}
