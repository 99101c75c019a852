// Enough of CUDA to run a kernel's source on the CPU: a thread of the host per thread of a block, shuffles by way of memory and barriers.
// For tests of indexing and arithmetic; it knows nothing of speed, and nothing of shared memory.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)

namespace page4d {

struct Index {
    unsigned x;
};
inline thread_local Index threadIdx, blockIdx;

struct Warp {
    std::barrier<> barrier{32};
    float lane[32];
};
inline thread_local Warp* warp;

inline float __shfl_xor_sync(unsigned, float x, int mask) {
    warp->lane[threadIdx.x % 32] = x;
    warp->barrier.arrive_and_wait();
    const float other = warp->lane[(threadIdx.x % 32) ^ static_cast<unsigned>(mask)];
    warp->barrier.arrive_and_wait();
    return other;
}

using std::min;

struct __half {
    _Float16 x;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __half2float(__half x) { return static_cast<float>(x.x); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &wide, 4);
    return y;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// kernel(arguments...) for each thread of each block.
template <class Kernel, class... Arguments>
void launch_on_cpu(unsigned blocks, unsigned threads, Kernel kernel, const Arguments&... arguments) {
    for (unsigned block = 0; block < blocks; ++block) {
        const auto warps = std::make_unique<Warp[]>((threads + 31) / 32);
        std::vector<std::thread> running;
        for (unsigned thread = 0; thread < threads; ++thread)
            running.emplace_back([&, thread] {
                threadIdx = {thread}, blockIdx = {block}, warp = &warps[thread / 32];
                kernel(arguments...);
            });
        for (std::thread& thread : running) thread.join();
    }
}

}  // namespace page4d
