// CpuAttention.
#include <algorithm>
#include <cmath>

#include "heads.h"

namespace cpu {
namespace {

constexpr int64_t kQueries = 4;       // that read keys and values once
constexpr int64_t kKeys = 256;        // of a part, where one token's are cut
constexpr int64_t kPackedTokens = 8;  // with fewer, packing keys takes longer than it saves

class AttentionNode : public HeadsNode {
public:
    using Schema = schema::CpuAttention;

    AttentionNode(Api api, KernelInfo const* info) : HeadsNode(api) {
        read<Schema>(info, attributes_);
        call_.heads = attributes_[Schema::kHeads];
        call_.kv_heads = attributes_[Schema::kKvHeads];
        call_.interleaved = attributes_[Schema::kInterleaved] != 0;
        share(call_.heads, call_.kv_heads);
    }

    void compute(Context* context) const {
        AttentionCall call = call_;
        Tensor const query = tensor(api_, input(context, Schema::kQuery)),
                     key = tensor(api_, input(context, Schema::kKey)),
                     value = tensor(api_, input(context, Schema::kValue)),
                     past = tensor(api_, input(context, Schema::kPastKey));
        Tensor const past_value = tensor(api_, input(context, Schema::kPastValue));
        Tensor const last = tensor(api_, input(context, Schema::kLast)),
                     fresh = tensor(api_, input(context, Schema::kNew));
        Tensor const cos = tensor(api_, input(context, Schema::kCos)), sin = tensor(api_, input(context, Schema::kSin));
        Tensor const positions = tensor(api_, input(context, Schema::kPositions));
        Tensor const mask = tensor(api_, input(context, Schema::kMask));
        require(query.sizes.size() == 3 && past.sizes.size() == 4 && mask.sizes.size() == 4 && cos.sizes.size() == 2,
                "its inputs have other axes than they should");
        call.batch = query.sizes[0];
        call.tokens = query.sizes[1];
        call.size = past.sizes[3];
        call.rotated = 2 * cos.sizes[1];
        call.columns = mask.sizes[3];
        channels(call.size);
        require(call.rotated <= call.size, call.rotated, " of a head's ", call.size, " channels are to be rotated");
        auto const part = [&](char const* what, Tensor const& x, int at, int64_t heads, int64_t& width) {
            return columns(what, x, call.batch, call.tokens, attributes_[at], heads * call.size, width);
        };
        call.query = part("query", query, Schema::kQueryAt, call.heads, call.query_width);
        call.key = part("key", key, Schema::kKeyAt, call.kv_heads, call.key_width);
        call.value = part("value", value, Schema::kValueAt, call.kv_heads, call.value_width);
        same("past_key", past.sizes, {call.batch, call.kv_heads, past.sizes[2], call.size});
        same("past_value", past_value.sizes, past.sizes);
        call.cache = cache_of(past.element);
        call.key_scales = scales(context, Schema::kKeyScale, call);
        call.value_scales = scales(context, Schema::kValueScale, call);
        same("sin", sin.sizes, cos.sizes);
        same("positions", positions.sizes, {call.batch, call.tokens});
        same("last", last.sizes, {call.batch});
        same("new", fresh.sizes, {call.batch});
        same("mask", mask.sizes, {call.batch, 1, call.tokens, call.columns});
        call.capacity = std::max(past.sizes[2], call.columns);
        call.scale = scale(attributes_[Schema::kScaleBits], call.size);
        call.cos = static_cast<float const*>(cos.data);
        call.sin = static_cast<float const*>(sin.data);
        call.positions = static_cast<int64_t const*>(positions.data);
        call.last = static_cast<int32_t const*>(last.data);
        call.fresh = static_cast<int32_t const*>(fresh.data);
        call.mask = static_cast<float const*>(mask.data);
        for (int64_t row = 0; row < call.batch; ++row) {
            require(0 <= call.fresh[row] && call.fresh[row] <= call.tokens && 0 <= call.past(row) &&
                        call.length(row) <= call.columns && call.past(row) <= past.sizes[2],
                    "row ", row, " has ", call.fresh[row], " new tokens of ", call.tokens, ", the last at ",
                    call.last[row], " under a mask of ", call.columns, ", behind ", past.sizes[2], " in the cache");
        }
        for (int64_t i = 0; i < call.batch * call.tokens; ++i) {
            require(0 <= call.positions[i] && call.positions[i] < cos.sizes[0], "position ", call.positions[i], " of ",
                    cos.sizes[0]);
        }
        std::vector<int64_t> const sizes{call.batch, call.tokens, call.heads * call.size};
        call.y = static_cast<float*>(output(context, sizes, Schema::kY - Schema::kInputs));
        std::vector<int64_t> const present{call.batch, call.kv_heads, call.capacity, call.size};
        call.keys = output(context, present, Schema::kPresentKey - Schema::kInputs);
        call.values = output(context, present, Schema::kPresentValue - Schema::kInputs);
        copy_past(call, past, call.keys);
        copy_past(call, past_value, call.values);
        if (call.batch * call.tokens > 0) {
            attend(context, call);
        }
    }

private:
    static Cache cache_of(Element element) {
        return element == Element::kFLOAT ? Cache::kF32 : element == Element::kHALF ? Cache::kF16 : Cache::kI8;
    }

    // Null of a cache of floats, which needs none.
    float const* scales(Context const* context, size_t port, AttentionCall const& call) const {
        Value const* value = input(context, port);
        require((value != nullptr) == (call.cache == Cache::kI8), "scales and a cache of int8 go together");
        if (value == nullptr) {
            return nullptr;
        }
        Tensor const found = tensor(api_, value);
        same("scale", found.sizes, {call.kv_heads, call.size});
        return static_cast<float const*>(found.data);
    }

    // Into a cache that is another buffer; no further than each row goes.
    static void copy_past(AttentionCall const& c, Tensor const& past, void* into) {
        int64_t const token = c.size * kCacheSizes[static_cast<int>(c.cache)];
        for (int64_t i = 0; past.data != into && i < c.batch * c.kv_heads; ++i) {
            int64_t const known = c.past(i / c.kv_heads) * token;
            char* const row = static_cast<char*>(into) + i * c.capacity * token;
            std::copy_n(static_cast<char const*>(past.data) + i * past.sizes[2] * token, known, row);
            std::fill_n(row + known, c.capacity * token - known, char{0});
        }
    }

    void attend(Context const* context, AttentionCall call) const {
        thread_local std::vector<float> queries, packed, partial;
        int64_t const groups = call.batch * call.kv_heads, shared = call.heads / call.kv_heads;
        // One token's keys are cut, so that all threads have some; the parts are of the same size whoever takes them.
        int64_t const rows = call.tokens * shared, blocks = (rows + kQueries - 1) / kQueries;
        int64_t const parts = call.tokens == 1 ? (call.columns + kKeys - 1) / kKeys : 1;
        call.queries = grow(queries, call.batch * (call.heads + call.kv_heads) * call.tokens * call.size);
        call.fresh_keys = call.queries + call.batch * call.heads * call.tokens * call.size;
        auto const prepare = [&](int64_t row, int64_t token, int64_t kv_head) {
            if (token < call.fresh[row]) {
                kernels().prepare(call, row, token, kv_head);
            }
        };
        bool const at_once = call.tokens * blocks * parts == 1;  // whoever attends prepares what nobody else reads
        in_parallel(context, at_once ? 0 : call.batch * call.tokens, [&](int64_t i) {
            for (int64_t kv_head = 0; kv_head < call.kv_heads; ++kv_head) {
                prepare(i / call.tokens, i % call.tokens, kv_head);
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
        int64_t const each = kQueries * (call.size + 2);
        float* const found = grow(partial, parts > 1 ? groups * blocks * parts * each : 0);
        in_parallel(context, groups * blocks * parts, [&](int64_t i) {
            if (at_once) {
                prepare(i / call.kv_heads, 0, i % call.kv_heads);
            }
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

    int64_t attributes_[std::size(Schema::kFields)];
    AttentionCall call_{};
};

}  // namespace

std::vector<Operator const*> attention() {
    static Operator const ops[] = {description<AttentionNode, 0>(), description<AttentionNode, 1>(),
                                   description<AttentionNode, 2>()};
    return {ops, ops + 1, ops + 2};
}

}  // namespace cpu
