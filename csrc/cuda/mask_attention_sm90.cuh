// Mask-modulated attention for Hopper, forward: softmax(q k^T * scale + r c^T) v. page4d_kernels/triton/mask_attention.py computes the
// same with the same row tiles, but without warp specialisation.
//
// Blocks are persistent: each processes several tiles of query rows in sequence. The producer warpgroup loads Q, K and V into shared memory by
// TMA, from a single thread. The consumer warpgroups compute 64 rows each:
//
//   S = Q K_0^T, softmax
//   for i = 1, 2, ...:  S = Q K_i^T, O += P V_{i-1}  both wgmmas are issued at once; the exponentials of S run under the second
//   O += P V_last
//
// The consumers issue in turns (`WarpSchedulerBarrier`), so that the exponentials of one run under the wgmmas of the others. At head dim
// 64 both take equally long. The key tile that may be ragged comes first, so the loop needs no mask. One exponential in POLYNOMIAL is computed
// by multiply-adds (`exp2_polynomial`; 0: none), as the special-function unit is a tight limit at head dim 64.
//
// Logits, softmax state and sums are fp32. Sums are rescaled only when a maximum has grown past a margin: until then, the exponentials are
// relative to an earlier maximum. As in the Triton kernel, without a bias the scale is folded into the exponent's factor. With a
// bias, logits are natural and log2(e) is applied after the maximum is subtracted.
//
// Include hopper.cuh first. To run on the CPU, include csrc/tests/hopper_on_cpu.h instead.
#pragma once

#include "schedule.h"
#include "values.cuh"

namespace page4d::cuda {

constexpr float log2e = 1.4426950408889634f;

template <class T, int D>
struct AttentionTile {
    static constexpr int consumers = D == 64 ? 3 : 2, rows = 64 * consumers, keys = 128, stages = D == 64 ? 4 : 2;
    static constexpr int threads = 128 * (consumers + 1);
    static constexpr int producer_registers = D == 64 ? 32 : 24, consumer_registers = D == 64 ? 160 : 240;
    static constexpr int launch_registers = 65536 / threads / 8 * 8;  // a test checks that ptxas uses as many
    static_assert(producer_registers + consumers * consumer_registers <= (consumers + 1) * launch_registers, "consumers would wait forever");
    static constexpr int panels = D / 64;  // of 64 columns, 128 bytes: the widest rows that TMA and wgmma can swizzle
    static_assert(sizeof(T) == 2 && D % 64 == 0);
};

// 128-byte rows with the 128-byte swizzle: the row number permutes the eight 16-byte chunks of a row, so a column of chunks is in different
// banks. TMA and wgmma derive the permutation from the address, so every tile must start at a multiple of 1024 bytes.
template <class T, int ROWS, int D>
struct alignas(1024) SwizzledTile {
    T at[D / 64][ROWS][64];
    __device__ T* chunk(int panel, int row, int chunk) { return &at[panel][row][(chunk ^ (row % 8)) * 8]; }
};

template <class T, int D>
struct AttentionShared {
    using Tile = AttentionTile<T, D>;
    SwizzledTile<T, Tile::rows, D> q, out;
    SwizzledTile<T, Tile::keys, D> k[Tile::stages], v[Tile::stages];
    Barrier q_full, q_empty, k_full[Tile::stages], k_empty[Tile::stages], v_full[Tile::stages], v_empty[Tile::stages];
};

struct AttentionArguments {
    TensorMap q, q_packed, k, v;  // (D, N, H, B) in tiles of 64 columns; q_packed (D, special, frames, H, B)
    const float* gate;            // r (B, Nq), or null for no bias
    const float* bias;            // c (B, Nk)
    void* out;                    // (B, H, Nq, D)
    float* lse;                   // (B, H, Nq)
    float* out_partial;           // (splits, B, H, Nq, D): written in place of out if the keys are split
    float* lse_partial;           // (splits, B, H, Nq): likewise, in place of lse
    int64_t out_stride[3], gate_stride, bias_stride;
    float scale;
    float rescale_margin[2];  // of a row's maximum, without and with a bias
    TileScheduler schedule;
};

// The ring stage of the n-th tile, and the parity of the mbarrier phase that it fills.
template <int STAGES>
struct PipelineState {
    static_assert((STAGES & (STAGES - 1)) == 0);
    int stage;
    uint32_t parity;
    __device__ explicit PipelineState(uint32_t n) : stage(n % STAGES), parity(n / STAGES % 2) {}
};

// The wgmma descriptor of a matrix in shared memory: its address, and the bytes between blocks of 8 rows and between panels.
__device__ inline uint64_t wgmma_descriptor(const void* matrix, uint32_t panel_bytes) {
    constexpr uint64_t swizzle_128 = uint64_t{1} << 62, block_bytes = 8 * 128;
    return swizzle_128 | (block_bytes >> 4) << 32 | static_cast<uint64_t>(panel_bytes >> 4) << 16 | ((shared_address(matrix) & 0x3ffff) >> 4);
}

// The descriptor of a matrix `bytes` further on. Its address is in the lower half, where it does not overflow.
__device__ inline uint64_t descriptor_at(uint64_t first, uint32_t bytes) {
    return (first & 0xffffffff00000000) | (static_cast<uint32_t>(first) + bytes / 16);
}

// 2^x for x < 128, without the special-function unit. x = n + f with |f| <= 1/2, a cubic gives 2^f, and n becomes the exponent of a factor. The
// relative error of 8e-5 is below the rounding of bf16 and fp16. Smaller x are clamped to -125, so the sum of a row of -inf is not 0;
// `fully_masked` therefore also tests the row maximum. NaN stays NaN: adding n to the exponent bits of 2^f instead would lose it.
__device__ inline float exp2_polynomial(float x) {
    constexpr float round = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it leaves n in the lowest bits, and 127 is the bias of exponents
    x = max_or_nan(x, -125.0f);
    const float shifted = x + round, f = x - (shifted - round);
    return fmaf(fmaf(fmaf(0.05517167f, f, 0.24261112f), f, 0.69326099f), f, 0.99992807f) * __int_as_float(__float_as_int(shifted) << 23);
}

template <class T, int D>
__device__ void load(const AttentionArguments& p, AttentionShared<T, D>& shared) {
    using Tile = AttentionTile<T, D>;
    const TileScheduler& schedule = p.schedule;
    uint32_t loaded_q = 0, loaded_k = 0, loaded_v = 0;
    for (int index = blockIdx.x; index < schedule.work; index += gridDim.x) {
        const WorkTile work = schedule.at(index);
        const bool packed = schedule.packed(work.tile);
        mbarrier_wait(shared.q_empty, ++loaded_q % 2);
        mbarrier_arrive_expect_tx(shared.q_full,
                                  static_cast<uint32_t>((packed ? schedule.packed_frames * schedule.special : Tile::rows) * D * sizeof(T)));
        for (int panel = 0; panel < Tile::panels; ++panel)
            if (packed)
                tma_load_5d(shared.q.at[panel], p.q_packed, shared.q_full, panel * 64, 0, work.tile * schedule.packed_frames, work.head, work.batch);
            else
                tma_load_4d(shared.q.at[panel], p.q, shared.q_full, panel * 64, (work.tile - schedule.packed_tiles) * Tile::rows, work.head,
                            work.batch);
        const auto fill = [&](const TensorMap& map, auto& ring, auto& full, auto& empty, uint32_t n, int tile) {
            const PipelineState<Tile::stages> state(n);
            mbarrier_wait(empty[state.stage], state.parity ^ 1);
            mbarrier_arrive_expect_tx(full[state.stage], static_cast<uint32_t>(sizeof(ring[0])));
            for (int panel = 0; panel < Tile::panels; ++panel)
                tma_load_4d(ring[state.stage].at[panel], map, full[state.stage], panel * 64, tile * Tile::keys, work.head, work.batch);
        };
#pragma unroll 1
        for (int tile = work.last_key_tile - 1; tile >= work.first_key_tile - 1; --tile) {  // in order of use: K is one tile ahead of V
            if (tile >= work.first_key_tile) fill(p.k, shared.k, shared.k_full, shared.k_empty, loaded_k++, tile);
            if (tile < work.last_key_tile - 1) fill(p.v, shared.v, shared.v_full, shared.v_empty, loaded_v++, tile + 1);
        }
    }
}

// The consumers take turns, in a ring, to issue their wgmmas.
template <int CONSUMERS>
struct WarpSchedulerBarrier {
    int mine;
    __device__ explicit WarpSchedulerBarrier(int consumer) : mine(consumer) {
        if (mine == CONSUMERS - 1) pass();  // the first one begins
    }
    __device__ void wait() const { named_barrier_sync(1 + mine, 256); }
    __device__ void pass() const { named_barrier_arrive(1 + (mine + 1) % CONSUMERS, 256); }
};

// A consumer warpgroup computes 64 rows, 16 per warp. Each of its threads holds two of them, rows lane / 4 and lane / 4 + 8 of its warp. Of each
// 8-column group j it holds columns 8 j + 2 (lane % 4) + {0, 1}. Accumulator element i is column i % 2 of row (i / 2) % 2 of group i / 4.
template <class T, int D, int POLYNOMIAL>
struct Consumer {
    using Tile = AttentionTile<T, D>;
    static constexpr int logits = Tile::keys / 2;  // per thread

    const AttentionArguments& p;
    AttentionShared<T, D>& shared;
    const int number;  // of the consumer
    const WarpSchedulerBarrier<Tile::consumers> scheduler_barrier;
    uint32_t tiles_q = 0, tiles_k = 0;  // tiles of queries and of keys taken from the ring so far

    float out[D / 2];
    uint32_t probs[logits / 2];  // P, as wgmma_rs reads it
    float row_max[2], row_sum[2], gate[2];

    __device__ Consumer(const AttentionArguments& p, AttentionShared<T, D>& shared, int number)
        : p(p), shared(shared), number(number), scheduler_barrier(number) {}

    struct ThreadCoord {
        int thread, lane, row;  // thread of the warpgroup, lane of the warp, and the first row of the tile; the second is row + 8
    };
    // Recomputed for each tile: the loop over keys has no registers left to keep it.
    __device__ static ThreadCoord thread_coord() {
        int thread = threadIdx.x;
        forget(thread);
        return {thread % 128, thread % 32, (thread / 128 - 1) * 64 + thread / 32 % 4 * 16 + thread % 32 / 4};
    }

    // Each warp arrives once it no longer reads a stage of shared memory.
    __device__ static void release(Barrier& empty) {
        if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
    }

    __device__ void issue_logits(float (&s)[logits], int stage) const {
        constexpr uint32_t panel = sizeof(shared.q.at[0]), panel_k = sizeof(shared.k[0].at[0]);
        const uint64_t q = wgmma_descriptor(&shared.q.at[0][64 * number], panel),
                       keys = descriptor_at(wgmma_descriptor(&shared.k[0], panel_k), stage * sizeof(shared.k[0]));
#pragma unroll
        for (int i = 0; i < D / 16; ++i)  // 16 columns are 32 bytes; addresses count 16
            wgmma_ss(T{}, s, q + (i / 4 * panel + i % 4 * 32) / 16, keys + (i / 4 * panel_k + i % 4 * 32) / 16, i > 0);
        wgmma_commit();
    }

    __device__ void issue_values(int stage) {
        const uint64_t values = descriptor_at(wgmma_descriptor(&shared.v[0], sizeof(shared.v[0].at[0])), stage * sizeof(shared.v[0]));
#pragma unroll
        for (int i = 0; i < Tile::keys / 16; ++i) wgmma_rs(T{}, out, probs + 4 * i, values + i * 16 * 128 / 16);  // 16 rows of 128 bytes
        wgmma_commit();
    }

    // Adds the bias (logits are then natural), masks keys past the end, and leaves the exponentials in `s`. Returns whether the maxima of the
    // warp's rows changed; `rescale` is then the factor for the earlier values of `out`, and that of row_sum is applied.
    template <bool BIASED>
    __device__ bool softmax(float (&s)[logits], int tile, const float* bias, bool ragged, float (&rescale)[2]) {
        const int column = tile * Tile::keys + threadIdx.x % 4 * 2, keys = p.schedule.keys;
        if (BIASED) {
#pragma unroll
            for (int i = 0; i < logits; i += 4)
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
                    const int n = column + 2 * i + odd;
                    const float c = n < keys ? bias[n] : 0.0f;
                    s[i + odd] = fmaf(gate[0], c, s[i + odd] * p.scale);
                    s[i + odd + 2] = fmaf(gate[1], c, s[i + odd + 2] * p.scale);
                }
        }
        if (ragged) {
#pragma unroll
            for (int i = 0; i < logits; ++i)
                if (column + i / 4 * 8 + i % 2 >= keys) s[i] = -INFINITY;
        }
        const float to_base2 = BIASED ? log2e : p.scale * log2e;
        float row_max_new[2];
        bool grows = false;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float& most = row_max_new[row] = row_max[row];
#pragma unroll
            for (int i = 2 * row; i < logits; i += 4) most = fmaxf(most, fmaxf(s[i], s[i + 1]));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
            grows = grows || most - row_max[row] > p.rescale_margin[BIASED];  // not while both are -inf
        }
        const bool rescaled = __any_sync(0xffffffffu, grows);  // soon becomes rare
        if (rescaled) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                rescale[row] = ex2_approx((row_max[row] - finite(row_max_new[row])) * to_base2);
                row_max[row] = row_max_new[row], row_sum[row] *= rescale[row];
            }
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float shift = finite(row_max[row]), scaled = shift * to_base2;
            float sum = 0.0f;
#pragma unroll
            for (int i = 2 * row; i < logits; i += 4)
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
                    const float x = BIASED ? (s[i + odd] - shift) * log2e : fmaf(s[i + odd], to_base2, -scaled);
                    s[i + odd] = by_polynomial(i / 2 + odd) ? exp2_polynomial(x) : ex2_approx(x);
                    sum += s[i + odd];
                }
            row_sum[row] += sum;
        }
        return rescaled;
    }

    __device__ static float finite(float row_max) { return row_max == -INFINITY ? 0.0f : row_max; }
    __device__ static constexpr bool by_polynomial(int i) { return POLYNOMIAL > 0 && (i + 1) % (POLYNOMIAL > 0 ? POLYNOMIAL : 1) == 0; }

    __device__ void round_probs(const float (&s)[logits]) {
#pragma unroll
        for (int i = 0; i < logits / 2; ++i) probs[i] = pack(T{}, s[2 * i], s[2 * i + 1]);
    }

    template <bool BIASED>
    __device__ void mma(int tile, int first_tile, const float* bias) {
#pragma unroll
        for (float& x : out) x = 0.0f;
        row_max[0] = row_max[1] = -INFINITY, row_sum[0] = row_sum[1] = 0.0f;
        float s[logits], rescale[2];

        mbarrier_wait(shared.q_full, tiles_q++ % 2);
        PipelineState<Tile::stages> current(tiles_k++);  // stage of the key tile whose logits are computed; its V is used one step later
        mbarrier_wait(shared.k_full[current.stage], current.parity);
        wgmma_fence();
        issue_logits(s, current.stage);
        wgmma_wait<0>();
        fence_operand(s);
        release(shared.k_empty[current.stage]);
        softmax<BIASED>(s, tile, bias, (tile + 1) * Tile::keys > p.schedule.keys, rescale);
        round_probs(s);

#pragma unroll 1
        while (--tile >= first_tile) {
            const PipelineState<Tile::stages> previous = current;
            current = PipelineState<Tile::stages>(tiles_k++);
            mbarrier_wait(shared.k_full[current.stage], current.parity);
            scheduler_barrier.wait();
            wgmma_fence();
            issue_logits(s, current.stage);
            mbarrier_wait(shared.v_full[previous.stage], previous.parity);
            wgmma_fence();
            issue_values(previous.stage);
            scheduler_barrier.pass();
            wgmma_wait<BIASED ? 0 : 1>();  // registers do not suffice to run a wgmma under a softmax with a bias
            fence_operand(s);
            release(shared.k_empty[current.stage]);
            const bool rescaled = softmax<BIASED>(s, tile, bias, false, rescale);
            if (row_sum[0] + row_sum[1] < 0.0f) __trap();  // never taken: keeps ptxas from moving the wait before the exponentials
            wgmma_wait<0>();
            fence_operand(out);
            release(shared.v_empty[previous.stage]);
            if (rescaled)
#pragma unroll
                for (int i = 0; i < D / 2; ++i) out[i] *= rescale[i / 2 % 2];
            round_probs(s);
        }

        release(shared.q_empty);
        mbarrier_wait(shared.v_full[current.stage], current.parity);
        wgmma_fence();
        issue_values(current.stage);
        wgmma_wait<0>();
        fence_operand(out);
        release(shared.v_empty[current.stage]);
    }

    // Divides by the sum and writes the rows of this tile. 16-bit results pass through shared memory to be stored in runs of 128 bytes.
    template <bool BIASED>
    __device__ void epilogue(const WorkTile& work) {
        const TileScheduler& schedule = p.schedule;
        const ThreadCoord coord = thread_coord();
        const int64_t head = static_cast<int64_t>(work.batch) * schedule.heads + work.head;
        const int64_t split = static_cast<int64_t>(work.split) * schedule.batch * schedule.heads + head;
        const bool whole = schedule.splits == 1;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            row_sum[row] += __shfl_xor_sync(0xffffffffu, row_sum[row], 1);
            row_sum[row] += __shfl_xor_sync(0xffffffffu, row_sum[row], 2);
            const bool fully_masked = row_sum[row] == 0.0f || (row_max[row] == -INFINITY && row_sum[row] == row_sum[row]);  // all logits -inf
            const float factor = fully_masked ? 0.0f : 1.0f / row_sum[row];
            const int n = schedule.row(work.tile, coord.row + 8 * row);
            if (n >= 0 && coord.lane % 4 == 0) {
                const float lse = fully_masked ? -INFINITY : (BIASED ? row_max[row] : row_max[row] * p.scale) + logf(row_sum[row]);
                (whole ? p.lse + head * schedule.queries : p.lse_partial + split * schedule.queries)[n] = lse;
            }
#pragma unroll
            for (int i = 2 * row; i < D / 2; i += 4) out[i] *= factor, out[i + 1] *= factor;
            if (!whole && n >= 0) {
                float* const to = p.out_partial + (split * schedule.queries + n) * D + coord.lane % 4 * 2;
#pragma unroll
                for (int i = 2 * row; i < D / 2; i += 4) *reinterpret_cast<float2*>(to + i / 4 * 8) = make_float2(out[i], out[i + 1]);
            }
        }
        if (!whole) return;

        const int barrier = 1 + Tile::consumers + number;
        named_barrier_sync(barrier, 128);  // all threads have read the previous tile's rows
#pragma unroll
        for (int i = 0; i < D / 2; i += 2) {
            const int row = coord.row + i / 2 % 2 * 8, group = i / 4;
            *reinterpret_cast<uint32_t*>(shared.out.chunk(group / 8, row, group % 8) + coord.lane % 4 * 2) = pack(T{}, out[i], out[i + 1]);
        }
        named_barrier_sync(barrier, 128);
        T* const base = static_cast<T*>(p.out) + work.batch * p.out_stride[0] + work.head * p.out_stride[1];
#pragma unroll 1
        for (int i = coord.thread; i < 64 * 8; i += 128) {
            const int row = 64 * number + i / 8, n = schedule.row(work.tile, row);
            if (n < 0) continue;
#pragma unroll
            for (int panel = 0; panel < Tile::panels; ++panel)
                *reinterpret_cast<int4*>(base + n * p.out_stride[2] + panel * 64 + i % 8 * 8) =
                    *reinterpret_cast<const int4*>(shared.out.chunk(panel, row, i % 8));
        }
    }

    template <bool BIASED>
    __device__ void mma_and_epilogue(int index) {
        const WorkTile work = p.schedule.at(index);
        mma<BIASED>(work.last_key_tile - 1, work.first_key_tile, BIASED ? p.bias + work.batch * p.bias_stride : nullptr);
        forget(index);  // recomputing it is cheaper than keeping it in registers
        epilogue<BIASED>(p.schedule.at(index));
    }

    __device__ void run() {
        const TileScheduler& schedule = p.schedule;
        for (int index = blockIdx.x; index < schedule.work; index += gridDim.x) {
            const WorkTile work = schedule.at(index);
            bool biased = schedule.packed(work.tile);
            gate[0] = gate[1] = 0.0f;
            if (p.gate && (biased || schedule.special == 0)) {
                const ThreadCoord coord = thread_coord();
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    const int n = schedule.row(work.tile, coord.row + 8 * row);
                    if (n >= 0) gate[row] = p.gate[work.batch * p.gate_stride + n];
                }
                // without a layout, any row may be gated
                if (schedule.special == 0) biased = named_barrier_or(gate[0] != 0.0f || gate[1] != 0.0f, 1 + Tile::consumers + number, 128);
            }
            if (biased)
                mma_and_epilogue<true>(index);
            else
                mma_and_epilogue<false>(index);
        }
    }
};

// Launched with one block per multiprocessor, or fewer if there are fewer work tiles.
template <class T, int D, int POLYNOMIAL>
__global__ void __launch_bounds__(AttentionTile<T, D>::threads, 1) mask_attention_fwd_kernel(const __grid_constant__ AttentionArguments p) {
    using Tile = AttentionTile<T, D>;
    auto& shared = *reinterpret_cast<AttentionShared<T, D>*>(dynamic_shared());
    if (threadIdx.x == 0) {
        prefetch_tensormap(p.q), prefetch_tensormap(p.k), prefetch_tensormap(p.v);
        constexpr int warps = 4 * Tile::consumers;
        mbarrier_init(shared.q_full, 1), mbarrier_init(shared.q_empty, warps);
        for (int i = 0; i < Tile::stages; ++i) {
            mbarrier_init(shared.k_full[i], 1), mbarrier_init(shared.k_empty[i], warps);
            mbarrier_init(shared.v_full[i], 1), mbarrier_init(shared.v_empty[i], warps);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);  // so ptxas knows that it is uniform in a warp
    if (warpgroup == 0) {
        setmaxnreg_dec<Tile::producer_registers>();
        if (threadIdx.x == 0) load<T, D>(p, shared);
    } else {
        setmaxnreg_inc<Tile::consumer_registers>();
        Consumer<T, D, POLYNOMIAL>(p, shared, warpgroup - 1).run();
    }
    __syncthreads();  // ptxas gives each role its own register count only if the roles meet again at the end
}

constexpr int merge_threads = 128;

// One thread per four columns of a row.
template <class T, int D>
__global__ void __launch_bounds__(merge_threads) mask_attention_fwd_kernel_merge(const __grid_constant__ AttentionArguments p) {
    const TileScheduler& schedule = p.schedule;
    const int64_t rows = static_cast<int64_t>(schedule.batch) * schedule.heads * schedule.queries;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * merge_threads + threadIdx.x, row = index / (D / 4);
    const int column = static_cast<int>(index % (D / 4)) * 4;
    if (row >= rows) return;
    Merge merge;
    for (int i = 0; i < schedule.splits; ++i) merge.see(p.lse_partial[i * rows + row]);
    float sum[4] = {};
    for (int i = 0; i < schedule.splits; ++i) {
        const float weight = merge.weight(p.lse_partial[i * rows + row]);
        const float* partial = p.out_partial + (i * rows + row) * D + column;
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += weight * partial[j];
    }
    const int64_t head = row / schedule.queries, n = row % schedule.queries;
    T* to = static_cast<T*>(p.out) + head / schedule.heads * p.out_stride[0] + head % schedule.heads * p.out_stride[1] + n * p.out_stride[2] + column;
#pragma unroll
    for (int j = 0; j < 4; j += 2) *reinterpret_cast<uint32_t*>(to + j) = pack(T{}, sum[j] * merge.factor(), sum[j + 1] * merge.factor());
    if (column == 0) p.lse[row] = merge.lse();
}

}  // namespace page4d::cuda
