// QK-norm + RoPE in one pass over the projection. It follows csrc/cpu/kernels_scalar.cpp, with a group of lanes in place of the loop over
// channels.
//
// Each lane loads 16 bytes, and a group of D * sizeof(T) / 16 lanes holds one head. Sums over the head dimension are warp shuffles within the
// group. So is the exchange with the RoPE partner: it is D / 4 channels away, which is at the same position of a lane a quarter of the group
// away. A group processes q and k of one token and head. Both loads are in flight together and share the angles.
#pragma once

#include "page4d/qk_norm_rope.h"
#include "values.cuh"

namespace page4d::cuda {

constexpr int threads = 256;

// Whether every head of every token starts at a multiple of 16 bytes.
template <class T>
inline bool aligned(const QkNormRope& p) {
    bool all = reinterpret_cast<uintptr_t>(p.qkv) % 16 == 0;
    for (const int64_t stride : p.stride) all = all && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    return all;
}

template <class T, int D>
struct Group {
    static constexpr int per_lane = Pack<T>::size, lanes = D / per_lane, rows = threads / lanes;
    static_assert(lanes <= 32 && lanes % 4 == 0 && (lanes & (lanes - 1)) == 0, "a quarter of the head dimension must be whole lanes of one warp");
};

// Sum over the lanes of a group. Every lane gets the same bits.
template <int LANES>
__device__ float sum(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

template <class T, int D>
__device__ void norm_and_rotate(float (&x)[Group<T, D>::per_lane], const float* weight, const float* bias, const float* cos, const float* sin,
                                float sign, float eps) {
    using G = Group<T, D>;
    float mean = 0.0f, square = 0.0f;
#pragma unroll
    for (int i = 0; i < G::per_lane; ++i) mean += x[i];
    mean = sum<G::lanes>(mean) / D;
#pragma unroll
    for (int i = 0; i < G::per_lane; ++i) {
        x[i] -= mean;
        square += x[i] * x[i];
    }
    const float rstd = 1.0f / sqrtf(sum<G::lanes>(square) / D + eps);
#pragma unroll
    for (int i = 0; i < G::per_lane; ++i) {
        x[i] = x[i] * rstd * weight[i] + bias[i];
        const float partner = __shfl_xor_sync(0xffffffffu, x[i], G::lanes / 4);
        x[i] = x[i] * cos[i] + sign * partner * sin[i];
    }
}

// Grid (tiles of tokens * batch * heads,).
template <class T, int D>
__global__ void __launch_bounds__(threads) qk_norm_rope_fwd_kernel(const QkNormRope p, int tiles, bool aligned) {
    using G = Group<T, D>;
    constexpr int quarter = D / 4;
    const int lane = threadIdx.x % G::lanes, channel = lane * G::per_lane;
    const int64_t head_of_batch = blockIdx.x / tiles, b = head_of_batch / p.heads, h = head_of_batch % p.heads;
    const int tokens = static_cast<int>(p.tokens), n = blockIdx.x % tiles * G::rows + threadIdx.x / G::lanes;
    const int here = min(n, tokens - 1);  // lanes past the end repeat the last token, as shuffles need all lanes

    const T* from = static_cast<const T*>(p.qkv) + b * p.stride[0] + here * p.stride[1] + h * p.stride[3] + channel;
    float q[G::per_lane], k[G::per_lane];
    load(q, from, aligned);
    load(k, from + p.stride[2], aligned);

    const int patch = here % static_cast<int>(p.per_frame) - static_cast<int>(p.special), width = static_cast<int>(p.width);
    // the first half of the head dimension is rotated by the row, the second half by the column
    const int axis = channel / (D / 2), first = channel % quarter;
    const int position = patch < 0 ? 0 : (axis == 0 ? patch / width : patch % width) + 1;
    const float sign = channel % (D / 2) < quarter ? -1.0f : 1.0f;
    const float *cos = p.cos + position * quarter + first, *sin = p.sin + position * quarter + first;
    norm_and_rotate<T, D>(q, p.q_weight + channel, p.q_bias + channel, cos, sin, sign, p.eps);
    norm_and_rotate<T, D>(k, p.k_weight + channel, p.k_bias + channel, cos, sin, sign, p.eps);

    if (n >= tokens) return;
    const int64_t to = (head_of_batch * p.tokens + n) * D + channel;
    Pack<T> out_q, out_k;
#pragma unroll
    for (int i = 0; i < G::per_lane; ++i) {
        assign(out_q.at[i], q[i]);
        assign(out_k.at[i], k[i]);
    }
    *reinterpret_cast<Pack<T>*>(static_cast<T*>(p.q) + to) = out_q;
    *reinterpret_cast<Pack<T>*>(static_cast<T*>(p.k) + to) = out_k;
}

}  // namespace page4d::cuda
