// The GPU as our kernels see it: every PTX instruction and launch that they use, behind a C++ function.
// tests/plugins/emulator/device.h has the same functions on the CPU, lane by lane, so that kernels run without a GPU.
#pragma once

#ifndef __CUDACC_RTC__  // NVRTC has device code alone, see sm70/
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef __CUDA_ARCH__
#define DEVICE_SM (__CUDA_ARCH__ / 10)
#else
#define DEVICE_SM 0  // host pass of nvcc
#endif

struct Half {};    // type tags: elements travel as uint16_t bits
struct Bfloat {};  // needs sm_80

// ---- numbers ----

template <class T>
__device__ __forceinline__ float to_float(uint16_t bits);
template <>
__device__ __forceinline__ float to_float<Half>(uint16_t bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}
template <>
__device__ __forceinline__ float to_float<Bfloat>(uint16_t bits) {
    return __uint_as_float(uint32_t(bits) << 16);
}

template <class T>
__device__ __forceinline__ uint16_t from_float(float f);
template <>
__device__ __forceinline__ uint16_t from_float<Half>(float f) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    return bits;
}
template <>
__device__ __forceinline__ uint16_t from_float<Bfloat>(float f) {
    // by hand: cvt to bf16 starts at sm_80, and the plain kernel must run anywhere
    uint32_t const u = __float_as_uint(f);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

__device__ __forceinline__ uint32_t float_bits(float f) { return __float_as_uint(f); }
__device__ __forceinline__ float bits_float(uint32_t u) { return __uint_as_float(u); }
// never contracted or approximated: the reference computes the same bits
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ int32_t round_to_int(float f) { return __float2int_rn(f); }  // NaN gives 0

template <class T>
__device__ __forceinline__ uint32_t add2(uint32_t a, uint32_t b);  // two packed elements; our uses are exact
template <>
__device__ __forceinline__ uint32_t add2<Half>(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
template <>
__device__ __forceinline__ uint32_t add2<Bfloat>(uint32_t a, uint32_t b) {
    uint32_t d = 0;
#if DEVICE_SM >= 90  // fma starts at sm_80, and wants its 1 in a register
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#elif DEVICE_SM >= 80
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80), "r"(b));
#endif
    return d;
}

// a & mask | bits, in the one instruction that the compiler does not find for two constants
__device__ __forceinline__ uint32_t mask_or(uint32_t a, uint32_t mask, uint32_t bits) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
    return d;
}

// ~a & mask | bits, the same way
__device__ __forceinline__ uint32_t mask_not_or(uint32_t a, uint32_t mask, uint32_t bits) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xae;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
    return d;
}

// The same value in all lanes, and the compiler may know it: branches on it need no reconvergence
__device__ __forceinline__ int uniform(int value) {
#if DEVICE_SM >= 80  // redux writes a uniform register
    return __reduce_max_sync(0xffffffff, value);
#else
    return __shfl_sync(0xffffffff, value, 0);
#endif
}

// The same value, of which the compiler knows nothing: it is held in a register, not computed again where it is used.
// Different Copies of a value have registers of their own.
template <int Copy = 0, class V>
__device__ __forceinline__ V held(V value) {
    V const lane = V(threadIdx.x % 32), disguise = lane + Copy;
    V same;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(same) : "r"(value ^ disguise), "r"(lane));
    return same ^ disguise;
}

// The larger of each of two unsigned halves
__device__ __forceinline__ uint32_t max_halves(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }

__device__ __forceinline__ uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

// ---- memory ----

__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
}

using Shared = uint32_t;  // an address in shared memory
__device__ __forceinline__ Shared shared_address(void const* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ Shared flip(Shared address, int bits) { return address ^ bits; }

// `count` elements of so many bytes further, in one instruction: what a compiler has hoisted is added in two
template <int Bytes>
__device__ __forceinline__ unsigned char const* advance(unsigned char const* p, int count) {
    int64_t bytes;
    asm volatile("mul.wide.s32 %0, %1, %2;" : "=l"(bytes) : "r"(count), "n"(Bytes));
    return p + bytes;
}

// A ring of Count places of Size bytes. What follows a place is the lower of `place + Size` and `wrap - Count * place`,
// two instructions: for the last place the latter is the first, for every other it is Count * Size or more above that.
template <int Size, int Count>
__device__ __forceinline__ Shared wrap_of(Shared first) {
    return first + Count * (first + (Count - 1) * Size);
}
template <int Size, int Count>
__device__ __forceinline__ Shared next_place(Shared place, Shared wrap) {
    Shared const next = place + Size, first = wrap - Count * place;
    return next < first ? next : first;
}

// 16 bytes that one lane reads once and nobody changes, straight to registers: weights
__device__ __forceinline__ uint4 load_once(void const* global) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global));
    return v;
}

// 16, 8 or 4 bytes, global to shared, zeros where !valid. 16 go past L1: x is shared through L2.
template <int Bytes = 16>
__device__ __forceinline__ void copy_async(Shared shared, void const* global, bool valid = true) {
#if DEVICE_SM >= 80
    if constexpr (Bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global), "n"(Bytes),
                     "r"(valid ? Bytes : 0)
                     : "memory");
#else
    static_assert(Bytes == 16, "what other sizes are for starts at sm_80");
    uint4 const v = valid ? __ldg(reinterpret_cast<uint4 const*>(global)) : uint4{0, 0, 0, 0};
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
#endif
}

__device__ __forceinline__ void copy_commit() {
#if DEVICE_SM >= 80
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int Pending>
__device__ __forceinline__ void copy_wait() {
#if DEVICE_SM >= 80
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// 16 bytes of shared memory
__device__ __forceinline__ uint4 load_piece(Shared shared) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(shared)
                 : "memory");
    return v;
}
__device__ __forceinline__ void store_piece(Shared shared, uint4 const& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
__device__ __forceinline__ uint32_t load_word(Shared shared) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared) : "memory");
    return v;
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// ---- barriers and exchange ----

__device__ __forceinline__ void warp_barrier() { __syncwarp(); }
__device__ __forceinline__ void block_barrier() { __syncthreads(); }
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Is counted there, and does not wait.
__device__ __forceinline__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ bool any_lane(bool holds) { return __any_sync(0xffffffff, holds); }  // in a lane of the warp
__device__ __forceinline__ uint32_t exchange(uint32_t value, int lane_mask) {
    return __shfl_xor_sync(0xffffffff, value, lane_mask);
}

// ---- overlap of kernels (sm_90 and newer; elsewhere a kernel starts when the one before it has ended) ----
//
// A kernel launched with Grid::overlap reads and writes nothing that another kernel touches before wait_for_inputs;
// what never changes (weights) may be fetched earlier. release_next lets the next such kernel be scheduled, any time.

__device__ __forceinline__ void wait_for_inputs() {
#if DEVICE_SM >= 90
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void release_next() {
#if DEVICE_SM >= 90
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- clusters: blocks that run at the same time and read each other's shared memory (sm_90 and newer) ----

// Of all threads of the cluster: what one wrote to shared memory before it, all of them see after it.
__device__ __forceinline__ void cluster_barrier() {
#if DEVICE_SM >= 90
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// The same without waiting for anybody's writes: published barriers are seen after it, and all reads are over.
__device__ __forceinline__ void relaxed_cluster_barrier() {
#if DEVICE_SM >= 90
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// What block `rank` of the cluster has in the place of `own`
__device__ __forceinline__ float4 load_four_from(int rank, float const* own) {
    float4 v{};
#if DEVICE_SM >= 90
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
        : "r"(shared_address(own)), "r"(rank)
        : "memory");
#endif
    return v;
}

// ---- tensor cores: c[16 x 8] += a[16 x k] * b[k x 8] ----

#define MULTIPLY_16(type)                                      \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "  \
        "{%0, %1, %2, %3};"                                    \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
#if DEVICE_SM >= 80
    if constexpr (std::is_same<T, Half>::value)
        MULTIPLY_16("f16");
    else
        MULTIPLY_16("bf16");
#else  // Turing has no bf16, and k = 8 only; the halves of a k16 fragment are two k8 fragments
    for (int h = 0; h < 2; h++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * h]), "r"(a[2 * h + 1]), "r"(h ? b1 : b0));
#endif
}

// Volta's: each of the four quad pairs q, lanes {4 q .. 4 q + 3, 16 + 4 q ..}, multiplies its own 8 x 4 by 4 x 8. A
// lane gives row r = lane % 4 + 4 * (lane / 16) of a, and of b's columns, and of c owns, for i = 0 .. 7,
//     row lane % 2 + (i & 2) + 4 * (lane / 16),   column (i & 4) + (lane & 2) + i % 2
__device__ __forceinline__ void multiply_add(float (&c)[8], uint32_t a0, uint32_t a1, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, {%10, %11}, "
        "{%0, %1, %2, %3, %4, %5, %6, %7};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
        : "r"(a0), "r"(a1), "r"(b0), "r"(b1));
}

// Both signed, k = 32
__device__ __forceinline__ void multiply_add_signed(int32_t (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
#if DEVICE_SM >= 80
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// a unsigned, b signed, k = 32: unsigned codes cost nothing
__device__ __forceinline__ void multiply_add(int32_t (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
#if DEVICE_SM >= 80
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // Turing: m8n8k16, rows g and g + 8 apart
    for (int h = 0; h < 2; h++)
        for (int j = 0; j < 2; j++)
            asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(c[2 * h]), "+r"(c[2 * h + 1])
                : "r"(a[2 * j + h]), "r"(j ? b1 : b0));
#endif
}

// ---- host ----

#ifndef __CUDACC_RTC__

using Stream = cudaStream_t;

inline int current_device() {
    int device = -1;
    return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}

// Of the current device; null, or what the runtime said
inline char const* describe_device(int32_t& sm, int32_t& multiprocessors) {
    int device = 0, major = 0, minor = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    sm = major * 10 + minor;
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

struct Grid {
    dim3 blocks;
    int threads;
    size_t shared = 0;
    dim3 cluster{1};       // neighbours that share their memory (sm_90 and newer)
    bool overlap = false;  // may start while the kernel before it ends (sm_90 and newer): see wait_for_inputs
};

// Returns null, or what the runtime said. More than 48 KiB of shared memory must be asked for on each device: the most
// that it has, whatever this launch needs, because threads that launch one kernel with different sizes would set each
// other's limit.
template <class Args>
char const* launch(void (*kernel)(Args), Grid const& grid, Stream stream, Args args) {
    auto* const function = reinterpret_cast<void const*>(kernel);
    cudaError_t status = cudaSuccess;
    if (grid.shared > 48 * 1024) {
        int device = 0, most = 0;
        status = cudaGetDevice(&device);
        if (status == cudaSuccess)
            status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (status == cudaSuccess)
            status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    cudaLaunchAttribute attributes[2] = {};
    unsigned count = 0;
    if (grid.cluster.x * grid.cluster.z > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count++].val.clusterDim = {grid.cluster.x, 1, grid.cluster.z};
    }
    if (grid.overlap) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t config{grid.blocks, dim3(grid.threads), grid.shared, stream, attributes, count};
    void* pointers[] = {&args};
    if (status == cudaSuccess) status = cudaLaunchKernelExC(&config, function, pointers);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

#endif
