// LayerNorm over the head dimension and 2-D rotary embedding of q and k, out of the packed projection.
#pragma once

#include "page4d/common.h"

namespace page4d {

// Strides are in elements; the head dimension has stride 1. Parameters and tables are fp32 and contiguous.
struct QkNormRope {
    const void* qkv;                          // (batch, tokens, 3, heads, head_dim)
    const float *q_weight, *q_bias;           // (head_dim)
    const float *k_weight, *k_bias;           // (head_dim)
    const float *cos, *sin;                   // (positions, head_dim / 4)
    void *q, *k;                              // (batch, heads, tokens, head_dim), contiguous
    int64_t batch, tokens, heads, head_dim;   // head_dim is a multiple of 4
    int64_t per_frame, special, width;        // tokens of a frame, those before its patches, patches of a row
    int64_t stride[4];                        // batch, token, q/k/v, head
    float eps;
    DType dtype;
    int threads;
    Level level;
};

Status qk_norm_rope(const QkNormRope& problem);

}  // namespace page4d
