// The host code of the CUDA kernels: which device and stream a launch uses, and what it says when the driver refuses.
#include <cstring>
#include <vector>

#include "checks.h"
#include "page4d/mask_attention.h"
#include "page4d/mask_head.h"
#include "runtime_on_cpu.h"
//
#include "../cuda/launch.cu"

namespace page4d::tests {
namespace {

constexpr int tokens = 8, dim = 64;

// A small problem of each kind that a launch accepts.
struct Small {
    std::vector<__nv_bfloat16> q = std::vector<__nv_bfloat16>(tokens * dim), out = q;
    std::vector<float> lse = std::vector<float>(tokens);
    MaskAttention p{};

    Small() {
        p.q = p.k = p.v = q.data(), p.out = out.data(), p.lse = lse.data();
        p.batch = p.heads = 1, p.queries = p.keys = tokens, p.head_dim = dim, p.scale = 1.0f, p.dtype = DType::bf16;
        for (int64_t* stride : {p.q_stride, p.k_stride, p.v_stride, p.out_stride}) stride[0] = stride[1] = tokens * dim, stride[2] = dim;
    }
    Status run(int device = 0) { return mask_attention_cuda(p, 1, nullptr, nullptr, device, reinterpret_cast<void*>(0x51)); }
};

Status small_head(int64_t hidden, int64_t width) {
    const std::vector<float> ones(static_cast<size_t>(hidden * 4 + width * 2 * 4 + 64), 1.0f);
    std::vector<float> out(static_cast<size_t>(width * 2)), statistics(8);
    MaskHead p{};
    p.tokens = p.w0 = p.b0 = p.w2 = p.b2 = p.w4 = p.b4 = ones.data(), p.out = out.data();
    p.batch = p.frames = 1, p.channels = 4, p.hidden = hidden, p.height = 2, p.width = width;
    p.stride[0] = p.stride[1] = width * 2 * 4, p.stride[2] = 4, p.stride[3] = 1, p.min_std = 1e-6f;
    return mask_head_cuda(p, statistics.data(), statistics.data() + 4, 0, nullptr);
}

void expect(Status status, Status want, const char* message, const char* what) {
    const bool good = status == want && (!message || std::strcmp(cuda_message(), message) == 0);
    check(good, "%s: status %d, \"%s\"", what, static_cast<int>(status), cuda_message());
}

void device_cases() {
    Small small;
    gpu() = {};
    expect(small.run(1), Status::ok, nullptr, "a thread that has no context yet");
    check(gpu().launches.size() == 1 && gpu().launches[0].device == 1 && gpu().launches[0].stream == reinterpret_cast<cudaStream_t>(0x51),
          "a launch uses the caller's device and stream");
    check(gpu().device == 0, "the device of the thread is restored: %d", gpu().device);
    expect(small.run(7), Status::cuda_error, "invalid device ordinal", "a device that does not exist");
    check(gpu().last_error == cudaSuccess, "a reported error does not remain in the thread");
}

void driver_cases() {
    Small small;
    gpu() = {};
    gpu().look_up_error = cudaErrorIllegalAddress;
    expect(small.run(), Status::cuda_error, "an illegal memory access was encountered", "a look-up that fails");
    gpu().knows_tensor_maps = false;
    expect(small.run(), Status::cuda_error, "the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12", "an old driver");
    gpu().knows_tensor_maps = true;
    expect(small.run(), Status::ok, nullptr, "a look-up that failed is tried again");
    gpu().fault = cudaErrorIllegalAddress;
    expect(small.run(), Status::cuda_error, "an illegal memory access was encountered", "the fault of an earlier kernel");
    gpu().fault = cudaSuccess;
    small.p.batch = 2, small.p.q_stride[0] = int64_t{1} << 39;
    expect(small.run(), Status::cuda_error, "no tensor map can be made of these sizes and strides", "a stride past 2^40 bytes");
}

void stride_cases() {
    Small small;
    gpu() = {};
    for (int64_t* stride : {small.p.q_stride, small.p.k_stride, small.p.v_stride}) {
        const int64_t before = stride[2];
        for (const int64_t wrong : {0, -64, 4}) {
            stride[2] = wrong;
            expect(small.run(), Status::misaligned, nullptr, "a stride of 0, below 0, or no multiple of 16 bytes");
        }
        stride[2] = before;
        stride[0] = stride[1] = 0;
        expect(small.run(), Status::ok, nullptr, "any stride along a dimension of size 1");
    }
}

void shared_memory_cases() {
    gpu() = {};
    gpu().shared_bytes = 99 * 1024;  // sm_86, sm_89
    expect(small_head(256, 93), Status::ok, nullptr, "mask_head: 93 patches wide");
    expect(small_head(256, 94), Status::cuda_error, "a block needs 101632 bytes of shared memory, and this device has 101376", "mask_head: 94 wide");
    check(gpu().last_error == cudaSuccess, "a refusal leaves no error in the thread");
    expect(small_head(64, 93), Status::ok, nullptr, "mask_head: the next launch after a refusal");
    Small small;
    expect(small.run(), Status::cuda_error, nullptr, "mask_attention without the shared memory of Hopper");
    gpu() = {};
    expect(small.run(), Status::ok, nullptr, "the next launch after an error");
}

}  // namespace

void launch_cases() {
    driver_cases();  // first: a look-up that went well is not repeated
    device_cases();
    stride_cases();
    shared_memory_cases();
}

}  // namespace page4d::tests
