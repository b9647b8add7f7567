// The CUDA driver as plugins/sm70/device.h calls it, on the CPU: a kernel is looked for in the image, and its emulated
// twin is run. FAKE_SM is the device; built with OLD_DRIVER it lacks what came with CUDA 12.
#include "device.h"

#include "../../../plugins/weight_only_gemm/volta.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Status { kSuccess = 0, kInvalid = 1, kNoBinary = 209, kNotFound = 500 };

struct Entry {
    char const* name;
    void (*gemm)(wog::VoltaArgs);
    void (*plain)(wog::PlainArgs);
    int threads;
};
#define ENTRIES(row, index)                                                      \
    {"volta_" #row "_4", volta_##row##_4, nullptr, wog::kRows[index].threads()}, \
        {"volta_" #row "_8", volta_##row##_8, nullptr, wog::kRows[index].threads()},
Entry const entries[] = {VOLTA_ROWS(ENTRIES){"volta_epilogue", volta_epilogue, nullptr, 256},
                         {"volta_plain", nullptr, volta_plain, 128}};

int sm() {
    char const* const given = std::getenv("FAKE_SM");
    return given ? std::atoi(given) : 70;
}

template <class Type>
Type at(void const* bytes, size_t offset) {
    Type value;
    std::memcpy(&value, static_cast<char const*>(bytes) + offset, sizeof value);
    return value;
}

int prepared = 0;  // kernels

}  // namespace

EXPORT int cuInit(unsigned) { return kSuccess; }
EXPORT int cuCtxGetDevice(int* device) { return *device = 3, kSuccess; }
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (device != 3) return kInvalid;
    int const found = attribute == 75 ? sm() / 10 : attribute == 76 ? sm() % 10 : attribute == 16 ? 80 : -1;
    return *value = found, found < 0 ? kInvalid : kSuccess;
}
#ifndef OLD_DRIVER
EXPORT int cuLibraryLoadData(void const** library, void const* image, void*, void*, unsigned options, void*, void*,
                             unsigned) {
    constexpr int kCuda = 190;
    bool const elf = !std::memcmp(image, "\177ELF", 4) && at<uint16_t>(image, 18) == kCuda;
    if (!elf || options || int(at<uint32_t>(image, 48) & 255) != sm()) return kNoBinary;
    return *library = image, kSuccess;
}
// Of an ELF file of 64 bits: its section headers are its end
static size_t image_size(void const* image) {
    return at<uint64_t>(image, 40) + size_t(at<uint16_t>(image, 58)) * at<uint16_t>(image, 60);
}
EXPORT int cuLibraryGetKernel(Entry const** kernel, void const* library, char const* name) {
    std::string const section = std::string("\0.text.", 7) + name + '\0';
    auto const* const first = static_cast<char const*>(library);
    auto const* const last = first + image_size(library);
    if (std::search(first, last, section.begin(), section.end()) == last) return kNotFound;
    for (Entry const& entry : entries)
        if (std::string(entry.name) == name) return *kernel = &entry, kSuccess;
    return kNotFound;
}
EXPORT int cuKernelGetFunction(void const** function, Entry const* kernel) {
    return *function = kernel, prepared++, kSuccess;
}
#endif
EXPORT int cuLaunchKernel(Entry const* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                          unsigned bz, unsigned shared, void* stream, void** arguments, void** extra) {
    int const all = int(sizeof entries / sizeof *entries);
    if (prepared < all || by != 1 || bz != 1 || int(bx) != kernel->threads || extra) return kInvalid;
    Grid const grid{dim3(gx, gy, gz), int(bx), shared};
    char const* const failed = kernel->gemm
                                   ? launch(kernel->gemm, grid, stream, *static_cast<wog::VoltaArgs*>(arguments[0]))
                                   : launch(kernel->plain, grid, stream, *static_cast<wog::PlainArgs*>(arguments[0]));
    return failed ? kInvalid : kSuccess;
}
EXPORT int cuGetErrorString(int status, char const** text) {
    *text = status == kNoBinary ? "no kernel image is available for execution on the device" : "another error";
    return kSuccess;
}
