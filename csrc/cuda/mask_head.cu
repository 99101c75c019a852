// Launches mask_head.cuh.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ampere.cuh"
#include "launch.cuh"
#include "mask_head.cuh"

namespace page4d::cuda {
namespace {

template <class T, int HIDDEN>
Status launch(const MaskHead& p, const HeadStatistics& space, int device, cudaStream_t stream) {
    const auto ceil_div = [](int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); };
    const auto frames = static_cast<unsigned>(p.batch * p.frames);
    using Statistics = StatisticsTile<T>;
    using Tile = HeadTile<HIDDEN>;
    const OnDevice guard(device);
    const int bytes = mask_head_cuda_shared_bytes(p.hidden, p.width);
    Status status = to_status(guard.status());
    if (status == Status::ok) status = allow_shared_memory(mask_head_fwd_kernel<T, HIDDEN>, bytes, device);
    if (status == Status::ok)
        status = launch_kernel(mask_head_fwd_kernel_stats<T>, dim3(frames, ceil_div(p.channels, Statistics::channels)), Statistics::threads, 0,
                               stream, p, space, aligned<T>(p));
    if (status == Status::ok)
        status = launch_kernel(mask_head_fwd_kernel<T, HIDDEN>, dim3(ceil_div(p.height * p.width, Tile::patches), frames), Tile::threads, bytes,
                               stream, p, space, aligned<T>(p));
    return status;
}

template <class T>
Status launch_hidden(const MaskHead& p, const HeadStatistics& space, int device, cudaStream_t stream) {
    return p.hidden <= 64 ? launch<T, 64>(p, space, device, stream) : launch<T, 256>(p, space, device, stream);
}

}  // namespace
}  // namespace page4d::cuda

namespace page4d {

int mask_head_cuda_shared_bytes(int64_t hidden, int64_t width) {
    const auto floats = hidden <= 64 ? cuda::HeadTile<64>::floats : cuda::HeadTile<256>::floats;
    return floats(static_cast<int>(width)) * static_cast<int>(sizeof(float));
}

Status mask_head_cuda(const MaskHead& p, float* mean, float* rstd, int device, void* stream) {
    if (const Status status = check(p); status != Status::ok) return status;
    if (!mean || !rstd) return Status::null_pointer;
    if (p.hidden > 256 || p.width > 300 || p.channels > INT32_MAX / 64 || p.height * p.width > INT32_MAX / 64 || p.batch * p.frames > 65535)
        return Status::bad_sizes;
    const auto to = static_cast<cudaStream_t>(stream);
    switch (p.dtype) {
        case DType::f32: return cuda::launch_hidden<float>(p, {mean, rstd}, device, to);
        case DType::f16: return cuda::launch_hidden<__half>(p, {mean, rstd}, device, to);
        case DType::bf16: return cuda::launch_hidden<__nv_bfloat16>(p, {mean, rstd}, device, to);
    }
    return Status::bad_dtype;
}

}  // namespace page4d
