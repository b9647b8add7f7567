// What Triton's TensorRT backend does with `plugins=`: the process has TensorRT, the library is only dlopened.
// usage: triton_host LIBNVINFER.so SHIM.so
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>

int main(int argc, char** argv) {
    void* const tensorrt = argc == 3 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : nullptr;
    void* const shim = tensorrt ? dlopen(argv[2], RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!shim) return std::printf("not loaded: %s\n", dlerror()), 1;
    auto* const get = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(dlsym(tensorrt, "getPluginRegistry"));
    auto* const creator = get()->getCreator("WeightOnlyGemm", "1", "instantrt");
    std::printf("%s\n", creator ? "found" : "not found");
    return 0;
}
