// The part of ONNX Runtime's C interface that an operator of ours needs: its wheels carry no headers.
//
// The interface is a table of functions to which releases only append, so that a function is known by its place. What
// an operator is, is a table too, of which a release reads what it knows by the version in front.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onnxruntime {

struct Status;
struct Value;
struct TensorInfo;
struct KernelInfo;
struct Context;
struct Domain;
struct SessionOptions;

constexpr uint32_t kVersion = 18;  // of the table: ONNX Runtime 1.18 and every later one has it

// By the names that schema.h has.
enum class Element : int32_t { kFLOAT = 1, kUINT8 = 2, kINT8 = 3, kINT32 = 6, kINT64 = 7, kBOOL = 9, kHALF = 10 };
enum class ErrorCode : int32_t { kInvalidArgument = 2 };

class Api {
public:
    explicit Api(void const* const* table) : table_(table) {}

    Status* error(char const* text) const { return call<0, Status*>(ErrorCode::kInvalidArgument, text); }
    Status* new_domain(char const* name, Domain** out) const { return call<26, Status*>(name, out); }
    Status* add_operator(Domain* domain, struct Operator const* op) const { return call<27, Status*>(domain, op); }
    Status* add_domain(SessionOptions* options, Domain* domain) const { return call<28, Status*>(options, domain); }
    Status* data(Value* value, void** out) const { return call<51, Status*>(value, out); }
    Status* element(TensorInfo const* info, Element* out) const { return call<60, Status*>(info, out); }
    Status* axes(TensorInfo const* info, size_t* out) const { return call<61, Status*>(info, out); }
    Status* sizes(TensorInfo const* info, int64_t* out, size_t n) const { return call<62, Status*>(info, out, n); }
    Status* info(Value const* value, TensorInfo** out) const { return call<65, Status*>(value, out); }
    Status* attribute(KernelInfo const* info, char const* name, int64_t* out) const {
        return call<86, Status*>(info, name, out);
    }
    Status* input(Context const* context, size_t index, Value const** out) const {
        return call<90, Status*>(context, index, out);
    }
    Status* output(Context* context, size_t index, int64_t const* sizes, size_t axes, Value** out) const {
        return call<91, Status*>(context, index, sizes, axes, out);
    }
    void release(Status* status) const { call<93, void>(status); }
    void release(TensorInfo* info) const { call<99, void>(info); }
    Status* input_count(KernelInfo const* info, size_t* out) const { return call<230, Status*>(info, out); }
    Status* constant(KernelInfo const* info, size_t index, int* is_constant, Value const** out) const {
        return call<249, Status*>(info, index, is_constant, out);
    }
    // Calls `work(data, i)` for i below `count` on the session's threads, this one among them.
    Status* in_parallel(Context const* context, void (*work)(void*, size_t), size_t count, void* data) const {
        return call<274, Status*>(context, work, count, size_t{0}, data);
    }

private:
    template <size_t Place, typename Result, typename... Arguments>
    Result call(Arguments... arguments) const {
        return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(table_[Place]))(arguments...);
    }

    void const* const* table_;
};

struct ApiBase {
    void const* const* (*table)(uint32_t version);
    char const* (*version)();
};

enum class Presence : int32_t { kRequired, kOptional, kVariadic };

// An operator as its library describes it. What is null here has a default.
struct Operator {
    uint32_t version;
    void* (*create)(Operator const*, void const* const* api, KernelInfo const*);
    char const* (*name)(Operator const*);
    char const* (*provider)(Operator const*);  // null: the CPU
    Element (*input_type)(Operator const*, size_t index);
    size_t (*inputs)(Operator const*);
    Element (*output_type)(Operator const*, size_t index);
    size_t (*outputs)(Operator const*);
    void (*compute)(void* kernel, Context*);
    void (*destroy)(void* kernel);
    Presence (*input_presence)(Operator const*, size_t index);
    Presence (*output_presence)(Operator const*, size_t index);
    int32_t (*input_memory)(Operator const*, size_t index);  // 0: where the provider has its own
    int (*unused[4])(Operator const*);                       // of variadic operators
    Status* (*create_or_fail)(Operator const*, void const* const* api, KernelInfo const*, void** kernel);
    Status* (*compute_or_fail)(void* kernel, Context*);
    Status* (*shapes)(Operator const*, void*);
    int (*first_version)(Operator const*);
    int (*last_version)(Operator const*);
    size_t (*may_inplace)(int**, int**);
    void (*release_inplace)(int*, int*);
    size_t (*aliases)(int**, int**);
    void (*release_aliases)(int*, int*);
};

}  // namespace onnxruntime
