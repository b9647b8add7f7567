// WeightOnlyGemm for TensorRT: shapes, workspace and launch around the C function of kernel.h.
#include "../runtime/plugin.h"

#include "kernel.h"

namespace {

using namespace nvinfer1;

struct WeightOnlyGemm : schema::WeightOnlyGemm {
    using Attributes = runtime::Attributes<schema::WeightOnlyGemm>;

    // Shapes of everything but x's leading axes are build-time constants: checked here, where an error names the node.
    static int32_t shape(Attributes const& a, DimsExprs const* in, int32_t count, DimsExprs& out,
                         IExprBuilder& builder) {
        if (count < kRequiredInputs || count > kInputs || in[kX].nbDims < 1 || in[kAffine].nbDims != 2) {
            runtime::complain(kName, "expected x [..., K], codes, affine [K/group, 2 N] and maybe bias [N]");
            return -1;
        }
        int32_t const last = in[kX].nbDims - 1;
        int64_t const k = constant(in[kX], last), n = constant(in[kAffine], 1) / 2;
        char error[256];
        wog_problem const p = problem(a, 1, int32_t(n), int32_t(k), WOG_F16);
        if (k > INT32_MAX || n > INT32_MAX || wog_check(&p, error, sizeof error)) {
            runtime::complain(kName, "%s", k > INT32_MAX || n > INT32_MAX ? "K or N above 2^31" : error);
            return -1;
        }
        int64_t const block_k = 256 / a[kBits];
        if (!is(in, kCodes, "codes", {n / 16, (k + block_k - 1) / block_k, 512}) ||
            !is(in, kAffine, "affine", {k / a[kGroup], 2 * n}) || (count == kInputs && !is(in, kBias, "bias", {n})))
            return -1;
        out = in[kX];
        out.d[last] = builder.constant(n / (1 + a[kGated]));
        return 0;
    }

    static size_t workspace(Attributes const& a, DynamicPluginTensorDesc const* in) {
        wog_problem const p =
            problem(a, rows(in[kX].max), int32_t(in[kAffine].max.d[1] / 2), columns(in[kX].max), WOG_F16);
        return size_t(wog_workspace(&p));
    }

    static bool describe(Attributes const& a, runtime::Device& device) {
        char error[256];
        device.library = a[kRoundedWeights] ? wog_library() : 0;
        if (!wog_device(&device.sm, &device.multiprocessors, error, sizeof error)) return true;
        runtime::complain(kName, "%s", error);
        return false;
    }

    static int32_t launch(Attributes const& a, runtime::Device const& device, PluginTensorDesc const* in,
                          void const* const* inputs, int32_t count, void* y, void* workspace, cudaStream_t stream) {
        int64_t const m = rows(in[kX].dims);
        if (m == 0) return 0;  // an empty batch has an empty result
        wog_problem p = problem(a, m, int32_t(in[kAffine].dims.d[1] / 2), columns(in[kX].dims),
                                in[kX].type == DataType::kBF16 ? WOG_BF16 : WOG_F16);
        p.sm = device.sm, p.sm_count = device.multiprocessors, p.library = device.library;
        wog_tensors const t{inputs[kX], inputs[kCodes], inputs[kAffine], count == kInputs ? inputs[kBias] : nullptr,
                            y,          workspace};
        char error[256];
        if (!wog_launch(&p, &t, stream, error, sizeof error)) return 0;
        runtime::complain(kName, "%s", error);
        return -1;
    }

private:
    static wog_problem problem(Attributes const& a, int64_t m, int32_t n, int32_t k, int32_t type) {
        wog_problem p{};
        p.m = m, p.n = n, p.k = k, p.group = a[kGroup], p.bits = a[kBits], p.type = type;
        p.activation = a[kActivation], p.gated = a[kGated], p.activation_bits = a[kActivationBits];
        p.rounded_weights = a[kRoundedWeights], p.batch_invariant = a[kBatchInvariant];
        p.sm = wog_oldest_sm(), p.sm_count = 1;
        return p;
    }

    static int64_t constant(DimsExprs const& shape, int32_t axis) {
        return shape.d[axis]->isConstant() ? shape.d[axis]->getConstantValue() : -1;
    }

    static bool is(DimsExprs const* in, int32_t port, char const* name, std::initializer_list<int64_t> expected) {
        int32_t axis = 0;
        for (int64_t const size : expected) {
            int64_t const found = axis < in[port].nbDims ? constant(in[port], axis) : -1;
            if (found != size) {
                runtime::complain(kName, "'%s' axis %d is %lld, expected %lld", name, axis,
                                  static_cast<long long>(found), static_cast<long long>(size));
                return false;
            }
            axis++;
        }
        return in[port].nbDims == axis;
    }

    static int64_t rows(Dims const& x) {
        int64_t product = 1;
        for (int32_t i = 0; i + 1 < x.nbDims; i++) product *= x.d[i];
        return product;
    }
    static int32_t columns(Dims const& x) { return int32_t(x.d[x.nbDims - 1]); }
};

}  // namespace

// Read from the file by `compile --plugin`: the library's name says for which GPUs it is, whatever the file is called.
#ifdef WOG_VOLTA
__attribute__((used)) char const serves[] = "InstantRT serves by libinstantrt_plugins_sm70.so";
#else
__attribute__((used)) char const serves[] = "InstantRT serves by libinstantrt_plugins.so";
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

// What IPluginRegistry::loadLibrary looks for. The logger finder's type changed between majors: accepted and not used.
EXPORT void setLoggerFinder(ILoggerFinder*) {}
EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static runtime::Creator<WeightOnlyGemm> creator;
    static IPluginCreatorInterface* const all[] = {&creator};
    count = 1;
    return all;
}
