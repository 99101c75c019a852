// What launches use of the CUDA runtime and driver, without either. Kernels run at once, in cuda_on_cpu.h. Calls check their arguments as the
// documentation of CUDA 13 demands, and fail as they would on a device. `gpu()` is the machine: tests choose its properties and faults, and
// read what was launched.
#pragma once

#include <string>

#include "cuda_on_cpu.h"

#define CUDART_VERSION 13000

namespace page4d {

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorDeviceUninitialized = 201,
    cudaErrorIllegalAddress = 700
};
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_INVALID_CONTEXT = 201 };
using cudaStream_t = struct Stream*;

struct Launch {
    int device;
    cudaStream_t stream;
    unsigned blocks, threads;
    size_t shared_bytes;
};

struct Gpu {
    int multiprocessors = 132, shared_bytes = 227 * 1024;
    bool knows_tensor_maps = true;            // false: the driver is older than CUDA 12
    cudaError_t fault = cudaSuccess;          // of an earlier kernel, as an asynchronous error; every call that can reports it
    cudaError_t look_up_error = cudaSuccess;  // of the next look-up in the driver
    // of the thread that launches
    int device = 0;
    bool context[2] = {};                  // made current by cudaSetDevice
    cudaError_t last_error = cudaSuccess;  // what cudaGetLastError returns and clears

    std::map<const void*, int> allowed_shared_bytes;  // of a kernel
    std::vector<Launch> launches;
};
inline Gpu& gpu() {
    static Gpu only;
    return only;
}
inline cudaError_t finish(cudaError_t error) {
    if (error != cudaSuccess) gpu().last_error = error;
    return error;
}

// ---- runtime ----------------------------------------------------------------------------------------------------------------------
inline cudaError_t cudaGetLastError() { return std::exchange(gpu().last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
    switch (static_cast<int>(error)) {
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorDeviceUninitialized: return "invalid device context";
        case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
        default: return "unrecognized error code";
    }
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = gpu().device;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device > 1) return finish(cudaErrorInvalidDevice);
    gpu().device = device, gpu().context[device] = true;
    return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || device > 1) return finish(cudaErrorInvalidDevice);
    *value = attribute == cudaDevAttrMultiProcessorCount ? gpu().multiprocessors : gpu().shared_bytes;
    return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || bytes > gpu().shared_bytes) return finish(cudaErrorInvalidValue);
    gpu().allowed_shared_bytes[reinterpret_cast<const void*>(kernel)] = bytes;
    return cudaSuccess;
}
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    void* attrs;
    unsigned numAttrs;
};
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
    const dim3 grid = config->gridDim, block = config->blockDim;
    if (gpu().fault != cudaSuccess) return finish(gpu().fault);
    if (grid.x < 1 || grid.x > INT32_MAX || grid.y < 1 || grid.y > 65535 || grid.z != 1 || block.x < 1 || block.x > 1024 || block.y * block.z != 1)
        return finish(cudaErrorInvalidConfiguration);
    const auto allowed = gpu().allowed_shared_bytes.find(reinterpret_cast<const void*>(kernel));
    const size_t limit = allowed == gpu().allowed_shared_bytes.end() ? 48 * 1024 : static_cast<size_t>(allowed->second);
    if (config->dynamicSmemBytes > limit || config->numAttrs != 0) return finish(cudaErrorInvalidValue);
    gpu().launches.push_back({gpu().device, config->stream, grid.x * grid.y, block.x, config->dynamicSmemBytes});
    launch_on_cpu(grid, block.x, config->dynamicSmemBytes, [&] { kernel(arguments...); });
    return cudaSuccess;
}

// ---- driver: tensor maps ----------------------------------------------------------------------------------------------------------
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct alignas(64) CUtensorMap {
    const void* base;
    int rank;
    int64_t size[5], stride[5];  // in elements of 2 bytes, the first stride is 1
    int box[5];
};

// The rules of the documentation, for 2-byte elements without interleaving. Strides may come in any order: its formula, by which each one
// includes the one before, describes dense tensors, and views are not dense. Stride 0 is refused, as nothing says what it does.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* boxes, const cuuint32_t* element_strides,
                                       CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                       CUtensorMapFloatOOBfill fill) {
    if (!gpu().context[gpu().device]) return CUDA_ERROR_INVALID_CONTEXT;
    if (gpu().fault != cudaSuccess) return static_cast<CUresult>(gpu().fault);
    const auto aligned = [](const void* address, uintptr_t to) { return address && reinterpret_cast<uintptr_t>(address) % to == 0; };
    bool good = aligned(map, 64) && aligned(base, 16) && rank >= 1 && rank <= 5 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                (type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
                promotion == CU_TENSOR_MAP_L2_PROMOTION_L2_256B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
    for (cuuint32_t i = 0; good && i < rank; ++i) {
        good =
            sizes[i] >= 1 && sizes[i] <= uint64_t{1} << 32 && boxes[i] >= 1 && boxes[i] <= 256 && element_strides[i] >= 1 && element_strides[i] <= 8;
        if (i + 1 < rank) good = good && strides[i] % 16 == 0 && strides[i] > 0 && strides[i] < uint64_t{1} << 40;
    }
    if (!good || boxes[0] * 2 % 16 != 0 || boxes[0] * 2 > 128) return CUDA_ERROR_INVALID_VALUE;  // a row of the box fits in the swizzle's span
    *map = {base, static_cast<int>(rank), {}, {1}, {}};
    for (cuuint32_t i = 0; i < rank; ++i) {
        if (element_strides[i] != 1) return CUDA_ERROR_INVALID_VALUE;  // allowed, but the loads below do not step
        map->size[i] = static_cast<int64_t>(sizes[i]), map->box[i] = static_cast<int>(boxes[i]);
        if (i > 0) map->stride[i] = static_cast<int64_t>(strides[i - 1] / 2);
    }
    return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult {
    cudaDriverEntryPointSuccess = 0,
    cudaDriverEntryPointSymbolNotFound = 1,
    cudaDriverEntryPointVersionNotSufficent = 2
};
constexpr unsigned long long cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
    if (const cudaError_t error = std::exchange(gpu().look_up_error, cudaSuccess); error != cudaSuccess) return finish(error);
    const bool known = gpu().knows_tensor_maps && version == 12000 && std::string(name) == "cuTensorMapEncodeTiled";
    *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
    return cudaSuccess;
}

}  // namespace page4d
