// Any CPU: loops of sixteen, which compilers make vectors of.
#include "halves.h"
#include "table.h"

namespace cpu {
namespace {

template <typename T>
struct Sixteen {
    T v[kLanes];
};

template <typename Make>
auto each(Make make) {
    Sixteen<decltype(make(0))> all;
    for (int i = 0; i < kLanes; ++i) {
        all.v[i] = make(i);
    }
    return all;
}

struct Plain {
    static constexpr bool kPairs = false;
    static constexpr int kRows = 1;
    struct I {  // sums, or a vector of codes
        union {
            int32_t sum[kLanes];
            uint8_t code[4 * kLanes];
        };
    };
    using F = Sixteen<float>;
    template <typename Make>
    static I sums(Make make) {
        I all;
        for (int i = 0; i < kLanes; ++i) {
            all.sum[i] = make(i);
        }
        return all;
    }
    template <typename Make>
    static I codes(Make make) {
        I all;
        for (int i = 0; i < 4 * kLanes; ++i) {
            all.code[i] = static_cast<uint8_t>(make(i));
        }
        return all;
    }
    static I zero() {
        return sums([](int) { return 0; });
    }
    static I load(uint8_t const* p) {
        return codes([=](int i) { return p[i]; });
    }
    static I low(I q) {
        return codes([&](int i) { return q.code[i] & 15; });
    }
    static I high(I q) {
        return codes([&](int i) { return q.code[i] >> 4; });
    }
    static int8_t const* spread(int8_t const* x) { return x; }
    // not inlined into the kernels' unrolled loops, where compilers take half a minute of it
    [[gnu::noinline]] static I dot(I sum, I q, int8_t const* x) {
        return sums([&](int i) {
            uint8_t const* c = q.code + 4 * i;
            return sum.sum[i] + c[0] * x[0] + c[1] * x[1] + c[2] * x[2] + c[3] * x[3];
        });
    }
    static I add(I a, I b) {
        return sums([&](int i) { return a.sum[i] + b.sum[i]; });
    }
    static I times256(I a) {
        return sums([&](int i) { return a.sum[i] * 256; });
    }
    static F to_float(I a) {
        return each([&](int i) { return static_cast<float>(a.sum[i]); });
    }
    static F set(float v) {
        return each([=](int) { return v; });
    }
    static F load(float const* p) {
        return each([=](int i) { return p[i]; });
    }
    static void store(float* p, F v) { std::memcpy(p, v.v, sizeof v.v); }
    static F add(F a, F b) {
        return each([&](int i) { return a.v[i] + b.v[i]; });
    }
    static F sub(F a, F b) {
        return each([&](int i) { return a.v[i] - b.v[i]; });
    }
    static F mul(F a, F b) {
        return each([&](int i) { return a.v[i] * b.v[i]; });
    }
    static F fma(F a, F b, F c) {
        return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
    }
    static F from_f16(uint16_t const* p) {
        return each([=](int i) { return from_half(p[i]); });
    }
    static F from_i8(int8_t const* p) {
        return each([=](int i) { return static_cast<float>(p[i]); });
    }
    static void to_i8(int8_t* p, F v) {
        for (int i = 0; i < kLanes; ++i) {
            p[i] = static_cast<int8_t>(std::min(std::max(-128.0f, std::nearbyint(v.v[i])), 127.0f));  // NaN: -128
        }
    }
    static void to_f16(uint16_t* p, F v) {
        for (int i = 0; i < kLanes; ++i) {
            p[i] = to_half(v.v[i]);
        }
    }
    static F from_bf16(uint16_t const* p) {
        return each([=](int i) { return from_bits(uint32_t{p[i]} << 16); });
    }
    static F from_u4(uint8_t const* p) {
        return each([=](int i) { return static_cast<float>(i % 2 ? p[i / 2] >> 4 : p[i / 2] & 15); });
    }
    static F from_u8(uint8_t const* p) {
        return each([=](int i) { return static_cast<float>(p[i]); });
    }
};

bool runs() { return true; }

}  // namespace

constinit Kernels const kPlain = kernels_of<Plain>("plain", runs);

}  // namespace cpu
