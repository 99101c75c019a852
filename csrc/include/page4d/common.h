// Shared by all ops: dtypes, error codes, instruction-set levels. Plain C++17: no torch, no Python, no CUDA headers.
#pragma once

#include <cstdint>

// Increment whenever a struct or a function of these headers or csrc/bindings.cpp changes. page4d_kernels/native.py must have the same number.
#define PAGE4D_INTERFACE 5

namespace page4d {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

enum class Status : int {
    ok = 0,
    bad_sizes = 1,
    bad_dtype = 2,
    null_pointer = 3,
    no_memory = 4,
    bad_level = 5,
    cuda_error = 6,
    misaligned = 7,
    bad_variant = 8
};

inline const char* describe(Status status) {
    switch (status) {
        case Status::ok: return "ok";
        case Status::bad_sizes: return "a size is negative, zero or too large where it may not be";
        case Status::bad_dtype: return "the kernel does not take this dtype";
        case Status::null_pointer: return "a pointer is null";
        case Status::no_memory: return "no memory for the working space";
        case Status::bad_level: return "this processor does not have the instruction set that was asked for";
        case Status::cuda_error: return "CUDA reported an error";
        case Status::misaligned: return "an address or a stride is not a positive multiple of 16 bytes";
        case Status::bad_variant: return "the kernel has no such variant";
    }
    return "unknown error";
}

// Instruction sets. Each level includes those before it.
enum class Level : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

// The highest level that this processor supports and the library was compiled with. The first call asks the operating system for AMX.
Level best_level();

// Runs independent multiply-adds (`exponentials`: 2^x) on all threads, with all operands in registers, for benchmarks to time.
// Returns the work done, in FLOP or values, or 0 for plain loops.
double peak_rate(DType dtype, bool exponentials, int threads, Level level);

// CUDA's message for the last Status::cuda_error of this thread. Only in libraries with CUDA kernels.
const char* cuda_message();

// The most shared memory that a block can have on this device. Only in libraries with CUDA kernels.
Status cuda_shared_memory(int device, int& bytes);

}  // namespace page4d
