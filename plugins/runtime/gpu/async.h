// What runs beside the threads: barriers in shared memory that count copies (sm_80 and newer); on Hopper (sm_90a) bulk
// and tensor copies and products by warpgroup. As device.h; tests/plugins/emulator/async.h offers the same on the CPU.
#pragma once

#include <cuda.h>
#include <device.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "compile for sm_90a, not sm_90: the table chooses warpgroup kernels there"
#endif

// ---- barriers: a phase ends when its arrivals and the bytes that they announced are complete ----
//
// Phases are told apart by parity. wait(b, 0) passes once the first phase has ended, wait(b, 1) once the second has; on
// a new barrier wait(b, 1) passes at once, as if a phase before the first had ended.

using Barrier = uint64_t;  // in shared memory

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// By the thread that initialised them, for copies and other blocks of the cluster; a barrier of all follows.
__device__ __forceinline__ void publish_barriers() {
#if DEVICE_SM >= 90
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// At the barrier in the same place of another block of the cluster: what this thread read may be written over there and
// here. Not for handing over what it wrote, for which .release.cluster would wait for all its stores to memory.
__device__ __forceinline__ void arrive_at(Barrier* barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}
// Arrives when all of this thread's copy_async so far have landed.
__device__ __forceinline__ void arrive_when_copied(Barrier* barrier) {
#if DEVICE_SM >= 80
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
// Arrives, and the phase lasts until that many more bytes have been copied.
__device__ __forceinline__ void arrive_expecting(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
#if DEVICE_SM >= 90
#define WAIT "try_wait"  // which sleeps for a while
#else
#define WAIT "test_wait"
#endif
__device__ __forceinline__ void wait(Barrier* barrier, int parity) {
    uint32_t done;
    do
        asm volatile("{\n.reg .pred done;\nmbarrier." WAIT
                     ".parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    while (!done);
}

// ---- copies from global memory, each counted by a barrier of the block where it lands ----

// `bytes` and both addresses are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* shared, void const* global, int bytes, Barrier* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

using TensorMap = CUtensorMap;  // a parameter of the kernel (__grid_constant__) that copy_box takes by address

// The map's 128 or 64 bytes from byte `byte` of its rows from `row`, zeros beyond the matrix, chunks of 16 bytes XORed
// with the row, or half of it: into the same place of every block of a cluster of so many, and counted there.
template <int Cluster>
__device__ __forceinline__ void copy_box(void* shared, TensorMap const& map, int byte, int64_t row, Barrier* barrier) {
    if constexpr (Cluster == 1)
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
            "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
            "l"(&map), "r"(byte), "r"(int(row)), "r"(shared_address(barrier))
            : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
            "l"(&map), "r"(byte), "r"(int(row)), "r"(shared_address(barrier)), "h"(uint16_t((1 << Cluster) - 1))
            : "memory");
}

__device__ __forceinline__ void prefetch_map(TensorMap const& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// One lane of a warp that is here as a whole: the compiler then issues a copy once, not lane by lane.
__device__ __forceinline__ bool elected() {
    uint32_t is;
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(is));
    return is;
}

// ---- warpgroups ----

// The registers of a thread, for all of a warpgroup: fewer than the kernel was compiled for leave some for others.
template <int Count>
__device__ __forceinline__ void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// ---- warpgroup tensor cores: d[64 x 8 C] += a[64 x 16] * x[8 C x 16]^T ----
//
// A warp gives 16 rows of a as an m16n8k16 fragment and gets its d as C fragments of 16 x 8. x is a tile in shared
// memory: 128 bytes (64 k) per row, 16-byte chunks XORed with the row, 1024-byte aligned. Products run on until waited
// for, and until then neither a nor d may be touched.

__device__ __forceinline__ void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Keeps the compiler from moving reads of a result above the wait, or writes of an operand below warpgroup_begin.
__device__ __forceinline__ void settle(float& f) { asm volatile("" : "+f"(f)::"memory"); }
__device__ __forceinline__ void settle(uint32_t& u) { asm volatile("" : "+r"(u)::"memory"); }
__device__ __forceinline__ void settle(int32_t& i) { asm volatile("" : "+r"(i)::"memory"); }
template <class Element, size_t Size>
__device__ __forceinline__ void settle(Element (&array)[Size]) {
#pragma unroll
    for (size_t i = 0; i < Size; i++) settle(array[i]);
}

// step: which 32 of a row's 128 bytes (16 halves, 32 int8). In a product, !add overwrites d: sums that start anew cost
// no registers of zeros.
__device__ __forceinline__ uint64_t tile_descriptor(void const* tile, int step) {
    uint32_t const low = (shared_address(tile) >> 4 & 0x3fff) | 1 << 16 | step * 2;  // in units of 16 bytes
    return low | uint64_t(1024 >> 4 | 1 << 30) << 32;                                // 8 rows apart; 128-byte swizzle
}

// d's registers in an operand list and in the text, by columns of 8 m
#define D_1(c, j) "+" c(d[j][0]), "+" c(d[j][1]), "+" c(d[j][2]), "+" c(d[j][3])
#define D_4(c, j) D_1(c, j), D_1(c, j + 1), D_1(c, j + 2), D_1(c, j + 3)
#define D_8(c) D_4(c, 0), D_4(c, 4)
#define D_16(c) D_8(c), D_4(c, 8), D_4(c, 12)
#define D_32(c) D_16(c), D_4(c, 16), D_4(c, 20), D_4(c, 24), D_4(c, 28)
#define TEXT_8                                                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TEXT_16                                                                                              \
    TEXT_8                                                                                                   \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
    "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TEXT_32                                                                                                \
    TEXT_16                                                                                                    \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "   \
    "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, " \
    "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, "   \
    "%121, %122, %123, %124, %125, %126, %127"
#define ADD_8 "setp.ne.b32 add, %37, 0;"
#define ADD_16 "setp.ne.b32 add, %69, 0;"
#define ADD_32 "setp.ne.b32 add, %133, 0;"
#define REST_8 "}, {%32, %33, %34, %35}, %36, add"
#define REST_16 "}, {%64, %65, %66, %67}, %68, add"
#define REST_32 "}, {%128, %129, %130, %131}, %132, add"

// `c`: the constraint of d's registers; `signs`: factors of a and x and their order, which integer products do not have
#define WARPGROUP_MULTIPLY(columns, c, instruction, signs)                                           \
    asm volatile("{\n.reg .pred add;\n" ADD_##columns "\nwgmma.mma_async.sync.aligned." instruction  \
                                                      " " TEXT_##columns REST_##columns signs ";\n}" \
                 : D_##columns(c)                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile_descriptor(tile, step)), "r"(int(add)))

#define WARPGROUP_FLOAT(columns, shape)                                                                   \
    template <class T>                                                                                    \
    __device__ __forceinline__ void warpgroup_multiply_add(float (&d)[columns][4], uint32_t const(&a)[4], \
                                                           void const* tile, int step, bool add) {        \
        if constexpr (std::is_same<T, Half>::value)                                                       \
            WARPGROUP_MULTIPLY(columns, "f", shape "k16.f32.f16.f16", ", 1, 1, 0");                       \
        else                                                                                              \
            WARPGROUP_MULTIPLY(columns, "f", shape "k16.f32.bf16.bf16", ", 1, 1, 0");                     \
    }
WARPGROUP_FLOAT(8, "m64n64")
WARPGROUP_FLOAT(16, "m64n128")

// The same for int8: d[64 x 8 C] += a[64 x 32] * x[8 C x 32]^T
#define WARPGROUP_INTEGER(columns, shape)                                                                   \
    __device__ __forceinline__ void warpgroup_multiply_add(int32_t (&d)[columns][4], uint32_t const(&a)[4], \
                                                           void const* tile, int step, bool add) {          \
        WARPGROUP_MULTIPLY(columns, "r", shape "k32.s32.s8.s8", "");                                        \
    }
WARPGROUP_INTEGER(8, "m64n64")
WARPGROUP_INTEGER(16, "m64n128")
WARPGROUP_INTEGER(32, "m64n256")

// ---- host ----

// A map of rows of `row_bytes` (a multiple of 16), of which copy_box takes `width` bytes (128 or 64) of `box` at a time.
// Null, or what went wrong.
inline char const* describe_rows(TensorMap& map, void const* base, int64_t rows, int64_t row_bytes, int box,
                                 int width = 128) {
    static decltype(&cuTensorMapEncodeTiled) const encode = [] {  // a function of the driver, which is not linked
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result{};
        cudaError_t const status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        bool const there = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
        return there ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found) : nullptr;
    }();
    if (!encode) return "the driver has no cuTensorMapEncodeTiled";
    cuuint64_t const sizes[] = {cuuint64_t(row_bytes), cuuint64_t(rows)}, pitch[] = {cuuint64_t(row_bytes)};
    cuuint32_t const boxes[] = {cuuint32_t(width), cuuint32_t(box)}, steps[] = {1, 1};
    CUresult const status =
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(base), sizes, pitch, boxes, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, width == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the rows of x";
}
