// softmax(q k^T * scale + r c^T) v, forward, and the log-sum-exp of its rows.
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
    int64_t frames, per_frame, special;  // CUDA only: the gate is 0 outside the first `special` of each `per_frame` queries; 0: no such promise
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
