// CpuGemm, and CpuRows, which reads the same weights.
#include <algorithm>

#include "nodes.h"

namespace cpu {
namespace {

constexpr int64_t kTaskBytes = 32 << 10;  // of codes: with less, waking a thread takes longer than the work
constexpr int64_t kRowBytes = 256 << 10;  // of x in integers: half of a core's cache, so that each strip meets it there
constexpr int64_t kRows = 24;             // whole tiles of 4, 6 and 8
constexpr int64_t kAloneBytes = 16 << 10;  // of x, which one thread brings into integers

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
        require(!x.sizes.empty() && x.sizes.back() == weight_.k, "x is ", x.sizes, ", expected [..., ", weight_.k, "]");
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
        call.y = static_cast<float*>(output(context, sizes));
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
            require(-weight_.n <= at[i] && at[i] < weight_.n, "id ", at[i], " of a table of ", weight_.n, " rows");
        }
        std::vector<int64_t> sizes = ids.sizes;
        sizes.push_back(weight_.k);
        float* const rows = static_cast<float*>(output(context, sizes));
        int64_t const each = std::max<int64_t>(1, kAloneBytes / weight_.k);
        in_parallel(context, (count + each - 1) / each, [&](int64_t task) {
            for (int64_t i = task * each; i < std::min(count, (task + 1) * each); ++i) {
                dequantize(weight_, at[i] < 0 ? at[i] + weight_.n : at[i], rows + i * weight_.k);
            }
        });
    }
};

}  // namespace

std::vector<Operator const*> gemm() {
    static Operator const op = description<GemmNode>();
    return {&op};
}

std::vector<Operator const*> rows() {
    static Operator const op = description<RowsNode>();
    return {&op};
}

}  // namespace cpu
