// The dynamics-aware mask head, forward: tokens -> one additive bias per key.
#pragma once

#include "page4d/common.h"

namespace page4d {

// Strides are in elements. The parameters are fp32 and contiguous, in the shapes of the convolutions.
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

inline Status check(const MaskHead& p) {
    if (p.batch < 1 || p.frames < 1 || p.channels < 1 || p.hidden < 1 || p.special < 0 || p.height < 1 || p.width < 1 || p.height * p.width < 2)
        return Status::bad_sizes;
    const bool missing = !p.tokens || !p.w0 || !p.b0 || !p.w2 || !p.b2 || !p.w4 || !p.b4 || !p.out;
    return missing ? Status::null_pointer : Status::ok;
}

Status mask_head(const MaskHead& problem);

// Serves sm_80 and newer, all values of DType, at most 256 hidden units and grids at most 300 wide. `mean` and `rstd` are working space,
// (batch * frames, channels) fp32. `stream` must be a cudaStream_t of that device. The call does not wait for the kernel.
//
// A block of the kernel needs mask_head_cuda_shared_bytes of shared memory; see cuda_shared_memory.
int mask_head_cuda_shared_bytes(int64_t hidden, int64_t width);
Status mask_head_cuda(const MaskHead& problem, float* mean, float* rstd, int device, void* stream);

}  // namespace page4d
