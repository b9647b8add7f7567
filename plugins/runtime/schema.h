// Written by plugins/codegen.py from the op definitions; do not edit.
#pragma once

#include <cstdint>

namespace schema {

struct Field {
    char const* name;
    int32_t value;  // the default
    int32_t choices;  // 0: any value, checked against the shapes
    int32_t allowed[5];
};

constexpr char kDomain[] = "instantrt";

// WeightOnlyGemm(x[..., K], codes[N//16, -(-K//(256//bits)), 512], affine[K//group, 2*N], bias[N]) -> y[..., N//(1+gated)]
struct WeightOnlyGemm {
    static constexpr char kName[] = "WeightOnlyGemm";
    static constexpr char kVersion[] = "1";
    enum Port : int32_t { kX, kCodes, kAffine, kBias, kY };
    static constexpr char const* kPortNames[] = {"x", "codes", "affine", "bias", "y"};
    static constexpr int32_t kInputs = 4;
    static constexpr int32_t kRequiredInputs = 3;
    enum Attr : int32_t { kBits, kGroup, kActivation, kGated, kActivationBits, kRoundedWeights, kBatchInvariant, kLayoutTag, kLayoutVersion };
    static constexpr Field kFields[9] = {
        {"bits", 4, 2, {4, 8}},
        {"group", 128, 0, {}},
        {"activation", 0, 4, {0, 1, 2, 3}},
        {"gated", 0, 2, {0, 1}},
        {"activation_bits", 16, 2, {16, 8}},
        {"rounded_weights", 0, 2, {0, 1}},
        {"batch_invariant", 0, 2, {0, 1}},
        {"layout_tag", 16, 1, {16}},
        {"layout_version", 1, 1, {1}},
    };
    // legal types: one row, one type for each port
    template <typename DataType>
    static constexpr DataType kTypes[2][5] = {
        {DataType::kHALF, DataType::kINT8, DataType::kHALF, DataType::kHALF, DataType::kHALF},
        {DataType::kBF16, DataType::kINT8, DataType::kBF16, DataType::kBF16, DataType::kBF16},
    };
};

// CpuGemm(x[..., K], codes[S, -(-K//(256//bits)), 512], affine[S, K//group, 16*((4, 2, 2, 1, 0)[scale_type]+(4, 2, 2, 1, 0)[zero_type])], bias[16*S], residual[..., 16*S//(1+gated)]) -> y[..., 16*S//(1+gated)]
struct CpuGemm {
    static constexpr char kName[] = "CpuGemm";
    static constexpr char kVersion[] = "1";
    enum Port : int32_t { kX, kCodes, kAffine, kBias, kResidual, kY };
    static constexpr char const* kPortNames[] = {"x", "codes", "affine", "bias", "residual", "y"};
    static constexpr int32_t kInputs = 5;
    static constexpr int32_t kRequiredInputs = 3;
    enum Attr : int32_t { kBits, kGroup, kScaleType, kZeroType, kLayoutVersion, kActivations, kActivation, kGated };
    static constexpr Field kFields[8] = {
        {"bits", 8, 2, {4, 8}},
        {"group", 32, 0, {}},
        {"scale_type", 0, 3, {0, 1, 2}},
        {"zero_type", 3, 5, {0, 1, 2, 3, 4}},
        {"layout_version", 1, 1, {1}},
        {"activations", 1, 3, {0, 1, 2}},
        {"activation", 0, 4, {0, 1, 2, 3}},
        {"gated", 0, 2, {0, 1}},
    };
    // legal types: one row, one type for each port
    template <typename DataType>
    static constexpr DataType kTypes[1][6] = {
        {DataType::kFLOAT, DataType::kUINT8, DataType::kUINT8, DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT},
    };
};

// CpuRows(ids[...], codes[S, B, 512], affine[S, G, 16*((4, 2, 2, 1, 0)[scale_type]+(4, 2, 2, 1, 0)[zero_type])]) -> rows[..., G*group]
struct CpuRows {
    static constexpr char kName[] = "CpuRows";
    static constexpr char kVersion[] = "1";
    enum Port : int32_t { kIds, kCodes, kAffine, kRows };
    static constexpr char const* kPortNames[] = {"ids", "codes", "affine", "rows"};
    static constexpr int32_t kInputs = 3;
    static constexpr int32_t kRequiredInputs = 3;
    enum Attr : int32_t { kBits, kGroup, kScaleType, kZeroType, kLayoutVersion };
    static constexpr Field kFields[5] = {
        {"bits", 8, 2, {4, 8}},
        {"group", 32, 0, {}},
        {"scale_type", 0, 3, {0, 1, 2}},
        {"zero_type", 3, 5, {0, 1, 2, 3, 4}},
        {"layout_version", 1, 1, {1}},
    };
    // legal types: one row, one type for each port
    template <typename DataType>
    static constexpr DataType kTypes[1][4] = {
        {DataType::kINT64, DataType::kUINT8, DataType::kUINT8, DataType::kFLOAT},
    };
};

// CpuAttention(query[B, S, X], key[B, S, Y], value[B, S, Z], past_key[B, H, P, D], past_value[B, H, P, D], last[B], mask[B, 1, S, T], new[B], cos[L, R], sin[L, R], positions[B, S], key_scale[H, D], value_scale[H, D]) -> y[B, S, heads*D], present_key[B, H, max(P,T), D], present_value[B, H, max(P,T), D]
struct CpuAttention {
    static constexpr char kName[] = "CpuAttention";
    static constexpr char kVersion[] = "1";
    enum Port : int32_t { kQuery, kKey, kValue, kPastKey, kPastValue, kLast, kMask, kNew, kCos, kSin, kPositions, kKeyScale, kValueScale, kY, kPresentKey, kPresentValue };
    static constexpr char const* kPortNames[] = {"query", "key", "value", "past_key", "past_value", "last", "mask", "new", "cos", "sin", "positions", "key_scale", "value_scale", "y", "present_key", "present_value"};
    static constexpr int32_t kInputs = 13;
    static constexpr int32_t kRequiredInputs = 8;
    enum Attr : int32_t { kHeads, kKvHeads, kQueryAt, kKeyAt, kValueAt, kScaleBits, kInterleaved };
    static constexpr Field kFields[7] = {
        {"heads", 1, 0, {}},
        {"kv_heads", 1, 0, {}},
        {"query_at", 0, 0, {}},
        {"key_at", 0, 0, {}},
        {"value_at", 0, 0, {}},
        {"scale_bits", 0, 0, {}},
        {"interleaved", 0, 2, {0, 1}},
    };
    // legal types: one row, one type for each port
    template <typename DataType>
    static constexpr DataType kTypes[3][16] = {
        {DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kINT32, DataType::kFLOAT, DataType::kINT32, DataType::kFLOAT, DataType::kFLOAT, DataType::kINT64, DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT},
        {DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kHALF, DataType::kHALF, DataType::kINT32, DataType::kFLOAT, DataType::kINT32, DataType::kFLOAT, DataType::kFLOAT, DataType::kINT64, DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kHALF, DataType::kHALF},
        {DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kINT8, DataType::kINT8, DataType::kINT32, DataType::kFLOAT, DataType::kINT32, DataType::kFLOAT, DataType::kFLOAT, DataType::kINT64, DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kINT8, DataType::kINT8},
    };
};

// CpuAttentionByToken(query[B, S, X], key[B, S, Y], value[B, S, Z], past_key[B, H, P, C], past_key_scale[B, H, P, K], past_key_zero[B, H, P, K], past_value[B, H, P, C], past_value_scale[B, H, P, V], past_value_zero[B, H, P, V], last[B], mask[B, 1, S, T], new[B], cos[L, R], sin[L, R], positions[B, S], center[H, 2*C]) -> y[B, S, heads*2*C], present_key[B, H, max(P,T), C], present_key_scale[B, H, max(P,T), K], present_key_zero[B, H, max(P,T), K], present_value[B, H, max(P,T), C], present_value_scale[B, H, max(P,T), V], present_value_zero[B, H, max(P,T), V]
struct CpuAttentionByToken {
    static constexpr char kName[] = "CpuAttentionByToken";
    static constexpr char kVersion[] = "1";
    enum Port : int32_t { kQuery, kKey, kValue, kPastKey, kPastKeyScale, kPastKeyZero, kPastValue, kPastValueScale, kPastValueZero, kLast, kMask, kNew, kCos, kSin, kPositions, kCenter, kY, kPresentKey, kPresentKeyScale, kPresentKeyZero, kPresentValue, kPresentValueScale, kPresentValueZero };
    static constexpr char const* kPortNames[] = {"query", "key", "value", "past_key", "past_key_scale", "past_key_zero", "past_value", "past_value_scale", "past_value_zero", "last", "mask", "new", "cos", "sin", "positions", "center", "y", "present_key", "present_key_scale", "present_key_zero", "present_value", "present_value_scale", "present_value_zero"};
    static constexpr int32_t kInputs = 16;
    static constexpr int32_t kRequiredInputs = 12;
    enum Attr : int32_t { kHeads, kKvHeads, kQueryAt, kKeyAt, kValueAt, kScaleBits, kInterleaved };
    static constexpr Field kFields[7] = {
        {"heads", 1, 0, {}},
        {"kv_heads", 1, 0, {}},
        {"query_at", 0, 0, {}},
        {"key_at", 0, 0, {}},
        {"value_at", 0, 0, {}},
        {"scale_bits", 0, 0, {}},
        {"interleaved", 0, 2, {0, 1}},
    };
    // legal types: one row, one type for each port
    template <typename DataType>
    static constexpr DataType kTypes[1][23] = {
        {DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kUINT8, DataType::kHALF, DataType::kUINT8, DataType::kUINT8, DataType::kHALF, DataType::kUINT8, DataType::kINT32, DataType::kFLOAT, DataType::kINT32, DataType::kFLOAT, DataType::kFLOAT, DataType::kINT64, DataType::kFLOAT, DataType::kFLOAT, DataType::kUINT8, DataType::kHALF, DataType::kUINT8, DataType::kUINT8, DataType::kHALF, DataType::kUINT8},
    };
};

// CpuWholeAttention(query[B, S, X], key[B, T, Y], value[B, T, Z], mask[M, H, Q, T]) -> y[B, S, heads*size]
struct CpuWholeAttention {
    static constexpr char kName[] = "CpuWholeAttention";
    static constexpr char kVersion[] = "1";
    enum Port : int32_t { kQuery, kKey, kValue, kMask, kY };
    static constexpr char const* kPortNames[] = {"query", "key", "value", "mask", "y"};
    static constexpr int32_t kInputs = 4;
    static constexpr int32_t kRequiredInputs = 3;
    enum Attr : int32_t { kHeads, kKvHeads, kSize, kQueryAt, kKeyAt, kValueAt, kScaleBits };
    static constexpr Field kFields[7] = {
        {"heads", 1, 0, {}},
        {"kv_heads", 1, 0, {}},
        {"size", 1, 0, {}},
        {"query_at", 0, 0, {}},
        {"key_at", 0, 0, {}},
        {"value_at", 0, 0, {}},
        {"scale_bits", 0, 0, {}},
    };
    // legal types: one row, one type for each port
    template <typename DataType>
    static constexpr DataType kTypes[2][5] = {
        {DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT},
        {DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kBOOL, DataType::kFLOAT},
    };
};

// CpuNorm(x[..., K], scale[K], bias[K]) -> y[..., K]
struct CpuNorm {
    static constexpr char kName[] = "CpuNorm";
    static constexpr char kVersion[] = "1";
    enum Port : int32_t { kX, kScale, kBias, kY };
    static constexpr char const* kPortNames[] = {"x", "scale", "bias", "y"};
    static constexpr int32_t kInputs = 3;
    static constexpr int32_t kRequiredInputs = 2;
    enum Attr : int32_t { kCentered, kEpsilonBits };
    static constexpr Field kFields[2] = {
        {"centered", 0, 2, {0, 1}},
        {"epsilon_bits", 925353388, 0, {}},
    };
    // legal types: one row, one type for each port
    template <typename DataType>
    static constexpr DataType kTypes[1][4] = {
        {DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT},
    };
};

}  // namespace schema
