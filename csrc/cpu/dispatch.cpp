// Selects the kernels of a level for a problem and runs them on threads.
#include <atomic>
#include <cstdlib>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.h"

#if defined(__linux__) && defined(PAGE4D_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace page4d {
namespace {

bool has_amx() {
#if defined(PAGE4D_EMULATE_AMX) && defined(PAGE4D_WITH_AMX)
    return true;  // loops replace the tile instructions; the rest of this level still needs AVX-512 BF16
#elif defined(__linux__) && defined(PAGE4D_WITH_AMX)
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned bf16 = 1u << 22, tile = 1u << 24;
    if ((d & bf16) == 0 || (d & tile) == 0) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

Level detect() {
    Level level = Level::scalar;
#if defined(PAGE4D_WITH_AVX2)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return level;
    level = Level::avx2;
#endif
#if defined(PAGE4D_WITH_AVX512)
    for (const bool has : {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512bw") != 0, __builtin_cpu_supports("avx512dq") != 0,
                           __builtin_cpu_supports("avx512vl") != 0})
        if (!has) return level;
    level = Level::avx512;
#endif
#if defined(PAGE4D_WITH_AVX512_BF16)
    if (!__builtin_cpu_supports("avx512bf16")) return level;
    level = Level::avx512_bf16;
#endif
    return has_amx() ? Level::amx : level;
}

const Kernels& kernels_of(Level level) {
    switch (level) {
#if defined(PAGE4D_WITH_AVX2)
        case Level::avx2: return kernels_avx2;
#endif
#if defined(PAGE4D_WITH_AVX512)
        case Level::avx512: return kernels_avx512;
#endif
#if defined(PAGE4D_WITH_AVX512_BF16)
        case Level::avx512_bf16: return kernels_avx512_bf16;
#endif
#if defined(PAGE4D_WITH_AMX)
        case Level::amx: return kernels_amx;
#endif
        default: return kernels_scalar;
    }
}

bool available(Level level) { return level >= Level::scalar && level <= best_level(); }

// Runs task(i, scratch) for every i on at most `threads` threads, including the calling thread. All other threads end before this function
// returns, so none of them spins beside the threads of the caller's framework.
template <class Task>
Status run_tasks(Plan plan, int threads, const Task& task) {
    const int64_t count = plan.tasks < threads ? plan.tasks : threads;
    const size_t bytes = (plan.scratch + 63) / 64 * 64;
    char* scratch = nullptr;
    if (bytes > 0) {
        scratch = static_cast<char*>(std::aligned_alloc(64, bytes * static_cast<size_t>(count)));
        if (!scratch) return Status::no_memory;
    }
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t thread) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < plan.tasks;)
            task(i, scratch ? scratch + static_cast<size_t>(thread) * bytes : nullptr);
    };
    std::vector<std::thread> others;
    try {
        others.reserve(static_cast<size_t>(count));
        for (int64_t thread = 1; thread < count; ++thread) others.emplace_back(work, thread);
    } catch (const std::exception&) {  // continue with fewer threads: tasks are assigned dynamically
    }
    work(0);
    for (std::thread& other : others) other.join();
    std::free(scratch);
    return Status::ok;
}

Status check(DType dtype, Level level) {
    if (dtype != DType::f32 && dtype != DType::bf16) return Status::bad_dtype;
    return available(level) ? Status::ok : Status::bad_level;
}

}  // namespace

Level best_level() {
    static const Level level = detect();
    return level;
}

double peak_rate(DType dtype, bool exponentials, int threads, Level level) {
    if (check(dtype, level) != Status::ok || threads < 1) return 0.0;
    const Kernels& kernels = kernels_of(level);
    if (!kernels.matmuls) return 0.0;
    std::vector<double> done(64 * static_cast<size_t>(threads));
    run_tasks({static_cast<int64_t>(done.size()), 0}, threads,
              [&](int64_t i, char*) { done[static_cast<size_t>(i)] = exponentials ? kernels.exponentials() : kernels.matmuls(dtype); });
    double total = 0.0;
    for (const double amount : done) total += amount;
    return total;
}

Status mask_attention(const MaskAttention& p) {
    if (const Status status = check(p.dtype, p.level); status != Status::ok) return status;
    if (p.batch < 0 || p.heads < 0 || p.queries < 0 || p.keys < 0 || p.head_dim < 1 || p.threads < 1) return Status::bad_sizes;
    if (p.batch == 0 || p.heads == 0 || p.queries == 0) return Status::ok;
    const bool missing_keys = p.keys > 0 && (!p.k || !p.v);
    if (!p.q || !p.out || !p.lse || missing_keys || (p.gate == nullptr) != (p.bias == nullptr)) return Status::null_pointer;
    const Kernels& kernels = kernels_of(p.level);
    return run_tasks(kernels.plan_attention(p), p.threads, [&](int64_t i, char* scratch) { kernels.attention(p, i, scratch); });
}

Status mask_head(const MaskHead& p) {
    if (const Status status = check(p.dtype, p.level); status != Status::ok) return status;
    if (const Status status = check(p); status != Status::ok) return status;
    if (p.threads < 1) return Status::bad_sizes;
    const Kernels& kernels = kernels_of(p.level);
    const size_t count = static_cast<size_t>(p.batch * p.frames * p.channels);
    float* memory = static_cast<float*>(std::malloc((2 * count + static_cast<size_t>(kernels.packed_w2(p))) * sizeof(float)));
    if (!memory) return Status::no_memory;
    const HeadWork made{memory, memory + count, memory + 2 * count};
    Status status = run_tasks(kernels.plan_prepare(p), p.threads, [&](int64_t i, char*) { kernels.prepare(p, made, i); });
    if (status == Status::ok)
        status = run_tasks(kernels.plan_head(p), p.threads, [&](int64_t i, char* scratch) { kernels.head(p, made, i, scratch); });
    std::free(memory);
    return status;
}

Status qk_norm_rope(const QkNormRope& p) {
    if (const Status status = check(p.dtype, p.level); status != Status::ok) return status;
    if (const Status status = check(p); status != Status::ok) return status;
    if (p.threads < 1) return Status::bad_sizes;
    const Kernels& kernels = kernels_of(p.level);
    return run_tasks(kernels.plan_rope(p), p.threads, [&](int64_t i, char* scratch) { kernels.rope(p, i, scratch); });
}

}  // namespace page4d
