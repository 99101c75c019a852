#include "launch.cuh"

#include <cstdarg>
#include <cstdio>

namespace page4d {
namespace {
thread_local char message[160] = "no error";
}

const char* cuda_message() { return message; }

Status cuda_shared_memory(int device, int& bytes) {
    return cuda::to_status(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

namespace cuda {

Status to_status(cudaError_t error) {
    if (error == cudaSuccess) return Status::ok;
    cudaGetLastError();  // the runtime keeps the error as well, and would report it again in a later call that went well
    return failure("%s", cudaGetErrorString(error));
}

Status failure(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof(message), format, arguments);
    va_end(arguments);
    return Status::cuda_error;
}

}  // namespace cuda
}  // namespace page4d
