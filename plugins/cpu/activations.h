// Activations of sixteen floats.
#pragma once

#include "kernel.h"
#include "vectors.h"

namespace cpu {
namespace {  // each file has its own, with its own instructions

// The error function to 1.5e-7: Abramowitz and Stegun, 7.1.26.
inline V error_function(V x) {
    V const a = largest(x, -x), t = 1 / (1 + 0.3275911f * a);
    V const tail =
        t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    V const value = 1 + -tail * exponential(-a * a);
    return where_below(x, 0, -value, value);
}

inline V activated(Activation activation, V x) {
    switch (activation) {
        case Activation::kSilu:
            return x / (1 + exponential(-x));
        case Activation::kGelu:
            return x * 0.5f * (1 + error_function(x * 0.707106781f));
        case Activation::kGeluTanh:  // 0.5 (1 + tanh z) = 1 / (1 + e^-2z)
            return x / (1 + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
        case Activation::kNone:
            return x;
    }
    return x;
}

}  // namespace
}  // namespace cpu
