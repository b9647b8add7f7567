// Written by plugins/codegen.py from the op definitions; do not edit.
#pragma once

#include <cstdint>

namespace schema {

struct Field {
    char const* name;
    int32_t value;  // the default
};

constexpr char kDomain[] = "instantrt";

// WeightOnlyGemm(x[..., K], codes[N//16, -(-K//(256//bits)), 512], affine[K//group, N, 2], bias[N]) -> y[..., N//(1+gated)]
struct WeightOnlyGemm {
    static constexpr char kName[] = "WeightOnlyGemm";
    static constexpr char kVersion[] = "1";
    enum Port : int32_t { kX, kCodes, kAffine, kBias, kY };
    static constexpr int32_t kInputs = 4;
    static constexpr int32_t kRequiredInputs = 3;
    enum Attr : int32_t { kBits, kGroup, kActivation, kGated, kActivationBits, kLayoutTag, kLayoutVersion };
    static constexpr Field kFields[7] = {{"bits", 4}, {"group", 128}, {"activation", 0}, {"gated", 0}, {"activation_bits", 16}, {"layout_tag", 16}, {"layout_version", 1}};
    // legal types: one row, one type for each port
    template <typename DataType>
    static constexpr DataType kTypes[2][5] = {
        {DataType::kHALF, DataType::kINT8, DataType::kHALF, DataType::kHALF, DataType::kHALF},
        {DataType::kBF16, DataType::kINT8, DataType::kBF16, DataType::kBF16, DataType::kBF16},
    };
};

}  // namespace schema
