// The mask head in two passes over the tokens, without a copy of them. page4d_kernels/triton/mask_head.py computes the same.
//
// `mask_head_fwd_kernel_stats` computes the mean and 1 / standard deviation of each channel of each frame. A block of `mask_head_fwd_kernel`
// processes 128 patches of a frame in blocks of 32 channels. It normalises the patches and their neighbours into shared memory, convolves
// them and applies GELU. Then it multiplies with the matching columns of W2, which cp.async loads during the convolution. The MMAs are tf32,
// three in place of one for fp32 tokens. GELU, the sum over the hidden layer, the channel mean and the sigmoid follow at the end.
//
// Include ampere.cuh first. To run on the CPU, include csrc/tests/ampere_on_cpu.h instead.
#pragma once

#include "page4d/mask_head.h"
#include "values.cuh"

namespace page4d::cuda {

// Mean and sum of squared deviations of `count` values. Merging does not lose precision, even for a large mean.
struct Moments {
    float count, mean, m2;
    __device__ void merge(const Moments& other) {
        const float total = count + other.count, step = other.mean - mean;
        if (total == 0.0f) return;
        mean += step * (other.count / total);
        m2 += other.m2 + step * step * (count * other.count / total);
        count = total;
    }
};

// Loads channels of a token as fp32, with 0 past the `available` ones.
template <class T>
__device__ inline void load_channels(float (&x)[Pack<T>::size], const T* from, int64_t stride, int available, bool aligned) {
    if (aligned && available >= Pack<T>::size) {
        load(x, from, true);
        return;
    }
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) x[i] = i < available ? value(from[i * stride]) : 0.0f;
}

// Whether channels are contiguous and each token starts at a multiple of 16 bytes.
template <class T>
inline bool aligned(const MaskHead& p) {
    bool all = reinterpret_cast<uintptr_t>(p.tokens) % 16 == 0 && p.stride[3] == 1;
    for (int i = 0; i < 3; ++i) all = all && p.stride[i] * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    return all;
}

struct HeadStatistics {
    float *mean, *rstd;  // (batch * frames, channels)
};

template <class T>
struct StatisticsTile {
    static constexpr int lanes = 8, channels = lanes * Pack<T>::size, rows = 32, threads = lanes * rows, at_once = 8;
};

// Grid (batch * frames, blocks of channels).
template <class T>
__global__ void __launch_bounds__(StatisticsTile<T>::threads) mask_head_fwd_kernel_stats(const MaskHead p, const HeadStatistics to, bool aligned) {
    using Tile = StatisticsTile<T>;
    constexpr int size = Pack<T>::size;
    const int lane = threadIdx.x % Tile::lanes, row = threadIdx.x / Tile::lanes, channel = blockIdx.y * Tile::channels + lane * size;
    const int patches = static_cast<int>(p.height * p.width), channels = static_cast<int>(p.channels);
    const T* from = static_cast<const T*>(p.tokens) + blockIdx.x / p.frames * p.stride[0] + blockIdx.x % p.frames * p.stride[1] +
                    p.special * p.stride[2] + channel * p.stride[3];
    Moments moments[size] = {};
    if (channel < channels)
        for (int first = row; first < patches; first += Tile::rows * Tile::at_once) {
            float x[Tile::at_once][size];
            float count = 0.0f;
#pragma unroll
            for (int i = 0; i < Tile::at_once; ++i) {
                const int patch = first + i * Tile::rows;
                if (patch >= patches) continue;
                count += 1.0f;
                load_channels(x[i], from + patch * p.stride[2], p.stride[3], channels - channel, aligned);
            }
#pragma unroll
            for (int c = 0; c < size; ++c) {
                Moments block{count, 0.0f, 0.0f};
#pragma unroll
                for (int i = 0; i < Tile::at_once; ++i)
                    if (first + i * Tile::rows < patches) block.mean += x[i][c];
                block.mean /= count;
#pragma unroll
                for (int i = 0; i < Tile::at_once; ++i)
                    if (first + i * Tile::rows < patches) block.m2 += (x[i][c] - block.mean) * (x[i][c] - block.mean);
                moments[c].merge(block);
            }
        }

    __shared__ Moments shared[Tile::rows][Tile::channels];
#pragma unroll
    for (int c = 0; c < size; ++c) shared[row][lane * size + c] = moments[c];
    for (int half = Tile::rows / 2; half > 0; half /= 2) {
        __syncthreads();
        if (row < half)
#pragma unroll
            for (int c = 0; c < size; ++c) shared[row][lane * size + c].merge(shared[row + half][lane * size + c]);
    }
    if (row > 0) return;
#pragma unroll
    for (int c = 0; c < size; ++c) {
        if (channel + c >= channels) break;
        const Moments& all = shared[0][lane * size + c];
        const float deviation = sqrtf(all.m2 / (patches - 1));
        const int64_t at = static_cast<int64_t>(blockIdx.x) * channels + channel + c;
        to.mean[at] = all.mean, to.rstd[at] = 1.0f / (deviation <= p.min_std ? p.min_std : deviation);  // NaN stays
    }
}

__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f)); }

template <int HIDDEN>
struct HeadTile {
    static constexpr int patches = 128, channels = 32, threads = 512, pitch = channels + 4;  // 8 rows of a column are in different banks
    static constexpr int across = 4, columns = HIDDEN / across / 8;  // warps side by side, and groups of 8 hidden units per warp
    // patches of a tile and their neighbours, up to one row and one column away
    __host__ __device__ static int window(int width) { return patches + 2 * (width + 1); }
    __host__ __device__ static int floats(int width) {
        return HIDDEN * pitch + patches * pitch + window(width) * channels + 2 * 12 * channels + (across + 1) * patches;
    }
};

// Grid (tiles of patches, batch * frames). At most HIDDEN hidden units.
template <class T, int HIDDEN>
__global__ void __launch_bounds__(HeadTile<HIDDEN>::threads) mask_head_fwd_kernel(const MaskHead p, const HeadStatistics statistics, bool aligned) {
    using Tile = HeadTile<HIDDEN>;
    constexpr int size = Pack<T>::size, C = Tile::channels;
    constexpr bool three = sizeof(T) == 4;  // MMAs in place of one, for the precision of fp32
    const int patches = static_cast<int>(p.height * p.width), width = static_cast<int>(p.width), height = static_cast<int>(p.height);
    const int channels = static_cast<int>(p.channels), hidden = static_cast<int>(p.hidden);
    int thread = threadIdx.x;
    const int first = blockIdx.x * Tile::patches, window = Tile::window(width), before = width + 1;  // patches of the window before the first
    const T* const from =
        static_cast<const T*>(p.tokens) + blockIdx.y / p.frames * p.stride[0] + blockIdx.y % p.frames * p.stride[1] + p.special * p.stride[2];
    const float *const mean = statistics.mean + static_cast<int64_t>(blockIdx.y) * channels, *const rstd =
                                                                                                 statistics.rstd +
                                                                                                 static_cast<int64_t>(blockIdx.y) * channels;

    float* const w2 = dynamic_floats();                         // [HIDDEN][pitch]
    float* const active = w2 + HIDDEN * Tile::pitch;            // [patches][pitch]: after the convolution and GELU
    float* const z = active + Tile::patches * Tile::pitch;      // [window][C]: normalised tokens
    float* const parameters = z + window * C;                   // twice [12][C]: nine taps, bias, mean, rstd
    float* const sums = parameters + 2 * 12 * C;                // [across][patches]: sums over each warp's hidden units
    float* const totals = sums + Tile::across * Tile::patches;  // [patches]: sums of z over channels

    const auto load_parameters = [&](int block) {
        float* const to = parameters + block % 2 * 12 * C;
        for (int i = thread; i < 12 * C; i += Tile::threads) {
            const int row = i / C, c = block * C + i % C;
            float x = 0.0f;  // channels past the end contribute 0
            if (c < channels) x = row < 9 ? p.w0[c * 9 + row] : row == 9 ? p.b0[c] : row == 10 ? mean[c] : rstd[c];
            to[i] = x;
        }
    };
    const auto load_w2 = [&](int block) {
        if (channels % 4 == 0 && reinterpret_cast<uintptr_t>(p.w2) % 16 == 0)
#pragma unroll 1
            for (int i = thread; i < HIDDEN * C / 4; i += Tile::threads) {
                const int n = i / (C / 4), c = block * C + i % (C / 4) * 4;
                const bool valid = n < hidden && c < channels;
                cp_async<16>(w2 + n * Tile::pitch + i % (C / 4) * 4, valid ? p.w2 + static_cast<int64_t>(n) * channels + c : p.w2, valid);
            }
        else
#pragma unroll 1
            for (int i = thread; i < HIDDEN * C; i += Tile::threads) {
                const int n = i / C, c = block * C + i % C;
                const bool valid = n < hidden && c < channels;
                cp_async<4>(w2 + n * Tile::pitch + i % C, valid ? p.w2 + static_cast<int64_t>(n) * channels + c : p.w2, valid);
            }
    };

    const int lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const int row0 = warp / Tile::across * 32, column0 = warp % Tile::across * Tile::columns * 8;
    float out[2][Tile::columns][4] = {};
    constexpr int items = Tile::patches * C / 4 / Tile::threads;  // per thread, of four channels of a patch each
    float total[items] = {};

    load_parameters(0);
    __syncthreads();
    for (int block = 0; block * C < channels; ++block) {
        const float* const own = parameters + block % 2 * 12 * C;
        forget(thread);  // registers cannot hold the positions of patches and neighbours between blocks
        for (int i = thread; i < window * (C / size); i += Tile::threads) {
            const int row = i / (C / size), c = i % (C / size) * size, patch = first - before + row;
            float x[size] = {};
            if (patch >= 0 && patch < patches && block * C + c < channels)
                load_channels(x, from + patch * p.stride[2] + (block * C + c) * p.stride[3], p.stride[3], channels - block * C - c, aligned);
#pragma unroll
            for (int j = 0; j < size; ++j) z[row * C + c + j] = (x[j] - own[10 * C + c + j]) * own[11 * C + c + j];
        }
        __syncthreads();  // z is complete, and all MMAs of the previous block are done
        load_w2(block);
        load_parameters(block + 1);

#pragma unroll
        for (int item = 0; item < items; ++item) {
            const int i = thread + item * Tile::threads, c = i % (C / 4) * 4, at = i / (C / 4), patch = first + at, y = patch / width,
                      x = patch % width;
            float a[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) a[j] = own[9 * C + c + j];
#pragma unroll
            for (int tap = 0; tap < 9; ++tap) {
                const int dy = tap / 3 - 1, dx = tap % 3 - 1;
                if (patch >= patches || y + dy < 0 || y + dy >= height || x + dx < 0 || x + dx >= width)
                    continue;  // padding is applied after normalisation
                const float* const neighbour = z + (before + at + dy * width + dx) * C + c;
#pragma unroll
                for (int j = 0; j < 4; ++j) a[j] += own[tap * C + c + j] * neighbour[j];
                if (tap == 4) total[item] += (neighbour[0] + neighbour[1]) + (neighbour[2] + neighbour[3]);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) active[at * Tile::pitch + c + j] = gelu(a[j]);
        }
        cp_async_wait_all();
        __syncthreads();

#pragma unroll 1
        for (int k = 0; k < C; k += 8) {
            float a[2][4], a_rest[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float x = active[(row0 + m * 16 + g + i % 2 * 8) * Tile::pitch + k + t + i / 2 * 4];
                    a[m][i] = to_tf32(x);
                    if (three) a_rest[m][i] = to_tf32(x - a[m][i]);
                }
#pragma unroll
            for (int n = 0; n < Tile::columns; ++n) {
                float b[2], b_rest[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float x = w2[(column0 + n * 8 + g) * Tile::pitch + k + t + i * 4];
                    b[i] = to_tf32(x);
                    if (three) b_rest[i] = to_tf32(x - b[i]);
                }
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    if (three) mma_m16n8k8_tf32(out[m][n], a_rest[m], b), mma_m16n8k8_tf32(out[m][n], a[m], b_rest);
                    mma_m16n8k8_tf32(out[m][n], a[m], b);
                }
            }
        }
    }

#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < Tile::columns; ++n)
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
                    const int column = column0 + n * 8 + 2 * t + odd;
                    if (column < hidden) sum += gelu(out[m][n][2 * row + odd] + p.b2[column]) * p.w4[column];
                }
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            if (t == 0) sums[warp % Tile::across * Tile::patches + row0 + m * 16 + g + row * 8] = sum;
        }
#pragma unroll
    for (int item = 0; item < items; ++item) {
#pragma unroll
        for (int step = 1; step < C / 4; step *= 2) total[item] += __shfl_xor_sync(0xffffffffu, total[item], step);
        if (thread % (C / 4) == 0) totals[(thread + item * Tile::threads) / (C / 4)] = total[item];
    }
    __syncthreads();
    float* const to = p.out + blockIdx.y * (p.special + patches);
    if (thread < Tile::patches && first + thread < patches) {
        float logit = p.b4[0] + totals[thread] / channels;
#pragma unroll
        for (int part = 0; part < Tile::across; ++part) logit += sums[part * Tile::patches + thread];
        to[p.special + first + thread] = 1.0f / (1.0f + expf(-logit)) - 0.5f;
    }
    if (blockIdx.x == 0)
        for (int i = thread; i < p.special; i += Tile::threads) to[i] = 0.0f;
}

}  // namespace page4d::cuda
