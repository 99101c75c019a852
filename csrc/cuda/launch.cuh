// Shared by all launches: selects the caller's device for the duration of a launch, launches kernels, and keeps the text of errors.
#pragma once

#include <cuda_runtime.h>

#include "page4d/common.h"

namespace page4d::cuda {

// This library links the CUDA runtime statically. Its current device may differ from that of the caller's runtime, so the device is always
// set. It is reset only if it was a different one, as `before_` may be a default that nobody chose.
class OnDevice {
  public:
    explicit OnDevice(int device) : device_(device), before_(device), status_(cudaGetDevice(&before_)) {
        if (status_ == cudaSuccess) status_ = cudaSetDevice(device);
    }
    ~OnDevice() {
        if (before_ != device_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
    cudaError_t status() const { return status_; }

  private:
    int device_, before_;
    cudaError_t status_;
};

// Remembers the text of an error for `cuda_message`, per thread.
Status to_status(cudaError_t error);
Status failure(const char* format, ...);

// Call before the first launch of `kernel` with this much dynamic shared memory. The device's default limit is 48 KiB.
template <class... Parameters>
Status allow_shared_memory(void (*kernel)(Parameters...), int bytes, int device) {
    int available = 0;
    if (const Status status = cuda_shared_memory(device, available); status != Status::ok) return status;
    if (bytes > available) return failure("a block needs %d bytes of shared memory, and this device has %d", bytes, available);
    return to_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

template <class... Parameters>
Status launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream, const Parameters&... parameters) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes), config.stream = stream;
    return to_status(cudaLaunchKernelEx(&config, kernel, parameters...));
}

}  // namespace page4d::cuda
