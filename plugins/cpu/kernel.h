// What CpuGemm's kernels take: plain memory, nothing of ONNX Runtime's.
#pragma once

#include <cstdint>

namespace cpu {

constexpr int kLanes = 16;        // columns in a strip
constexpr int kBlock = 32;        // k that share a scale of x
constexpr int kBlockBytes = 512;  // of a block of codes: 8 vectors of 16 columns by 4 k
constexpr int kVectors = 8;

// op.py's TYPES, and how many bytes a number of each has.
enum class Type { kF32, kF16, kBF16, kU8, kNone };
constexpr int64_t kSizes[] = {4, 2, 2, 1, 0};

// semantics.py's ACTIVATIONS.
enum class Activation { kNone, kSilu, kGelu, kGeluTanh };

// How x is brought into integers: op.py's INT8_BLOCKS, INT16_BLOCKS, INT8_ROWS.
enum class Form { kInt8Blocks, kInt16Blocks, kInt8Rows };

struct Weight {
    int64_t n, k, group;
    int bits;
    Form form;
    Type scale_type, zero_type;  // zeros: codes; or minima, which are float; or none, where all are the central code
    Activation activation;
    bool gated;  // a strip has eight gates, then the eight ups that they multiply
    uint8_t const* codes;
    uint8_t const* affine;  // of each strip and group: 16 scales, then 16 zeros
    float const* bias;      // null: none
};

// Rows of x in integers.
struct Rows {
    int8_t* limbs;
    float* scales;
    float* sums;
};

// Of one row: bytes of limbs, numbers of scales and sums.
struct Shape {
    explicit Shape(Weight const& w)
        : limbs(w.form == Form::kInt16Blocks ? 2 * w.k : w.k),
          scales(w.form == Form::kInt8Rows ? 1 : w.k / kBlock),
          sums(w.k / w.group) {}
    int64_t limbs, scales, sums;
};

inline int64_t stored_blocks(Weight const& w) { return (w.k * w.bits + 255) / 256; }

inline int64_t affine_bytes(Weight const& w) {
    return kLanes * (kSizes[static_cast<int>(w.scale_type)] + kSizes[static_cast<int>(w.zero_type)]);
}

// Columns of y.
inline int64_t width(Weight const& w) { return w.gated ? w.n / 2 : w.n; }

struct Call {
    Weight const* weight;
    Rows x;
    float const* residual;  // what is added to y; null: nothing
    float* y;
};

// What is wrong with the sizes of a weight; null where nothing is.
char const* refuse(Weight const&);

// Row `row` of the matrix, [k].
void dequantize(Weight const&, int64_t row, float* into);

// What a cache of keys and values holds: CpuAttention's, then CpuAttentionByToken's.
enum class Cache { kF32, kF16, kI8, kNibbles };
constexpr int64_t kMostGroups = 32;  // of a head's channels in four bits

// Keys, or values.
struct CachePart {
    void* data;                     // [batch, kv_heads, capacity, size]
    float const* scales = nullptr;  // of int8, [kv_heads, size]: what a step stands for
    // of four bits, [batch, kv_heads, capacity, groups]: scales in float16, and zero points
    uint16_t* steps = nullptr;
    uint8_t* zeros = nullptr;
    int64_t groups = 0;
};

// Queries, keys and values of `tokens` new tokens in each of `batch` rows, over a cache of `capacity` tokens.
struct AttentionCall {
    Cache cache;
    int64_t batch, tokens, heads, kv_heads, size, rotated, room, capacity, columns;  // room: in the past
    float scale;
    bool interleaved;                  // neighbours are rotated, not halves of a head's first channels
    float const *query, *key, *value;  // [batch, tokens, width], from the first column of the heads on
    int64_t query_width, key_width, value_width;
    float const *cos, *sin;    // [positions, rotated / 2]
    int64_t const* positions;  // [batch, tokens]; null: nothing is rotated
    int32_t const* last;       // [batch] the last token of each row, the cache's and the new
    int32_t const* counts;     // [batch] how many of the new are no padding behind them
    float const* mask;         // [batch, tokens, columns], added to the scores
    CachePart keys, values;
    float const* center;  // [kv_heads, size] what comes off keys in four bits; null: nothing
    float* queries;       // [batch, heads, tokens, size]: rotated and scaled
    float* fresh;         // [batch, tokens, kv_heads, size]: room to make a key in, or a value
    float const* packed;  // [batch, kv_heads, columns in sixteens, size, 16]; null: keys are met as they lie
    float* values_read;   // of four bits beside it: [batch, kv_heads, columns in sixteens, 16, size]
    float* y;             // [batch, tokens, heads size]

    int64_t length(int64_t row) const { return last[row] + int64_t{1}; }
    int64_t past(int64_t row) const { return length(row) - counts[row]; }
};

// Attention without a cache: columns of queries, keys and values, each in rows of some width.
struct WholeCall {
    static constexpr int64_t kMostQueries = 8;  // of a block, of any kernels

    int64_t batch, queries, keys, heads, kv_heads, size;
    int64_t query_width, key_width, value_width;
    float scale;
    float const *query, *key, *value;         // [batch, queries or keys, width], from the first column of the heads on
    void const* mask;                         // [batch, heads, queries, keys], added to the scores; null: nothing
    bool seen;                                // or truth values: whether a key is seen
    int64_t mask_row, mask_head, mask_query;  // from one to the next; 0: the same for all
    float* y;                                 // [batch, queries, heads size]

    int64_t padded_keys() const { return (keys + kLanes - 1) / kLanes * kLanes; }
    int64_t memory() const { return padded_keys() * (2 * size + 2 * kMostQueries); }
};

// Rows of x [rows, k] brought to one size.
struct NormCall {
    int64_t k;
    bool centered;  // less their mean
    float epsilon;
    float const *x, *scale, *bias;  // null: no bias
    float* y;
};

struct Kernels {
    char const* name;
    bool (*runs)();  // on this CPU
    void (*quantize)(Weight const&, float const* x, int8_t* limbs, float* scales, float* sums);
    void (*multiply)(Call const&, int64_t strip, int64_t last_strip, int64_t row, int64_t last_row);
    void (*prepare)(AttentionCall const&, int64_t row, int64_t token, int64_t kv_head);
    void (*pack)(AttentionCall const&, int64_t row, int64_t kv_head, int64_t tile, float* into);
    void (*attend)(AttentionCall const&, int64_t row, int64_t kv_head, int64_t first, int64_t count, int64_t begin,
                   int64_t end, float* weights, float* top, float* total, float* sums);
    void (*attend_whole)(WholeCall const&, int64_t row, int64_t head, int64_t first, int64_t count, float* memory);
    void (*norm)(NormCall const&, int64_t row);
};

extern Kernels const kAvx512, kAvxVnni, kAvx2, kPlain;

// The fastest that run here.
Kernels const& kernels();

}  // namespace cpu
