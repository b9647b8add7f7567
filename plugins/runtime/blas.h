// cuBLASLt, found at run time: nothing of it is linked, and where it is absent nobody may call. Enumerators and the
// result structure are those of cublasLt.h, the same in CUDA 12 and 13.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <mutex>

namespace blas {

constexpr char const* kLibraries[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
constexpr int kMostDevices = 64;

enum Type : int { kFloat32 = 0, kFloat16 = 2, kBfloat16 = 14 };  // cudaDataType

struct Heuristic {  // cublasLtMatmulHeuristicResult_t
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

struct Functions {
    int (*create)(void** handle);
    int (*describe)(void** matmul, int compute_type, int scale_type);
    int (*set)(void* matmul, int attribute, void const* value, size_t size);
    int (*forget)(void* matmul);
    int (*lay_out)(void** layout, int type, uint64_t rows, uint64_t columns, int64_t pitch);
    int (*forget_layout)(void* layout);
    int (*prefer)(void** preference);
    int (*set_preference)(void* preference, int attribute, void const* value, size_t size);
    int (*forget_preference)(void* preference);
    int (*choose)(void* handle, void* matmul, void* a, void* b, void* c, void* d, void* preference, int most,
                  Heuristic* found, int* count);
    int (*multiply)(void* handle, void* matmul, void const* alpha, void const* a, void* a_layout, void const* b,
                    void* b_layout, void const* beta, void const* c, void* c_layout, void* d, void* d_layout,
                    void const* algorithm, void* workspace, size_t size, void* stream);
};

// Null where no cuBLASLt of a known major, or one without these functions, is found: what is not there may come later.
inline Functions const* functions() noexcept {
    static Functions table{};
    static bool complete = false;
    static std::mutex lock;
    std::lock_guard<std::mutex> const guard(lock);
    auto const find = [] {
        for (char const* name : kLibraries) {
            void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
            if (!library) continue;
            struct {
                char const* name;
                void* pointer;
            } const wanted[] = {{"cublasLtCreate", &table.create},
                                {"cublasLtMatmulDescCreate", &table.describe},
                                {"cublasLtMatmulDescSetAttribute", &table.set},
                                {"cublasLtMatmulDescDestroy", &table.forget},
                                {"cublasLtMatrixLayoutCreate", &table.lay_out},
                                {"cublasLtMatrixLayoutDestroy", &table.forget_layout},
                                {"cublasLtMatmulPreferenceCreate", &table.prefer},
                                {"cublasLtMatmulPreferenceSetAttribute", &table.set_preference},
                                {"cublasLtMatmulPreferenceDestroy", &table.forget_preference},
                                {"cublasLtMatmulAlgoGetHeuristic", &table.choose},
                                {"cublasLtMatmul", &table.multiply}};
            bool all = true;
            for (auto const& w : wanted) {
                void* const found = dlsym(library, w.name);
                *static_cast<void**>(w.pointer) = found;
                all = all && found;
            }
            if (all) return true;
        }
        return false;
    };
    complete = complete || find();
    return complete ? &table : nullptr;
}

// The handle of a device, made on the first call for it, which must not be inside a graph capture. Null without a
// library.
inline void* handle(int device) noexcept {
    static void* handles[kMostDevices];
    static std::mutex lock;
    if (!functions() || device < 0 || device >= kMostDevices) return nullptr;
    std::lock_guard<std::mutex> const guard(lock);
    if (!handles[device] && functions()->create(&handles[device])) handles[device] = nullptr;
    return handles[device];
}

// y[m, n] = x[m, k] @ w[n, k]^T in fp32, all rows contiguous; x and w have the 16-bit `type`. 0, or a cublasStatus_t.
inline int multiply(void* handle, Type type, void const* x, void const* w, float* y, int64_t m, int64_t n, int64_t k,
                    void* workspace, size_t size, void* stream) noexcept {
    Functions const& f = *functions();
    constexpr int kCompute32 = 68, kTransposeA = 3, kTransposed = 1, kMaxWorkspace = 1;
    void *matmul = nullptr, *a = nullptr, *b = nullptr, *c = nullptr, *preference = nullptr;
    // The library's matrices are column-major: it sees w as [k, n] to be transposed, x as [k, m], y as [n, m].
    int status = f.describe(&matmul, kCompute32, kFloat32);
    if (!status) status = f.set(matmul, kTransposeA, &kTransposed, sizeof kTransposed);
    if (!status) status = f.lay_out(&a, type, uint64_t(k), uint64_t(n), k);
    if (!status) status = f.lay_out(&b, type, uint64_t(k), uint64_t(m), k);
    if (!status) status = f.lay_out(&c, kFloat32, uint64_t(n), uint64_t(m), n);
    if (!status) status = f.prefer(&preference);
    if (!status) status = f.set_preference(preference, kMaxWorkspace, &size, sizeof size);
    Heuristic best{};
    int found = 0;
    if (!status) status = f.choose(handle, matmul, a, b, c, c, preference, 1, &best, &found);
    constexpr int kNotSupported = 15;
    if (!status && !found) status = kNotSupported;
    float const one = 1.0f, none = 0.0f;
    if (!status)
        status =
            f.multiply(handle, matmul, &one, w, a, x, b, &none, y, c, y, c, best.algorithm, workspace, size, stream);
    if (preference) f.forget_preference(preference);
    for (void* layout : {a, b, c})
        if (layout) f.forget_layout(layout);
    if (matmul) f.forget(matmul);
    return status;
}

}  // namespace blas
