// What the nodes of attention have in common.
#pragma once

#include <bit>
#include <cmath>

#include "nodes.h"

namespace cpu {

class HeadsNode : public Node {
protected:
    using Node::Node;

    // `count` columns of x [batch, rows, width], from `at` on: the first of them.
    float const* columns(char const* what, Tensor const& x, int64_t batch, int64_t rows, int64_t at, int64_t count,
                         int64_t& width) const {
        require(x.sizes.size() == 3 && x.sizes[0] == batch && x.sizes[1] == rows, what, " is ", x.sizes, ", expected [",
                batch, ", ", rows, ", ...]");
        width = x.sizes[2];
        require(at >= 0 && at + count <= width, what, " has ", width, " columns, expected ", count, " from ", at,
                " on");
        return static_cast<float const*>(x.data) + at;
    }

    // What heads have to be.
    void share(int64_t heads, int64_t kv_heads) const {
        require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, heads, " heads cannot share ", kv_heads);
    }

    void channels(int64_t size) const {
        int64_t const most = 1 << 16;  // whose products with numbers of heads do not overflow
        require(size > 0 && size % kLanes == 0 && size <= most, "a head has ", size,
                " channels, expected a multiple of 16, at most ", most);
    }

    // What scores are multiplied with: an attribute has its bits, or 0.
    static float scale(int64_t bits, int64_t size) {
        return bits == 0 ? 1 / std::sqrt(static_cast<float>(size)) : std::bit_cast<float>(static_cast<int32_t>(bits));
    }
};

}  // namespace cpu
