// The mask head on FMA units: statistics of a frame, then tiles of patches through convolution, GELU, C -> hidden, GELU, hidden -> 1.
#pragma once

#include <math.h>

#include "gemm.h"
#include "kernels.h"

namespace page4d::PAGE4D_ISA {

constexpr int64_t head_rows = EngineF32::block;  // patches of a tile
constexpr int64_t head_channels = 64;            // of a slice: convolved, then multiplied

template <class T>
const T* frame_tokens(const MaskHead& p, int64_t frame) {
    return static_cast<const T*>(p.tokens) + frame / p.frames * p.stride[0] + frame % p.frames * p.stride[1] + p.special * p.stride[2];
}

inline Plan plan_statistics(const MaskHead& p) { return {p.batch * p.frames * ((p.channels + head_channels - 1) / head_channels), 0}; }

// Two passes over a slice of channels, so that a large mean costs no digits.
template <class T>
void statistics(const MaskHead& p, Statistics out, int64_t task) {
    const int64_t slices = (p.channels + head_channels - 1) / head_channels, patches = p.height * p.width;
    const int64_t frame = task / slices, first = task % slices * head_channels, count = smaller(head_channels, p.channels - first);
    const T* u = frame_tokens<T>(p, frame) + first * p.stride[3];
    float mean[head_channels] = {}, square[head_channels] = {};
    for (int64_t i = 0; i < patches; ++i)
        for (int64_t c = 0; c < count; ++c) mean[c] += value(u[i * p.stride[2] + c * p.stride[3]]);
    for (int64_t c = 0; c < count; ++c) mean[c] /= static_cast<float>(patches);
    float rest[head_channels] = {};  // of the mean: the sum above has rounded
    for (int64_t i = 0; i < patches; ++i)
        for (int64_t c = 0; c < count; ++c) {
            const float x = value(u[i * p.stride[2] + c * p.stride[3]]) - mean[c];
            rest[c] += x;
            square[c] += x * x;
        }
    for (int64_t c = 0; c < count; ++c) {
        const float shift = rest[c] / static_cast<float>(patches);
        const float std = sqrtf((square[c] - shift * rest[c]) / static_cast<float>(patches - 1));
        out.mean[frame * p.channels + first + c] = mean[c] + shift;
        out.rstd[frame * p.channels + first + c] = 1.0f / (std < p.min_std ? p.min_std : std);
    }
}

// w2 (hidden, channels) and the normalised neighbourhood are packed per slice of channels, into a working space of fixed size.
struct HeadSpace {
    float *z, *a, *w, *hidden, *sums;
    Panels panels;
    int64_t rows_of_z;

    HeadSpace(const MaskHead& p, char* base, size_t* bytes) {
        panels = panels_for<EngineF32>(p.hidden);
        rows_of_z = head_rows + 2 * p.width + 2;  // a tile of patches with its neighbours above, below and beside
        size_t used = 0;
        const auto take = [&](int64_t count) {
            char* place = base ? base + used : nullptr;
            used += static_cast<size_t>(round_up(count * 4, 64));
            return reinterpret_cast<float*>(place);
        };
        z = take(rows_of_z * head_channels);
        a = take(head_rows * head_channels);
        w = take(head_channels * panels.columns());
        hidden = take(head_rows * panels.columns());
        sums = take(head_rows);
        *bytes = used;
    }
};

inline Plan plan_head(const MaskHead& p) {
    size_t bytes;
    const HeadSpace space(p, nullptr, &bytes);
    return {p.batch * p.frames * ((p.height * p.width + head_rows - 1) / head_rows), bytes};
}

template <class T>
void head(const MaskHead& p, Statistics statistics, int64_t task, char* scratch) {
    const int64_t patches = p.height * p.width, tiles = (patches + head_rows - 1) / head_rows;
    const int64_t frame = task / tiles, first = task % tiles * head_rows, rows = smaller(head_rows, patches - first);
    const T* u = frame_tokens<T>(p, frame);
    size_t bytes;
    const HeadSpace space(p, scratch, &bytes);
    const int64_t width = space.panels.columns();
    const int64_t z_first = first - p.width - 1;  // patch of the first row of z
    for (int64_t i = 0; i < head_rows; ++i) space.sums[i] = 0.0f;

    for (int64_t c0 = 0; c0 < p.channels; c0 += head_channels) {
        const int64_t count = smaller(head_channels, p.channels - c0);
        const float *mean = statistics.mean + frame * p.channels + c0, *rstd = statistics.rstd + frame * p.channels + c0;
        for (int64_t i = 0; i < rows + 2 * p.width + 2; ++i) {
            const int64_t patch = z_first + i;
            float* z = space.z + i * head_channels;
            for (int64_t c = 0; c < head_channels; ++c) z[c] = 0.0f;
            if (patch < 0 || patch >= patches) continue;  // the padding is 0 after normalisation
            const T* from = u + patch * p.stride[2] + c0 * p.stride[3];
            for (int64_t c = 0; c < count; ++c) z[c] = (value(from[c * p.stride[3]]) - mean[c]) * rstd[c];
        }
        float taps[9][head_channels] = {}, offset[head_channels] = {};
        for (int64_t c = 0; c < count; ++c) {
            offset[c] = p.b0[c0 + c];
            for (int t = 0; t < 9; ++t) taps[t][c] = p.w0[(c0 + c) * 9 + t];
        }
        for (int64_t i = 0; i < head_rows; ++i) {
            float* a = space.a + i * head_channels;
            if (i >= rows) {
                for (int64_t c = 0; c < head_channels; ++c) a[c] = 0.0f;
                continue;
            }
            const int64_t x = (first + i) % p.width;
            const float* centre = space.z + (i + p.width + 1) * head_channels;
            Vec total = broadcast(0.0f);
            for (int64_t c = 0; c < head_channels; c += Vec::width) {
                Vec acc = load(offset + c);
                for (int t = 0; t < 9; ++t) {
                    const int64_t dx = t % 3 - 1, dy = t / 3 - 1;
                    if (x + dx < 0 || x + dx >= p.width) continue;
                    acc = fma(load(taps[t] + c), load(centre + (dy * p.width + dx) * head_channels + c), acc);
                }
                store(a + c, gelu(acc));
                total = total + load(centre + c);
            }
            space.sums[i] += sum(total);
        }
        for (int64_t panel = 0; panel < space.panels.count; ++panel)  // w2 of this slice, transposed
            for (int64_t j = 0; j < space.panels.width(); ++j) {
                const int64_t o = panel * space.panels.width() + j;
                float* w = space.w + panel * head_channels * space.panels.width() + j;
                for (int64_t c = 0; c < head_channels; ++c)
                    w[c * space.panels.width()] = o < p.hidden && c < count ? p.w2[o * p.channels + c0 + c] : 0.0f;
            }
        multiply<EngineF32>(head_rows, space.panels, head_channels, space.a, head_channels, space.w, space.hidden, width, c0 > 0);
    }

    const int64_t per_frame = p.special + patches;
    float* out = p.out + frame * per_frame;
    for (int64_t i = 0; i < rows; ++i) {
        float* hidden = space.hidden + i * width;
        for (int64_t o = 0; o < p.hidden; ++o) hidden[o] += p.b2[o];
        for (int64_t o = 0; o < width; o += Vec::width) store(hidden + o, gelu(load(hidden + o)));
        float logit = p.b4[0] + space.sums[i] / static_cast<float>(p.channels);
        for (int64_t o = 0; o < p.hidden; ++o) logit += hidden[o] * p.w4[o];
        out[p.special + first + i] = 1.0f / (1.0f + expf(-logit)) - 0.5f;
    }
    if (first == 0)
        for (int64_t i = 0; i < p.special; ++i) out[i] = 0.0f;
}

}  // namespace page4d::PAGE4D_ISA
