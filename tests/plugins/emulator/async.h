// plugins/runtime/gpu/async.h on the CPU: copies that land at a random later time, barriers that count them, clusters.
//
// Strict where the hardware would hang or silently be wrong: memory under a copy is poison until it lands; a phase that
// never ends, bytes that nobody announced, a block that ends before its copies, and fragments, sums or rows of x that
// change under a running product all abort with a message.
#pragma once

#include <device.h>

#include <map>

using Barrier = uint64_t;

namespace emulator {

struct Phases {
    int arrivals = 0, missing = 0;  // of each phase; of the current one
    int64_t bytes = 0;              // announced less landed; below zero when a neighbour's copy is early
    uint64_t ended = 0;             // phases
};
inline std::map<void const*, Phases> phases;

inline std::string describe_barrier(void const* barrier) {
    Phases const& p = phases.at(barrier);
    std::string where = "?";
    for (unsigned rank = 0; rank < state.shared.size(); rank++) {
        auto const at = static_cast<unsigned char const*>(barrier) - shared_of(rank);
        if (at >= 0 && at < long(state.shared[rank].size()))
            where = std::to_string(at) + " of block " + std::to_string(rank);
    }
    return "the barrier at byte " + where + ", phase " + std::to_string(p.ended) + ": " + std::to_string(p.missing) +
           " of " + std::to_string(p.arrivals) + " arrivals and " + std::to_string(p.bytes) + " bytes missing";
}

inline Phases& phases_of(void const* barrier) {
    auto const found = phases.find(barrier);
    if (found == phases.end()) fail("a barrier that was not initialised");
    return found->second;
}

inline void advance(void const* barrier, int arrivals, int64_t bytes) {
    Phases& p = phases_of(barrier);
    p.missing -= arrivals, p.bytes += bytes;
    if (p.missing < 0) fail("more arrivals than " + describe_barrier(barrier) + " counts");
    if (p.bytes < 0 && state.shared.size() == 1) fail("bytes that nobody announced at " + describe_barrier(barrier));
    if (p.missing || p.bytes) return;
    p.missing = p.arrivals, p.ended++, state.progress++;
}

// Poison until the copy lands
inline void copy_later(void* to, std::vector<unsigned char> bytes, void const* barrier) {
    std::memset(to, 0xff, bytes.size());
    state.later.push_back([to, bytes, barrier] {
        std::memcpy(to, bytes.data(), bytes.size());
        advance(barrier, 0, -int64_t(bytes.size()));
    });
}

inline void require(bool holds, char const* what) {
    if (!holds) fail(what);
}
inline bool aligned(void const* p, size_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

inline void audit_barriers() {
    for (auto const& [barrier, p] : phases)
        if (p.bytes) fail("left over at " + describe_barrier(barrier));
    phases.clear();
}

}  // namespace emulator

// ---- barriers ----

inline void barrier_init(Barrier* barrier, int arrivals) {
    emulator::require(emulator::aligned(barrier, 8), "a barrier is not aligned");
    emulator::phases[barrier] = {arrivals, arrivals};
    emulator::state.describe = emulator::describe_barrier;
    emulator::state.audit = emulator::audit_barriers;
}
inline void publish_barriers() {}
inline void arrive(Barrier* barrier) { emulator::advance(barrier, 1, 0); }
inline void arrive_at(Barrier* barrier, int rank) {
    emulator::advance(emulator::at_rank(barrier, unsigned(rank)), 1, 0);
}
inline void arrive_expecting(Barrier* barrier, int bytes) { emulator::advance(barrier, 1, bytes); }
inline void arrive_when_copied(Barrier* barrier) {
    auto& groups = emulator::state.now->groups;
    for (auto const& copy : groups.back()) std::memset(copy.to, 0xff, 16);
    emulator::state.later.push_back([copies = std::move(groups.back()), barrier] {
        for (auto const& copy : copies) std::memcpy(copy.to, copy.bytes, 16);
        emulator::advance(barrier, 1, 0);
    });
    groups.back() = {};
}
inline void wait(Barrier* barrier, int parity) {
    emulator::Fiber* const me = emulator::state.now;
    emulator::Phases const& phases = emulator::phases_of(barrier);
    me->waiting = barrier;
    while (int(phases.ended % 2) == parity) emulator::await(phases.ended, phases.ended);
    me->waiting = nullptr;
}

// ---- copies ----

inline void copy_bulk(void* shared, void const* global, int bytes, Barrier* barrier) {
    emulator::require(bytes > 0 && bytes % 16 == 0, "a bulk copy of bytes that are no multiple of 16");
    emulator::require(emulator::aligned(shared, 16) && emulator::aligned(global, 16), "a bulk copy is not aligned");
    auto const* const from = static_cast<unsigned char const*>(global);
    emulator::copy_later(shared, {from, from + bytes}, barrier);
}

struct alignas(64) TensorMap {
    unsigned char const* base;
    int64_t rows, row_bytes;
    int box, width;
};

template <int Cluster>
inline void copy_box(void* shared, TensorMap const& map, int byte, int64_t row, Barrier* barrier) {
    emulator::require(emulator::aligned(shared, map.width * 8), "a tile is not aligned to its swizzle");
    int const pieces = map.width / 16;
    std::vector<unsigned char> bytes(size_t(map.box) * map.width);
    for (int i = 0; i < map.box * pieces; i++) {
        int const r = i / pieces, piece = i % pieces, at = byte + piece * 16;
        int const turned = piece ^ (pieces == 8 ? r % 8 : r / 2 % 4);
        if (row + r < map.rows && at < map.row_bytes)
            std::memcpy(&bytes[size_t(r * map.width + turned * 16)], map.base + (row + r) * map.row_bytes + at, 16);
    }
    for (unsigned rank = 0; rank < unsigned(Cluster); rank++)
        emulator::copy_later(Cluster == 1 ? shared : emulator::at_rank(shared, rank), bytes,
                             Cluster == 1 ? barrier : emulator::at_rank(barrier, rank));
}
inline void prefetch_map(TensorMap const&) {}
inline bool elected() { return threadIdx.x % 32 == 0; }

// ---- warpgroups ----

template <int Count>
inline void keep_registers() {}
template <int Count>
inline void take_registers() {}

inline void warpgroup_begin() {}
template <class Anything>
inline void settle(Anything&) {}
inline void warpgroup_commit() { emulator::state.now->products.emplace_back(); }
template <int Pending>
inline void warpgroup_wait() {
    auto& products = emulator::state.now->products;
    while (products.size() > Pending + 1) {
        for (auto const& product : products.front()) product();
        products.erase(products.begin());
    }
}

namespace emulator {
// What 32 bytes of each row of a tile hold
inline uint64_t digest(unsigned char const* tile, size_t rows, int step) {
    uint64_t sum = 0;
    for (size_t row = 0; row < rows; row++)
        for (size_t chunk = 0; chunk < 2; chunk++) {
            uint64_t words[2];
            std::memcpy(words, tile + row * 128 + ((size_t(step) * 2 + chunk) ^ row % 8) * 16, 16);
            sum = (sum * 31 + words[0]) * 31 + words[1];
        }
    return sum;
}

// A product of this lane runs when it is waited for; until then its fragment, its sums and its rows of x must keep
// their values.
template <class Sum, size_t C, class Product>
inline void multiply_later(Sum (&d)[C][4], uint32_t const (&a)[4], void const* tile, int step, Product const& product) {
    require(aligned(tile, 1024), "a tile is not aligned to its swizzle");
    auto const f = fragments(a, 0, 0);
    auto const* const bytes = static_cast<unsigned char const*>(tile);
    std::array<uint32_t, 4> const mine{a[0], a[1], a[2], a[3]};
    int const lane = int(threadIdx.x) % 32;
    uint64_t const rows = lane ? 0 : digest(bytes, 8 * C, step);  // one lane looks for all
    auto const* const raw = reinterpret_cast<unsigned char const*>(d);
    Running& running = state.now->running[raw];
    if (running.products++ == 0) running.sums.assign(raw, raw + sizeof d);
    state.now->products.back().push_back([=, live = &a, &running, &d] {
        require(!std::memcmp(mine.data(), live, sizeof mine), "a fragment changed under its product");
        require(!std::memcmp(running.sums.data(), raw, sizeof d), "sums changed under their product");
        require(lane || rows == digest(bytes, 8 * C, step), "rows of x changed under their product");
        product(f, bytes, lane / 4, lane % 4);
        running.products--, running.sums.assign(raw, raw + sizeof d);
    });
}
}  // namespace emulator

template <class T, size_t C>
inline void warpgroup_multiply_add(float (&d)[C][4], uint32_t const (&a)[4], void const* tile, int k16, bool add) {
    emulator::multiply_later(d, a, tile, k16,
                             [k16, add, out = &d](auto const& f, unsigned char const* bytes, int g, int t) {
                                 for (size_t j = 0; j < C; j++)
                                     for (int i = 0; i < 4; i++) {
                                         double sum = 0;
                                         for (int k = 0; k < 16; k++) {
                                             int const row = int(j) * 8 + 2 * t + i % 2, chunk = k16 * 2 + k / 8;
                                             uint16_t x;
                                             std::memcpy(&x, bytes + row * 128 + (chunk ^ row % 8) * 16 + k % 8 * 2, 2);
                                             uint32_t const av = f[g * 4 + k % 8 / 2].a[i / 2 + k / 8 * 2];
                                             sum += double(to_float<T>(uint16_t(av >> k % 2 * 16))) * to_float<T>(x);
                                         }
                                         (*out)[j][i] = emulator::cut((add ? (*out)[j][i] : 0.0f) + sum);
                                     }
                             });
}

template <size_t C>
inline void warpgroup_multiply_add(int32_t (&d)[C][4], uint32_t const (&a)[4], void const* tile, int k32, bool add) {
    emulator::multiply_later(d, a, tile, k32,
                             [k32, add, out = &d](auto const& f, unsigned char const* bytes, int g, int t) {
                                 for (size_t j = 0; j < C; j++)
                                     for (int i = 0; i < 4; i++) {
                                         int32_t sum = add ? (*out)[j][i] : 0;
                                         for (int k = 0; k < 32; k++) {
                                             int const row = int(j) * 8 + 2 * t + i % 2, chunk = k32 * 2 + k / 16;
                                             auto const x = int8_t(bytes[row * 128 + (chunk ^ row % 8) * 16 + k % 16]);
                                             uint32_t const av = f[g * 4 + k % 16 / 4].a[i / 2 + k / 16 * 2];
                                             sum += int32_t(int8_t(av >> k % 4 * 8)) * x;
                                         }
                                         (*out)[j][i] = sum;
                                     }
                             });
}

// ---- host ----

inline char const* describe_rows(TensorMap& map, void const* base, int64_t rows, int64_t row_bytes, int box,
                                 int width = 128) {
    if (!emulator::aligned(base, 16) || row_bytes % 16 || box > 256) return "a tensor map that no driver would make";
    map = {static_cast<unsigned char const*>(base), rows, row_bytes, box, width};
    return nullptr;
}
