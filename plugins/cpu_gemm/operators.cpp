// What ONNX Runtime sees of CpuGemm: its ports, a kernel for each node, its rows and strips on the session's threads.
#include <algorithm>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "kernel.h"
#include "onnxruntime.h"
#include "schema.h"

namespace cpu_gemm {
namespace {

using namespace onnxruntime;
using Schema = schema::CpuGemm;

constexpr int64_t kTaskBytes = 32 << 10;   // of codes: with less, waking a thread takes longer than the work
constexpr int64_t kRowBytes = 256 << 10;   // of x in integers: half of a core's cache, so that each strip meets it there
constexpr int64_t kRows = 8;  // what kernels multiply at once
constexpr int64_t kAloneBytes = 16 << 10;  // of x, which one thread brings into integers

struct Refused {
    Status* status;
};

void check(Status* status) {
    if (status != nullptr) {
        throw Refused{status};
    }
}

template <typename Work>
Status* guarded(Api const& api, Work work) {
    try {
        work();
        return nullptr;
    } catch (Refused const& refused) {
        return refused.status;
    } catch (std::exception const& error) {
        return api.error(error.what());
    }
}

struct Tensor {
    Element element;
    std::vector<int64_t> sizes;
    void* data;
};

Tensor tensor(Api const& api, Value const* value) {
    TensorInfo* info = nullptr;
    check(api.info(value, &info));
    auto const release = [&api](TensorInfo* info) { api.release(info); };
    std::unique_ptr<TensorInfo, decltype(release)> const owned(info, release);
    Tensor found;
    size_t axes = 0;
    check(api.element(info, &found.element));
    check(api.axes(info, &axes));
    found.sizes.resize(axes);
    check(api.sizes(info, found.sizes.data(), axes));
    check(api.data(const_cast<Value*>(value), &found.data));
    return found;
}

std::string text(std::vector<int64_t> const& sizes) {
    std::string all;
    for (int64_t size : sizes) {
        all += (all.empty() ? "[" : ", ") + std::to_string(size);
    }
    return all + "]";
}

class Kernel {
   public:
    Kernel(Api api, KernelInfo const* info) : api_(api) {
        int64_t attributes[std::size(Schema::kFields)];
        for (size_t i = 0; i < std::size(attributes); ++i) {
            attributes[i] = attribute(info, Schema::kFields[i]);
        }
        weight_.bits = static_cast<int>(attributes[Schema::kBits]);
        weight_.group = attributes[Schema::kGroup];
        weight_.form = static_cast<Form>(attributes[Schema::kActivations]);
        weight_.scale_type = static_cast<Type>(attributes[Schema::kScaleType]);
        weight_.zero_type = static_cast<Type>(attributes[Schema::kZeroType]);
        weight_.activation = static_cast<Activation>(attributes[Schema::kActivation]);
        weight_.gated = attributes[Schema::kGated] != 0;
        check(api_.input_count(info, &inputs_));
        Tensor const codes = constant(info, Schema::kCodes, Element::kU8);
        Tensor const affine = constant(info, Schema::kAffine, Element::kU8);
        require(codes.sizes.size() == 3 && affine.sizes.size() == 3, "codes and affine have three axes");
        weight_.n = codes.sizes[0] * kLanes;
        weight_.k = affine.sizes[1] * weight_.group;
        char const* wrong = refuse(weight_);
        require(wrong == nullptr, wrong ? wrong : "");
        same("codes", codes.sizes, {codes.sizes[0], stored_blocks(weight_), kBlockBytes});
        same("affine", affine.sizes, {codes.sizes[0], weight_.k / weight_.group, affine_bytes(weight_)});
        weight_.codes = static_cast<uint8_t const*>(codes.data);
        weight_.affine = static_cast<uint8_t const*>(affine.data);
        if (is_constant(info, Schema::kBias)) {
            Tensor const bias = constant(info, Schema::kBias, Element::kF32);
            same("bias", bias.sizes, {weight_.n});
            weight_.bias = static_cast<float const*>(bias.data);
        }
    }

    void compute(Context* context) const {
        Tensor const x = tensor(api_, input(context, Schema::kX));
        require(!x.sizes.empty() && x.sizes.back() == weight_.k,
                "x is " + text(x.sizes) + ", expected [..., " + std::to_string(weight_.k) + "]");
        require(weight_.bias != nullptr || input(context, Schema::kBias) == nullptr, "bias is no constant");
        std::vector<int64_t> sizes = x.sizes;
        sizes.back() = width(weight_);
        int64_t rows = 1;
        for (size_t i = 0; i + 1 < sizes.size(); ++i) {
            rows *= sizes[i];
        }
        Call call{&weight_, {}, nullptr, nullptr};
        if (Value const* value = input(context, Schema::kResidual)) {
            Tensor const residual = tensor(api_, value);
            same("residual", residual.sizes, sizes);
            call.residual = static_cast<float const*>(residual.data);
        }
        Value* out = nullptr;
        void* y = nullptr;
        check(api_.output(context, 0, sizes.data(), sizes.size(), &out));
        check(api_.data(out, &y));
        if (rows == 0) {
            return;
        }
        call.x = memory_for(rows);
        call.y = static_cast<float*>(y);
        quantize(context, static_cast<float const*>(x.data), rows, call.x);
        multiply(context, call, rows);
    }

    Api const& api() const { return api_; }

   private:
    void require(bool holds, std::string const& what) const {
        if (!holds) {
            throw Refused{api_.error((std::string(Schema::kName) + ": " + what).c_str())};
        }
    }

    void same(char const* name, std::vector<int64_t> const& found, std::vector<int64_t> const& expected) const {
        require(found == expected, std::string(name) + " is " + text(found) + ", expected " + text(expected));
    }

    int64_t attribute(KernelInfo const* info, schema::Field const& field) const {
        int64_t value = 0;
        check(api_.attribute(info, field.name, &value));
        auto const* end = field.allowed + field.choices;
        require(field.choices == 0 || std::find(field.allowed, end, value) != end,
                std::string(field.name) + " is " + std::to_string(value) + ", which this library does not have");
        return value;
    }

    bool is_constant(KernelInfo const* info, size_t port) const {
        Value const* value = nullptr;
        int constant = 0;
        if (port < inputs_) {
            check(api_.constant(info, port, &constant, &value));
        }
        return constant != 0;
    }

    Tensor constant(KernelInfo const* info, size_t port, Element element) const {
        Value const* value = nullptr;
        int constant = 0;
        check(api_.constant(info, port, &constant, &value));
        require(constant != 0, "input " + std::to_string(port) + " is no constant");
        Tensor found = tensor(api_, value);
        require(found.element == element, "input " + std::to_string(port) + " has another type");
        return found;
    }

    // Null for one that the node does not have.
    Value const* input(Context const* context, size_t port) const {
        Value const* value = nullptr;
        if (port < inputs_) {
            check(api_.input(context, port, &value));
        }
        return value;
    }

    // Of the calling thread, which keeps it for the next node.
    Rows memory_for(int64_t rows) const {
        thread_local std::vector<int8_t> limbs;
        thread_local std::vector<float> floats;
        Shape const shape(weight_);
        limbs.resize(std::max<size_t>(limbs.size(), rows * shape.limbs));
        floats.resize(std::max<size_t>(floats.size(), rows * (shape.scales + shape.sums)));
        return {limbs.data(), floats.data(), floats.data() + rows * shape.scales};
    }

    template <typename Work>
    void in_parallel(Context const* context, int64_t count, Work work) const {
        if (count == 1) {
            return work(0);
        }
        auto const call = [](void* data, size_t i) { (*static_cast<Work*>(data))(static_cast<int64_t>(i)); };
        check(api_.in_parallel(context, call, static_cast<size_t>(count), &work));
    }

    void quantize(Context const* context, float const* x, int64_t rows, Rows const& into) const {
        int64_t const each = std::max<int64_t>(1, kAloneBytes / (weight_.k * int64_t{sizeof(float)}));
        in_parallel(context, (rows + each - 1) / each, [&](int64_t i) {
            for (int64_t row = i * each; row < std::min(rows, (i + 1) * each); ++row) {
                Shape const shape(weight_);
                kernels().quantize(weight_, x + row * weight_.k, into.limbs + row * shape.limbs,
                                   into.scales + row * shape.scales, into.sums + row * shape.sums);
            }
        });
    }

    void multiply(Context const* context, Call const& call, int64_t rows) const {
        int64_t const strips = weight_.n / kLanes;
        int64_t const rows_each = std::max<int64_t>(kRows, kRowBytes / Shape(weight_).limbs / kRows * kRows);
        int64_t const strips_each = std::max<int64_t>(1, kTaskBytes / (stored_blocks(weight_) * kBlockBytes) / rows);
        int64_t const across = (strips + strips_each - 1) / strips_each;
        in_parallel(context, (rows + rows_each - 1) / rows_each * across, [&](int64_t i) {
            int64_t const row = i / across * rows_each, first = i % across * strips_each;
            for (int64_t strip = first; strip < std::min(strips, first + strips_each); ++strip) {
                kernels().multiply(call, strip, row, std::min(rows, row + rows_each));
            }
        });
    }

    Api api_;
    Weight weight_{};
    size_t inputs_ = 0;
};

Operator description() {
    Operator op{};
    op.version = kVersion;
    op.name = [](Operator const*) { return Schema::kName; };
    op.provider = [](Operator const*) -> char const* { return nullptr; };
    op.inputs = [](Operator const*) -> size_t { return Schema::kInputs; };
    op.outputs = [](Operator const*) -> size_t { return 1; };
    op.input_type = [](Operator const*, size_t i) {
        return i == Schema::kCodes || i == Schema::kAffine ? Element::kU8 : Element::kF32;
    };
    op.output_type = [](Operator const*, size_t) { return Element::kF32; };
    op.input_presence = [](Operator const*, size_t i) {
        return i < Schema::kRequiredInputs ? Presence::kRequired : Presence::kOptional;
    };
    op.output_presence = [](Operator const*, size_t) { return Presence::kRequired; };
    op.input_memory = [](Operator const*, size_t) { return 0; };
    op.first_version = [](Operator const*) { return 1; };
    op.last_version = [](Operator const*) { return 1; };
    op.create_or_fail = [](Operator const*, void const* const* table, KernelInfo const* info, void** kernel) {
        Api const api(table);
        return guarded(api, [&] { *kernel = new Kernel(api, info); });
    };
    op.compute_or_fail = [](void* kernel, Context* context) {
        auto const& self = *static_cast<Kernel const*>(kernel);
        return guarded(self.api(), [&] { self.compute(context); });
    };
    op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}

}  // namespace
}  // namespace cpu_gemm

// Tells the compiler of artifacts what this file is.
extern "C" __attribute__((visibility("default"))) char const instantrt_serves[] =
    "InstantRT serves by libinstantrt_cpu.so";

extern "C" __attribute__((visibility("default"))) onnxruntime::Status* RegisterCustomOps(
    onnxruntime::SessionOptions* options, onnxruntime::ApiBase const* base) {
    using namespace onnxruntime;
    static Operator const op = cpu_gemm::description();
    void const* const* table = base->table(kVersion);
    Api const api(table);
    return cpu_gemm::guarded(api, [&] {
        Domain* domain = nullptr;  // the session's options hold it for as long as they live
        cpu_gemm::check(api.new_domain(schema::kDomain, &domain));
        cpu_gemm::check(api.add_operator(domain, &op));
        cpu_gemm::check(api.add_domain(options, domain));
    });
}
