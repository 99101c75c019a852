// The table of one instruction-set level. A kernel file defines the level (PAGE4D_ISA) and the engine of its bf16 matmuls
// (PAGE4D_BF16_ENGINE), then includes this file.
#pragma once

#include "attention.h"
#include "ceiling.h"
#include "head.h"
#include "rope.h"

#define PAGE4D_TABLE_OF(level) kernels_##level
#define PAGE4D_TABLE(level) PAGE4D_TABLE_OF(level)

namespace page4d {

using namespace PAGE4D_ISA;

const Kernels PAGE4D_TABLE(PAGE4D_ISA) = {
    [](const MaskAttention& p) { return p.dtype == DType::f32 ? plan_attention<EngineF32>(p) : plan_attention<PAGE4D_BF16_ENGINE>(p); },
    [](const MaskAttention& p, int64_t task, char* scratch) {
        p.dtype == DType::f32 ? attend<EngineF32, float>(p, task, scratch) : attend<PAGE4D_BF16_ENGINE, uint16_t>(p, task, scratch);
    },
    [](const MaskHead& p) { return p.dtype == DType::f32 ? packed_w2<EngineF32>(p) : packed_w2<PAGE4D_BF16_ENGINE>(p); },
    plan_prepare,
    [](const MaskHead& p, HeadWork out, int64_t task) {
        p.dtype == DType::f32 ? prepare<EngineF32, float>(p, out, task) : prepare<PAGE4D_BF16_ENGINE, uint16_t>(p, out, task);
    },
    [](const MaskHead& p) { return p.dtype == DType::f32 ? plan_head<EngineF32>(p) : plan_head<PAGE4D_BF16_ENGINE>(p); },
    [](const MaskHead& p, HeadWork in, int64_t task, char* scratch) {
        p.dtype == DType::f32 ? head<EngineF32, float>(p, in, task, scratch) : head<PAGE4D_BF16_ENGINE, uint16_t>(p, in, task, scratch);
    },
    plan_rope,
    [](const QkNormRope& p, int64_t task, char* scratch) {
        p.dtype == DType::f32 ? rope<float>(p, task, scratch) : rope<uint16_t>(p, task, scratch);
    },
    [](DType dtype) { return dtype == DType::f32 ? matmuls<EngineF32>() : matmuls<PAGE4D_BF16_ENGINE>(); },
    exponentials,
};

}  // namespace page4d
