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
    int threads;
    Level level;
};

Status mask_attention(const MaskAttention& problem);

}  // namespace page4d
