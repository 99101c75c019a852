// Hopper (sm_90a) instructions that CUDA C++ lacks, one function per instruction: mbarriers, TMA loads, warpgroup MMA (wgmma).
// csrc/tests/hopper_on_cpu.h has the same functions as loops and the same include guard. Source: the PTX ISA 8.x.
#ifndef PAGE4D_CUDA_HOPPER
#define PAGE4D_CUDA_HOPPER

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace page4d::cuda {

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

// Call it once, from all threads. ptxas would work out the address again wherever it is used, as the block may be in a cluster. Taken from
// lane 0, it stays in a uniform register.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char memory[];
    const uint32_t address = __shfl_sync(0xffffffffu, static_cast<uint32_t>(__cvta_generic_to_shared(memory)), 0);
    return static_cast<unsigned char*>(__cvta_shared_to_generic(address));
}
__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// ---- registers of a warpgroup -----------------------------------------------------------------------------------------------------
template <int COUNT>
__device__ __forceinline__ void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- named barriers of the block ---------------------------------------------------------------------------------------------------
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// True in every thread if `mine` is true in any of them.
__device__ __forceinline__ bool named_barrier_or(bool mine, int barrier, int threads) {
    int any;
    asm volatile(
        "{.reg .pred p, q;\n"
        "setp.ne.b32 p, %1, 0;\n"
        "barrier.cta.red.or.pred q, %2, %3, p;\n"
        "selp.b32 %0, 1, 0, q;}\n"
        : "=r"(any)
        : "r"(static_cast<int>(mine)), "r"(barrier), "r"(threads)
        : "memory");
    return any;
}

// ---- mbarriers, in shared memory ---------------------------------------------------------------------------------------------------
__device__ __forceinline__ void mbarrier_init(Barrier& barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// Call after the last mbarrier_init and before other threads use the barriers.
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(Barrier& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives, and makes the phase wait for `bytes` bytes of TMA loads as well.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(Barrier& barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has completed. Parity 1 of a new barrier counts as completed.
__device__ __forceinline__ void mbarrier_wait(Barrier& barrier, uint32_t parity) {
    asm volatile(
        "{.reg .pred p;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\n"
        "bra again;\n"
        "done:}\n" ::"r"(shared_address(&barrier)),
        "r"(parity)
        : "memory");
}

// ---- TMA loads --------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void prefetch_tensormap(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}
__device__ __forceinline__ void tma_load_4d(void* to, const TensorMap& map, Barrier& full, int x0, int x1, int x2, int x3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
                     shared_address(to)),
                 "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(&full)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
                 : "memory");
}
__device__ __forceinline__ void tma_load_5d(void* to, const TensorMap& map, Barrier& full, int x0, int x1, int x2, int x3, int x4) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(
                     shared_address(to)),
                 "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(&full)), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
                 : "memory");
}

// ---- warpgroup MMA ----------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// The compiler neither reads these values before this point nor computes them after it. Without the fence it may read an accumulator that
// a wgmma still writes, or move arithmetic that should run under a wgmma behind the wait.
template <int N>
__device__ __forceinline__ void fence_operand(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define PAGE4D_F8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define PAGE4D_F32(d, i) PAGE4D_F8(d, i), PAGE4D_F8(d, i + 8), PAGE4D_F8(d, i + 16), PAGE4D_F8(d, i + 24)
#define PAGE4D_R32                                                                                                                                  \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
    "%30, %31"
#define PAGE4D_R64                                                                                                                              \
    PAGE4D_R32                                                                                                                                  \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
    "%59, %60, %61, %62, %63"

// d (64 x 128) = a b^T [+ d]: a (64 x 16) and b (128 x 16) in shared memory, contiguous along the 16.
#define PAGE4D_WGMMA(TYPE, NAME)                                                                                                             \
    __device__ __forceinline__ void wgmma_ss(TYPE, float (&d)[64], uint64_t a, uint64_t b, bool add) {                                       \
        asm volatile(                                                                                                                        \
            "{.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                                                       \
            "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " " PAGE4D_R64 "}, %64, %65, p, 1, 1, 0, 0;}"                       \
            : PAGE4D_F32(d, 0), PAGE4D_F32(d, 32)                                                                                            \
            : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                                                   \
    }                                                                                                                                        \
    /* d (64 x 64) += a b: a (64 x 16) in registers, b (16 x 64) in shared memory, contiguous along the 64 */                                \
    __device__ __forceinline__ void wgmma_rs(TYPE, float (&d)[32], const uint32_t* a, uint64_t b) {                                          \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " " PAGE4D_R32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"  \
                     : PAGE4D_F32(d, 0)                                                                                                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                                  \
    }                                                                                                                                        \
    /* d (64 x 128) += a b */                                                                                                                \
    __device__ __forceinline__ void wgmma_rs(TYPE, float (&d)[64], const uint32_t* a, uint64_t b) {                                          \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " " PAGE4D_R64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;" \
                     : PAGE4D_F32(d, 0), PAGE4D_F32(d, 32)                                                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                                  \
    }
PAGE4D_WGMMA(__nv_bfloat16, "bf16")
PAGE4D_WGMMA(__half, "f16")
#undef PAGE4D_WGMMA
#undef PAGE4D_F8
#undef PAGE4D_F32
#undef PAGE4D_R32
#undef PAGE4D_R64

// ---- arithmetic -------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ float ex2_approx(float x) {  // on the special-function unit (MUFU)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float max_or_nan(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
__device__ __forceinline__ uint32_t pack(__nv_bfloat16, float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ uint32_t pack(__half, float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

}  // namespace page4d::cuda

#endif
