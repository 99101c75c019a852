// sm_80 instructions that CUDA C++ lacks, one function per instruction: warp-level tf32 MMA and asynchronous copies into shared memory.
// csrc/tests/ampere_on_cpu.h has the same functions as loops and the same include guard. Source: the PTX ISA 8.x.
#ifndef PAGE4D_CUDA_AMPERE
#define PAGE4D_CUDA_AMPERE

#include <cstdint>

namespace page4d::cuda {

// Rounds fp32 to nearest with the 10 fraction bits that a tf32 MMA reads.
__device__ __forceinline__ float to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}

// d (16 x 8) += a (16 x 8) b (8 x 8). With g = lane / 4 and t = lane % 4, a lane holds d at (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1),
// a at (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), and b at (t, g), (t + 4, g).
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
                   "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// Starts a copy of BYTES (4 or 16) bytes into shared memory, or of zeros if not `valid`.
template <int BYTES>
__device__ __forceinline__ void cp_async(float* to, const float* from, bool valid) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
// Waits until all copies of this thread have completed.
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ float* dynamic_floats() {
    extern __shared__ __align__(16) float floats[];
    return floats;
}

}  // namespace page4d::cuda

#endif
