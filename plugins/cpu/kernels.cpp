// Which kernels run here, and what they refuse; the C interface through which tests reach each of them.
#include <cstring>

#include "halves.h"
#include "kernel.h"

namespace cpu {

char const* refuse(Weight const& w) {
    if (w.n <= 0 || w.k <= 0) {
        return "a weight without rows or columns";
    }
    if (w.group <= 0 || w.group % kBlock != 0 || w.k % w.group != 0) {
        return "group is no multiple of 32 that divides K";
    }
    if (w.form == Form::kInt8Rows && w.group > 65536) {
        return "a group above 65536 with a scale for each row of x";  // its products would not fit in 32 bits
    }
    return nullptr;
}

namespace {

float number(uint8_t const* from, Type type, int lane) {
    if (type == Type::kU8) {
        return from[lane];
    }
    if (type == Type::kF32) {
        float value;
        std::memcpy(&value, from + 4 * lane, 4);
        return value;
    }
    uint16_t bits;
    std::memcpy(&bits, from + 2 * lane, 2);
    return type == Type::kF16 ? from_half(bits) : from_bits(uint32_t{bits} << 16);
}

}  // namespace

void dequantize(Weight const& w, int64_t row, float* into) {
    int64_t const strip = row / kLanes, groups = w.k / w.group;
    int const lane = static_cast<int>(row % kLanes);
    uint8_t const* codes = w.codes + strip * stored_blocks(w) * kBlockBytes + 4 * lane;
    uint8_t const* affine = w.affine + strip * groups * affine_bytes(w);
    for (int64_t group = 0; group < groups; ++group, affine += affine_bytes(w)) {
        float const scale = number(affine, w.scale_type, lane);
        uint8_t const* zeros = affine + kLanes * kSizes[static_cast<int>(w.scale_type)];
        float const zero =
            w.zero_type == Type::kNone ? static_cast<float>(1 << (w.bits - 1)) : number(zeros, w.zero_type, lane);
        bool const is_minimum = w.zero_type != Type::kNone && w.zero_type != Type::kU8;
        for (int64_t k = group * w.group; k < (group + 1) * w.group; ++k) {
            int64_t const block = k / kBlock, vector = k % kBlock / 4;
            uint8_t const byte = codes[(w.bits == 8 ? block : block / 2) * kBlockBytes + vector * 64 + k % 4];
            int const q = w.bits == 8 ? byte : block % 2 ? byte >> 4 : byte & 15;
            float const code = static_cast<float>(q);
            into[k] = is_minimum ? code * scale + zero : (code - zero) * scale;
        }
    }
}

namespace {

Kernels const* const kAll[] = {&kAvx512, &kAvxVnni, &kAvx2, &kPlain};  // the fastest first

Kernels const* fastest() {
    for (Kernels const* each : kAll) {
        if (each->runs()) {
            return each;
        }
    }
    return &kPlain;
}

Kernels const* chosen = fastest();

}  // namespace

Kernels const& kernels() { return *chosen; }

}  // namespace cpu

// The name of the kernels that run from now on: those called `name` where this CPU has them, else what ran before.
extern "C" __attribute__((visibility("default"))) char const* instantrt_cpu_kernels(char const* name) {
    for (cpu::Kernels const* each : cpu::kAll) {
        if (std::strcmp(each->name, name) == 0 && each->runs()) {
            cpu::chosen = each;
        }
    }
    return cpu::chosen->name;
}
