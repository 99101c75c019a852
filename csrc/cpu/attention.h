// Mask-modulated attention for one engine: an online softmax over tiles of keys, for one chunk of query rows per task.
//
// A task is one chunk of rows of one head. It packs each tile of K (transposed) and V once for all its rows. The size of the working space
// is bounded for any sequence length. The softmax adds the bias r_i c_j, and only in rows with r_i != 0.
#pragma once

#include <math.h>

#include "gemm.h"
#include "kernels.h"

namespace page4d::PAGE4D_ISA {

constexpr int64_t most_rows = 1920;  // of a chunk; a multiple of every engine's `rows`
constexpr int64_t few_rows = 768;    // threads without work do not make chunks smaller than about half of this
constexpr int64_t tile_keys = 256;
constexpr float log2e = 1.4426950408889634f;
constexpr float slack = 8.0f;  // a higher maximum by less than this leaves the sums as they are: exp2 of the logits stays below 2^12

// Every chunk packs all keys of its head, which are far apart in a packed projection. Therefore a head has as few chunks as keep all threads
// busy. Rows do not depend on each other, so results do not depend on the chunks. They are as even as whole register tiles allow.
template <class E>
int64_t rows_of_chunk(const MaskAttention& p) {
    const int64_t heads = p.batch * p.heads, wanted = (4 * p.threads + heads - 1) / heads;
    const int64_t fewest = (p.queries + most_rows - 1) / most_rows, most = (p.queries + few_rows - 1) / few_rows;
    const int64_t chunks = wanted < fewest ? fewest : smaller(wanted, most);
    return round_up((p.queries + chunks - 1) / chunks, E::rows);
}

// Working space of a task.
template <class E>
struct Space {
    typename E::Unit *q, *k, *v;              // (rows, units), panels of (units, keys), panels of (pairs of keys, channels)
    float *logits, *out, *row_max, *row_sum;  // (block, keys), (rows, channels), running maximum and sum (rows,)
    typename E::Element* probs;               // (block, keys): exp2 of the logits as an operand; fp32 reuses the memory of the logits
    Panels key_panels, out_panels;
    int64_t units;

    Space(int64_t head_dim, int64_t chunk, char* base, size_t* bytes) {
        key_panels = panels_for<E>(tile_keys);
        out_panels = panels_for<E>(head_dim);
        units = round_up((head_dim + E::pair - 1) / E::pair, E::step);
        size_t used = 0;
        const auto take = [&](int64_t count) {
            char* place = base ? base + used : nullptr;  // null: the caller only needs the size
            used += static_cast<size_t>(round_up(count * 4, 64));
            return place;
        };
        q = reinterpret_cast<typename E::Unit*>(take(chunk * units));
        k = reinterpret_cast<typename E::Unit*>(take(key_panels.columns() * units));
        v = reinterpret_cast<typename E::Unit*>(take(tile_keys / E::pair * out_panels.columns()));
        logits = reinterpret_cast<float*>(take(E::block * key_panels.columns()));
        out = reinterpret_cast<float*>(take(chunk * out_panels.columns()));
        row_max = reinterpret_cast<float*>(take(chunk));
        row_sum = reinterpret_cast<float*>(take(chunk));
        probs = E::pair == 1 ? reinterpret_cast<typename E::Element*>(logits)
                             : reinterpret_cast<typename E::Element*>(take(E::block * key_panels.columns() / E::pair));
        *bytes = used;
    }
};

// One unit of a row (0 past the head dim), and a vector of units that are all within the head dim.
template <class T>
inline void pack_one(float* to, const T* row, int64_t d, int64_t head_dim) {
    *to = d < head_dim ? value(row[d]) : 0.0f;
}
inline void pack_one(uint32_t* to, const uint16_t* row, int64_t unit, int64_t head_dim) {
    const int64_t d = 2 * unit;
    const uint32_t low = d < head_dim ? row[d] : 0, high = d + 1 < head_dim ? row[d + 1] : 0;
    *to = low | high << 16;
}
template <class T>
inline Vec units_of(const float*, const T* row, int64_t d) {
    return load(row + d);
}
// Channel d of two keys (fp32: of one key) as a unit, and a vector of such units from channel d on.
inline void pack_keys(float* to, float a, float) { *to = a; }
inline void pack_keys(float* to, uint16_t a, uint16_t) { *to = from_bf16(a); }
inline void pack_keys(uint32_t* to, uint16_t a, uint16_t b) { *to = static_cast<uint32_t>(a) | static_cast<uint32_t>(b) << 16; }
template <class T>
inline Vec keys_of(const float*, const T* first, const T*) {
    return load(first);
}
inline void store_units(float* to, Vec x) { store(to, x); }
#if defined(__AVX512BF16__)
inline Vec units_of(const uint32_t*, const uint16_t* row, int64_t unit) { return load_units(row + 2 * unit); }
inline Vec keys_of(const uint32_t*, const uint16_t* first, const uint16_t* second) { return load_pairs(first, second); }
inline void store_units(uint32_t* to, Vec x) { _mm512_storeu_ps(to, x.v); }
#endif

template <class E, class T>
void pack_rows(typename E::Unit* to, const T* from, int64_t stride, int64_t rows, int64_t padded, int64_t units, int64_t head_dim) {
    const int64_t whole = head_dim / E::pair / Vec::width * Vec::width;
    for (int64_t i = 0; i < padded; ++i, to += units, from += stride) {
        int64_t u = 0;
        if (i < rows) {
            for (; u < whole; u += Vec::width) store_units(to + u, units_of(to, from, u));
            for (; u < units; ++u) pack_one(to + u, from, u, head_dim);
        }
        for (; u < units; ++u) to[u] = 0;
    }
}

// Packs K as (units, keys) in panels of keys by transposing square blocks. Zeros past the last key and channel.
template <class E, class T>
void pack_transposed(typename E::Unit* to, const T* from, int64_t stride, int64_t keys, Panels panels, int64_t units, int64_t head_dim) {
    const int64_t width = panels.width(), whole = head_dim / E::pair / Vec::width * Vec::width;  // units in square blocks
    for (int64_t p = 0; p < panels.count; ++p, to += units * width)
        for (int64_t j = 0; j < width; j += Vec::width) {
            const int64_t first = p * width + j;
            for (int64_t u = 0; u < whole; u += Vec::width) {
                Vec block[Vec::width];
                for (int i = 0; i < Vec::width; ++i) block[i] = first + i < keys ? units_of(to, from + (first + i) * stride, u) : broadcast(0.0f);
                transpose(block);
                for (int i = 0; i < Vec::width; ++i) store_units(to + (u + i) * width + j, block[i]);
            }
            for (int64_t u = whole; u < units; ++u)
                for (int64_t i = 0; i < Vec::width; ++i) {
                    if (first + i < keys)
                        pack_one(to + u * width + j + i, from + (first + i) * stride, u, head_dim);
                    else
                        to[u * width + j + i] = 0;
                }
        }
}

// Packs V as (keys or pairs of keys, channels) in panels of channels. Zeros past the last key and channel.
template <class E, class T>
void pack_values(typename E::Unit* to, const T* from, int64_t stride, int64_t keys, int64_t padded, Panels panels, int64_t head_dim) {
    const int64_t width = panels.width();
    for (int64_t p = 0; p < panels.count; ++p)
        for (int64_t key = 0; key < padded; key += E::pair, to += width) {
            const T* first = from + key * stride + p * width;
            const T* second = first + (E::pair - 1) * stride;
            const int64_t channels = smaller(width, head_dim - p * width);
            int64_t d = 0;
            if (key + E::pair <= keys)
                for (; d + Vec::width <= channels; d += Vec::width) store_units(to + d, keys_of(to, first + d, second + d));
            for (; d < width; ++d) {
                if (key >= keys || d >= channels)
                    to[d] = 0;
                else
                    pack_keys(to + d, first[d], key + E::pair <= keys ? second[d] : T(0));
            }
        }
}

// The softmax of a row of a tile has two steps, from x = q k^T to exp2 of the logits. Each step handles all rows of a block before the next,
// because the maximum of one row is a chain of dependent instructions: only with several rows in flight does it take no time.
//
// In rows without a gate, the scale is folded into the exponent: exp2(x scale log2(e) - row_max log2(e)). Rows with a gate become natural
// logits in the first step, and log2(e) is applied after the maximum is subtracted: multiplied into a large gate, its rounding would lose
// precision.
inline bool natural(float scale, float r) { return r != 0.0f || scale <= 0.0f; }

// Updates the maximum of a row, up to `slack`. Returns the factor for its earlier sums.
inline float raise_max(float* s, int64_t keys, int64_t width, float scale, float r, const float* c, float* row_max) {
    if (natural(scale, r)) {
        const int64_t whole = keys / Vec::width * Vec::width;
        const Vec factor = broadcast(scale), gate = broadcast(r);
        for (int64_t j = 0; j < whole; j += Vec::width) store(s + j, r != 0.0f ? fma(gate, load(c + j), load(s + j) * factor) : load(s + j) * factor);
        for (int64_t j = whole; j < keys; ++j) s[j] = s[j] * scale + (r != 0.0f ? r * c[j] : 0.0f);
    }
    for (int64_t j = keys; j < width; ++j) s[j] = -INFINITY;
    Vec lane_max[2] = {broadcast(-INFINITY), broadcast(-INFINITY)};
    for (int64_t j = 0; j < width; j += 2 * Vec::width) {
        lane_max[0] = max(lane_max[0], load(s + j));
        lane_max[1] = max(lane_max[1], load(s + j + Vec::width));
    }
    const float tile_max = max(max(lane_max[0], lane_max[1])) * (natural(scale, r) ? 1.0f : scale), old = *row_max;
    if (!(tile_max > old + slack)) return 1.0f;
    *row_max = tile_max;
    return old == -INFINITY ? 1.0f : exp2f((old - tile_max) * log2e);  // 1: there are no sums yet
}

// Replaces the logits of a row by their exp2, as an operand. Returns the sum.
template <class E>
float exp2_row(const float* s, typename E::Element* probs, int64_t width, float scale, float r, float row_max) {
    const float shift = row_max == -INFINITY ? 0.0f : row_max;  // without a finite logit, all values stay exp2(-inf) = 0
    const Vec base = broadcast(shift), to_base2 = broadcast(log2e), slope = broadcast(scale * log2e), offset = broadcast(-shift * log2e);
    Vec sums = broadcast(0.0f);
    for (int64_t j = 0; j < width; j += Vec::width) {
        const Vec p = exp2(natural(scale, r) ? (load(s + j) - base) * to_base2 : fma(load(s + j), slope, offset));
        sums = sums + p;
        store_elements(probs + j, p);
    }
    return sum(sums);
}

template <class E, class T>
void attend(const MaskAttention& p, int64_t task, char* scratch) {
    const int64_t chunk = rows_of_chunk<E>(p), chunks = (p.queries + chunk - 1) / chunk;
    const int64_t b = task / chunks / p.heads, h = task / chunks % p.heads, first = task % chunks * chunk;
    const int64_t rows = smaller(chunk, p.queries - first), padded = round_up(rows, E::rows);
    const T* q = static_cast<const T*>(p.q) + b * p.q_stride[0] + h * p.q_stride[1] + first * p.q_stride[2];
    const T* k = static_cast<const T*>(p.k) + b * p.k_stride[0] + h * p.k_stride[1];
    const T* v = static_cast<const T*>(p.v) + b * p.v_stride[0] + h * p.v_stride[1];
    const float* r = p.gate ? p.gate + b * p.gate_stride + first : nullptr;
    const float* c = p.bias ? p.bias + b * p.bias_stride : nullptr;
    size_t bytes;
    const Space<E> space(p.head_dim, chunk, scratch, &bytes);
    const int64_t channels = space.out_panels.columns();
    const auto* probs = reinterpret_cast<const typename E::Unit*>(space.probs);
    const auto gate = [&](int64_t row) { return r && row < rows ? r[row] : 0.0f; };

    E::begin();
    pack_rows<E>(space.q, q, p.q_stride[2], rows, padded, space.units, p.head_dim);
    for (int64_t i = 0; i < padded; ++i) space.row_max[i] = -INFINITY, space.row_sum[i] = 0.0f;
    if (p.keys == 0)  // else the first tile overwrites it
        for (int64_t i = 0; i < padded * channels; ++i) space.out[i] = 0.0f;

    for (int64_t j = 0; j < p.keys; j += tile_keys) {
        const int64_t keys = smaller(tile_keys, p.keys - j);
        const Panels panels = space.key_panels.first(keys);
        const int64_t width = panels.columns();
        pack_transposed<E>(space.k, k + j * p.k_stride[2], p.k_stride[2], keys, panels, space.units, p.head_dim);
        pack_values<E>(space.v, v + j * p.v_stride[2], p.v_stride[2], keys, width, space.out_panels, p.head_dim);
        for (int64_t i = 0; i < padded; i += E::block) {
            const int64_t block = smaller(E::block, padded - i);
            multiply<E>(block, panels, space.units, space.q + i * space.units, space.units, space.k, space.logits, width, false);
            for (int64_t row = i; row < i + block; ++row) {
                const float rescale =
                    raise_max(space.logits + (row - i) * width, keys, width, p.scale, gate(row), c ? c + j : nullptr, space.row_max + row);
                if (rescale == 1.0f) continue;
                space.row_sum[row] *= rescale;
                float* o = space.out + row * channels;
                for (int64_t d = 0; d < channels; d += Vec::width) store(o + d, load(o + d) * broadcast(rescale));
            }
            for (int64_t row = i; row < i + block; ++row) {
                const int64_t at = (row - i) * width;
                space.row_sum[row] += exp2_row<E>(space.logits + at, space.probs + at, width, p.scale, gate(row), space.row_max[row]);
            }
            multiply<E>(block, space.out_panels, width / E::pair, probs, width / E::pair, space.v, space.out + i * channels, channels, j > 0);
        }
    }

    E::end();

    float* lse = p.lse + (b * p.heads + h) * p.queries + first;
    for (int64_t i = 0; i < rows; ++i) {
        const float row_sum = space.row_sum[i], inverse = 1.0f / (row_sum == 0.0f ? 1.0f : row_sum);
        T* o = static_cast<T*>(p.out) + b * p.out_stride[0] + h * p.out_stride[1] + (first + i) * p.out_stride[2];
        for (int64_t d = 0; d < p.head_dim; ++d) assign(o + d, space.out[i * channels + d] * inverse);
        lse[i] = row_sum == 0.0f ? -INFINITY : space.row_max[i] + logf(row_sum);
    }
}

template <class E>
Plan plan_attention(const MaskAttention& p) {
    size_t bytes;
    const int64_t chunk = rows_of_chunk<E>(p);
    const Space<E> space(p.head_dim, chunk, nullptr, &bytes);
    return {p.batch * p.heads * ((p.queries + chunk - 1) / chunk), bytes};
}

}  // namespace page4d::PAGE4D_ISA
