// The table of the kernels of one instruction set.
#pragma once

#include "attention.h"
#include "gemm.h"
#include "norm.h"
#include "whole_attention.h"

namespace cpu {

template <typename Isa>
constexpr Kernels kernels_of(char const* name, bool (*runs)()) {
    return {name,
            runs,
            Gemm<Isa>::quantize,
            Gemm<Isa>::multiply,
            Attention<Isa>::prepare,
            Attention<Isa>::pack,
            Attention<Isa>::attend,
            WholeAttention<Isa>::attend,
            Norm<Isa>::norm};
}

}  // namespace cpu
