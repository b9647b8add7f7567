// CpuAttention.
#include <algorithm>
#include <cmath>

#include "heads.h"

namespace cpu {
namespace {

constexpr int64_t kQueries = 4;       // that read keys and values once
constexpr int64_t kKeys = 256;        // of a part, where one token's are cut
constexpr int64_t kPackedTokens = 8;  // with fewer, packing keys takes longer than it saves

template <typename S>
class AttentionNode : public HeadsNode {
public:
    using Schema = S;
    static constexpr bool kByToken = std::is_same_v<Schema, schema::CpuAttentionByToken>;

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
        Tensor const last = tensor(api_, input(context, Schema::kLast)),
                     fresh = tensor(api_, input(context, Schema::kNew));
        Tensor const mask = tensor(api_, input(context, Schema::kMask));
        require(query.sizes.size() == 3 && past.sizes.size() == 4 && mask.sizes.size() == 4,
                "its inputs have other axes than they should");
        call.batch = query.sizes[0];
        call.tokens = query.sizes[1];
        call.size = past.sizes[3] * (kByToken ? 2 : 1);
        call.columns = mask.sizes[3];
        channels(call.size);
        auto const part = [&](char const* what, Tensor const& x, int at, int64_t heads, int64_t& width) {
            return columns(what, x, call.batch, call.tokens, attributes_[at], heads * call.size, width);
        };
        call.query = part("query", query, Schema::kQueryAt, call.heads, call.query_width);
        call.key = part("key", key, Schema::kKeyAt, call.kv_heads, call.key_width);
        call.value = part("value", value, Schema::kValueAt, call.kv_heads, call.value_width);
        same("last", last.sizes, {call.batch});
        same("new", fresh.sizes, {call.batch});
        same("mask", mask.sizes, {call.batch, 1, call.tokens, call.columns});
        call.room = past.sizes[2];
        call.capacity = std::max(call.room, call.columns);
        call.scale = scale(attributes_[Schema::kScaleBits], call.size);
        call.last = static_cast<int32_t const*>(last.data);
        call.counts = static_cast<int32_t const*>(fresh.data);
        call.mask = static_cast<float const*>(mask.data);
        for (int64_t row = 0; row < call.batch; ++row) {
            require(0 <= call.counts[row] && call.counts[row] <= call.tokens && 0 <= call.past(row) &&
                        call.length(row) <= call.columns && call.past(row) <= call.room,
                    "row ", row, " has ", call.counts[row], " new tokens of ", call.tokens, ", the last at ",
                    call.last[row], " under a mask of ", call.columns, ", behind ", call.room, " in the cache");
        }
        rotation(context, call);
        std::vector<int64_t> const sizes{call.batch, call.tokens, call.heads * call.size};
        call.y = static_cast<float*>(output(context, sizes, Schema::kY - Schema::kInputs));
        if constexpr (kByToken) {
            call.cache = Cache::kNibbles;
            call.center = rows_of_heads(context, "center", Schema::kCenter, call);
            nibbles(context, call, call.keys, Schema::kPastKey, Schema::kPresentKey);
            nibbles(context, call, call.values, Schema::kPastValue, Schema::kPresentValue);
        } else {
            call.cache = past.element == Element::kFLOAT  ? Cache::kF32
                         : past.element == Element::kHALF ? Cache::kF16
                                                          : Cache::kI8;
            numbers(context, call, call.keys, Schema::kPastKey, Schema::kPresentKey, Schema::kKeyScale);
            numbers(context, call, call.values, Schema::kPastValue, Schema::kPresentValue, Schema::kValueScale);
        }
        if (call.batch * call.tokens > 0) {
            attend(context, call);
        }
    }

private:
    // Tables and positions, where they are given.
    void rotation(Context const* context, AttentionCall& call) const {
        Value const *const angles = input(context, Schema::kCos), *const others = input(context, Schema::kSin),
                           *const given = input(context, Schema::kPositions);
        bool const none = angles == nullptr;
        require((others == nullptr) == none && (given == nullptr) == none, "cos, sin and positions go together");
        if (none) {
            return;
        }
        Tensor const cos = tensor(api_, angles), sin = tensor(api_, others), positions = tensor(api_, given);
        require(cos.sizes.size() == 2, "cos is ", cos.sizes, ", expected two axes");
        same("sin", sin.sizes, cos.sizes);
        same("positions", positions.sizes, {call.batch, call.tokens});
        call.rotated = 2 * cos.sizes[1];
        require(call.rotated <= call.size, call.rotated, " of a head's ", call.size, " channels are to be rotated");
        call.cos = static_cast<float const*>(cos.data);
        call.sin = static_cast<float const*>(sin.data);
        call.positions = static_cast<int64_t const*>(positions.data);
        for (int64_t i = 0; i < call.batch * call.tokens; ++i) {
            require(0 <= call.positions[i] && call.positions[i] < cos.sizes[0], "position ", call.positions[i], " of ",
                    cos.sizes[0]);
        }
    }

    void numbers(Context* context, AttentionCall const& call, CachePart& part, int past, int present,
                 size_t scales) const {
        int64_t const bytes[] = {4, 2, 1};
        part.data = grown(context, call, past, present, call.size, bytes[static_cast<int>(call.cache)]);
        part.scales = rows_of_heads(context, "scale", scales, call);
        require((part.scales != nullptr) == (call.cache == Cache::kI8), "scales and a cache of int8 go together");
    }

    // Codes, scales and zero points are ports beside one another.
    void nibbles(Context* context, AttentionCall const& call, CachePart& part, int past, int present) const {
        Tensor const steps = tensor(api_, input(context, static_cast<size_t>(past) + 1));
        part.groups = steps.sizes.size() == 4 ? steps.sizes[3] : 0;
        require(part.groups > 0 && part.groups <= kMostGroups && call.size % (kLanes * part.groups) == 0, call.size,
                " channels in ", part.groups, " groups, expected at most ", kMostGroups, " of a multiple of 16");
        part.data = grown(context, call, past, present, call.size / 2, 1);
        part.steps = static_cast<uint16_t*>(grown(context, call, past + 1, present + 1, part.groups, 2));
        part.zeros = static_cast<uint8_t*>(grown(context, call, past + 2, present + 2, part.groups, 1));
    }

    // [kv_heads, size]; null where it is not given.
    float const* rows_of_heads(Context const* context, char const* what, size_t port, AttentionCall const& call) const {
        Value const* const value = input(context, port);
        if (value == nullptr) {
            return nullptr;
        }
        Tensor const found = tensor(api_, value);
        same(what, found.sizes, {call.kv_heads, call.size});
        return static_cast<float const*>(found.data);
    }

    // A present [batch, kv_heads, capacity, width] with what its past has of each row, which may be the same buffer.
    void* grown(Context* context, AttentionCall const& c, int past, int present, int64_t width, int64_t bytes) const {
        Tensor const before = tensor(api_, input(context, static_cast<size_t>(past)));
        same(Schema::kPortNames[past], before.sizes, {c.batch, c.kv_heads, c.room, width});
        void* const into =
            output(context, {c.batch, c.kv_heads, c.capacity, width}, static_cast<size_t>(present - Schema::kInputs));
        int64_t const token = width * bytes;
        for (int64_t i = 0; before.data != into && i < c.batch * c.kv_heads; ++i) {
            int64_t const known = c.past(i / c.kv_heads) * token;
            char* const row = static_cast<char*>(into) + i * c.capacity * token;
            std::copy_n(static_cast<char const*>(before.data) + i * c.room * token, known, row);
            std::fill_n(row + known, c.capacity * token - known, char{0});
        }
        return into;
    }

    void attend(Context const* context, AttentionCall call) const {
        thread_local std::vector<float> queries, packed, values, partial;
        int64_t const groups = call.batch * call.kv_heads, shared = call.heads / call.kv_heads;
        // One token's keys are cut, so that all threads have some; the parts are of the same size whoever takes them.
        int64_t const rows = call.tokens * shared, blocks = (rows + kQueries - 1) / kQueries;
        int64_t const parts = call.tokens == 1 ? (call.columns + kKeys - 1) / kKeys : 1;
        call.queries = grow(queries, call.batch * (call.heads + call.kv_heads) * call.tokens * call.size);
        call.fresh = call.queries + call.batch * call.heads * call.tokens * call.size;
        auto const prepare = [&](int64_t row, int64_t token, int64_t kv_head) {
            if (token < call.counts[row]) {
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
            call.values_read = kByToken ? grow(values, groups * tiles * kLanes * call.size) : nullptr;
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
        int64_t const token = std::min((first + count - 1) / shared, c.counts[row] - int64_t{1});
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
            bool const seen = (first + i) / shared < c.counts[row] && total[i] != 0;
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
            for (int64_t p = 0; p < parts && (first + i) / shared < c.counts[row]; ++p) {
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
    using Plain = AttentionNode<schema::CpuAttention>;
    static Operator const ops[] = {description<Plain, 0>(), description<Plain, 1>(), description<Plain, 2>(),
                                   description<AttentionNode<schema::CpuAttentionByToken>>()};
    return {ops, ops + 1, ops + 2, ops + 3};
}

}  // namespace cpu
