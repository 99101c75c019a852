#include "launch.cuh"

namespace page4d {
namespace {
thread_local const char* message = "no error";
}

const char* cuda_message() { return message; }

namespace cuda {
Status to_status(cudaError_t error) { return error == cudaSuccess ? Status::ok : failure(cudaGetErrorString(error)); }
Status failure(const char* text) {
    message = text;
    return Status::cuda_error;
}
}  // namespace cuda
}  // namespace page4d
