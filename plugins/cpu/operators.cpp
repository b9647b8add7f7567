// What ONNX Runtime sees of our operators: their ports, a kernel for each node, work on the session's threads.
#include <algorithm>
#include <cmath>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "kernel.h"
#include "onnxruntime.h"
#include "schema.h"

namespace cpu {
namespace {

using namespace onnxruntime;
constexpr int64_t kTaskBytes = 32 << 10;  // of codes: with less, waking a thread takes longer than the work
constexpr int64_t kRowBytes = 256 << 10;  // of x in integers: half of a core's cache, so that each strip meets it there
constexpr int64_t kRows = 24;             // whole tiles of 4, 6 and 8
constexpr int64_t kQueries = 4;           // that read keys and values once
constexpr int64_t kKeys = 256;            // of a part, where one token's are cut
constexpr int64_t kPackedTokens = 8;      // with fewer, packing keys takes longer than it saves
constexpr int64_t kHeadSize = 1 << 16;    // whose products with numbers of heads do not overflow
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

// What nodes of all operators have: a session's interface, and attributes.
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
        bool const known = field.choices == 0 ? value == static_cast<int32_t>(value)  // so that no product overflows
                                              : std::find(field.allowed, end, value) != end;
        require(known, std::string(field.name) + " is " + std::to_string(value) + ", which this library does not have");
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

    float* output(Context* context, std::vector<int64_t> const& sizes, size_t port = 0) const {
        Value* out = nullptr;
        void* data = nullptr;
        check(api_.output(context, port, sizes.data(), sizes.size(), &out));
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
    char const* name_ = "";
    size_t inputs_ = 0;
};

// Nodes with a weight, which is constant.
class WeightNode : public Node {
protected:
    using Node::Node;

    template <typename Schema>
    void read(KernelInfo const* info, int64_t (&attributes)[std::size(Schema::kFields)]) {
        Node::read<Schema>(info, attributes);
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

    Weight weight_{};
};

int64_t product(std::vector<int64_t> const& sizes) {
    int64_t all = 1;
    for (int64_t size : sizes) {
        all *= size;
    }
    return all;
}

class GemmNode : public WeightNode {
public:
    using Schema = schema::CpuGemm;

    GemmNode(Api api, KernelInfo const* info) : WeightNode(api) {
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
        int64_t const pair = 2 * stored_blocks(weight_) * kBlockBytes;
        int64_t const strips_each = 2 * std::max<int64_t>(1, kTaskBytes / pair / rows);
        int64_t const across = (strips + strips_each - 1) / strips_each;
        in_parallel(context, (rows + rows_each - 1) / rows_each * across, [&](int64_t i) {
            int64_t const row = i / across * rows_each, first = i % across * strips_each;
            kernels().multiply(call, first, std::min(strips, first + strips_each), row,
                               std::min(rows, row + rows_each));
        });
    }
};

class RowsNode : public WeightNode {
public:
    using Schema = schema::CpuRows;

    RowsNode(Api api, KernelInfo const* info) : WeightNode(api) {
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

class AttentionNode : public Node {
public:
    using Schema = schema::CpuAttention;

    AttentionNode(Api api, KernelInfo const* info) : Node(api) {
        int64_t attributes[std::size(Schema::kFields)];
        read<Schema>(info, attributes);
        call_.heads = attributes[Schema::kHeads];
        call_.kv_heads = attributes[Schema::kKvHeads];
        require(call_.kv_heads > 0 && call_.heads > 0 && call_.heads % call_.kv_heads == 0,
                std::to_string(call_.heads) + " heads cannot share " + std::to_string(call_.kv_heads));
    }

    void compute(Context* context) const {
        AttentionCall call = call_;
        Tensor const x = tensor(api_, input(context, Schema::kQkv)),
                     past = tensor(api_, input(context, Schema::kPastKey));
        Tensor const past_value = tensor(api_, input(context, Schema::kPastValue));
        Tensor const last = tensor(api_, input(context, Schema::kLast)),
                     fresh = tensor(api_, input(context, Schema::kNew));
        Tensor const cos = tensor(api_, input(context, Schema::kCos)), sin = tensor(api_, input(context, Schema::kSin));
        Tensor const positions = tensor(api_, input(context, Schema::kPositions));
        Tensor const mask = tensor(api_, input(context, Schema::kMask));
        require(x.sizes.size() == 3 && past.sizes.size() == 4 && mask.sizes.size() == 4 && cos.sizes.size() == 2,
                "its inputs have other axes than they should");
        call.batch = x.sizes[0];
        call.tokens = x.sizes[1];
        call.size = past.sizes[3];
        call.rotated = 2 * cos.sizes[1];
        call.columns = mask.sizes[3];
        require(call.size > 0 && call.size % kLanes == 0 && call.size <= kHeadSize,
                "a head has " + std::to_string(call.size) + " channels, expected a multiple of 16, at most " +
                    std::to_string(kHeadSize));
        require(call.rotated <= call.size, std::to_string(call.rotated) + " of a head's " + std::to_string(call.size) +
                                               " channels are to be rotated");
        same("qkv", x.sizes, {call.batch, call.tokens, (call.heads + 2 * call.kv_heads) * call.size});
        same("past_key", past.sizes, {call.batch, call.kv_heads, past.sizes[2], call.size});
        same("past_value", past_value.sizes, past.sizes);
        same("sin", sin.sizes, cos.sizes);
        same("positions", positions.sizes, {call.batch, call.tokens});
        same("last", last.sizes, {call.batch});
        same("new", fresh.sizes, {call.batch});
        same("mask", mask.sizes, {call.batch, 1, call.tokens, call.columns});
        call.capacity = std::max(past.sizes[2], call.columns);
        call.scale = 1 / std::sqrt(static_cast<float>(call.size));
        call.qkv = static_cast<float const*>(x.data);
        call.cos = static_cast<float const*>(cos.data);
        call.sin = static_cast<float const*>(sin.data);
        call.positions = static_cast<int64_t const*>(positions.data);
        call.last = static_cast<int32_t const*>(last.data);
        call.fresh = static_cast<int32_t const*>(fresh.data);
        call.mask = static_cast<float const*>(mask.data);
        for (int64_t row = 0; row < call.batch; ++row) {
            require(0 <= call.fresh[row] && call.fresh[row] <= call.tokens && 0 <= call.past(row) &&
                        call.length(row) <= call.columns && call.past(row) <= past.sizes[2],
                    "row " + std::to_string(row) + " has " + std::to_string(call.fresh[row]) + " new tokens of " +
                        std::to_string(call.tokens) + ", the last at " + std::to_string(call.last[row]) +
                        " under a mask of " + std::to_string(call.columns) + ", behind " +
                        std::to_string(past.sizes[2]) + " in the cache");
        }
        for (int64_t i = 0; i < call.batch * call.tokens; ++i) {
            require(0 <= call.positions[i] && call.positions[i] < cos.sizes[0],
                    "position " + std::to_string(call.positions[i]) + " of " + std::to_string(cos.sizes[0]));
        }
        call.y = output(context, {call.batch, call.tokens, call.heads * call.size}, Schema::kY - Schema::kInputs);
        std::vector<int64_t> const present{call.batch, call.kv_heads, call.capacity, call.size};
        call.keys = output(context, present, Schema::kPresentKey - Schema::kInputs);
        call.values = output(context, present, Schema::kPresentValue - Schema::kInputs);
        copy_past(call, static_cast<float const*>(past.data), past.sizes[2], call.keys);
        copy_past(call, static_cast<float const*>(past_value.data), past.sizes[2], call.values);
        if (call.batch * call.tokens > 0) {
            attend(context, call);
        }
    }

private:
    // Into a cache that is another buffer; no further than each row goes.
    static void copy_past(AttentionCall const& c, float const* from, int64_t room, float* into) {
        for (int64_t i = 0; from != into && i < c.batch * c.kv_heads; ++i) {
            int64_t const past = c.past(i / c.kv_heads) * c.size;
            std::copy_n(from + i * room * c.size, past, into + i * c.capacity * c.size);
            std::fill_n(into + i * c.capacity * c.size + past, c.capacity * c.size - past, 0.0f);
        }
    }

    void attend(Context const* context, AttentionCall call) const {
        thread_local std::vector<float> queries, packed, partial;
        int64_t const groups = call.batch * call.kv_heads, shared = call.heads / call.kv_heads;
        call.queries = grow(queries, call.batch * call.heads * call.tokens * call.size);
        in_parallel(context, call.batch * call.tokens, [&](int64_t i) {
            if (i % call.tokens < call.fresh[i / call.tokens]) {
                kernels().prepare(call, i / call.tokens, i % call.tokens);
            }
        });
        if (call.tokens >= kPackedTokens) {
            int64_t const tiles = (call.columns + kLanes - 1) / kLanes;
            float* const into = grow(packed, groups * tiles * kLanes * call.size);
            in_parallel(context, groups * tiles, [&](int64_t i) {
                int64_t const row = i / tiles / call.kv_heads;
                kernels().pack(call, row, i / tiles % call.kv_heads, i % tiles, into + i * kLanes * call.size);
            });
            call.packed = into;
        }
        // One token's keys are cut, so that all threads have some; the parts are of the same size whoever takes them.
        int64_t const rows = call.tokens * shared, blocks = (rows + kQueries - 1) / kQueries;
        int64_t const parts = call.tokens == 1 ? (call.columns + kKeys - 1) / kKeys : 1;
        int64_t const each = kQueries * (call.size + 2);
        float* const found = grow(partial, parts > 1 ? groups * blocks * parts * each : 0);
        in_parallel(context, groups * blocks * parts, [&](int64_t i) {
            part(call, i / parts / blocks, i / parts % blocks, i % parts, parts, found + i * each);
        });
        for (int64_t i = 0; parts > 1 && i < groups * blocks; ++i) {
            merge(call, i / blocks, i % blocks, parts, found + i * parts * each);
        }
    }

    // Of the calling thread: others have vectors of their own by the same name.
    static float* grow(std::vector<float>& memory, int64_t count) {
        memory.resize(std::max<size_t>(memory.size(), count));
        return memory.data();
    }

    // Queries of one block over all keys, or some: sums, the largest score and the total of weights.
    static void part(AttentionCall const& c, int64_t group, int64_t block, int64_t part, int64_t parts,
                     float* partial) {
        thread_local std::vector<float> weights, sums;
        int64_t const row = group / c.kv_heads, shared = c.heads / c.kv_heads;
        int64_t const first = block * kQueries, count = std::min(kQueries, c.tokens * shared - first);
        int64_t const token = std::min((first + count - 1) / shared, c.fresh[row] - int64_t{1});
        int64_t const begin = part * kKeys;
        int64_t const end = std::min(c.past(row) + token + 1, parts > 1 ? begin + kKeys : c.columns);
        float top[kQueries], total[kQueries];
        std::fill_n(top, count, -INFINITY);
        std::fill_n(total, count, 0.0f);
        grow(weights, kQueries * (c.columns + kLanes));
        grow(sums, kQueries * c.size);
        float* const into = parts > 1 ? partial + 2 * kQueries : sums.data();
        if (begin < end) {
            kernels().attend(c, row, group % c.kv_heads, first, count, begin, end, weights.data(), top, total, into);
        }
        if (parts > 1) {
            std::copy_n(top, count, partial);
            std::copy_n(total, count, partial + kQueries);
            return;
        }
        for (int64_t i = 0; i < count; ++i) {
            bool const seen = (first + i) / shared < c.fresh[row] && total[i] != 0;
            float const by = seen ? 1 / total[i] : 0;
            float* const y = place(c, group, first + i);
            for (int64_t d = 0; d < c.size; ++d) {
                y[d] = seen ? into[i * c.size + d] * by : 0;
            }
        }
    }

    static void merge(AttentionCall const& c, int64_t group, int64_t block, int64_t parts, float const* partial) {
        int64_t const each = kQueries * (c.size + 2), shared = c.heads / c.kv_heads, row = group / c.kv_heads;
        int64_t const first = block * kQueries, count = std::min(kQueries, c.tokens * shared - first);
        for (int64_t i = 0; i < count; ++i) {
            float top = -INFINITY, total = 0;
            for (int64_t p = 0; p < parts; ++p) {
                float const score = partial[p * each + i];
                top = score > top || score != score ? score : top;
            }
            float* const y = place(c, group, first + i);
            std::fill_n(y, c.size, 0.0f);
            for (int64_t p = 0; p < parts && (first + i) / shared < c.fresh[row]; ++p) {
                float const* from = partial + p * each;
                if (from[kQueries + i] == 0) {
                    continue;
                }
                float const factor = std::exp(from[i] - top);
                total += from[kQueries + i] * factor;
                for (int64_t d = 0; d < c.size; ++d) {
                    y[d] += from[2 * kQueries + i * c.size + d] * factor;
                }
            }
            for (int64_t d = 0; total != 0 && d < c.size; ++d) {
                y[d] /= total;
            }
        }
    }

    static float* place(AttentionCall const& c, int64_t group, int64_t query) {
        int64_t const shared = c.heads / c.kv_heads, row = group / c.kv_heads;
        int64_t const token = query / shared, head = group % c.kv_heads * shared + query % shared;
        return c.y + ((row * c.tokens + token) * c.heads + head) * c.size;
    }

    AttentionCall call_{};
};

template <typename Node>
Operator description() {
    using Schema = typename Node::Schema;
    Operator op{};
    op.version = kVersion;
    op.name = [](Operator const*) { return Schema::kName; };
    op.provider = [](Operator const*) -> char const* { return nullptr; };
    op.inputs = [](Operator const*) -> size_t { return Schema::kInputs; };
    op.outputs = [](Operator const*) -> size_t {
        return std::size(Schema::template kTypes<Element>[0]) - Schema::kInputs;
    };
    op.input_type = [](Operator const*, size_t i) { return Schema::template kTypes<Element>[0][i]; };
    op.output_type = [](Operator const*, size_t i) { return Schema::template kTypes<Element>[0][Schema::kInputs + i]; };
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
}  // namespace cpu

// Tells the compiler of artifacts what this file is.
extern "C" __attribute__((visibility("default"))) char const instantrt_serves[] =
    "InstantRT serves by libinstantrt_cpu.so";

extern "C" __attribute__((visibility("default"))) onnxruntime::Status* RegisterCustomOps(
    onnxruntime::SessionOptions* options, onnxruntime::ApiBase const* base) {
    using namespace onnxruntime;
    static Operator const gemm = cpu::description<cpu::GemmNode>();
    static Operator const rows = cpu::description<cpu::RowsNode>();
    static Operator const attention = cpu::description<cpu::AttentionNode>();
    void const* const* table = base->table(kVersion);
    Api const api(table);
    return cpu::guarded(api, [&] {
        Domain* domain = nullptr;  // the session's options hold it for as long as they live
        cpu::check(api.new_domain(schema::kDomain, &domain));
        cpu::check(api.add_operator(domain, &gemm));
        cpu::check(api.add_operator(domain, &rows));
        cpu::check(api.add_operator(domain, &attention));
        cpu::check(api.add_domain(options, domain));
    });
}
