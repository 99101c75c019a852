// What every CUDA kernel's launch needs: the caller's device for as long as it takes, and errors as text.
#pragma once

#include <cuda_runtime.h>

#include "page4d/common.h"

namespace page4d::cuda {

// This library links the CUDA runtime statically, so it has a current device of its own; the driver's context is shared with the caller.
class OnDevice {
  public:
    explicit OnDevice(int device) : status_(cudaGetDevice(&before_)) {
        if (status_ == cudaSuccess && device != before_) status_ = cudaSetDevice(device);
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
    cudaError_t status() const { return status_; }

  private:
    int before_ = 0;
    cudaError_t status_;
};

// Remembers the text of an error for `cuda_message`, per thread.
Status to_status(cudaError_t error);

}  // namespace page4d::cuda
