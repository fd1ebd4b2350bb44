/*
 * lorafa_reference: the LoRA-FA linear layer in plain C11, summed in double. An oracle, made to be read.
 *
 *     cc -O2 -std=c11 -ffp-contract=off -fPIC -shared lorafa_reference.c -o liblorafa_reference.so -lm
 *
 * M rows of input, K = in_features, N = out_features, R = rank, s = scaling, dropout 0:
 *
 *     forward    z  = round( s * (x A^T) )               A = round(lora_A), B = round(lora_B)
 *                y  = round( x weight^T + z B^T + bias )
 *     backward   dz = round( s * (dy B) )
 *                dB = dy^T z                             rounded to lora_B's dtype
 *                dx = round( dy weight + dz A )
 *
 * round() goes to `dtype`, the dtype of x. Every array is row-major, contiguous, of double, and x, weight,
 * bias, dy and the z given to backward hold values of `dtype` already; lora_A and lora_B need not. A sum is
 * taken in double in the order of its index and then rounded once. Sizes count elements, not bytes. Outputs
 * overlap nothing.
 *
 * The floating-point environment must be in its default rounding mode, to nearest.
 */
#ifndef LORAFA_REFERENCE_H
#define LORAFA_REFERENCE_H

#include <stdint.h>

enum lorafa_dtype {
    LORAFA_FP64 = 0, /* double itself: no rounding */
    LORAFA_FP32 = 1,
    LORAFA_BF16 = 2,
    LORAFA_FP16 = 3
};

enum lorafa_status {
    LORAFA_OK = 0,
    LORAFA_ERROR_SIZE = 1,   /* a size is negative, or an array could not be addressed */
    LORAFA_ERROR_NULL = 2,   /* an input that a wanted output needs is NULL although it has elements */
    LORAFA_ERROR_DTYPE = 3,  /* not one of enum lorafa_dtype */
    LORAFA_ERROR_MEMORY = 4  /* no memory for the rounded copies of lora_A and lora_B */
};

/* What a status means, in English; never NULL. The string is static. */
const char *lorafa_strerror(int status);

/*
 * `value` rounded once to the nearest number of `dtype`, ties to even: gradual underflow, overflow to
 * infinity; NaN and the sign of zero are kept. NaN for an unknown dtype.
 */
double lorafa_round(double value, enum lorafa_dtype dtype);

/* lorafa_round of every element. Returns an enum lorafa_status. */
int lorafa_round_array(
    int64_t count,                  /* elements */
    const double *restrict values,  /* (count,) */
    enum lorafa_dtype dtype,
    double *restrict rounded        /* (count,) */
);

/*
 * An output passed as NULL is not wanted: y alone, z alone or both. An input is required when a wanted
 * output depends on it, and bias never is. Returns an enum lorafa_status; on an error no output is written.
 */
int lorafa_forward(
    int64_t M, int64_t N, int64_t K, int64_t R,
    const double *restrict x,       /* (M, K) */
    const double *restrict weight,  /* (N, K)  for y */
    const double *restrict lora_A,  /* (R, K) */
    const double *restrict lora_B,  /* (N, R)  for y */
    const double *restrict bias,    /* (N,)    or NULL */
    double scaling,                 /* s: alpha / R, or alpha / sqrt(R) */
    enum lorafa_dtype dtype,        /* of x, z and y */
    double *restrict z,             /* (M, R)  out, s included, or NULL */
    double *restrict y              /* (M, N)  out, or NULL */
);

int lorafa_backward(
    int64_t M, int64_t N, int64_t K, int64_t R,
    const double *restrict dy,      /* (M, N) */
    const double *restrict z,       /* (M, R)  for dB; as lorafa_forward left it, s included */
    const double *restrict weight,  /* (N, K)  for dx */
    const double *restrict lora_A,  /* (R, K)  for dx */
    const double *restrict lora_B,  /* (N, R)  for dz and dx */
    double scaling,                 /* s, as in lorafa_forward */
    enum lorafa_dtype dtype,        /* of dy, dz and dx */
    enum lorafa_dtype lora_B_dtype, /* of dB */
    double *restrict dz,            /* (M, R)  out, s included, or NULL */
    double *restrict dx,            /* (M, K)  out, or NULL */
    double *restrict dB             /* (N, R)  out, or NULL; zeros when M is 0 */
);

#endif
