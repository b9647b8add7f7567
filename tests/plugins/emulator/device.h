// plugins/runtime/gpu/device.h on the CPU: the kernels' own source, compiled by a C++ compiler and run lane by lane.
//
// Every thread of a block is a fiber; a barrier or warp-wide instruction suspends it until all its peers have arrived.
// The order in which threads run is drawn from a seed (EMULATOR_SEED), so a missing barrier changes results. Copies
// into shared memory happen only when waited for, shared memory starts as NaNs, and fragments follow the PTX register
// maps: wrong indices, missing waits and unwritten memory show. Timing, and memory order between threads of a warp, do
// not.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#ifndef DEVICE_SM
#define DEVICE_SM 80
#endif
#define __global__
#define __device__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
using Stream = void*;
struct Half {};
struct Bfloat {};

namespace emulator {

struct Copy {
    void* to;
    unsigned char bytes[16];
    size_t size;
};

struct Running {  // products of a warpgroup that add to the same sums and have not been waited for
    int products = 0;
    std::vector<unsigned char> sums;
};

struct Fiber {
    jmp_buf place;  // where it goes on
    dim3 block;
    unsigned rank = 0, thread = 0, warp = 0;  // block of the cluster, thread of the block, warp of the cluster
    void const* waiting = nullptr;            // for what, for the message when that never comes
    uint64_t const* awaited = nullptr;        // what counts up when it may go on,
    uint64_t seen = 0;                        // from this
    bool started = false, done = false;
    std::vector<std::vector<Copy>> groups{1};  // the last one is not committed yet
    std::vector<std::vector<std::function<void()>>> products{1};
    std::map<void const*, Running> running;  // by their sums
};

struct Meeting {  // of the threads that take part in a barrier or a warp-wide instruction
    int arrived = 0;
    uint64_t generation = 0;
};

struct Payload {
    unsigned char bytes[64];
};

inline struct State {
    std::vector<Fiber> fibers;                      // of a cluster: of one block, most often
    size_t threads = 0;                             // of a block
    std::vector<std::array<Meeting, 16>> barriers;  // of each block
    std::vector<Meeting> warps;
    Meeting cluster;
    std::vector<std::array<std::array<Payload, 32>, 2>> mail;  // two generations of each warp's exchange
    jmp_buf scheduler;
    std::vector<std::unique_ptr<char[]>> stacks;  // of the fibers, one cluster's after the other's
    Fiber* now = nullptr;
    uint64_t progress = 0;
    std::vector<std::vector<unsigned char>> shared;  // of each block
    std::vector<std::function<void()>> later;        // what happens at some time while threads run on
    std::function<std::string(void const*)> describe;
    std::function<void()> audit;  // when all threads have ended
    std::function<void()> body;
} state;

[[noreturn]] inline void fail(std::string const& what) {
    std::fprintf(stderr, "emulator: %s\n", what.c_str());
    std::abort();
}

// swapcontext asks the system for the signal mask each time, which was half of all that the emulator did; jumps do not
// (glibc's checked ones refuse another stack, so it is compiled without _FORTIFY_SOURCE).
inline void yield() {
    if (!_setjmp(state.now->place)) _longjmp(state.scheduler, 1);
}
// Gives way until `count` is no longer `seen`.
inline void await(uint64_t const& count, uint64_t seen) {
    state.now->awaited = &count, state.now->seen = seen;
    while (count == seen) yield();
    state.now->awaited = nullptr;
}

inline uint64_t arrive(Meeting& meeting, int threads) {
    uint64_t const mine = meeting.generation;
    if (++meeting.arrived == threads) {
        meeting.arrived = 0;
        meeting.generation++;
        state.progress++;
    }
    return mine;
}
inline uint64_t meet(Meeting& meeting, int threads) {
    uint64_t const mine = arrive(meeting, threads);
    await(meeting.generation, mine);
    return mine;
}

// What every lane of the warp contributed to this instruction
template <class Value>
inline std::array<Value, 32> share(Value const& value) {
    static_assert(sizeof(Value) <= sizeof(Payload), "payload");
    unsigned const warp = state.now->warp, lane = state.now->thread % 32;
    auto& box = state.mail[warp][state.warps[warp].generation % 2];
    std::memcpy(box[lane].bytes, &value, sizeof value);
    meet(state.warps[warp], 32);
    std::array<Value, 32> all;
    for (int i = 0; i < 32; i++) std::memcpy(&all[i], box[i].bytes, sizeof value);
    return all;
}

inline void enter() {
    state.body();
    state.now->done = true;
    state.progress++;
    yield();
}

// Runs `f` until it gives way.
inline void resume(Fiber& f) {
    state.now = &f;
    if (_setjmp(state.scheduler)) return;
    if (f.started) _longjmp(f.place, 1);
    f.started = true;
    constexpr size_t kStack = 64 * 1024;
    auto& stack = state.stacks[size_t(&f - state.fibers.data())];
    if (!stack) stack.reset(new char[kStack]);
    ucontext_t fresh;
    getcontext(&fresh);
    fresh.uc_stack.ss_sp = stack.get(), fresh.uc_stack.ss_size = kStack, fresh.uc_link = nullptr;
    makecontext(&fresh, enter, 0);
    setcontext(&fresh);
}

// Some of what may happen now; when all threads wait, at least one thing. Returns whether anything did.
inline bool happen(bool all_wait, std::mt19937& random) {
    auto& later = state.later;
    std::shuffle(later.begin(), later.end(), random);
    size_t count = later.empty() ? 0 : random() % (later.size() + 1) / 2;
    if (all_wait && !later.empty()) count = std::max<size_t>(count, 1);
    std::vector<std::function<void()>> now(later.end() - long(count), later.end());
    later.resize(later.size() - count);
    for (auto const& event : now) event();
    return count > 0;
}

inline unsigned char* shared_of(unsigned rank) {
    auto const at = reinterpret_cast<uintptr_t>(state.shared[rank].data());
    return reinterpret_cast<unsigned char*>((at + 1023) / 1024 * 1024);
}

inline void run_cluster(dim3 first, dim3 cluster, int threads, size_t shared, std::mt19937& random) {
    unsigned const warps = unsigned(threads + 31) / 32, blocks = cluster.x * cluster.z;
    state.fibers = std::vector<Fiber>(threads * blocks);
    state.threads = size_t(threads);
    state.stacks.resize(std::max(state.stacks.size(), state.fibers.size()));
    state.barriers.assign(blocks, {});
    state.warps.assign(warps * blocks, {});
    state.cluster = {};
    state.mail.resize(state.warps.size());
    state.shared.assign(blocks, std::vector<unsigned char>(shared + 2048, 0xff));
    std::vector<Fiber*> order;
    for (unsigned rank = 0; rank < blocks; rank++)
        for (unsigned i = 0; i < unsigned(threads); i++) {
            Fiber& f = state.fibers[rank * unsigned(threads) + i];
            f.block = {first.x + rank % cluster.x, first.y, first.z + rank / cluster.x};
            f.rank = rank, f.thread = i, f.warp = rank * warps + i / 32;
            order.push_back(&f);
        }
    while (!order.empty()) {
        std::shuffle(order.begin(), order.end(), random);
        uint64_t const before = state.progress;
        unsigned const resting = random() % 2 ? random() % blocks : blocks;  // one block of a cluster may fall behind
        for (Fiber* f : order) {
            bool const waits = f->awaited && *f->awaited == f->seen;
            if (!waits && (blocks == 1 || f->rank != resting)) resume(*f);
        }
        order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->done; }), order.end());
        bool const stuck = state.progress == before && (blocks == 1 || resting == blocks);
        if (happen(stuck, random) || !stuck) continue;
        std::string what = std::to_string(order.size()) + " threads wait for others that never come";
        for (Fiber* f : order)
            if (f->waiting) {
                what += "; thread " + std::to_string(f->thread) + " at " + state.describe(f->waiting);
                break;
            }
        fail(what);
    }
    for (unsigned rank = 0; rank < blocks; rank++) {
        auto const& memory = state.shared[rank];
        size_t const end = size_t(shared_of(rank) - memory.data()) + shared;
        bool const intact = std::all_of(memory.begin() + long(end), memory.end(), [](auto b) { return b == 0xff; });
        if (!intact) fail("block " + std::to_string(rank) + " wrote past the end of its shared memory");
    }
    if (!state.later.empty()) fail("a block ended before its copies had landed");
    if (state.audit) state.audit();
}

struct ThreadIndex {
    struct {
        operator int() const { return int(state.now->thread); }
    } x;
};
template <unsigned dim3::* Axis>
struct BlockAxis {
    operator unsigned() const { return state.now->block.*Axis; }
};
struct BlockIndex {
    BlockAxis<&dim3::x> x;
    BlockAxis<&dim3::y> y;
    BlockAxis<&dim3::z> z;
};

}  // namespace emulator

inline emulator::ThreadIndex threadIdx;
inline emulator::BlockIndex blockIdx;
inline dim3 gridDim;

// ---- numbers ----

inline uint32_t float_bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}
inline float bits_float(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

template <class T>
inline float to_float(uint16_t bits);
namespace emulator {
inline float half_value(int bits) {
    int const exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float const sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(float(1024 + mantissa), exponent - 25) : std::ldexp(float(mantissa), -24));
}
inline std::vector<float> const half_values = [] {
    std::vector<float> all(65536);
    for (int i = 0; i < 65536; i++) all[size_t(i)] = half_value(i);
    return all;
}();
}  // namespace emulator
template <>
inline float to_float<Half>(uint16_t bits) {
    return emulator::half_values[bits];
}
template <>
inline float to_float<Bfloat>(uint16_t bits) {
    return bits_float(uint32_t(bits) << 16);
}

template <class T>
inline uint16_t from_float(float f);
template <>
inline uint16_t from_float<Half>(float f) {
    uint16_t const sign = uint16_t(float_bits(f) >> 16 & 0x8000);
    f = std::fabs(f);
    if (std::isnan(f)) return 0x7fff;
    if (f >= 65520.0f) return sign | 0x7c00;
    int exponent = 0;
    std::frexp(f, &exponent);  // f = m * 2^exponent, m in [0.5, 1)
    int const shift = f == 0 ? -24 : std::max(exponent - 11, -24);
    int const units = int(std::nearbyint(std::ldexp(f, -shift)));  // half to even
    return uint16_t(sign + (shift == -24 ? units : ((shift + 25) << 10) + units - 1024));
}
template <>
inline uint16_t from_float<Bfloat>(float f) {
    uint32_t const u = float_bits(f);
    return (u & 0x7fffffff) > 0x7f800000 ? uint16_t(0x7fff) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline float divide(float a, float b) { return a / b; }
inline float multiply(float a, float b) { return a * b; }
inline int32_t round_to_int(float f) { return std::isnan(f) ? 0 : int32_t(std::nearbyint(f)); }

template <class T>
inline uint32_t add2(uint32_t a, uint32_t b) {
    uint16_t const low = from_float<T>(to_float<T>(uint16_t(a)) + to_float<T>(uint16_t(b)));
    return low | uint32_t(from_float<T>(to_float<T>(uint16_t(a >> 16)) + to_float<T>(uint16_t(b >> 16)))) << 16;
}

inline uint32_t mask_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
inline uint32_t mask_not_or(uint32_t a, uint32_t mask, uint32_t bits) { return (~a & mask) | bits; }
inline int uniform(int value);
template <int Copy = 0, class V>
inline V held(V value) {
    return value;
}

inline uint32_t max_halves(uint32_t a, uint32_t b) {
    return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffff, b & 0xffff);
}

inline uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t const all = uint64_t(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) out |= uint32_t(all >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}

// ---- memory ----

inline unsigned char* dynamic_shared() { return emulator::shared_of(emulator::state.now->rank); }

using Shared = unsigned char*;
inline Shared shared_address(void const* p) { return static_cast<unsigned char*>(const_cast<void*>(p)); }

inline Shared flip(Shared address, int bits) {
    return reinterpret_cast<Shared>(reinterpret_cast<uintptr_t>(address) ^ uintptr_t(bits));
}

template <int Bytes>
inline unsigned char const* advance(unsigned char const* p, int count) {
    return p + int64_t(count) * Bytes;
}

template <int Size, int Count>
inline Shared wrap_of(Shared first) {
    return first;
}
template <int Size, int Count>
inline Shared next_place(Shared place, Shared wrap) {
    return place == wrap + (Count - 1) * Size ? wrap : place + Size;
}

inline uint4 load_once(void const* global) {
    if (reinterpret_cast<uintptr_t>(global) % 16) std::abort();
    uint4 v;
    std::memcpy(&v, global, 16);
    return v;
}

template <int Bytes = 16>
inline void copy_async(Shared shared, void const* global, bool valid = true) {
    if (reinterpret_cast<uintptr_t>(shared) % Bytes || reinterpret_cast<uintptr_t>(global) % Bytes) std::abort();
    emulator::Copy copy{shared, {}, Bytes};
    if (valid) std::memcpy(copy.bytes, global, Bytes);
    if (DEVICE_SM >= 80)
        emulator::state.now->groups.back().push_back(copy);
    else
        std::memcpy(shared, copy.bytes, Bytes);
}
inline void copy_commit() { emulator::state.now->groups.emplace_back(); }
template <int Pending>
inline void copy_wait() {
    auto& groups = emulator::state.now->groups;
    while (groups.size() > Pending + 1) {  // the last is open
        for (auto const& copy : groups.front()) std::memcpy(copy.to, copy.bytes, copy.size);
        groups.erase(groups.begin());
    }
}

inline uint4 load_piece(Shared shared) {
    if (reinterpret_cast<uintptr_t>(shared) % 16) std::abort();
    uint4 v;
    std::memcpy(&v, shared, 16);
    return v;
}
inline void store_piece(Shared shared, uint4 const& v) {
    if (reinterpret_cast<uintptr_t>(shared) % 16) std::abort();
    std::memcpy(shared, &v, 16);
}
inline uint32_t load_word(Shared shared) {
    uint32_t v;
    std::memcpy(&v, shared, 4);
    return v;
}

namespace emulator {
// The eight rows of a matrix are read together where each has banks of its own, or is row 0 of shared memory: zeros.
inline void expect_no_conflict(Shared const* rows) {
    Shared of_bank[8] = {};
    for (int i = 0; i < 8; i++) {
        auto const at = rows[i] - dynamic_shared();
        Shared& other = of_bank[at / 16 % 8];
        if (at >= 128 && other && other != rows[i]) fail("a bank conflict of rows of a matrix");
        if (at >= 128) other = rows[i];
    }
}
}  // namespace emulator
inline void load_matrices(uint32_t (&r)[4], Shared row) {
    auto const rows = emulator::share(row);
    int const lane = int(threadIdx.x) % 32;
    for (int i = 0; i < 4; i++) {
        emulator::expect_no_conflict(&rows[i * 8]);
        auto const* at = rows[i * 8 + lane / 4] + lane % 4 * 4;
        if (reinterpret_cast<uintptr_t>(rows[i * 8 + lane / 4]) % 16) std::abort();
        std::memcpy(&r[i], at, 4);
    }
    emulator::share(0);  // nobody overwrites what a slower lane still reads: the instruction is warp-wide
}

// ---- barriers and exchange ----

inline void warp_barrier() { emulator::share(0); }
inline void named_barrier(int id, int threads) {
    emulator::meet(emulator::state.barriers[emulator::state.now->rank].at(id), threads);
}
inline void named_arrive(int id, int threads) {
    emulator::arrive(emulator::state.barriers[emulator::state.now->rank].at(id), threads);
}
inline void block_barrier() { named_barrier(0, int(emulator::state.threads)); }
inline bool any_lane(bool holds) {
    auto const all = emulator::share(holds);
    return std::find(all.begin(), all.end(), true) != all.end();
}
inline uint32_t exchange(uint32_t value, int lane_mask) {
    return emulator::share(value)[(int(threadIdx.x) % 32) ^ lane_mask];
}

inline int uniform(int value) {
    auto const all = emulator::share(value);
    if (all[0] != value) std::abort();  // it was not
    return value;
}

// ---- clusters ----

inline void cluster_barrier() { emulator::meet(emulator::state.cluster, int(emulator::state.fibers.size())); }
inline void relaxed_cluster_barrier() { cluster_barrier(); }

namespace emulator {
inline void* at_rank(void const* shared, unsigned rank) {
    size_t const first = rank * state.threads;
    bool lives = false;
    for (size_t i = first; i < first + state.threads; i++) lives = lives || !state.fibers[i].done;
    if (!lives) fail("block " + std::to_string(rank) + " of the cluster has ended and its memory is gone");
    return shared_of(rank) + (static_cast<unsigned char const*>(shared) - dynamic_shared());
}
}  // namespace emulator
inline float4 load_four_from(int rank, float const* own) {
    if (reinterpret_cast<uintptr_t>(own) % 16) std::abort();
    return *static_cast<float4 const*>(emulator::at_rank(own, unsigned(rank)));
}

inline void wait_for_inputs() {}
inline void release_next() {}

// ---- tensor cores: register maps as the PTX manual draws them ----

// A third of all that the emulator computes, in few functions; the rest is sooner compiled than run.
#pragma GCC push_options
#pragma GCC optimize("O3")

namespace emulator {
// Assumed, not measured on a GPU: tensor cores cut bits off their fp32 sums instead of rounding them to nearest, after
// every product of one instruction.
inline float cut(double sum) {
    float const nearest = float(sum);
    return std::fabs(double(nearest)) > std::fabs(sum) ? std::nextafterf(nearest, 0.0f) : nearest;
}
struct Fragments {
    uint32_t a[4], b[2];
};
inline std::array<Fragments, 32> fragments(uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
    return share(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
}
}  // namespace emulator

namespace emulator {
inline int exponent(float f) { return int(float_bits(f) >> 23 & 255) - 127; }
template <class T>
int nominal_exponent(float f) {
    return std::max(exponent(f), std::is_same<T, Half>::value ? -14 : -126);
}
inline double power_of_two(int exponent) {
    uint64_t const bits = uint64_t(exponent + 1023) << 52;
    double value;
    std::memcpy(&value, &bits, 8);
    return value;
}
// The terms of one product's sum are cut to the last of 27 bits of the largest, and the sum to 24. How large a term is
// goes by the exponents of its factors as they are written: a subnormal's is that of the smallest normal number, so
// that small codes as subnormals lose bits. It is what an H200's errors agree with: 3e-6 to 6e-6 for such codes.
template <class T>
float sum_cut(float c, std::array<float, 16> const& a, std::array<float, 16> const& b) {
    int most = c == 0 ? -1000 : exponent(c);
    double plain = c;
    for (size_t k = 0; k < 16; k++) {
        plain += double(a[k]) * b[k];
        if (a[k] != 0 && b[k] != 0) most = std::max(most, nominal_exponent<T>(a[k]) + nominal_exponent<T>(b[k]));
    }
    if (!std::isfinite(plain) || most == -1000) return float(plain);
    double const unit = power_of_two(std::max(most, -126) - 26), per_unit = power_of_two(26 - std::max(most, -126));
    int64_t units = int64_t(c * per_unit);
    for (size_t k = 0; k < 16; k++) units += int64_t(double(a[k]) * b[k] * per_unit);
    double const sum = double(units) * unit;
    return cut(sum);
}
}  // namespace emulator

template <class T>
inline void multiply_add(float (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
    static_assert(DEVICE_SM >= 80 || std::is_same<T, Half>::value, "bf16 starts at sm_80");
    auto const f = emulator::fragments(a, b0, b1);
    int const g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
    for (int i = 0; i < 4; i++) {
        std::array<float, 16> left, right;
        for (size_t k = 0; k < 16; k++) {
            size_t const owner = k % 8 / 2;
            int const half = int(k % 2) * 16;
            uint32_t const av = f[size_t(g) * 4 + owner].a[size_t(i) / 2 + k / 8 * 2];
            uint32_t const bv = f[size_t(2 * t + i % 2) * 4 + owner].b[k / 8];
            left[k] = to_float<T>(uint16_t(av >> half)), right[k] = to_float<T>(uint16_t(bv >> half));
        }
        c[i] = emulator::sum_cut<T>(c[i], left, right);
    }
}

namespace emulator {
// As measured on V100 (Fasi et al. 2021): all five terms are cut to the last of 24 bits of the largest, so is their
// sum.
inline float sum_as_volta(double const (&terms)[5]) {
    double most = 0, sum = 0;
    for (double const t : terms) most = std::max(most, std::fabs(t));
    for (double const t : terms)
        if (!std::isfinite(t)) return float(terms[0] + terms[1] + terms[2] + terms[3] + terms[4]);
    if (most == 0) return 0.0f;
    int const last = std::max(std::ilogb(most), -126) - 23;
    double const unit = power_of_two(last), per_unit = power_of_two(-last);
    for (double const t : terms) sum += std::trunc(t * per_unit) * unit;
    float const nearest = float(sum);
    return std::fabs(double(nearest)) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}
}  // namespace emulator

inline void multiply_add(float (&c)[8], uint32_t a0, uint32_t a1, uint32_t b0, uint32_t b1) {
    static_assert(DEVICE_SM >= 70, "tensor cores");
    auto const f = emulator::fragments({a0, a1, 0, 0}, b0, b1);
    int const lane = int(threadIdx.x) % 32, quad = lane % 16 / 4;
    auto const owner = [quad](int row) { return row / 4 * 16 + quad * 4 + row % 4; };
    for (int i = 0; i < 8; i++) {
        int const row = (lane & 1) + (i & 2) + lane / 16 * 4, column = (i & 4) + (lane & 2) + (i & 1);
        double terms[5] = {c[i]};
        for (int k = 0; k < 4; k++) {
            uint32_t const av = f[owner(row)].a[k / 2], bv = f[owner(column)].b[k / 2];
            terms[k + 1] =
                double(to_float<Half>(uint16_t(av >> k % 2 * 16))) * to_float<Half>(uint16_t(bv >> k % 2 * 16));
        }
        c[i] = emulator::sum_as_volta(terms);
    }
}

namespace emulator {
template <class A>  // uint8_t or int8_t
inline void multiply_integers(int32_t (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
    auto const f = fragments(a, b0, b1);
    int const g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 32; k++) {
            int const owner = k % 16 / 4, byte = k % 4 * 8;
            uint32_t const av = f[g * 4 + owner].a[i / 2 + k / 16 * 2], bv = f[(2 * t + i % 2) * 4 + owner].b[k / 16];
            c[i] += int32_t(A(av >> byte)) * int32_t(int8_t(bv >> byte));
        }
}
}  // namespace emulator
inline void multiply_add(int32_t (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::multiply_integers<uint8_t>(c, a, b0, b1);
}
inline void multiply_add_signed(int32_t (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::multiply_integers<int8_t>(c, a, b0, b1);
}

#pragma GCC pop_options

// ---- host ----

inline int current_device() { return 0; }
inline char const* describe_device(int32_t& sm, int32_t& multiprocessors) {
    sm = DEVICE_SM, multiprocessors = 4;
    return nullptr;
}

struct Grid {
    dim3 blocks;
    int threads;
    size_t shared = 0;
    dim3 cluster{1};
    bool overlap = false;
};

template <class Args>
char const* launch(void (*kernel)(Args), Grid const& grid, Stream, Args args) {
    char const* const seed = std::getenv("EMULATOR_SEED");
    std::mt19937 random(seed ? unsigned(std::atoi(seed)) : 1u);
    size_t const limit = (DEVICE_SM < 75 ? 48 : DEVICE_SM < 80 ? 64 : DEVICE_SM == 90 ? 227 : 99) * 1024;
    if (grid.shared > limit) return "more shared memory than the smallest device of this family has";
    if (grid.blocks.x % grid.cluster.x || grid.blocks.z % grid.cluster.z)
        return "a grid that is no multiple of its clusters";
    emulator::state.body = [&] { kernel(args); };
    gridDim = grid.blocks;
    for (unsigned z = 0; z < grid.blocks.z; z += grid.cluster.z)
        for (unsigned y = 0; y < grid.blocks.y; y++)
            for (unsigned x = 0; x < grid.blocks.x; x += grid.cluster.x)
                emulator::run_cluster({x, y, z}, grid.cluster, grid.threads, grid.shared, random);
    return nullptr;
}
