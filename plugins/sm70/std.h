// What device code of ours needs of the standard headers, for NVRTC, which has none: nvrtc.py gives it for each of
// them.
#ifndef INSTANTRT_STD  // not `pragma once`: it goes by names, and this file has several
#define INSTANTRT_STD

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned uint32_t;
typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;

namespace std {

template <class A, class B>
struct is_same {
    static constexpr bool value = false;
};
template <class A>
struct is_same<A, A> {
    static constexpr bool value = true;
};

template <class T>
constexpr T const& max(T const& a, T const& b) {
    return a < b ? b : a;
}
template <class T>
constexpr T const& min(T const& a, T const& b) {
    return b < a ? b : a;
}

}  // namespace std

#endif
