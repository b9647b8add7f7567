// The GPU as host code alone sees it: kernels were compiled by nvrtc.py into the image that is linked beside this, are
// found there by name, and run through the CUDA driver, which is opened when asked for. Nothing of CUDA is linked, so
// one library serves every TensorRT and every CUDA 12 that still know Volta. plugins/runtime/gpu/device.h has the
// device side.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <mutex>

#define __global__
#define __device__
#define __forceinline__ inline
#define KERNELS_ELSEWHERE     // headers that kernels share with launchers leave out what runs on the device
#define KERNEL(name) (#name)  // how launch() is told of one

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using Stream = void*;

namespace driver {

extern unsigned char const image[];  // written by nvrtc.py
extern char const* const kernels[];
extern int const kernel_count;

struct Functions {
    int (*start)(unsigned flags);
    int (*device)(int* device);
    int (*attribute)(int* value, int attribute, int device);
    int (*load)(void** library, void const* image, void* options, void** values, unsigned count, void* library_options,
                void** library_values, unsigned library_count);
    int (*find)(void** kernel, void* library, char const* name);
    int (*prepare)(void** function, void* kernel);
    int (*launch)(void* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, Stream stream, void** arguments, void** extra);
    int (*explain)(int status, char const** text);
};

// Null, and the reason in `failed`, where there is no driver, or one older than CUDA 12.
inline Functions const* functions(char const*& failed) noexcept {
    static Functions table{};
    static char const* const reason = []() -> char const* {
        void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (!library) return "there is no libcuda.so.1, the NVIDIA driver";
        struct {
            char const* name;
            void* pointer;
        } const wanted[] = {{"cuInit", &table.start},
                            {"cuCtxGetDevice", &table.device},
                            {"cuDeviceGetAttribute", &table.attribute},
                            {"cuLibraryLoadData", &table.load},
                            {"cuLibraryGetKernel", &table.find},
                            {"cuKernelGetFunction", &table.prepare},
                            {"cuLaunchKernel", &table.launch},
                            {"cuGetErrorString", &table.explain}};
        for (auto const& w : wanted) {
            void* const found = dlsym(library, w.name);
            *static_cast<void**>(w.pointer) = found;
            if (!found) return "the NVIDIA driver is older than CUDA 12 (525)";
        }
        return nullptr;
    }();
    failed = reason;
    return reason ? nullptr : &table;
}

inline char const* explain(int status) noexcept {
    char const *text = nullptr, *failed = nullptr;
    if (status && functions(failed)->explain(status, &text)) text = nullptr;
    return status ? (text ? text : "an unknown error of the CUDA driver") : nullptr;
}

// The image, loaded on the first call. It belongs to no context: the driver brings it into each that uses it.
inline char const* library(void*& loaded) noexcept {
    static void* image_library = nullptr;
    static std::mutex lock;
    char const* failed = nullptr;
    Functions const* const f = functions(failed);
    if (!f) return failed;
    std::lock_guard<std::mutex> const guard(lock);
    if (!image_library) failed = explain(f->load(&image_library, image, nullptr, nullptr, 0, nullptr, nullptr, 0));
    loaded = image_library;
    return failed;
}

}  // namespace driver

// Of the current context; null, or what the driver said. Brings all kernels into that context, which a launch inside a
// graph capture must not do.
inline char const* describe_device(int32_t& sm, int32_t& multiprocessors) {
    constexpr int kMajor = 75, kMinor = 76, kMultiprocessors = 16;  // CU_DEVICE_ATTRIBUTE_...
    char const* failed = nullptr;
    driver::Functions const* const f = driver::functions(failed);
    if (!f) return failed;
    int device = 0, major = 0, minor = 0;
    void* library = nullptr;
    int status = f->start(0);
    if (!status) status = f->device(&device);
    if (!status) status = f->attribute(&major, kMajor, device);
    if (!status) status = f->attribute(&minor, kMinor, device);
    if (!status) status = f->attribute(&multiprocessors, kMultiprocessors, device);
    if (status) return driver::explain(status);
    sm = major * 10 + minor;
    if (sm != 70) return nullptr;  // wog_check says what is wrong with it; the image could not be loaded
    if ((failed = driver::library(library))) return failed;
    for (int i = 0; i < driver::kernel_count; i++) {
        void *kernel = nullptr, *function = nullptr;
        if (!status) status = f->find(&kernel, library, driver::kernels[i]);
        if (!status) status = f->prepare(&function, kernel);
    }
    return driver::explain(status);
}

struct Grid {
    dim3 blocks;
    int threads;
    size_t shared = 0;  // at most 48 KiB, which need not be asked for
};

// Returns null, or what the driver said. A kernel of a library is launched in the current context.
template <class Args>
char const* launch(char const* kernel, Grid const& grid, Stream stream, Args args) {
    void *library = nullptr, *found = nullptr;
    char const* failed = driver::library(library);
    if (failed) return failed;
    driver::Functions const& f = *driver::functions(failed);
    void* pointers[] = {&args};
    int status = f.find(&found, library, kernel);
    if (!status)
        status = f.launch(found, grid.blocks.x, grid.blocks.y, grid.blocks.z, unsigned(grid.threads), 1, 1,
                          unsigned(grid.shared), stream, pointers, nullptr);
    return driver::explain(status);
}
