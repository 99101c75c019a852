// The dynamics-aware mask head, forward: tokens -> one additive bias per key.
#pragma once

#include "page4d/common.h"

namespace page4d {

// Strides are in elements. The parameters are fp32 and contiguous, in their convolution shapes.
struct MaskHead {
    const void* tokens;  // (batch, frames, special + height * width, channels)
    const float* w0;     // (channels, 1, 3, 3)
    const float* b0;     // (channels)
    const float* w2;     // (hidden, channels)
    const float* b2;     // (hidden)
    const float* w4;     // (hidden)
    const float* b4;     // (1)
    float* out;          // (batch, frames * (special + height * width)), contiguous
    int64_t batch, frames, channels, hidden, special, height, width;
    int64_t stride[4];  // batch, frame, token, channel
    float min_std;
    DType dtype;
    int threads;
    Level level;
};

Status mask_head(const MaskHead& problem);

}  // namespace page4d
