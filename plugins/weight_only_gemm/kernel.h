// WeightOnlyGemm: y[M, N] = act(x[M, K] @ dequant(W[N, K])^T + bias[N])         op.py has the contract, layout.py the
// bytes
//
// One plain C function launches it: a problem, pointers, a stream. No TensorRT, no PyTorch, no synchronisation, no
// allocation but the first call's for measured choices; the same problem always gives the same bits; everything can be
// captured in a CUDA graph.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum wog_type { WOG_F16 = 0, WOG_BF16 = 1 };
enum wog_activation { WOG_NONE = 0, WOG_SILU = 1, WOG_GELU = 2, WOG_GELU_TANH = 3 };

typedef struct {
    int64_t m;
    int32_t n, k, group;
    int32_t bits;             // of a code: 4 or 8
    int32_t type;             // wog_type of x, affine, bias and y
    int32_t activation;       // wog_activation
    int32_t gated;            // 1: y[M, N/2] = act(gate) * up, strips of eight gates and eight ups
    int32_t activation_bits;  // 16, or 8: x is quantized per row to int8
    int32_t sm, sm_count;     // of the device: 75, 80, 86, 89, 90, 100, 120; 70 in Volta's library
    int32_t wide;             // 1: y is float32, for tests of the arithmetic before the output's rounding
    int32_t plain;            // 1: the plain kernel, against which the fast ones are tested
    int32_t rounded_weights;  // 1: dequantized weights may be rounded to `type`, for a library's product of many rows
    int32_t library;          // 1: the device has that library (wog_library)
    int32_t row;              // for measurements: index + 1 of the table's row to use; 0: choose
    int32_t splits;           // likewise: parts of K for different blocks; 0: choose
    int32_t batch_invariant;  // 1: the bits of a row of y are the same with any m; rounded_weights then changes nothing
} wog_problem;

typedef struct {
    void const *x, *codes, *affine, *bias;  // bias may be null; all 16-byte aligned, rows contiguous
    void *y, *workspace;
} wog_tensors;

typedef struct {
    char const* kernel;       // name of the chosen row of the table
    int32_t row;              // and its index, from 0
    int32_t splits;           // parts of K that different blocks sum, in a cluster or in the workspace
    int32_t grid_m, grid_n;   // blocks
    int32_t threads, shared;  // per block
    int64_t workspace;        // bytes
    // For a model of the time: of a block's tile; blocks on a multiprocessor, and bytes of weights on their way there
    int32_t tile_m, tile_n, resident, in_flight;
} wog_plan;

#define WOG_EXPORT __attribute__((visibility("default")))

// These return 0, or 1 with a message in `error`. The first two are functions of the problem, the second of measured
// choices, too (choices.h), a file that its first call reads; they need no GPU.
WOG_EXPORT int wog_check(wog_problem const* problem, char* error, size_t size);
WOG_EXPORT int wog_choose(wog_problem const* problem, wog_plan* plan, char* error, size_t size);
WOG_EXPORT int wog_launch(wog_problem const* problem, wog_tensors const* tensors, void* stream, char* error,
                          size_t size);

// The rows of the table, and their names: what wog_problem.row counts.
WOG_EXPORT int32_t wog_rows(void);
WOG_EXPORT char const* wog_row_name(int32_t row);

// The oldest SM that this library serves: for checks before a device is known.
WOG_EXPORT int32_t wog_oldest_sm(void);

// sm and sm_count of the current CUDA device.
WOG_EXPORT int wog_device(int32_t* sm, int32_t* sm_count, char* error, size_t size);

// 1 where cuBLASLt can be loaded and serves the current CUDA device. The first call loads it; not for graph captures.
WOG_EXPORT int32_t wog_library(void);

// The largest workspace that any m <= problem->m needs on any device: an engine may be built far from where it runs.
WOG_EXPORT int64_t wog_workspace(wog_problem const* problem);

#ifdef __cplusplus
}
#endif
