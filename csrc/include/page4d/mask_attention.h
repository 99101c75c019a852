// softmax(q k^T * scale + r c^T) v, forward, and the log-sum-exp of its rows.
#pragma once

#include "page4d/common.h"

namespace page4d {

// Choices of the CUDA kernel that change results by rounding only. Which one is fastest is for each device to find out. One exponential in
// `polynomial_every` is computed by multiply-adds (0: none; at head dim 128 none in any case, as exponentials are not the limit there). Sums
// are rescaled once the maximum of a row has grown by more than `rescale_past`, in powers of 2.
struct AttentionVariant {
    int polynomial_every;
    float rescale_past;
};
constexpr AttentionVariant attention_variants[] = {{8, 8.0f}, {16, 8.0f}, {0, 8.0f}, {8, 0.0f}, {16, 0.0f}, {0, 0.0f}};  // 0 is the default

// Strides are in elements; the head dimension has stride 1. q, k, v and out have one dtype; r, c and lse are fp32.
struct MaskAttention {
    const void* q;      // (batch, heads, queries, head_dim)
    const void* k;      // (batch, heads, keys, head_dim)
    const void* v;      // (batch, heads, keys, head_dim)
    const float* gate;  // r: (batch, queries), or null for no bias
    const float* bias;  // c: (batch, keys), or null for no bias
    void* out;          // (batch, heads, queries, head_dim)
    float* lse;         // (batch, heads, queries), contiguous
    int64_t batch, heads, queries, keys, head_dim;
    int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // batch, head, token
    int64_t gate_stride, bias_stride;                              // batch; 1 along the tokens
    float scale;
    DType dtype;
    int64_t frames, per_frame, special;  // CUDA only: the gate is 0 outside the first `special` of each `per_frame` queries; 0: no such promise
    int variant;                         // CUDA only: an index of attention_variants
    int threads;                         // CPU only, like the level
    Level level;
};

Status mask_attention(const MaskAttention& problem);

// Serves Hopper (sm_90), head dims 64 and 128, fp16 and bf16. Addresses and strides of q, k, v and out must be multiples of 16 bytes. `stream`
// must be a cudaStream_t of that device. The call does not wait for the kernel. If there are too few queries to fill the device, the keys are
// split. Then `splits` is greater than 1, and the caller must allocate out_partial (splits, batch, heads, queries, head_dim) and
// lse_partial (splits, batch, heads, queries), both fp32.
Status mask_attention_cuda_splits(const MaskAttention& problem, int device, int& splits);
Status mask_attention_cuda(const MaskAttention& problem, int splits, float* out_partial, float* lse_partial, int device, void* stream);

}  // namespace page4d
