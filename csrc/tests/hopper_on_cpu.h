// The functions of csrc/cuda/hopper.cuh as loops that follow the PTX ISA. Positions in shared memory are computed only from descriptors, tensor
// maps and addresses. Operations that are asynchronous on the device (wgmmas, TMA loads) complete at a random time, and the results of a wgmma
// are NaN until then. This detects missing waits and stages that are released too early.
#ifndef PAGE4D_CUDA_HOPPER
#define PAGE4D_CUDA_HOPPER

#include <array>
#include <type_traits>

#include "runtime_on_cpu.h"

namespace page4d::cuda {

// ---- shared memory ----------------------------------------------------------------------------------------------------------------
// Dynamic shared memory begins after the first KiB, which the system keeps.
constexpr uint32_t shared_base = 0x400;
inline unsigned char* dynamic_shared() { return memory_of_block(); }
inline uint32_t shared_address(const void* pointer) {
    return shared_base + static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - dynamic_shared());
}
// 128-byte swizzle: address bits 4 to 6 are XORed with bits 7 to 9.
inline unsigned char* swizzled(uint32_t address) {
    address ^= (address >> 7 & 7) << 4;
    if (address < shared_base || address >= shared_base + block().shared_bytes()) fail("an address outside the block's shared memory");
    return dynamic_shared() + (address - shared_base);
}

template <int COUNT>
void setmaxnreg_dec() {}
template <int COUNT>
void setmaxnreg_inc() {}

// ---- named barriers of the block ---------------------------------------------------------------------------------------------------
// A block has 16. All lanes of a warp execute the instruction together, and count as 32 threads.
inline void check_named_barrier(int barrier, int threads) {
    if (barrier < 0 || barrier > 15 || threads % 32 != 0) fail("a named barrier past 15, or of a part of a warp");
    block().meet({of_warp_at_barrier, static_cast<int>(threadIdx.x / 32) * 16 + barrier}, 32, [] {});
}
inline void named_barrier_sync(int barrier, int threads) {
    check_named_barrier(barrier, threads);
    block().meet({at_barrier, barrier}, threads, [] {});
}
inline void named_barrier_arrive(int barrier, int threads) {
    check_named_barrier(barrier, threads);
    block().arrive({at_barrier, barrier}, threads);
}
inline bool named_barrier_or(bool mine, int barrier, int threads) {
    static bool any[16], result[16];
    check_named_barrier(barrier, threads);
    any[barrier] = any[barrier] || mine;
    block().meet({at_barrier, barrier}, threads, [&] { result[barrier] = any[barrier], any[barrier] = false; });
    return result[barrier];
}

// ---- mbarriers, in shared memory ---------------------------------------------------------------------------------------------------
struct Barrier {
    int arrivals, missing;
    int64_t bytes;
    uint32_t phase;   // parity of the current phase
    uint32_t fenced;  // 1: initialised, and visible to all threads and to the copy engine

    void step() {
        if (missing == 0 && bytes == 0) missing = arrivals, phase ^= 1;
    }
    Barrier& ready() {
        if (fenced != 1) fail("an mbarrier is used before mbarrier_init and fence_mbarrier_init");
        return *this;
    }
};
inline std::vector<Barrier*>& unfenced_barriers() {
    static std::vector<Barrier*> all;
    return all;
}
inline void mbarrier_init(Barrier& barrier, int arrivals) {
    barrier = {arrivals, arrivals, 0, 0, 0};
    unfenced_barriers().push_back(&barrier);
}
inline void fence_mbarrier_init() {
    for (Barrier* barrier : std::exchange(unfenced_barriers(), {})) barrier->fenced = 1;
}
inline void mbarrier_arrive(Barrier& barrier) {
    if (barrier.ready().missing-- == 0) fail("more arrivals than the barrier expects");
    barrier.step();
}
inline void mbarrier_arrive_expect_tx(Barrier& barrier, uint32_t bytes) {
    barrier.ready().bytes += bytes;
    mbarrier_arrive(barrier);
}
inline void mbarrier_wait(Barrier& barrier, uint32_t parity) {
    block().wait_until([&barrier = barrier.ready(), parity] { return barrier.phase != parity; });
}

// ---- TMA loads --------------------------------------------------------------------------------------------------------------------
using TensorMap = CUtensorMap;
inline void prefetch_tensormap(const TensorMap&) {}
template <class... Index>
void tma_load(void* to, const TensorMap& map, Barrier& full, Index... index) {
    const std::array<int64_t, sizeof...(Index)> from{index...};
    if (static_cast<int>(from.size()) != map.rank) fail("a TMA load with another number of coordinates than its tensor map");
    const uint32_t address = shared_address(to);
    if (address % 1024 != 0) fail("a swizzled TMA load to an address that is not a multiple of 1024");
    block().in_the_background.push_back([=, &map, &full] {
        int64_t count = 1;
        for (int i = 0; i < map.rank; ++i) count *= map.box[i];
        for (int64_t element = 0; element < count; ++element) {
            int64_t rest = element, offset = 0;
            bool inside = true;
            for (int i = 0; i < map.rank; ++i) {
                const int64_t at = from[static_cast<size_t>(i)] + rest % map.box[i];
                rest /= map.box[i];
                inside = inside && at >= 0 && at < map.size[i];
                offset += at * map.stride[i];
            }
            uint16_t x = 0;
            if (inside) std::memcpy(&x, static_cast<const uint16_t*>(map.base) + offset, 2);
            std::memcpy(swizzled(address + static_cast<uint32_t>(element) * 2), &x, 2);
        }
        full.bytes -= count * 2;
        full.step();
    });
}
inline void tma_load_4d(void* to, const TensorMap& map, Barrier& full, int x0, int x1, int x2, int x3) { tma_load(to, map, full, x0, x1, x2, x3); }
inline void tma_load_5d(void* to, const TensorMap& map, Barrier& full, int x0, int x1, int x2, int x3, int x4) {
    tma_load(to, map, full, x0, x1, x2, x3, x4);
}

// ---- warpgroup MMA ----------------------------------------------------------------------------------------------------------------
struct Wgmma {
    int columns;
    bool half, add, transposed;
    uint64_t a, b;  // descriptors
    float* d[128];  // each thread's accumulators
    std::vector<float> before[128];
    const uint32_t* registers[128] = {};  // each thread's part of A, or null if it is in shared memory
};
// Registers that a thread gave to a wgmma.
struct Operand {
    const uint32_t* at;
    size_t words;
    std::vector<uint32_t> result;  // what the last wgmmas left in an accumulator
    std::vector<uint32_t> fenced;  // the values at the last wgmma_fence; empty: unknown, or a wgmma may have written them since
    unsigned group = 0;            // the last group of wgmmas that had it
    bool pinned = true;            // by fence_operand, since that group
    bool accumulator = false;
};
struct WarpgroupThread {
    bool fenced = false;
    unsigned committed = 0, done = 0;  // groups, and those that wgmma_wait has seen complete
    std::vector<Operand> operands;
};
struct Warpgroup {
    unsigned block = 0;
    std::shared_ptr<Wgmma> coming;
    std::vector<std::shared_ptr<Wgmma>> uncommitted;
    std::vector<std::vector<std::shared_ptr<Wgmma>>> groups;  // in flight, oldest first
    WarpgroupThread threads[128];

    WarpgroupThread& own() { return threads[threadIdx.x % 128]; }
};
inline Warpgroup& warpgroup() {
    static Warpgroup all[8];
    Warpgroup& mine = all[threadIdx.x / 128];
    if (mine.block != block().serial) mine = {}, mine.block = block().serial;
    return mine;
}
// Reads registers that may no longer be part of a live variable.
#if defined(__SANITIZE_ADDRESS__)
__attribute__((no_sanitize_address))
#endif
inline void copy_words(const volatile uint32_t* from, std::vector<uint32_t>& to, size_t words) {
    to.resize(words);
    uint32_t* const first = to.data();
    for (size_t i = 0; i < words; ++i) first[i] = from[i];
}
// The thread gives these registers to a wgmma.
inline void use(WarpgroupThread& thread, const void* registers, size_t words, bool accumulator) {
    const auto* at = static_cast<const uint32_t*>(registers);
    auto operand = std::find_if(thread.operands.begin(), thread.operands.end(), [at](const Operand& other) { return other.at == at; });
    if (operand == thread.operands.end()) operand = thread.operands.insert(operand, {at, words, {}, {}});
    const bool in_flight = accumulator && operand->accumulator && operand->group >= thread.done && !operand->pinned;
    if (!in_flight && !operand->fenced.empty() && !std::equal(at, at + words, operand->fenced.begin()))
        fail("registers of a wgmma were written after the fence before it");
    operand->words = words, operand->group = thread.committed, operand->accumulator = accumulator, operand->pinned = false;
}
inline float half_value(bool half, uint16_t bits) { return half ? static_cast<float>(bits_as<_Float16>(bits)) : __bfloat162float({bits}); }
// Element (row, column) of a matrix in panels of 64 columns and blocks of 8 rows, with rows 128 bytes apart.
inline float element(bool half, uint64_t descriptor, int row, int column) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("a descriptor without the 128-byte swizzle");
    const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
    const uint32_t start = field(0), panel = field(16), rows = field(32);
    uint16_t bits;
    std::memcpy(&bits, swizzled(start + column / 64 * panel + row / 8 * rows + row % 8 * 128 + column % 64 * 2), 2);
    return half_value(half, bits);
}
inline void compute(const Wgmma& p) {
    float a[64][16], b[16][128];
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < p.columns; ++n) b[k][n] = p.transposed ? element(p.half, p.b, k, n) : element(p.half, p.b, n, k);
    for (int thread = 0; thread < 128; ++thread)
        for (int i = 0; i < 8; ++i) {  // pairs: (row, columns), (row + 8, columns), (row, columns + 8), (row + 8, columns + 8)
            const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, k = thread % 4 * 2 + i % 2 + i / 4 * 8;
            a[row][k] = p.registers[thread] ? half_value(p.half, static_cast<uint16_t>(p.registers[thread][i / 2] >> (i % 2 * 16)))
                                            : element(p.half, p.a, row, k);
        }
    for (int thread = 0; thread < 128; ++thread)
        for (int i = 0; i < p.columns / 2; ++i) {
            const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
            float sum = p.add ? p.before[thread][static_cast<size_t>(i)] : 0.0f;
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            p.d[thread][i] = sum;
        }
}
// All threads of the warpgroup must issue the same wgmma. Until it completes, its results are NaN.
template <int N>
void issue(float (&d)[N], bool half, bool add, bool transposed, const uint32_t* registers, uint64_t a, uint64_t b) {
    Warpgroup& group = warpgroup();
    const int thread = static_cast<int>(threadIdx.x % 128);
    if (!group.coming) group.coming = std::make_shared<Wgmma>(Wgmma{2 * N, half, add, transposed, a, b, {}, {}, {}});
    Wgmma& p = *group.coming;
    if (p.columns != 2 * N || p.add != add || p.a != a || p.b != b || p.transposed != transposed)
        fail("threads of a warpgroup issue different wgmmas");
    if (!group.own().fenced) fail("a wgmma without a fence before it");
    use(group.own(), d, N, true);
    if (registers) use(group.own(), registers, 4, false);
    p.d[thread] = d, p.registers[thread] = registers;
    block().meet({of_warpgroup, static_cast<int>(threadIdx.x / 128)}, 128, [&group] {
        group.uncommitted.push_back(std::move(group.coming));
        group.coming = nullptr;
    });
    // wgmmas with the same accumulator run in order, so only the first one has an earlier value to save
    const auto& newest = group.uncommitted.back();
    bool first = true;
    for (const auto& other : group.uncommitted) first = first && (other == newest || other->d[thread] != d);
    if (first) {
        newest->before[thread].assign(d, d + N);
        std::fill(d, d + N, NAN);
    }
}
inline void wgmma_fence() {
    WarpgroupThread& thread = warpgroup().own();
    thread.fenced = true;
    for (Operand& operand : thread.operands) {
        const bool in_flight = operand.accumulator && operand.group >= thread.done;
        if (operand.accumulator && !in_flight && !operand.pinned) fail("an accumulator without fence_operand after the wait for it");
        operand.fenced.clear();
        if (!in_flight) copy_words(operand.at, operand.fenced, operand.words);
    }
}
inline void wgmma_commit() {
    Warpgroup& group = warpgroup();
    ++group.own().committed;
    block().meet({of_warpgroup, static_cast<int>(threadIdx.x / 128)}, 128, [&group] {
        group.groups.push_back(std::move(group.uncommitted));
        group.uncommitted.clear();
        block().in_the_background.push_back([&group] {
            for (const auto& p : group.groups.front()) {
                for (int thread = 0; thread < 128; ++thread)
                    if (p->before[thread].empty()) p->before[thread].assign(p->d[thread], p->d[thread] + p->columns / 2);
                compute(*p);
                for (int thread = 0; thread < 128; ++thread)
                    for (Operand& operand : group.threads[thread].operands)
                        if (operand.at == reinterpret_cast<const uint32_t*>(p->d[thread])) copy_words(operand.at, operand.result, operand.words);
            }
            group.groups.erase(group.groups.begin());
        });
    });
}
template <int PENDING>
void wgmma_wait() {
    Warpgroup& group = warpgroup();
    block().wait_until([&group] { return group.groups.size() <= PENDING; });
    WarpgroupThread& thread = group.own();
    thread.fenced = false;
    if (thread.committed >= PENDING) thread.done = std::max(thread.done, thread.committed - PENDING);
}
template <int N>
void fence_operand(float (&d)[N]) {
    WarpgroupThread& thread = warpgroup().own();
    for (Operand& operand : thread.operands) {
        if (operand.at != reinterpret_cast<const uint32_t*>(d) || operand.group >= thread.done || operand.pinned) continue;
        if (!std::equal(operand.result.begin(), operand.result.end(), operand.at)) fail("an accumulator was written before its fence_operand");
        operand.pinned = true;
    }
}

template <class T>
constexpr bool is_half = std::is_same_v<T, __half>;
template <class T>
void wgmma_ss(T, float (&d)[64], uint64_t a, uint64_t b, bool add) {
    issue(d, is_half<T>, add, false, nullptr, a, b);
}
template <class T, int N>
void wgmma_rs(T, float (&d)[N], const uint32_t* a, uint64_t b) {
    issue(d, is_half<T>, true, true, a, 0, b);
}

// ---- arithmetic -------------------------------------------------------------------------------------------------------------------
inline float ex2_approx(float x) { return std::exp2(x); }
inline float max_or_nan(float x, float y) { return x != x || y != y ? bits_as<float>(0x7fffffffu) : std::max(x, y); }  // the device's NaN
inline uint32_t pack(__nv_bfloat16, float low, float high) {
    return __float2bfloat16_rn(low).bits | static_cast<uint32_t>(__float2bfloat16_rn(high).bits) << 16;
}
inline uint32_t pack(__half, float low, float high) {
    return bits_as<uint16_t>(static_cast<_Float16>(low)) | static_cast<uint32_t>(bits_as<uint16_t>(static_cast<_Float16>(high))) << 16;
}

}  // namespace page4d::cuda

#endif
