// Launches qk_norm_rope.cuh.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"
#include "qk_norm_rope.cuh"

namespace page4d::cuda {
namespace {

template <class T, int D>
Status launch(const QkNormRope& p, int device, cudaStream_t stream) {
    const int64_t tiles = (p.tokens + Group<T, D>::rows - 1) / Group<T, D>::rows, blocks = tiles * p.batch * p.heads;
    if (p.tokens > INT32_MAX || blocks > INT32_MAX) return Status::bad_sizes;
    if ((reinterpret_cast<uintptr_t>(p.q) | reinterpret_cast<uintptr_t>(p.k)) % 16 != 0) return Status::misaligned;
    const OnDevice guard(device);
    if (guard.status() != cudaSuccess) return to_status(guard.status());
    return launch_kernel(qk_norm_rope_fwd_kernel<T, D>, static_cast<unsigned>(blocks), threads, 0, stream, p, static_cast<int>(tiles), aligned<T>(p));
}

template <class T>
Status launch_dim(const QkNormRope& p, int device, cudaStream_t stream) {
    switch (p.head_dim) {
        case 32: return launch<T, 32>(p, device, stream);
        case 64: return launch<T, 64>(p, device, stream);
        case 128: return launch<T, 128>(p, device, stream);
        default: return Status::bad_sizes;
    }
}

}  // namespace
}  // namespace page4d::cuda

namespace page4d {

Status qk_norm_rope_cuda(const QkNormRope& p, int device, void* stream) {
    if (const Status status = check(p); status != Status::ok) return status;
    const auto to = static_cast<cudaStream_t>(stream);
    switch (p.dtype) {
        case DType::f32: return cuda::launch_dim<float>(p, device, to);
        case DType::f16: return cuda::launch_dim<__half>(p, device, to);
        case DType::bf16: return cuda::launch_dim<__nv_bfloat16>(p, device, to);
    }
    return Status::bad_dtype;
}

}  // namespace page4d
