// The functions that one instruction-set level provides. Work is divided into independent tasks. No two tasks write to the same place, so
// results depend neither on the number of threads nor on the order of tasks.
#pragma once

#include <cstddef>

#include "page4d/mask_attention.h"
#include "page4d/mask_head.h"
#include "page4d/qk_norm_rope.h"

namespace page4d {

struct Plan {
    int64_t tasks;
    size_t scratch;  // bytes of working space per thread, 64-byte aligned
};

// Results of the first pass of the mask head, for the second pass.
struct HeadWork {
    float* mean;  // per frame and channel
    float* rstd;  // 1 / standard deviation, likewise
    float* w2;    // packed for the second pass
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
    double (*matmuls)(DType);  // returns the work done, in FLOP; null for plain loops
    double (*exponentials)();  // likewise, in values
};

extern const Kernels kernels_scalar, kernels_avx2, kernels_avx512, kernels_avx512_bf16, kernels_amx;

}  // namespace page4d
