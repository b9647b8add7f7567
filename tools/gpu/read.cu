// What a graph node costs, pure reading, and sums of a split K. Every thread sums 16-byte loads: the bandwidth that this
// reaches is the roof for kernels that stream weights.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

// Eight loads on their way before the first is used: a loop that asks for its end between them waits for each.
__device__ uint32_t read(uint4 const* data, int64_t count) {
    constexpr int kLoads = 8;
    uint32_t sum = 0;
    int64_t const stride = int64_t(gridDim.x) * blockDim.x;
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i + (kLoads - 1) * stride < count; i += kLoads * stride) {
        uint4 v[kLoads];
#pragma unroll
        for (int j = 0; j < kLoads; j++) v[j] = __ldcs(data + i + j * stride);
#pragma unroll
        for (int j = 0; j < kLoads; j++) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (; i < count; i += stride) {
        uint4 const v = __ldcs(data + i);
        sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    return sum;
}

__global__ void __launch_bounds__(512) read_all(uint4 const* data, int64_t count, uint32_t* sink) {
    uint32_t const sum = read(data, count);
    if (sum == 0x12345678u) *sink = sum;  // never, but the compiler cannot know
}

__global__ void nothing() {}

// kParts neighbours share an output tile of kTile floats, to which each contributes what it has read.
constexpr int kParts = 4, kTile = 256;

__global__ void __launch_bounds__(kTile) parts_to_memory(uint4 const* data, int64_t count, float* parts) {
    float const value = float(read(data, count));
    int const tile = blockIdx.x / kParts, part = blockIdx.x % kParts;
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
    cudaGridDependencySynchronize();  // the sums of the launch before have read their parts
#endif
    parts[int64_t(part) * (gridDim.x / kParts) * kTile + tile * kTile + threadIdx.x] = value;
}

__global__ void __launch_bounds__(kTile) sum_parts(float const* parts, float* out) {
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
    cudaGridDependencySynchronize();
#endif
    int64_t const size = int64_t(gridDim.x) * kTile, i = blockIdx.x * kTile + threadIdx.x;
    float sum = 0;
    for (int part = 0; part < kParts; part++) sum += parts[part * size + i];
    out[i] = sum;
}

__global__ void __launch_bounds__(kTile) parts_to_cluster(uint4 const* data, int64_t count, float* out) {
#if __CUDA_ARCH__ >= 900
    __shared__ float mine[kTile];
    auto const cluster = cooperative_groups::this_cluster();
    mine[threadIdx.x] = float(read(data, count));
    cudaTriggerProgrammaticLaunchCompletion();
    cudaGridDependencySynchronize();
    cluster.sync();
    constexpr int kShare = kTile / kParts;
    int const tile = blockIdx.x / kParts, at = cluster.block_rank() * kShare + threadIdx.x;
    if (threadIdx.x < kShare) {
        float sum = 0;
        for (int part = 0; part < kParts; part++) sum += *cluster.map_shared_rank(mine + at, part);
        out[tile * kTile + at] = sum;
    }
    cluster.sync();  // before this block's memory goes
#endif
}

// Clusters, and kernels that start beside the one before, come with sm_90: elsewhere the launch fails, and says so.
template <class... Args>
cudaError_t launch(void (*kernel)(Args...), int blocks, int cluster, void* stream, Args... args) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {unsigned(cluster), 1, 1};
    cudaLaunchConfig_t config{dim3(blocks), dim3(kTile), 0, static_cast<cudaStream_t>(stream), attributes, 2};
    return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace

extern "C" {

int empty(int64_t blocks, void* stream) {
    nothing<<<unsigned(blocks), 256, 0, static_cast<cudaStream_t>(stream)>>>();
    return cudaGetLastError();
}

int read_bytes(uint4 const* data, int64_t bytes, uint32_t* sink, int64_t blocks, void* stream) {
    read_all<<<unsigned(blocks), 512, 0, static_cast<cudaStream_t>(stream)>>>(data, bytes / 16, sink);
    return cudaGetLastError();
}

int sum_by_memory(uint4 const* data, int64_t bytes, float* parts, float* out, int64_t tiles, void* stream) {
    cudaError_t const status = launch(parts_to_memory, int(tiles) * kParts, 1, stream, data, bytes / 16, parts);
    float const* const written = parts;
    return status ? status : launch(sum_parts, int(tiles), 1, stream, written, out);
}

int sum_by_cluster(uint4 const* data, int64_t bytes, float*, float* out, int64_t tiles, void* stream) {
    return launch(parts_to_cluster, int(tiles) * kParts, kParts, stream, data, bytes / 16, out);
}

// Clusters of so many blocks, each with so much shared memory, that are there at one time; below 0: a CUDA error.
int most_clusters(int64_t blocks, int64_t shared) {
    cudaLaunchAttribute size{};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim = {unsigned(blocks), 1, 1};
    cudaLaunchConfig_t const config{dim3(unsigned(blocks)), dim3(256), size_t(shared), nullptr, &size, 1};
    int count = 0;
    cudaError_t status = cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (!status) status = cudaOccupancyMaxActiveClusters(&count, nothing, &config);
    return status ? -int(status) : count;
}
}
