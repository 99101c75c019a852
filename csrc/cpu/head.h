// The mask head. The first pass computes the statistics of each frame. The second processes tiles of patches: convolution, GELU, C -> hidden
// as a matmul, GELU, hidden -> 1.
#pragma once

#include <math.h>

#include "gemm.h"
#include "kernels.h"

namespace page4d::PAGE4D_ISA {

constexpr int64_t head_rows = 96;      // patches of a tile; a multiple of every engine's `rows`
constexpr int64_t head_channels = 64;  // channels of a slice: convolved, then multiplied with W2

inline int64_t slices_of(const MaskHead& p) { return (p.channels + head_channels - 1) / head_channels; }

template <class T>
const T* frame_tokens(const MaskHead& p, int64_t frame) {
    return static_cast<const T*>(p.tokens) + frame / p.frames * p.stride[0] + frame % p.frames * p.stride[1] + p.special * p.stride[2];
}

// Loads a slice of the channels of one token as fp32, with 0 past the last channel.
template <class T>
inline void load_slice(float* to, const T* from, int64_t stride, int64_t count) {
    if (count == head_channels && stride == 1) {
        for (int64_t c = 0; c < head_channels; c += Vec::width) store(to + c, load(from + c));
        return;
    }
    for (int64_t c = 0; c < head_channels; ++c) to[c] = c < count ? value(from[c * stride]) : 0.0f;
}

template <class E>
int64_t packed_w2(const MaskHead& p) {
    return slices_of(p) * head_channels / E::pair * panels_for<E>(p.hidden).columns();
}

// Tasks: the statistics of each slice of each frame, then w2 (hidden, channels) of each slice, transposed into panels.
inline Plan plan_prepare(const MaskHead& p) { return {(p.batch * p.frames + 1) * slices_of(p), 0}; }

// Two passes over a slice, so that a large mean does not reduce precision.
template <class T>
void statistics(const MaskHead& p, HeadWork out, int64_t frame, int64_t first) {
    const int64_t patches = p.height * p.width, count = smaller(head_channels, p.channels - first);
    const T* u = frame_tokens<T>(p, frame) + first * p.stride[3];
    float x[head_channels], mean[head_channels] = {}, rest[head_channels] = {}, square[head_channels] = {};
    for (int64_t i = 0; i < patches; ++i) {
        load_slice(x, u + i * p.stride[2], p.stride[3], count);
        for (int64_t c = 0; c < head_channels; ++c) mean[c] += x[c];
    }
    for (int64_t c = 0; c < head_channels; ++c) mean[c] /= static_cast<float>(patches);
    for (int64_t i = 0; i < patches; ++i) {
        load_slice(x, u + i * p.stride[2], p.stride[3], count);
        for (int64_t c = 0; c < head_channels; ++c) {
            const float deviation = x[c] - mean[c];
            rest[c] += deviation;  // corrects the mean for rounding in the first pass
            square[c] += deviation * deviation;
        }
    }
    for (int64_t c = 0; c < count; ++c) {
        const float shift = rest[c] / static_cast<float>(patches);
        const float std = sqrtf((square[c] - shift * rest[c]) / static_cast<float>(patches - 1));
        out.mean[frame * p.channels + first + c] = mean[c] + shift;
        out.rstd[frame * p.channels + first + c] = 1.0f / (std < p.min_std ? p.min_std : std);
    }
}

inline void pack_channels(float* to, float a, float) { *to = a; }
inline void pack_channels(uint32_t* to, float a, float b) { *to = static_cast<uint32_t>(to_bf16(a)) | static_cast<uint32_t>(to_bf16(b)) << 16; }

template <class E, class T>
void prepare(const MaskHead& p, HeadWork out, int64_t task) {
    const int64_t slices = slices_of(p), frame = task / slices, slice = task % slices, first = slice * head_channels;
    if (frame < p.batch * p.frames) return statistics<T>(p, out, frame, first);
    const Panels panels = panels_for<E>(p.hidden);
    auto* w = reinterpret_cast<typename E::Unit*>(out.w2) + slice * head_channels / E::pair * panels.columns();
    const auto weight = [&](int64_t o, int64_t c) { return o < p.hidden && c < p.channels ? p.w2[o * p.channels + c] : 0.0f; };
    for (int64_t panel = 0; panel < panels.count; ++panel)
        for (int64_t c = first; c < first + head_channels; c += E::pair)
            for (int64_t j = 0; j < panels.width(); ++j, ++w) {
                const int64_t o = panel * panels.width() + j;
                pack_channels(w, weight(o, c), weight(o, c + 1));
            }
}

// Working space of a tile: one slice of channels, and the hidden layer.
template <class E>
struct HeadSpace {
    float *z, *hidden, *sums;
    typename E::Element* a;
    Panels panels;
    int64_t rows_of_z;

    HeadSpace(const MaskHead& p, char* base, size_t* bytes) {
        panels = panels_for<E>(p.hidden);
        rows_of_z = head_rows + 2 * p.width + 2;  // a tile of patches and all their neighbours
        size_t used = 0;
        const auto take = [&](int64_t count) {
            char* place = base ? base + used : nullptr;
            used += static_cast<size_t>(round_up(count * 4, 64));
            return reinterpret_cast<float*>(place);
        };
        z = take(rows_of_z * head_channels);
        a = reinterpret_cast<typename E::Element*>(take(head_rows * head_channels / E::pair));
        hidden = take(head_rows * panels.columns());
        sums = take(head_rows);
        *bytes = used;
    }
};

template <class E>
Plan plan_head(const MaskHead& p) {
    size_t bytes;
    const HeadSpace<E> space(p, nullptr, &bytes);
    return {p.batch * p.frames * ((p.height * p.width + head_rows - 1) / head_rows), bytes};
}

template <class E, class T>
void head(const MaskHead& p, HeadWork made, int64_t task, char* scratch) {
    const int64_t patches = p.height * p.width, tiles = (patches + head_rows - 1) / head_rows;
    const int64_t frame = task / tiles, first = task % tiles * head_rows, rows = smaller(head_rows, patches - first);
    const T* u = frame_tokens<T>(p, frame);
    size_t bytes;
    const HeadSpace<E> space(p, scratch, &bytes);
    const int64_t width = space.panels.columns();
    const int64_t z_first = first - p.width - 1;  // patch of the first row of z
    for (int64_t i = 0; i < head_rows; ++i) space.sums[i] = 0.0f;
    E::begin();

    for (int64_t c0 = 0; c0 < p.channels; c0 += head_channels) {
        const int64_t count = smaller(head_channels, p.channels - c0);
        float mean[head_channels] = {}, rstd[head_channels] = {}, taps[9][head_channels] = {}, offset[head_channels] = {};
        for (int64_t c = 0; c < count; ++c) {
            mean[c] = made.mean[frame * p.channels + c0 + c];
            rstd[c] = made.rstd[frame * p.channels + c0 + c];
            offset[c] = p.b0[c0 + c];
            for (int t = 0; t < 9; ++t) taps[t][c] = p.w0[(c0 + c) * 9 + t];
        }
        for (int64_t i = 0; i < rows + 2 * p.width + 2; ++i) {
            const int64_t patch = z_first + i;
            float* z = space.z + i * head_channels;
            const bool inside = patch >= 0 && patch < patches;  // else 0: padding is applied after normalisation
            if (inside) load_slice(z, u + patch * p.stride[2] + c0 * p.stride[3], p.stride[3], count);
            for (int64_t c = 0; c < head_channels; ++c) z[c] = inside ? (z[c] - mean[c]) * rstd[c] : 0.0f;
        }
        for (int64_t i = 0; i < head_rows; ++i) {
            typename E::Element* a = space.a + i * head_channels;
            if (i >= rows) {
                for (int64_t c = 0; c < head_channels; ++c) a[c] = 0;
                continue;
            }
            const float* centre = space.z + (i + p.width + 1) * head_channels;
            const int64_t x = (first + i) % p.width;
            const float *neighbours[9], *weights[9];
            int found = 0;
            for (int t = 0; t < 9; ++t) {
                const int64_t dx = t % 3 - 1, dy = t / 3 - 1;
                if (x + dx < 0 || x + dx >= p.width) continue;  // rows outside the grid are zeros in z
                neighbours[found] = centre + (dy * p.width + dx) * head_channels;
                weights[found++] = taps[t];
            }
            Vec total = broadcast(0.0f);
            for (int64_t c = 0; c < head_channels; c += Vec::width) {
                Vec acc = load(offset + c);
                for (int t = 0; t < found; ++t) acc = fma(load(weights[t] + c), load(neighbours[t] + c), acc);
                store_elements(a + c, gelu(acc));
                total = total + load(centre + c);
            }
            space.sums[i] += sum(total);
        }
        constexpr int64_t units = head_channels / E::pair;
        const auto* w2 = reinterpret_cast<const typename E::Unit*>(made.w2) + c0 / E::pair * width;
        multiply<E>(head_rows, space.panels, units, reinterpret_cast<const typename E::Unit*>(space.a), units, w2, space.hidden, width, c0 > 0);
    }

    E::end();
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
