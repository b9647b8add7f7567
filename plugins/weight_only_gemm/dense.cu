// Many rows where tensor cores have no warpgroups: weights dequantized to T in the workspace, then cuBLASLt.
//
//     W[n, k] = T((q - z) * s), one rounding;   y = x @ W^T in fp32;   bias, activation, gate as everywhere
//
// The rounding of W is why the op must ask for it (`rounded_weights`): each product is off by half a step of T, so the
// error of y is about that of rounding y once more, but does not vanish where products cancel. Sums go through memory
// in fp32, so that bias, activation and gate are those of all other kernels.
#include "../runtime/blas.h"
#include "epilogue.h"

namespace wog {
namespace {

struct DequantizeArgs {
    unsigned char const* codes;
    uint32_t const* affine;
    uint16_t* dense;  // [N, K]
    int32_t n, k, group;
};

// A warp for each 512-byte block; a lane writes pairs of k, 16 bytes together with its three neighbours.
template <class T, int Bits>
__global__ void __launch_bounds__(256) dequantize(DequantizeArgs const p) {
    constexpr int kBlockK = 256 / Bits;
    int const lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int const strips = p.n / 16, blocks = (p.k + kBlockK - 1) / kBlockK;
    int64_t const item = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
    if (item >= int64_t(strips) * blocks) return;
    // in the order of the bytes: tiles of 8 strips, in them blocks of k, in those strips
    int const tile = int(item / (8 * blocks)) * 8, width = strips - tile < 8 ? strips - tile : 8;
    int const inside = int(item - int64_t(tile) * blocks), block = inside / width, strip = tile + inside % width;
    uint4 const v = reinterpret_cast<uint4 const*>(p.codes + item * 512)[lane];
    uint32_t const words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int step = 0; step < kBlockK / 16; step++) {
        int const k0 = block * kBlockK + step * 16;
        if (k0 >= p.k) break;  // padding
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int const n = strip * 16 + 8 * h + g;
            uint32_t const affine = p.affine[int64_t(k0 / p.group) * p.n + n];
            float const scale = to_float<T>(uint16_t(affine)), zero = to_float<T>(uint16_t(affine >> 16));
            auto* const row = reinterpret_cast<uint32_t*>(p.dense + int64_t(n) * p.k + k0);
#pragma unroll
            for (int h8 = 0; h8 < 2; h8++) {
                uint32_t pair = 0;
                for (int e = 0; e < 2; e++) {  // k = k0 + 8 h8 + 2 t + e, as layout.py has it
                    uint32_t const q = Bits == 4 ? words[step] >> 4 * (4 * e + 2 * h8 + h) & 15
                                                 : words[2 * step + h] >> 8 * (2 * e + h8) & 255;
                    pair |= uint32_t(from_float<T>((float(q) - zero) * scale)) << 16 * e;
                }
                row[4 * h8 + t] = pair;
            }
        }
    }
}

}  // namespace

int32_t find_library() { return blas::handle(current_device()) != nullptr; }

char const* launch_dense(wog_problem const& p, wog_tensors const& t, wog_plan const& plan, void* stream) {
    void* const library = blas::handle(current_device());
    if (!library) return "there is no cuBLASLt (libcublasLt.so.13 or .12) for this device";
    auto* const workspace = static_cast<unsigned char*>(t.workspace);
    DenseBuffers const at = dense_buffers(p.m, p.n, p.k);
    auto* const dense = reinterpret_cast<uint16_t*>(workspace + at.weights);
    auto* const sums = reinterpret_cast<float*>(workspace + at.sums);
    DequantizeArgs const args{
        static_cast<unsigned char const*>(t.codes), static_cast<uint32_t const*>(t.affine), dense, p.n, p.k, p.group};
    bool const half = p.type == WOG_F16;
    auto* const kernel = p.bits == 4 ? (half ? dequantize<Half, 4> : dequantize<Bfloat, 4>)
                                     : (half ? dequantize<Half, 8> : dequantize<Bfloat, 8>);
    if (char const* failed = launch(kernel, {dim3(plan.grid_n), plan.threads}, static_cast<Stream>(stream), args))
        return failed;
    if (blas::multiply(library, half ? blas::kFloat16 : blas::kBfloat16, t.x, dense, sums, p.m, p.n, p.k,
                       workspace + at.library, size_t(kLibraryWorkspace), stream))
        return "cuBLASLt refused the product";
    return launch_epilogue(p, t, sums, 1, stream);
}

}  // namespace wog
