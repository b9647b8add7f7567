// What ONNX Runtime sees of our operators: their ports, a kernel for each node, work on the session's threads.
#pragma once

#include <algorithm>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "kernel.h"
#include "onnxruntime.h"
#include "schema.h"

namespace cpu {

using namespace onnxruntime;

struct Refused {
    Status* status;
};

inline void check(Status* status) {
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

inline Tensor tensor(Api const& api, Value const* value) {
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

inline std::string text(char const* words) { return words; }
inline std::string text(int64_t number) { return std::to_string(number); }
inline std::string text(std::vector<int64_t> const& sizes) {
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

    // `parts` are joined only where it does not hold.
    template <typename... Parts>
    void require(bool holds, Parts const&... parts) const {
        if (!holds) {
            throw Refused{api_.error((name_ + std::string(": ") + ... + text(parts)).c_str())};
        }
    }

    void same(char const* name, std::vector<int64_t> const& found, std::vector<int64_t> const& expected) const {
        require(found == expected, name, " is ", found, ", expected ", expected);
    }

    int64_t attribute(KernelInfo const* info, schema::Field const& field) const {
        int64_t value = 0;
        check(api_.attribute(info, field.name, &value));
        auto const* end = field.allowed + field.choices;
        bool const known = field.choices == 0 ? value == static_cast<int32_t>(value)  // so that no product overflows
                                              : std::find(field.allowed, end, value) != end;
        require(known, field.name, " is ", value, ", which this library does not have");
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
        require(is_constant(info, port), "input ", port, " is no constant");
        Value const* value = nullptr;
        int constant = 0;
        check(api_.constant(info, port, &constant, &value));
        Tensor found = tensor(api_, value);
        require(found.element == element, "input ", port, " has another type");
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

    void* output(Context* context, std::vector<int64_t> const& sizes, size_t port = 0) const {
        Value* out = nullptr;
        void* data = nullptr;
        check(api_.output(context, port, sizes.data(), sizes.size(), &out));
        check(api_.data(out, &data));
        return data;
    }

    template <typename Work>
    void in_parallel(Context const* context, int64_t count, Work work) const {
        if (count <= 1) {
            return count == 1 ? work(0) : void();
        }
        auto const call = [](void* data, size_t i) { (*static_cast<Work*>(data))(static_cast<int64_t>(i)); };
        check(api_.in_parallel(context, call, static_cast<size_t>(count), &work));
    }

    Api api_;
    char const* name_ = "";
    size_t inputs_ = 0;
};

inline int64_t product(std::vector<int64_t> const& sizes) {
    int64_t all = 1;
    for (int64_t size : sizes) {
        all *= size;
    }
    return all;
}

// `Row`: of its types.
template <typename Node, int Row = 0>
Operator description() {
    using Schema = typename Node::Schema;
    Operator op{};
    op.version = kVersion;
    op.name = [](Operator const*) { return Schema::kName; };
    op.provider = [](Operator const*) -> char const* { return nullptr; };
    op.inputs = [](Operator const*) -> size_t { return Schema::kInputs; };
    op.outputs = [](Operator const*) -> size_t {
        return std::size(Schema::template kTypes<Element>[Row]) - Schema::kInputs;
    };
    op.input_type = [](Operator const*, size_t i) { return Schema::template kTypes<Element>[Row][i]; };
    op.output_type = [](Operator const*, size_t i) {
        return Schema::template kTypes<Element>[Row][Schema::kInputs + i];
    };
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

// What each file of operators has for a session.
std::vector<Operator const*> gemm();
std::vector<Operator const*> rows();
std::vector<Operator const*> attention();
std::vector<Operator const*> whole_attention();
std::vector<Operator const*> norm();

}  // namespace cpu
