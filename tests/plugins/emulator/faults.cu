// One mistake for each number, of the kind that hangs a GPU or spoils results there: what the emulator must say of it.
#include <async.h>

#include <cstdlib>

struct Args {
    unsigned char const* from;
    int fault;
};

void kernel(Args const p) {
    auto* const tile = dynamic_shared();
    auto* const barrier = reinterpret_cast<Barrier*>(tile + 8192);
    float d[8][4] = {};
    uint32_t a[4] = {};
    if (threadIdx.x == 0) {
        barrier_init(barrier, p.fault == 1 ? 2 : 1);
        publish_barriers();
    }
    block_barrier();
    if (threadIdx.x == 0) {
        arrive_expecting(barrier, p.fault == 2 ? 8192 : 4096);
        if (p.fault == 3) arrive(barrier), arrive(barrier);
        copy_bulk(tile, p.from, p.fault == 4 ? 4112 : 4096, barrier);
    }
    if (p.fault == 5) return;
    if (p.fault == 11) load_matrices(a, shared_address(tile) + 1024 + threadIdx.x % 32 * 128);
    wait(barrier, p.fault == 6 ? 1 : 0);
    if (p.fault == 6 && tile[0] == 0xff) emulator::fail("poison");
    if (p.fault == 7) wait(barrier, 1);
    warpgroup_begin();
    warpgroup_multiply_add<Half>(d, a, tile, 0, true);
    warpgroup_commit();
    if (p.fault == 8) a[0] = 1;
    if (p.fault == 9) d[3][1] = 1.0f;
    if (p.fault == 10 && threadIdx.x == 0) tile[5 * 128 + 5 * 16] = 1;
    warpgroup_wait<0>();
}

int main(int, char** argv) {
    static unsigned char memory[8192];
    char const* const failed = launch(kernel, {dim3(1), 128, 16384}, nullptr, Args{memory, std::atoi(argv[1])});
    return failed != nullptr;
}
