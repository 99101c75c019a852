// softmax(q k^T * scale + r c^T) v, forward, and its log-sum-exp.
#pragma once

#include "page4d/common.h"

namespace page4d {

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
    int64_t frames, per_frame, special;  // for CUDA: the gate is 0 outside the first `special` of each `per_frame` queries; 0: no such promise
    int threads;                         // for CPUs, like the level
    Level level;
};

Status mask_attention(const MaskAttention& problem);

// On Hopper (sm_90), head dims 64 and 128, fp16 and bf16; addresses and strides of q, k, v and out are multiples of 16 bytes. `stream` is a
// cudaStream_t of that device; nothing waits for the kernel. If few queries leave the device idle the keys are split: then `splits` is
// more than 1, and the caller brings out_partial (splits, batch, heads, queries, head_dim) and lse_partial (splits, batch, heads, queries), fp32.
Status mask_attention_cuda_splits(const MaskAttention& problem, int device, int& splits);
Status mask_attention_cuda(const MaskAttention& problem, int splits, float* out_partial, float* lse_partial, int device, void* stream);

}  // namespace page4d
