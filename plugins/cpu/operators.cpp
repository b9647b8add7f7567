// What ONNX Runtime finds in this library.
#include "nodes.h"

// Tells the compiler of artifacts what this file is.
extern "C" __attribute__((visibility("default"))) char const instantrt_serves[] =
    "InstantRT serves by libinstantrt_cpu.so";

extern "C" __attribute__((visibility("default"))) onnxruntime::Status* RegisterCustomOps(
    onnxruntime::SessionOptions* options, onnxruntime::ApiBase const* base) {
    using namespace onnxruntime;
    void const* const* table = base->table(kVersion);
    Api const api(table);
    return cpu::guarded(api, [&] {
        Domain* domain = nullptr;  // the session's options hold it for as long as they live
        cpu::check(api.new_domain(schema::kDomain, &domain));
        for (auto const& operators :
             {cpu::gemm(), cpu::rows(), cpu::attention(), cpu::whole_attention(), cpu::norm()}) {
            for (Operator const* each : operators) {
                cpu::check(api.add_operator(domain, each));
            }
        }
        cpu::check(api.add_domain(options, domain));
    });
}
