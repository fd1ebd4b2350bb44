/*
 * lorafa_reference: the LoRA-FA linear layer and the blocks made of it in plain C11, summed in double. An
 * oracle, made to be read.
 *
 *     cc -O2 -std=c11 -ffp-contract=off -fPIC -shared lorafa_reference.c -o liblorafa_reference.so -lm
 *
 * M rows of input, K = in_features, N = out_features, R = rank, s = scaling, p = the probability of dropout:
 *
 *     forward    z  = round( s / (1 - p) * ((x keep) A^T) )      A = round(lora_A), B = round(lora_B)
 *                y  = round( x weight^T + z B^T + bias )
 *     backward   dz = round( s * (dy B) )
 *                dB = dy^T z                                     rounded to lora_B's dtype
 *                dx = round( dy weight + keep / (1 - p) (dz A) )
 *
 * keep is (M, K) of 0 and 1, all 1 when p is 0. A product with 0 is a product: 0 * NaN and 0 * Inf are NaN.
 *
 * round() goes to `dtype`, the dtype of x. Every array of double is row-major and contiguous, and all but
 * lora_A and lora_B hold values of `dtype` already when they come in. A sum is taken in double in the order
 * of its index and then rounded once. Sizes count elements, not bytes. Outputs overlap nothing.
 *
 * An output passed as NULL is not wanted. An input is required when a wanted output depends on it, and bias
 * never is. Functions return an enum lorafa_status; on an error no output is written.
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
    LORAFA_ERROR_SIZE = 1,    /* a size is negative, an array could not be addressed, layers do not fit */
    LORAFA_ERROR_NULL = 2,    /* an input that a wanted output needs is NULL although it has elements */
    LORAFA_ERROR_DTYPE = 3,   /* not one of enum lorafa_dtype */
    LORAFA_ERROR_MEMORY = 4,  /* no memory for rounded copies and intermediate results */
    LORAFA_ERROR_DROPOUT = 5, /* dropout_p is not in [0, 1) */
    LORAFA_ERROR_SHARED = 6,  /* members that share lora_A disagree in what makes z */
    LORAFA_ERROR_KIND = 7,    /* not one of enum lorafa_activation or enum lorafa_norm_form */
    LORAFA_ERROR_SINGULAR = 8 /* A A^T + epsilon I has no inverse */
};

/* What a status means, in English; never NULL. The string is static. */
const char *lorafa_strerror(int status);

/* ---- rounding ---- */

/*
 * `value` rounded once to the nearest number of `dtype`, ties to even: gradual underflow, overflow to
 * infinity; NaN and the sign of zero are kept. NaN for an unknown dtype.
 */
double lorafa_round(double value, enum lorafa_dtype dtype);

/* lorafa_round of every element. */
int lorafa_round_array(
    int64_t count,                  /* elements */
    const double *restrict values,  /* (count,) */
    enum lorafa_dtype dtype,
    double *restrict rounded        /* (count,) */
);

/*
 * ---- dropout ----
 *
 * One call of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) decides on
 * four columns: its key is the seed, low word first, its counter the 64-bit number
 * row * ceil(K / 4) + column / 4, low word first, then two zeros. The element is kept if word
 * (column mod 4) is at least the threshold min(round(p * 2^32), 2^32 - 1), both unsigned.
 */

void lorafa_philox4x32(
    const uint32_t counter[4],
    const uint32_t key[2],
    uint32_t word[4]                /* out */
);

/* min(round(p * 2^32), 2^32 - 1), a tie to even. */
uint32_t lorafa_threshold(double dropout_p);

/* 1 if the element is kept, 0 if it is dropped. */
int lorafa_keep(uint64_t seed, uint64_t row, uint64_t column, uint64_t K, uint32_t threshold);

/* The mask of M rows, the first of which is row first_row of the input. */
int lorafa_keep_mask(
    int64_t M, int64_t K,
    uint64_t seed,
    double dropout_p,               /* p, in [0, 1) */
    uint64_t first_row,
    uint8_t *keep                   /* (M, K)  out, of 0 and 1 */
);

/* ---- one linear layer ---- */

int lorafa_forward(
    int64_t M, int64_t N, int64_t K, int64_t R,
    const double *restrict x,       /* (M, K) */
    const double *restrict weight,  /* (N, K)  for y */
    const double *restrict lora_A,  /* (R, K) */
    const double *restrict lora_B,  /* (N, R)  for y */
    const double *restrict bias,    /* (N,)    or NULL */
    double scaling,                 /* s: alpha / R, or alpha / sqrt(R) */
    double dropout_p,               /* p, in [0, 1) */
    uint64_t seed,                  /* of keep; of no account when p is 0 */
    enum lorafa_dtype dtype,        /* of x, z and y */
    double *restrict z,             /* (M, R)  out, s / (1 - p) included, or NULL */
    double *restrict y              /* (M, N)  out, or NULL */
);

int lorafa_backward(
    int64_t M, int64_t N, int64_t K, int64_t R,
    const double *restrict dy,      /* (M, N) */
    const double *restrict z,       /* (M, R)  for dB; as lorafa_forward left it */
    const double *restrict weight,  /* (N, K)  for dx */
    const double *restrict lora_A,  /* (R, K)  for dx */
    const double *restrict lora_B,  /* (N, R)  for dz and dx */
    double scaling,                 /* s, p and the seed as in lorafa_forward */
    double dropout_p,
    uint64_t seed,
    enum lorafa_dtype dtype,        /* of dy, dz and dx */
    enum lorafa_dtype lora_B_dtype, /* of dB */
    double *restrict dz,            /* (M, R)  out, s included and 1 / (1 - p) not, or NULL */
    double *restrict dx,            /* (M, K)  out, or NULL */
    double *restrict dB             /* (N, R)  out, or NULL; zeros when M is 0 */
);

/*
 * The gradient correction of LoRA-FA's second version: corrected = dB (A A^T + epsilon I)^-1 / s^2, rounded
 * once to lora_B's dtype. A is lora_A itself, not rounded. By a Cholesky factorisation in double.
 */
int lorafa_correct(
    int64_t N, int64_t K, int64_t R,
    const double *restrict dB,      /* (N, R) */
    const double *restrict lora_A,  /* (R, K) */
    double scaling,                 /* s, not 0 */
    double epsilon,
    enum lorafa_dtype lora_B_dtype, /* of dB */
    double *restrict corrected      /* (N, R)  out */
);

/*
 * ---- linear layers on one input ----
 *
 * Member i of a group makes its y from the common x as one linear layer does, with a mask of its own. The
 * gradient of x is summed over the members and rounded once:
 *
 *     dx = round( sum of dy_i weight_i  +  sum of keep_i / (1 - p_i) (dz_i A_i) )
 *
 * With share_A the group has one lora_A, one mask and one z, those of member 0, and one dz:
 *
 *     z  = round( s / (1 - p) * ((x keep) A^T) )
 *     dz = round( s * (sum of dy_i B_i) )
 *     dx = round( sum of dy_i weight_i  +  keep / (1 - p) (dz A) )
 *
 * Every other member then has R, scaling, dropout_p and seed of member 0, or R = 0; its lora_A is not read.
 */

struct lorafa_linear {
    int64_t N, R;                   /* R = 0: no adapter, a plain frozen linear layer */
    const double *weight;           /* (N, K) */
    const double *bias;             /* (N,)    or NULL */
    const double *lora_A;           /* (R, K) */
    const double *lora_B;           /* (N, R) */
    double scaling;                 /* s */
    double dropout_p;               /* p, in [0, 1) */
    uint64_t seed;                  /* of keep */
    enum lorafa_dtype lora_B_dtype; /* of dB */
};

int lorafa_group_forward(
    int64_t M, int64_t K,
    int64_t count,                  /* of members */
    const double *restrict x,       /* (M, K) */
    const struct lorafa_linear *members, /* (count,) */
    int share_A,                    /* 0 or 1 */
    enum lorafa_dtype dtype,        /* of x, z and y */
    double *const *z,               /* (count,) of (M, R_i) out or NULL, with share_A one; NULL wants none */
    double *const *y                /* (count,) of (M, N_i) out or NULL; NULL wants none */
);

int lorafa_group_backward(
    int64_t M, int64_t K,
    int64_t count,                  /* of members */
    const double *const *dy,        /* (count,) of (M, N_i), NULL where nobody used the output: as zeros */
    const double *const *z,         /* (count,) of (M, R_i), with share_A one; for dB */
    const struct lorafa_linear *members, /* (count,) */
    int share_A,                    /* as in lorafa_group_forward */
    enum lorafa_dtype dtype,        /* of dy, dz and dx */
    double *const *dz,              /* (count,) of (M, R_i) out or NULL, with share_A one; NULL wants none */
    double *restrict dx,            /* (M, K)  out, or NULL */
    double *const *dB               /* (count,) of (N_i, R_i) out or NULL; NULL wants none */
);

/*
 * ---- gated MLP ----
 *
 * gate and up are a group on x, down takes their activated product. I = N of gate and of up = K of down.
 *
 *     forward    g, u = gate(x), up(x)              rounded as the y of any linear layer
 *                h = round( act(g) u )
 *                y = down(h)
 *     backward   dh = the dx of down                rounded
 *                dg = round( dh u act'(g) ),   du = round( dh act(g) )
 *                dx = that of the group
 */

enum lorafa_activation {
    LORAFA_SILU = 0,     /* g / (1 + exp(-g)) */
    LORAFA_GELU = 1,     /* g (1 + erf(g / sqrt(2))) / 2 */
    LORAFA_GELU_TANH = 2 /* g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2 */
};

/* act(g) and act'(g), to the accuracy of libm; NaN for an unknown activation. */
double lorafa_activate(enum lorafa_activation activation, double g);
double lorafa_activate_derivative(enum lorafa_activation activation, double g);

int lorafa_gated_product(
    int64_t count,                  /* elements */
    const double *restrict g,       /* (count,) */
    const double *restrict u,       /* (count,) */
    enum lorafa_activation activation,
    enum lorafa_dtype dtype,        /* of g, u and h */
    double *restrict h              /* (count,)  out */
);

int lorafa_gated_product_backward(
    int64_t count,                  /* elements */
    const double *restrict dh,      /* (count,) */
    const double *restrict g,       /* (count,) */
    const double *restrict u,       /* (count,) */
    enum lorafa_activation activation,
    enum lorafa_dtype dtype,        /* of dh, g, u, dg and du */
    double *restrict dg,            /* (count,)  out */
    double *restrict du             /* (count,)  out */
);

int lorafa_mlp_forward(
    int64_t M, int64_t K,
    const double *restrict x,       /* (M, K) */
    const struct lorafa_linear layers[3], /* gate (I, K), up (I, K), down (N, I) */
    enum lorafa_activation activation,
    enum lorafa_dtype dtype,        /* of x and of every output */
    double *const *z,               /* (3,) of (M, R_i) out or NULL: z of gate, up, down; NULL wants none */
    double *restrict g,             /* (M, I)  out, or NULL */
    double *restrict u,             /* (M, I)  out, or NULL */
    double *restrict h,             /* (M, I)  out, or NULL */
    double *restrict y              /* (M, N)  out, or NULL */
);

int lorafa_mlp_backward(
    int64_t M, int64_t K,
    const double *restrict dy,      /* (M, N) */
    const double *restrict g,       /* (M, I)  as lorafa_mlp_forward left it, and so are u and z */
    const double *restrict u,       /* (M, I) */
    const double *const *z,         /* (3,) of (M, R_i): of gate, up, down; each for its dB */
    const struct lorafa_linear layers[3], /* gate, up, down */
    enum lorafa_activation activation,
    enum lorafa_dtype dtype,        /* of dy, dh, dg, du and dx */
    double *restrict dh,            /* (M, I)  out, or NULL */
    double *restrict dg,            /* (M, I)  out, or NULL */
    double *restrict du,            /* (M, I)  out, or NULL */
    double *restrict dx,            /* (M, K)  out, or NULL */
    double *const *dB               /* (3,) of (N_i, R_i) out or NULL: of gate, up, down; NULL wants none */
);

/*
 * ---- RMS norm ----
 *
 * With rstd = 1 / sqrt(mean of x^2 + eps), taken over a row, and n = x rstd, neither of them rounded:
 *
 *     forward    Llama's form, T5's too    y = round( weight round(n) )
 *                Gemma's form              y = round( (1 + weight) n )
 *     backward   dn = dy weight, or dy (1 + weight)
 *                dx = round( rstd (dn - n mean of (dn n)) )
 */

enum lorafa_norm_form {
    LORAFA_NORM_LLAMA = 0,
    LORAFA_NORM_GEMMA = 1
};

int lorafa_rms_norm(
    int64_t M, int64_t K,
    const double *restrict x,       /* (M, K) */
    const double *restrict weight,  /* (K,) */
    double eps,
    enum lorafa_norm_form form,
    enum lorafa_dtype dtype,        /* of x and y */
    double *restrict y              /* (M, K)  out */
);

int lorafa_rms_norm_backward(
    int64_t M, int64_t K,
    const double *restrict dy,      /* (M, K) */
    const double *restrict x,       /* (M, K) */
    const double *restrict weight,  /* (K,) */
    double eps,
    enum lorafa_norm_form form,
    enum lorafa_dtype dtype,        /* of dy, x and dx */
    double *restrict dx             /* (M, K)  out */
);

#endif
