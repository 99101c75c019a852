// The part of CUDA that is needed to run a kernel's source on the CPU. The threads of a block are fibers of one host thread. Wherever they
// wait for each other, the next fiber is chosen at random, which exposes missing synchronisation. For tests of indexing, arithmetic and
// synchronisation. It says nothing about speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

namespace page4d {

[[noreturn]] inline void fail(const char* what) {
    std::printf("%s\n", what);
    std::exit(1);
}

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, gridDim;

// Dynamic shared memory. A block that has less must not use the rest.
constexpr size_t most_shared_bytes = 227 * 1024;
inline unsigned char* memory_of_block() {
    alignas(1024) static unsigned char memory[most_shared_bytes];
    return memory;
}

// ---- fibers -----------------------------------------------------------------------------------------------------------------------
struct Fiber {
    static constexpr size_t stack_bytes = 256 * 1024;
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack{new unsigned char[stack_bytes]};
    std::function<bool()> may_go_on;  // empty: true
    bool ended = false;
    void* sanitizer_stack = nullptr;
};

// Runs the threads of one block until all have ended. Asynchronous work of the device, such as copies, is a list of closures.
class Block {
  public:
    Block(unsigned threads, size_t shared_bytes, unsigned seed, std::function<void()> kernel)
        : fibers_(threads), shared_bytes_(shared_bytes), random_(seed), kernel_(std::move(kernel)) {}

    void run() {
        current_block() = this;
        for (Fiber& fiber : fibers_) {
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = Fiber::stack_bytes;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, &Block::enter, 0);
        }
        std::vector<unsigned> ready;
        for (;;) {
            // Asynchronous work completes at any time, sometimes only when no thread can continue.
            while (!in_the_background.empty() && random_() % 8 == 0) finish_one();
            ready.clear();
            bool ended = true;
            for (unsigned i = 0; i < fibers_.size(); ++i) {
                ended = ended && fibers_[i].ended;
                if (!fibers_[i].ended && (!fibers_[i].may_go_on || fibers_[i].may_go_on())) ready.push_back(i);
            }
            if (ended) break;
            if (ready.empty()) {
                if (in_the_background.empty()) fail("deadlock: all threads of a block wait for each other");
                finish_one();
                continue;
            }
            std::shuffle(ready.begin(), ready.end(), random_);
            for (const unsigned i : ready)
                if (!fibers_[i].may_go_on || fibers_[i].may_go_on()) resume(i);
        }
        while (!in_the_background.empty()) finish_one();
        current_block() = nullptr;
    }

    // Suspends the running thread until `condition` holds. Other threads continue.
    void wait_until(std::function<bool()> condition) {
        Fiber& fiber = fibers_[threadIdx.x];
        fiber.may_go_on = std::move(condition);
        leave(fiber);
        fiber.may_go_on = nullptr;
    }

    // Waits until `count` threads have called this with the same name. The last one to arrive calls `last` before the others continue.
    template <class Last>
    void meet(const std::pair<int, int>& name, int count, Last last) {
        Meeting& meeting = meetings_[name];
        const unsigned round = meeting.round;
        if (++meeting.here == count) {
            last();
            meeting.here = 0, ++meeting.round;
        } else {
            wait_until([&meeting, round] { return meeting.round != round; });
        }
    }
    void arrive(const std::pair<int, int>& name, int count) {
        Meeting& meeting = meetings_[name];
        if (++meeting.here == count) meeting.here = 0, ++meeting.round;
    }

    static Block*& current_block() {
        static Block* block = nullptr;
        return block;
    }

    int threads() const { return static_cast<int>(fibers_.size()); }
    size_t shared_bytes() const { return shared_bytes_; }

    std::vector<std::function<void()>> in_the_background;
    const unsigned serial = ++blocks();  // tells the blocks of all launches apart

  private:
    static unsigned& blocks() {
        static unsigned count = 0;
        return count;
    }

    struct Meeting {
        int here = 0;
        unsigned round = 0;
    };

    void finish_one() {
        const size_t which = random_() % in_the_background.size();
        const auto work = std::move(in_the_background[which]);
        in_the_background.erase(in_the_background.begin() + static_cast<std::ptrdiff_t>(which));
        work();
    }

    static void enter() {
        Block& block = *current_block();
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(nullptr, &block.main_stack_, &block.main_stack_bytes_);
#endif
        block.kernel_();
        Fiber& fiber = block.fibers_[threadIdx.x];
        fiber.ended = true;
        block.leave(fiber);
    }

    void resume(unsigned thread) {
        threadIdx = {thread};
#if defined(__SANITIZE_ADDRESS__)
        void* own = nullptr;
        __sanitizer_start_switch_fiber(&own, fibers_[thread].stack.get(), Fiber::stack_bytes);
#endif
        swapcontext(&main_, &fibers_[thread].context);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
    }

    void leave(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(fiber.ended ? nullptr : &fiber.sanitizer_stack, main_stack_, main_stack_bytes_);
#endif
        swapcontext(&fiber.context, &main_);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, nullptr, nullptr);
#endif
    }

    std::vector<Fiber> fibers_;
    size_t shared_bytes_;
    std::mt19937 random_;
    std::function<void()> kernel_;
    std::map<std::pair<int, int>, Meeting> meetings_;
    ucontext_t main_;
    const void* main_stack_ = nullptr;
    size_t main_stack_bytes_ = 0;
};

inline Block& block() { return *Block::current_block(); }

enum Meetings { at_barrier, of_warp, of_warp_at_barrier, of_warpgroup };

inline void __syncthreads() {
    block().meet({at_barrier, 0}, block().threads(), [] {});
}
[[noreturn]] inline void __trap() { fail("a kernel trapped"); }

// Every lane gives `mine` and receives what lane `from` gave.
template <class T>
T exchange_in_warp(T mine, unsigned from) {
    static T lanes[64][32];
    const unsigned warp = threadIdx.x / 32;
    lanes[warp][threadIdx.x % 32] = mine;
    block().meet({of_warp, static_cast<int>(warp)}, 32, [] {});
    const T other = lanes[warp][from];
    block().meet({of_warp, static_cast<int>(warp)}, 32, [] {});
    return other;
}
inline float __shfl_xor_sync(unsigned, float x, int mask) { return exchange_in_warp(x, threadIdx.x % 32 ^ static_cast<unsigned>(mask)); }
inline int __shfl_sync(unsigned, int x, int lane) { return exchange_in_warp(x, static_cast<unsigned>(lane)); }

inline bool __any_sync(unsigned, bool mine) {
    static bool lanes[64][32];
    const unsigned warp = threadIdx.x / 32;
    lanes[warp][threadIdx.x % 32] = mine;
    block().meet({of_warp, static_cast<int>(warp)}, 32, [] {});
    const bool any = std::any_of(lanes[warp], lanes[warp] + 32, [](bool x) { return x; });
    block().meet({of_warp, static_cast<int>(warp)}, 32, [] {});
    return any;
}

// ---- types and arithmetic ---------------------------------------------------------------------------------------------------------
using std::max;
using std::min;

struct __half {
    _Float16 x;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline float __half2float(__half x) { return static_cast<float>(x.x); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// Runs a kernel for each thread of each block. Shared memory begins as NaN. The order of threads is random.
inline void launch_on_cpu(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
    static std::mt19937 random(0);
    unsigned char* const memory = memory_of_block();
    gridDim = grid;
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = {x, y};
            std::memset(memory, 0xff, most_shared_bytes);
            Block(threads, shared_bytes, random(), kernel).run();
            if (!std::all_of(memory + shared_bytes, memory + most_shared_bytes, [](unsigned char byte) { return byte == 0xff; }))
                fail("a kernel wrote past its shared memory");
        }
}

}  // namespace page4d
