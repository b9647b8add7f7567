// CpuNorm.
#include <algorithm>
#include <bit>

#include "nodes.h"

namespace cpu {
namespace {

constexpr int64_t kAloneBytes = 32 << 10;  // of x: with less, waking a thread takes longer than the work

class NormNode : public Node {
public:
    using Schema = schema::CpuNorm;

    NormNode(Api api, KernelInfo const* info) : Node(api) {
        int64_t attributes[std::size(Schema::kFields)];
        read<Schema>(info, attributes);
        call_.centered = attributes[Schema::kCentered] != 0;
        call_.epsilon = std::bit_cast<float>(static_cast<int32_t>(attributes[Schema::kEpsilonBits]));
    }

    void compute(Context* context) const {
        NormCall call = call_;
        Tensor const x = tensor(api_, input(context, Schema::kX)), scale = tensor(api_, input(context, Schema::kScale));
        require(!x.sizes.empty(), "x has no axes");
        call.k = x.sizes.back();
        same("scale", scale.sizes, {call.k});
        call.scale = static_cast<float const*>(scale.data);
        if (Value const* value = input(context, Schema::kBias)) {
            Tensor const bias = tensor(api_, value);
            same("bias", bias.sizes, {call.k});
            call.bias = static_cast<float const*>(bias.data);
        }
        call.x = static_cast<float const*>(x.data);
        call.y = static_cast<float*>(output(context, x.sizes));
        int64_t const rows = call.k == 0 ? 0 : product(x.sizes) / call.k;
        int64_t const each =
            std::max<int64_t>(1, kAloneBytes / (std::max<int64_t>(call.k, 1) * int64_t{sizeof(float)}));
        in_parallel(context, (rows + each - 1) / each, [&](int64_t i) {
            for (int64_t row = i * each; row < std::min(rows, (i + 1) * each); ++row) {
                kernels().norm(call, row);
            }
        });
    }

private:
    NormCall call_{};
};

}  // namespace

std::vector<Operator const*> norm() {
    static Operator const op = description<NormNode>();
    return {&op};
}

}  // namespace cpu
