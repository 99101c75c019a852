// Shared by all launches: selects the caller's device for the duration of a launch, and keeps the text of errors.
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
Status failure(const char* text);

}  // namespace page4d::cuda
