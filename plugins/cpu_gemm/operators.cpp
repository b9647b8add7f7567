// What ONNX Runtime sees of CpuGemm and CpuRows: their ports, a kernel for each node, work on the session's threads.
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
constexpr int64_t kTaskBytes = 32 << 10;  // of codes: with less, waking a thread takes longer than the work
constexpr int64_t kRowBytes = 256 << 10;  // of x in integers: half of a core's cache, so that each strip meets it there
constexpr int64_t kRows = 8;              // what kernels multiply at once
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
        all += (all.empty() ? "" : ", ") + std::to_string(size);
    }
    return "[" + all + "]";
}

// What nodes of both operators have: a session's interface, and a weight that is constant.
class Node {
public:
    explicit Node(Api api) : api_(api) {}

    Api const& api() const { return api_; }

protected:
    template <typename Schema>
    void read(KernelInfo const* info, int64_t (&attributes)[std::size(Schema::kFields)]) {
        name_ = Schema::kName;
        for (size_t i = 0; i < std::size(attributes); ++i) {
            attributes[i] = attribute(info, Schema::kFields[i]);
        }
        check(api_.input_count(info, &inputs_));
        weight_.bits = static_cast<int>(attributes[Schema::kBits]);
        weight_.group = attributes[Schema::kGroup];
        weight_.scale_type = static_cast<Type>(attributes[Schema::kScaleType]);
        weight_.zero_type = static_cast<Type>(attributes[Schema::kZeroType]);
    }

    // Codes and affine, whose sizes have to be those of the attributes.
    void take(KernelInfo const* info, size_t codes_port, size_t affine_port) {
        Tensor const codes = constant(info, codes_port, Element::kUINT8),
                     affine = constant(info, affine_port, Element::kUINT8);
        require(codes.sizes.size() == 3 && affine.sizes.size() == 3, "codes and affine have three axes");
        weight_.n = codes.sizes[0] * kLanes;
        weight_.k = affine.sizes[1] * weight_.group;
        char const* wrong = refuse(weight_);
        require(wrong == nullptr, wrong ? wrong : "");
        same("codes", codes.sizes, {codes.sizes[0], stored_blocks(weight_), kBlockBytes});
        same("affine", affine.sizes, {codes.sizes[0], weight_.k / weight_.group, affine_bytes(weight_)});
        weight_.codes = static_cast<uint8_t const*>(codes.data);
        weight_.affine = static_cast<uint8_t const*>(affine.data);
    }

    void require(bool holds, std::string const& what) const {
        if (!holds) {
            throw Refused{api_.error((name_ + (": " + what)).c_str())};
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
        require(is_constant(info, port), "input " + std::to_string(port) + " is no constant");
        Value const* value = nullptr;
        int constant = 0;
        check(api_.constant(info, port, &constant, &value));
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

    float* output(Context* context, std::vector<int64_t> const& sizes) const {
        Value* out = nullptr;
        void* data = nullptr;
        check(api_.output(context, 0, sizes.data(), sizes.size(), &out));
        check(api_.data(out, &data));
        return static_cast<float*>(data);
    }

    template <typename Work>
    void in_parallel(Context const* context, int64_t count, Work work) const {
        if (count == 1) {
            return work(0);
        }
        auto const call = [](void* data, size_t i) { (*static_cast<Work*>(data))(static_cast<int64_t>(i)); };
        check(api_.in_parallel(context, call, static_cast<size_t>(count), &work));
    }

    Api api_;
    Weight weight_{};
    char const* name_ = "";
    size_t inputs_ = 0;
};

int64_t product(std::vector<int64_t> const& sizes) {
    int64_t all = 1;
    for (int64_t size : sizes) {
        all *= size;
    }
    return all;
}

class GemmNode : public Node {
public:
    using Schema = schema::CpuGemm;

    GemmNode(Api api, KernelInfo const* info) : Node(api) {
        int64_t attributes[std::size(Schema::kFields)];
        read<Schema>(info, attributes);
        weight_.form = static_cast<Form>(attributes[Schema::kActivations]);
        weight_.activation = static_cast<Activation>(attributes[Schema::kActivation]);
        weight_.gated = attributes[Schema::kGated] != 0;
        take(info, Schema::kCodes, Schema::kAffine);
        if (is_constant(info, Schema::kBias)) {
            Tensor const bias = constant(info, Schema::kBias, Element::kFLOAT);
            same("bias", bias.sizes, {weight_.n});
            weight_.bias = static_cast<float const*>(bias.data);
        }
    }

    void compute(Context* context) const {
        Tensor const x = tensor(api_, input(context, Schema::kX));
        require(!x.sizes.empty() && x.sizes.back() == weight_.k,
                "x is " + text(x.sizes) + ", expected [..., " + std::to_string(weight_.k) + "]");
        require(weight_.bias != nullptr || input(context, Schema::kBias) == nullptr, "bias is no constant");
        std::vector<int64_t> sizes(x.sizes.begin(), x.sizes.end() - 1);
        int64_t const rows = product(sizes);
        sizes.push_back(width(weight_));
        Call call{&weight_, {}, nullptr, nullptr};
        if (Value const* value = input(context, Schema::kResidual)) {
            Tensor const residual = tensor(api_, value);
            same("residual", residual.sizes, sizes);
            call.residual = static_cast<float const*>(residual.data);
        }
        call.y = output(context, sizes);
        if (rows > 0) {
            call.x = memory_for(rows);
            quantize(context, static_cast<float const*>(x.data), rows, call.x);
            multiply(context, call, rows);
        }
    }

private:
    // Of the calling thread, which keeps it for the next node.
    Rows memory_for(int64_t rows) const {
        thread_local std::vector<int8_t> limbs;
        thread_local std::vector<float> floats;
        Shape const shape(weight_);
        limbs.resize(std::max<size_t>(limbs.size(), rows * shape.limbs));
        floats.resize(std::max<size_t>(floats.size(), rows * (shape.scales + shape.sums)));
        return {limbs.data(), floats.data(), floats.data() + rows * shape.scales};
    }

    void quantize(Context const* context, float const* x, int64_t rows, Rows const& into) const {
        int64_t const each = std::max<int64_t>(1, kAloneBytes / (weight_.k * int64_t{sizeof(float)}));
        Shape const shape(weight_);
        in_parallel(context, (rows + each - 1) / each, [&](int64_t i) {
            for (int64_t row = i * each; row < std::min(rows, (i + 1) * each); ++row) {
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
};

class RowsNode : public Node {
public:
    using Schema = schema::CpuRows;

    RowsNode(Api api, KernelInfo const* info) : Node(api) {
        int64_t attributes[std::size(Schema::kFields)];
        read<Schema>(info, attributes);
        take(info, Schema::kCodes, Schema::kAffine);
    }

    void compute(Context* context) const {
        Tensor const ids = tensor(api_, input(context, Schema::kIds));
        int64_t const* at = static_cast<int64_t const*>(ids.data);
        int64_t const count = product(ids.sizes);
        for (int64_t i = 0; i < count; ++i) {
            require(-weight_.n <= at[i] && at[i] < weight_.n,
                    "id " + std::to_string(at[i]) + " of a table of " + std::to_string(weight_.n) + " rows");
        }
        std::vector<int64_t> sizes = ids.sizes;
        sizes.push_back(weight_.k);
        float* const rows = output(context, sizes);
        int64_t const each = std::max<int64_t>(1, kAloneBytes / weight_.k);
        in_parallel(context, (count + each - 1) / each, [&](int64_t task) {
            for (int64_t i = task * each; i < std::min(count, (task + 1) * each); ++i) {
                dequantize(weight_, at[i] < 0 ? at[i] + weight_.n : at[i], rows + i * weight_.k);
            }
        });
    }
};

template <typename Node>
Operator description() {
    using Schema = typename Node::Schema;
    Operator op{};
    op.version = kVersion;
    op.name = [](Operator const*) { return Schema::kName; };
    op.provider = [](Operator const*) -> char const* { return nullptr; };
    op.inputs = [](Operator const*) -> size_t { return Schema::kInputs; };
    op.outputs = [](Operator const*) -> size_t { return 1; };
    op.input_type = [](Operator const*, size_t i) { return Schema::template kTypes<Element>[0][i]; };
    op.output_type = [](Operator const*, size_t) { return Schema::template kTypes<Element>[0][Schema::kInputs]; };
    op.input_presence = [](Operator const*, size_t i) {
        return i < Schema::kRequiredInputs ? Presence::kRequired : Presence::kOptional;
    };
    op.output_presence = [](Operator const*, size_t) { return Presence::kRequired; };
    op.input_memory = [](Operator const*, size_t) { return 0; };
    op.first_version = op.last_version = [](Operator const*) { return 1; };
    op.create_or_fail = [](Operator const*, void const* const* table, KernelInfo const* info, void** kernel) {
        Api const api(table);
        return guarded(api, [&] { *kernel = new Node(api, info); });
    };
    op.compute_or_fail = [](void* kernel, Context* context) {
        auto const& node = *static_cast<Node const*>(kernel);
        return guarded(node.api(), [&] { node.compute(context); });
    };
    op.destroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
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
    static Operator const gemm = cpu_gemm::description<cpu_gemm::GemmNode>();
    static Operator const rows = cpu_gemm::description<cpu_gemm::RowsNode>();
    void const* const* table = base->table(kVersion);
    Api const api(table);
    return cpu_gemm::guarded(api, [&] {
        Domain* domain = nullptr;  // the session's options hold it for as long as they live
        cpu_gemm::check(api.new_domain(schema::kDomain, &domain));
        cpu_gemm::check(api.add_operator(domain, &gemm));
        cpu_gemm::check(api.add_operator(domain, &rows));
        cpu_gemm::check(api.add_domain(options, domain));
    });
}
