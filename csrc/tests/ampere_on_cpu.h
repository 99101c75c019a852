// The functions of csrc/cuda/ampere.cuh as loops that follow the PTX ISA.
#ifndef PAGE4D_CUDA_AMPERE
#define PAGE4D_CUDA_AMPERE

#include "cuda_on_cpu.h"

namespace page4d::cuda {

inline float to_tf32(float x) { return bits_as<float>((bits_as<uint32_t>(x) + 0x1000) & ~0x1fffu); }

// The MMA reads tf32: it truncates operands that the kernel did not round.
inline void mma_m16n8k8_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
    struct Lane {
        float *d, a[4], b[2];
    };
    static Lane warps[64][32];
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const auto cut = [](float x) { return bits_as<float>(bits_as<uint32_t>(x) & ~0x1fffu); };
    Lane& mine = warps[warp][lane];
    mine.d = d;
    for (int i = 0; i < 4; ++i) mine.a[i] = cut(a[i]);
    for (int i = 0; i < 2; ++i) mine.b[i] = cut(b[i]);
    block().meet({of_warp, warp}, 32, [warp] {
        const auto& lanes = warps[warp];
        for (int row = 0; row < 16; ++row)
            for (int column = 0; column < 8; ++column) {
                float& sum = lanes[row % 8 * 4 + column / 2].d[row / 8 * 2 + column % 2];
                for (int k = 0; k < 8; ++k) sum += lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2] * lanes[column * 4 + k % 4].b[k / 4];
            }
    });
}

// Copies happen as late as possible: when the thread waits.
inline std::vector<std::function<void()>>& copies_of_thread() {
    static std::vector<std::function<void()>> copies[1024];
    return copies[threadIdx.x];
}
template <int BYTES>
void cp_async(float* to, const float* from, bool valid) {
    if (reinterpret_cast<uintptr_t>(to) % BYTES != 0 || reinterpret_cast<uintptr_t>(from) % BYTES != 0) fail("a misaligned asynchronous copy");
    for (size_t i = 0; i < BYTES / sizeof(float); ++i) to[i] = NAN;
    copies_of_thread().push_back([=] {
        for (size_t i = 0; i < BYTES / sizeof(float); ++i) to[i] = valid ? from[i] : 0.0f;
    });
}
inline void cp_async_wait_all() {
    for (const auto& copy : copies_of_thread()) copy();
    copies_of_thread().clear();
}

inline float* dynamic_floats() { return reinterpret_cast<float*>(memory_of_block()); }

}  // namespace page4d::cuda

#endif
