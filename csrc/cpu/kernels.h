// What one instruction-set level provides. Work comes as independent tasks: each writes what no other writes, so results depend neither
// on the number of threads nor on their order.
#pragma once

#include <cstddef>

#include "page4d/mask_attention.h"
#include "page4d/mask_head.h"
#include "page4d/qk_norm_rope.h"

namespace page4d {

struct Plan {
    int64_t tasks;
    size_t scratch;  // bytes that each thread lends to its tasks, 64-byte aligned
};

// What the first pass of the mask head leaves for the second.
struct HeadWork {
    float* mean;  // per frame and channel
    float* rstd;  // 1 / standard deviation, likewise
    float* w2;    // as the second pass reads it
};

struct Kernels {
    Plan (*plan_attention)(const MaskAttention&);
    void (*attention)(const MaskAttention&, int64_t task, char* scratch);
    int64_t (*packed_w2)(const MaskHead&);  // floats
    Plan (*plan_prepare)(const MaskHead&);
    void (*prepare)(const MaskHead&, HeadWork, int64_t task);
    Plan (*plan_head)(const MaskHead&);
    void (*head)(const MaskHead&, HeadWork, int64_t task, char* scratch);
    Plan (*plan_rope)(const QkNormRope&);
    void (*rope)(const QkNormRope&, int64_t task, char* scratch);
    double (*products)(DType);  // an amount of work, in FLOP; null for plain loops
    double (*exponentials)();   // likewise, in values
};

extern const Kernels kernels_scalar, kernels_avx2, kernels_avx512, kernels_avx512_bf16, kernels_amx;

}  // namespace page4d
