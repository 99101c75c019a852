// Helpers that the kernels share: fp32, fp16 and bf16 values, read and written 16 bytes at a time.
#pragma once

#include <cstdint>

namespace page4d::cuda {

__device__ inline float value(float x) { return x; }
__device__ inline float value(__half x) { return __half2float(x); }
__device__ inline float value(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(__half& to, float x) { to = __float2half_rn(x); }
__device__ inline void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

template <class T>
struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T at[size];
};

// Loads consecutive elements as fp32, in one access if they are aligned.
template <class T>
__device__ inline void load(float (&x)[Pack<T>::size], const T* from, bool aligned) {
    Pack<T> pack;
    if (aligned)
        pack = *reinterpret_cast<const Pack<T>*>(from);
    else
#pragma unroll
        for (int i = 0; i < Pack<T>::size; ++i) pack.at[i] = from[i];
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) x[i] = value(pack.at[i]);
}

// What was worked out from x before is worked out again after, in place of being kept in registers.
__device__ inline void forget(int& x) { asm volatile("" : "+r"(x)); }

}  // namespace page4d::cuda
