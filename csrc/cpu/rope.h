// QK-norm + RoPE. A task is a run of tokens. Each head of each token is normalised and rotated while it is in registers and the L1 cache.
#pragma once

#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace page4d::PAGE4D_ISA {

constexpr int64_t rope_tokens = 64;

inline Plan plan_rope(const QkNormRope& p) {
    const int64_t runs = (p.tokens + rope_tokens - 1) / rope_tokens;
    return {p.batch * runs, static_cast<size_t>(round_up(6 * 4 * round_up(p.head_dim, Vec::width), 64))};
}

template <class T>
void rope(const QkNormRope& p, int64_t task, char* scratch) {
    const int64_t runs = (p.tokens + rope_tokens - 1) / rope_tokens, b = task / runs, first = task % runs * rope_tokens;
    const int64_t d = p.head_dim, half = d / 2, quarter = d / 4, padded = round_up(d, Vec::width);
    float *x = reinterpret_cast<float*>(scratch), *partner = x + padded, *cos = partner + padded, *sin = cos + padded;
    for (int64_t n = first; n < smaller(first + rope_tokens, p.tokens); ++n) {
        const int64_t patch = n % p.per_frame - p.special;
        const int64_t position[2] = {patch < 0 ? 0 : patch / p.width + 1, patch < 0 ? 0 : patch % p.width + 1};
        for (int64_t axis = 0; axis < 2; ++axis)
            for (int64_t m = 0; m < quarter; ++m) {  // channels m and m + quarter of an axis are rotated together
                const float c = p.cos[position[axis] * quarter + m], s = p.sin[position[axis] * quarter + m];
                cos[axis * half + m] = cos[axis * half + quarter + m] = c;
                sin[axis * half + m] = -s;
                sin[axis * half + quarter + m] = s;
            }
        for (int which = 0; which < 2; ++which) {
            const float *weight = which ? p.k_weight : p.q_weight, *bias = which ? p.k_bias : p.q_bias;
            for (int64_t h = 0; h < p.heads; ++h) {
                const T* from = static_cast<const T*>(p.qkv) + b * p.stride[0] + n * p.stride[1] + which * p.stride[2] + h * p.stride[3];
                T* to = static_cast<T*>(which ? p.k : p.q) + ((b * p.heads + h) * p.tokens + n) * d;
                float mean = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : mean)
                for (int64_t i = 0; i < d; ++i) mean += x[i] = value(from[i]);
                mean /= static_cast<float>(d);
#pragma omp simd reduction(+ : square)
                for (int64_t i = 0; i < d; ++i) {
                    x[i] -= mean;
                    square += x[i] * x[i];
                }
                const float rstd = 1.0f / sqrtf(square / static_cast<float>(d) + p.eps);
#pragma omp simd
                for (int64_t i = 0; i < d; ++i) x[i] = x[i] * rstd * weight[i] + bias[i];
                for (int64_t axis = 0; axis < d; axis += half)
#pragma omp simd
                    for (int64_t m = 0; m < quarter; ++m) {
                        partner[axis + m] = x[axis + quarter + m];
                        partner[axis + quarter + m] = x[axis + m];
                    }
#pragma omp simd
                for (int64_t i = 0; i < d; ++i) assign(to + i, x[i] * cos[i] + partner[i] * sin[i]);
            }
        }
    }
}

}  // namespace page4d::PAGE4D_ISA
