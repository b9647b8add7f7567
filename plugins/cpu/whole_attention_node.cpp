// CpuWholeAttention.
#include <algorithm>
#include <cmath>

#include "heads.h"

namespace cpu {
namespace {

constexpr int64_t kChunk = 256;  // queries of a task: enough that packing keys and values is little of it

class WholeAttentionNode : public HeadsNode {
public:
    using Schema = schema::CpuWholeAttention;

    WholeAttentionNode(Api api, KernelInfo const* info) : HeadsNode(api) {
        read<Schema>(info, attributes_);
        call_.heads = attributes_[Schema::kHeads];
        call_.kv_heads = attributes_[Schema::kKvHeads];
        call_.size = attributes_[Schema::kSize];
        call_.scale = scale(attributes_[Schema::kScaleBits], call_.size);
        share(call_.heads, call_.kv_heads);
        channels(call_.size);
    }

    void compute(Context* context) const {
        WholeCall call = call_;
        Tensor const query = tensor(api_, input(context, Schema::kQuery));
        require(query.sizes.size() == 3, "query is ", query.sizes, ", expected three axes");
        call.batch = query.sizes[0];
        call.queries = query.sizes[1];
        Tensor const key = tensor(api_, input(context, Schema::kKey));
        require(key.sizes.size() == 3, "key is ", key.sizes, ", expected three axes");
        call.keys = key.sizes[1];
        Tensor const value = tensor(api_, input(context, Schema::kValue));
        auto const part = [&](char const* what, Tensor const& x, int64_t rows, int at, int64_t heads, int64_t& width) {
            return columns(what, x, call.batch, rows, attributes_[at], heads * call.size, width);
        };
        call.query = part("query", query, call.queries, Schema::kQueryAt, call.heads, call.query_width);
        call.key = part("key", key, call.keys, Schema::kKeyAt, call.kv_heads, call.key_width);
        call.value = part("value", value, call.keys, Schema::kValueAt, call.kv_heads, call.value_width);
        if (Value const* given = input(context, Schema::kMask)) {
            take(tensor(api_, given), call);
        }
        call.y = static_cast<float*>(output(context, {call.batch, call.queries, call.heads * call.size}));
        int64_t const chunks = (call.queries + kChunk - 1) / kChunk;
        in_parallel(context, call.batch * call.heads * chunks, [&](int64_t i) {
            thread_local std::vector<float> memory;
            memory.resize(std::max<size_t>(memory.size(), call.memory()));
            int64_t const first = i % chunks * kChunk;
            kernels().attend_whole(call, i / chunks / call.heads, i / chunks % call.heads, first,
                                   std::min(kChunk, call.queries - first), memory.data());
        });
    }

private:
    void take(Tensor const& mask, WholeCall& call) const {
        std::vector<int64_t> const whole{call.batch, call.heads, call.queries, call.keys};
        bool fits = mask.sizes.size() == 4 && mask.sizes[3] == call.keys;
        for (size_t axis = 0; fits && axis < 3; ++axis) {
            fits = mask.sizes[axis] == whole[axis] || mask.sizes[axis] == 1;
        }
        require(fits, "mask is ", mask.sizes, ", expected ", whole, ", or 1 but for the last");
        int64_t each = call.keys;
        int64_t* const strides[] = {&call.mask_row, &call.mask_head, &call.mask_query};
        for (int axis = 2; axis >= 0; --axis) {
            *strides[axis] = mask.sizes[axis] == 1 ? 0 : each;
            each *= mask.sizes[axis];
        }
        call.mask = mask.data;
        call.seen = mask.element == Element::kBOOL;
    }

    int64_t attributes_[std::size(Schema::kFields)];
    WholeCall call_{};
};

}  // namespace

std::vector<Operator const*> whole_attention() {
    static Operator const ops[] = {description<WholeAttentionNode, 0>(), description<WholeAttentionNode, 1>()};
    return {ops, ops + 1};
}

}  // namespace cpu
