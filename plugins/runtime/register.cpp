// Registers our creators as soon as this library is loaded: for hosts that only dlopen plugin libraries, such as
// Triton's TensorRT backend with its `plugins=` setting, which never asks a library for getCreators.
//
// Built once for each TensorRT major (the registry's layout differs), loads libinstantrt_plugins.so from its own
// folder, and links nothing of TensorRT: the libnvinfer.so.<major> that the process already has is asked. On any
// failure it says so and registers nothing.
#include <NvInferRuntime.h>
#include <NvInferVersion.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#ifndef PLUGIN_LIBRARY
#define PLUGIN_LIBRARY "libinstantrt_plugins.so"
#endif

namespace {

using namespace nvinfer1;

#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)

void* symbol(char const* library, int flags, char const* name) noexcept {
    void* const handle = dlopen(library, flags);
    void* const found = handle ? dlsym(handle, name) : nullptr;
    if (!found) std::fprintf(stderr, "InstantRT: no %s in %s: %s\n", name, library, dlerror());
    return found;
}

struct Registration {
    Registration() noexcept {
        Dl_info self{};
        if (!dladdr(reinterpret_cast<void*>(&symbol), &self) || !self.dli_fname) return;
        char path[4096];
        char const* const slash = std::strrchr(self.dli_fname, '/');
        int const folder = slash ? int(slash - self.dli_fname) + 1 : 0;
        std::snprintf(path, sizeof path, "%.*s" PLUGIN_LIBRARY, folder, self.dli_fname);
        auto* const creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(
            symbol(path, RTLD_NOW | RTLD_LOCAL, "getCreators"));
        // NOLOAD: a second copy of TensorRT would have a second registry
        auto* const registry = reinterpret_cast<IPluginRegistry* (*)()>(
            symbol("libnvinfer.so." STRING(NV_TENSORRT_MAJOR), RTLD_NOW | RTLD_NOLOAD, "getPluginRegistry"));
        if (!creators || !registry) return;
        int32_t count = 0;
        auto* const* const all = creators(count);
        for (int32_t i = 0; i < count; i++) {
            auto* const creator = static_cast<IPluginCreatorV3One*>(all[i]);
            if (!registry()->registerCreator(*creator, creator->getPluginNamespace()))
                std::fprintf(stderr, "InstantRT: %s is already registered\n", creator->getPluginName());
        }
    }
};

Registration const registration;

}  // namespace
