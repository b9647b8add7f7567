// The part of cuBLASLt that plugins/runtime/blas.h calls, on the CPU: one product, checked for what the real one would
// silently misread. Loaded under the real library's name before the kernels ask for it.
#include "device.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t pitch;
};
struct Matmul {
    int compute, scale, transpose_a = 0;
};

EXPORT int cublasLtCreate(void** handle) { return *handle = new int(7), 0; }
EXPORT int cublasLtMatmulDescCreate(void** out, int compute, int scale) { return *out = new Matmul{compute, scale}, 0; }
EXPORT int cublasLtMatmulDescSetAttribute(Matmul* matmul, int attribute, int const* value, size_t size) {
    if (attribute != 3 || size != 4) return 7;
    return matmul->transpose_a = *value, 0;
}
EXPORT int cublasLtMatmulDescDestroy(Matmul* matmul) { return delete matmul, 0; }
EXPORT int cublasLtMatrixLayoutCreate(void** out, int type, uint64_t rows, uint64_t columns, int64_t pitch) {
    return *out = new Layout{type, rows, columns, pitch}, 0;
}
EXPORT int cublasLtMatrixLayoutDestroy(Layout* layout) { return delete layout, 0; }
EXPORT int cublasLtMatmulPreferenceCreate(void** out) { return *out = new size_t(0), 0; }
EXPORT int cublasLtMatmulPreferenceSetAttribute(size_t* preference, int attribute, size_t const* value, size_t size) {
    if (attribute != 1 || size != 8) return 7;
    return *preference = *value, 0;
}
EXPORT int cublasLtMatmulPreferenceDestroy(size_t* preference) { return delete preference, 0; }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, Matmul*, Layout*, Layout*, Layout*, Layout*, size_t* most, int,
                                          uint64_t* out, int* found) {
    out[0] = *most;  // the algorithm remembers what it may use
    return *found = 1, 0;
}
EXPORT int cublasLtMatmul(int* handle, Matmul* matmul, float* alpha, void const* a, Layout* al, void const* b,
                          Layout* bl, float* beta, void const*, Layout*, float* d, Layout* dl, uint64_t* algorithm,
                          void* workspace, size_t size, void*) {
    uint64_t const n = dl->rows, m = dl->columns, k = bl->rows;
    bool const fits = al->rows == k && al->columns == n && bl->columns == m && al->type == bl->type && dl->type == 0;
    if (*handle != 7 || matmul->compute != 68 || matmul->scale || matmul->transpose_a != 1 || *alpha != 1 || *beta ||
        !fits || al->pitch < int64_t(k) || bl->pitch < int64_t(k) || dl->pitch < int64_t(n) || algorithm[0] > size)
        return 7;
    std::memset(workspace, 0x5a, size);
    auto const number = [type = al->type](void const* from, uint64_t at) {
        uint16_t const bits = static_cast<uint16_t const*>(from)[at];
        return double(type == 2 ? to_float<Half>(bits) : to_float<Bfloat>(bits));
    };
    for (uint64_t i = 0; i < n; i++)
        for (uint64_t j = 0; j < m; j++) {
            double sum = 0;
            for (uint64_t l = 0; l < k; l++) sum += number(a, i * al->pitch + l) * number(b, j * bl->pitch + l);
            d[j * dl->pitch + i] = float(sum);
        }
    return 0;
}
