// LayerNorm over the head dimension and 2-D rotary embedding of q and k, read from the packed projection.
#pragma once

#include "page4d/common.h"

namespace page4d {

// Strides are in elements; the head dimension has stride 1. Parameters and tables are fp32 and contiguous.
struct QkNormRope {
    const void* qkv;                         // (batch, tokens, 3, heads, head_dim)
    const float *q_weight, *q_bias;          // (head_dim)
    const float *k_weight, *k_bias;          // (head_dim)
    const float *cos, *sin;                  // (positions, head_dim / 4)
    void *q, *k;                             // (batch, heads, tokens, head_dim), contiguous
    int64_t batch, tokens, heads, head_dim;  // head_dim is a multiple of 4
    int64_t per_frame, special, width;       // tokens per frame, tokens before its patches, patches per row
    int64_t stride[4];                       // batch, token, q/k/v, head
    float eps;
    DType dtype;
    int threads;  // CPU only, like the level
    Level level;
};

inline Status check(const QkNormRope& p) {
    if (p.batch < 1 || p.tokens < 1 || p.heads < 1 || p.head_dim < 4 || p.head_dim % 4 != 0 || p.per_frame < 1 || p.special < 0 || p.width < 1)
        return Status::bad_sizes;
    const bool missing = !p.qkv || !p.q_weight || !p.q_bias || !p.k_weight || !p.k_bias || !p.cos || !p.sin || !p.q || !p.k;
    return missing ? Status::null_pointer : Status::ok;
}

Status qk_norm_rope(const QkNormRope& problem);

// Serves head dims 32, 64 and 128 and all values of DType. `stream` must be a cudaStream_t of that device. The call does not wait for the
// kernel.
Status qk_norm_rope_cuda(const QkNormRope& problem, int device, void* stream);

}  // namespace page4d
