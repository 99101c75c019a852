// Mask-modulated attention for one engine: an online softmax over tiles of keys, for a chunk of query rows at a time.
//
// A task is one chunk of rows of one head. It packs each tile of K (transposed) and V once, for all its rows, into a working space whose size
// does not depend on the sequence. The bias r_i c_j is added in the softmax, and only in rows with r_i != 0.
#pragma once

#include <math.h>

#include "gemm.h"
#include "kernels.h"

namespace page4d::PAGE4D_ISA {

constexpr int64_t chunk_rows = 384;  // a multiple of every engine's block of rows
constexpr int64_t tile_keys = 256;
constexpr float log2e = 1.4426950408889634f;

// The working space of a task.
template <class E>
struct Space {
    typename E::Unit *q, *k, *v;   // (rows, units), panels of (units, keys), panels of (pairs of keys, channels)
    float *logits, *out, *top, *total;  // (block, keys), (rows, channels), running maximum and sum (rows,)
    typename E::Element* weights;  // (block, keys): exp2 of the logits as an operand; for fp32 the logits' own place
    Panels key_panels, out_panels;
    int64_t units;

    Space(int64_t head_dim, char* base, size_t* bytes) {
        key_panels = panels_for<E>(tile_keys);
        out_panels = panels_for<E>(head_dim);
        units = round_up((head_dim + E::pair - 1) / E::pair, E::step);
        size_t used = 0;
        const auto take = [&](int64_t count) {
            char* place = base ? base + used : nullptr;  // null: only the size is wanted
            used += static_cast<size_t>(round_up(count * 4, 64));
            return place;
        };
        q = reinterpret_cast<typename E::Unit*>(take(chunk_rows * units));
        k = reinterpret_cast<typename E::Unit*>(take(key_panels.columns() * units));
        v = reinterpret_cast<typename E::Unit*>(take(tile_keys / E::pair * out_panels.columns()));
        logits = reinterpret_cast<float*>(take(E::block * key_panels.columns()));
        out = reinterpret_cast<float*>(take(chunk_rows * out_panels.columns()));
        top = reinterpret_cast<float*>(take(chunk_rows));
        total = reinterpret_cast<float*>(take(chunk_rows));
        weights = E::pair == 1 ? reinterpret_cast<typename E::Element*>(logits)
                               : reinterpret_cast<typename E::Element*>(take(E::block * key_panels.columns() / E::pair));
        *bytes = used;
    }
};

// Element d of a row as the engine wants it, 0 past the head dim.
template <class T>
inline void pack_one(float* to, const T* row, int64_t d, int64_t head_dim) { *to = d < head_dim ? value(row[d]) : 0.0f; }
template <class T>
inline void pack_one(uint32_t* to, const T* row, int64_t unit, int64_t head_dim) {
    const int64_t d = 2 * unit;
    const uint32_t low = d < head_dim ? row[d] : 0, high = d + 1 < head_dim ? row[d + 1] : 0;
    *to = low | high << 16;
}
// Channel d of two keys, one of fp32.
inline void pack_keys(float* to, float a, float) { *to = a; }
inline void pack_keys(float* to, uint16_t a, uint16_t) { *to = from_bf16(a); }
inline void pack_keys(uint32_t* to, uint16_t a, uint16_t b) { *to = static_cast<uint32_t>(a) | static_cast<uint32_t>(b) << 16; }

template <class E, class T>
void pack_rows(typename E::Unit* to, const T* from, int64_t stride, int64_t rows, int64_t padded, int64_t units, int64_t head_dim) {
    for (int64_t i = 0; i < padded; ++i)
        for (int64_t u = 0; u < units; ++u) {
            if (i < rows)
                pack_one(to + i * units + u, from + i * stride, u, head_dim);
            else
                to[i * units + u] = 0;
        }
}

template <class E, class T>
void pack_transposed(typename E::Unit* to, const T* from, int64_t stride, int64_t keys, Panels panels, int64_t units, int64_t head_dim) {
    const int64_t width = panels.width();
    for (int64_t p = 0; p < panels.count; ++p, to += units * width)
        for (int64_t j = 0; j < width; ++j) {
            const int64_t key = p * width + j;
            for (int64_t u = 0; u < units; ++u) {
                if (key < keys)
                    pack_one(to + u * width + j, from + key * stride, u, head_dim);
                else
                    to[u * width + j] = 0;
            }
        }
}

// Pairs of keys (single keys for fp32) as the inner dimension; zeros past the last key and channel.
template <class E, class T>
void pack_values(typename E::Unit* to, const T* from, int64_t stride, int64_t keys, Panels panels, int64_t head_dim) {
    const int64_t width = panels.width(), inner = tile_keys / E::pair;
    for (int64_t p = 0; p < panels.count; ++p)
        for (int64_t u = 0; u < inner; ++u, to += width) {
            const int64_t key = u * E::pair;
            const T* first = from + key * stride + p * width;
            const T* second = first + (E::pair - 1) * stride;
            const int64_t channels = smaller(width, head_dim - p * width);
            for (int64_t d = 0; d < width; ++d) {
                if (key >= keys || d >= channels)
                    to[d] = 0;
                else
                    pack_keys(to + d, first[d], key + E::pair - 1 < keys ? second[d] : T(0));
            }
        }
}

inline void store_weights(float* to, Vec x) { store(to, x); }
#if defined(__AVX512BF16__)
inline void store_weights(uint16_t* to, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x.v));
}
#endif

// One row of a tile: logits to exp2 of them. Returns what the row's sums so far have to be multiplied with.
template <class E>
float softmax_row(float* s, typename E::Element* weights, int64_t keys, int64_t width, float scale, float r, const float* c, float* top, float* total) {
    Vec best = broadcast(-INFINITY);
    for (int64_t j = keys; j < width; ++j) s[j] = -INFINITY;
    const int64_t whole = keys / Vec::width * Vec::width;
    const Vec factor = broadcast(scale), gate = broadcast(r);
    if (r != 0.0f) {
        for (int64_t j = 0; j < whole; j += Vec::width) {
            const Vec x = fma(gate, load(c + j), load(s + j) * factor);
            store(s + j, x);
            best = max(best, x);
        }
        for (int64_t j = whole; j < keys; ++j) s[j] = s[j] * scale + r * c[j];
    } else {
        for (int64_t j = 0; j < whole; j += Vec::width) {
            const Vec x = load(s + j) * factor;
            store(s + j, x);
            best = max(best, x);
        }
        for (int64_t j = whole; j < keys; ++j) s[j] *= scale;
    }
    for (int64_t j = whole; j < width; j += Vec::width) best = max(best, load(s + j));
    const float tile_top = max(best), before = *top;
    const float now = tile_top > before ? tile_top : before;
    const float shift = now == -INFINITY ? 0.0f : now;  // a row without a finite logit stays at exp2(-inf) = 0
    const Vec base = broadcast(shift), to_base2 = broadcast(log2e);
    Vec sums = broadcast(0.0f);
    for (int64_t j = 0; j < width; j += Vec::width) {
        const Vec p = exp2((load(s + j) - base) * to_base2);
        sums = sums + p;
        store_weights(weights + j, p);
    }
    const float keep = before == now ? 1.0f : exp2f((before - shift) * log2e);
    *total = *total * keep + sum(sums);
    *top = now;
    return keep;
}

template <class E, class T>
void attend(const MaskAttention& p, int64_t task, char* scratch) {
    const int64_t chunks = (p.queries + chunk_rows - 1) / chunk_rows;
    const int64_t b = task / chunks / p.heads, h = task / chunks % p.heads, first = task % chunks * chunk_rows;
    const int64_t rows = smaller(chunk_rows, p.queries - first), padded = round_up(rows, E::block);
    const T* q = static_cast<const T*>(p.q) + b * p.q_stride[0] + h * p.q_stride[1] + first * p.q_stride[2];
    const T* k = static_cast<const T*>(p.k) + b * p.k_stride[0] + h * p.k_stride[1];
    const T* v = static_cast<const T*>(p.v) + b * p.v_stride[0] + h * p.v_stride[1];
    const float* r = p.gate ? p.gate + b * p.gate_stride + first : nullptr;
    const float* c = p.bias ? p.bias + b * p.bias_stride : nullptr;
    size_t bytes;
    const Space<E> space(p.head_dim, scratch, &bytes);
    const int64_t width = space.key_panels.columns(), channels = space.out_panels.columns();
    const auto* weights = reinterpret_cast<const typename E::Unit*>(space.weights);

    E::begin();
    pack_rows<E>(space.q, q, p.q_stride[2], rows, padded, space.units, p.head_dim);
    for (int64_t i = 0; i < padded; ++i) space.top[i] = -INFINITY, space.total[i] = 0.0f;
    for (int64_t i = 0; i < padded * channels; ++i) space.out[i] = 0.0f;

    for (int64_t j = 0; j < p.keys; j += tile_keys) {
        const int64_t keys = smaller(tile_keys, p.keys - j);
        pack_transposed<E>(space.k, k + j * p.k_stride[2], p.k_stride[2], keys, space.key_panels, space.units, p.head_dim);
        pack_values<E>(space.v, v + j * p.v_stride[2], p.v_stride[2], keys, space.out_panels, p.head_dim);
        for (int64_t i = 0; i < padded; i += E::block) {
            multiply<E>(E::block, space.key_panels, space.units, space.q + i * space.units, space.units, space.k, space.logits, width, false);
            for (int64_t row = 0; row < E::block; ++row) {
                const float gate = r && i + row < rows ? r[i + row] : 0.0f;
                const float keep = softmax_row<E>(space.logits + row * width, space.weights + row * width, keys, width, p.scale, gate, c + j,
                                                  space.top + i + row, space.total + i + row);
                if (keep != 1.0f) {
                    float* o = space.out + (i + row) * channels;
                    for (int64_t d = 0; d < channels; d += Vec::width) store(o + d, load(o + d) * broadcast(keep));
                }
            }
            multiply<E>(E::block, space.out_panels, tile_keys / E::pair, weights, width / E::pair, space.v, space.out + i * channels, channels, true);
        }
    }

    E::end();

    float* lse = p.lse + (b * p.heads + h) * p.queries + first;
    for (int64_t i = 0; i < rows; ++i) {
        const float total = space.total[i], inverse = 1.0f / (total == 0.0f ? 1.0f : total);
        T* o = static_cast<T*>(p.out) + b * p.out_stride[0] + h * p.out_stride[1] + (first + i) * p.out_stride[2];
        for (int64_t d = 0; d < p.head_dim; ++d) assign(o + d, space.out[i * channels + d] * inverse);
        lse[i] = total == 0.0f ? -INFINITY : space.top[i] + logf(total);
    }
}

template <class E>
Plan plan_attention(const MaskAttention& p) {
    size_t bytes;
    const Space<E> space(p.head_dim, nullptr, &bytes);
    return {p.batch * p.heads * ((p.queries + chunk_rows - 1) / chunk_rows), bytes};
}

}  // namespace page4d::PAGE4D_ISA
