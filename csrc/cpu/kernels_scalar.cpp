// The three ops as plain loops. This is the reference for the code and the tests of the other levels. It runs on any processor.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace page4d {
namespace {

float from_bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float read(const void* base, int64_t index, DType dtype) {
    return dtype == DType::f32 ? static_cast<const float*>(base)[index] : from_bf16(static_cast<const uint16_t*>(base)[index]);
}

void write(void* base, int64_t index, DType dtype, float x) {
    if (dtype == DType::f32)
        static_cast<float*>(base)[index] = x;
    else
        static_cast<uint16_t*>(base)[index] = to_bf16(x);
}

float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678f)); }

// --- mask attention: a task is one query row --------------------------------------------------------------------------------

Plan plan_attention(const MaskAttention& p) { return {p.batch * p.heads * p.queries, static_cast<size_t>(p.head_dim) * sizeof(float)}; }

void attention(const MaskAttention& p, int64_t task, char* scratch) {
    const int64_t b = task / p.queries / p.heads, h = task / p.queries % p.heads, i = task % p.queries;
    const int64_t q = b * p.q_stride[0] + h * p.q_stride[1] + i * p.q_stride[2];
    const int64_t k = b * p.k_stride[0] + h * p.k_stride[1], v = b * p.v_stride[0] + h * p.v_stride[1];
    float* sum = reinterpret_cast<float*>(scratch);
    for (int64_t d = 0; d < p.head_dim; ++d) sum[d] = 0.0f;
    float row_max = -INFINITY, row_sum = 0.0f;
    for (int64_t j = 0; j < p.keys; ++j) {
        float logit = 0.0f;
        for (int64_t d = 0; d < p.head_dim; ++d) logit += read(p.q, q + d, p.dtype) * read(p.k, k + j * p.k_stride[2] + d, p.dtype);
        logit *= p.scale;
        if (p.gate) logit += p.gate[b * p.gate_stride + i] * p.bias[b * p.bias_stride + j];
        if (logit == -INFINITY) continue;
        if (logit > row_max) {  // false for NaN, which then propagates through `prob`
            const float rescale = std::exp(row_max - logit);
            for (int64_t d = 0; d < p.head_dim; ++d) sum[d] *= rescale;
            row_sum *= rescale;
            row_max = logit;
        }
        const float prob = std::exp(logit - row_max);
        for (int64_t d = 0; d < p.head_dim; ++d) sum[d] += prob * read(p.v, v + j * p.v_stride[2] + d, p.dtype);
        row_sum += prob;
    }
    const int64_t out = b * p.out_stride[0] + h * p.out_stride[1] + i * p.out_stride[2];
    for (int64_t d = 0; d < p.head_dim; ++d) write(p.out, out + d, p.dtype, row_sum == 0.0f ? 0.0f : sum[d] / row_sum);
    p.lse[task] = row_sum == 0.0f ? -INFINITY : row_max + std::log(row_sum);
}

// --- mask head: a task is one channel of a frame (prepare) or one patch (head) ----------------------------------------------

int64_t token(const MaskHead& p, int64_t frame, int64_t patch) {
    return frame / p.frames * p.stride[0] + frame % p.frames * p.stride[1] + (p.special + patch) * p.stride[2];
}

int64_t packed_w2(const MaskHead&) { return 0; }

Plan plan_prepare(const MaskHead& p) { return {p.batch * p.frames * p.channels, 0}; }

void prepare(const MaskHead& p, HeadWork out, int64_t task) {
    const int64_t frame = task / p.channels, c = task % p.channels, patches = p.height * p.width;
    double mean = 0.0, square = 0.0;
    for (int64_t i = 0; i < patches; ++i) mean += read(p.tokens, token(p, frame, i) + c * p.stride[3], p.dtype);
    mean /= static_cast<double>(patches);
    for (int64_t i = 0; i < patches; ++i) {
        const double x = read(p.tokens, token(p, frame, i) + c * p.stride[3], p.dtype) - mean;
        square += x * x;
    }
    const float std = static_cast<float>(std::sqrt(square / static_cast<double>(patches - 1)));
    out.mean[task] = static_cast<float>(mean);
    out.rstd[task] = 1.0f / (std < p.min_std ? p.min_std : std);
}

Plan plan_head(const MaskHead& p) { return {p.batch * p.frames * p.height * p.width, static_cast<size_t>(p.channels) * sizeof(float)}; }

void head(const MaskHead& p, HeadWork in, int64_t task, char* scratch) {
    const int64_t patches = p.height * p.width, frame = task / patches, patch = task % patches, y = patch / p.width, x = patch % p.width;
    const auto z = [&](int64_t row, int64_t column, int64_t c) {
        if (row < 0 || row >= p.height || column < 0 || column >= p.width) return 0.0f;  // padding is applied after normalisation
        const float u = read(p.tokens, token(p, frame, row * p.width + column) + c * p.stride[3], p.dtype);
        return (u - in.mean[frame * p.channels + c]) * in.rstd[frame * p.channels + c];
    };
    float* a = reinterpret_cast<float*>(scratch);
    float channel_sum = 0.0f;
    for (int64_t c = 0; c < p.channels; ++c) {
        float sum = p.b0[c];
        for (int64_t t = 0; t < 9; ++t) sum += p.w0[c * 9 + t] * z(y + t / 3 - 1, x + t % 3 - 1, c);
        a[c] = gelu(sum);
        channel_sum += z(y, x, c);
    }
    float logit = p.b4[0] + channel_sum / static_cast<float>(p.channels);
    for (int64_t o = 0; o < p.hidden; ++o) {
        float sum = p.b2[o];
        for (int64_t c = 0; c < p.channels; ++c) sum += p.w2[o * p.channels + c] * a[c];
        logit += p.w4[o] * gelu(sum);
    }
    float* out = p.out + frame * (p.special + patches);
    out[p.special + patch] = 1.0f / (1.0f + std::exp(-logit)) - 0.5f;
    for (int64_t i = 0; patch == 0 && i < p.special; ++i) out[i] = 0.0f;
}

// --- QK-norm + RoPE: a task is one token ------------------------------------------------------------------------------------

Plan plan_rope(const QkNormRope& p) { return {p.batch * p.tokens, static_cast<size_t>(p.head_dim) * sizeof(float)}; }

void rope(const QkNormRope& p, int64_t task, char* scratch) {
    const int64_t b = task / p.tokens, n = task % p.tokens, patch = n % p.per_frame - p.special;
    const int64_t position[2] = {patch < 0 ? 0 : patch / p.width + 1, patch < 0 ? 0 : patch % p.width + 1};
    const int64_t half = p.head_dim / 2, quarter = p.head_dim / 4;
    float* x = reinterpret_cast<float*>(scratch);
    for (int64_t which = 0; which < 2; ++which)
        for (int64_t h = 0; h < p.heads; ++h) {
            const int64_t from = b * p.stride[0] + n * p.stride[1] + which * p.stride[2] + h * p.stride[3];
            float mean = 0.0f, square = 0.0f;
            for (int64_t d = 0; d < p.head_dim; ++d) mean += x[d] = read(p.qkv, from + d, p.dtype);
            mean /= static_cast<float>(p.head_dim);
            for (int64_t d = 0; d < p.head_dim; ++d) square += (x[d] - mean) * (x[d] - mean);
            const float rstd = 1.0f / std::sqrt(square / static_cast<float>(p.head_dim) + p.eps);
            for (int64_t d = 0; d < p.head_dim; ++d)
                x[d] = (x[d] - mean) * rstd * (which ? p.k_weight : p.q_weight)[d] + (which ? p.k_bias : p.q_bias)[d];
            void* to = which ? p.k : p.q;
            const int64_t row = ((b * p.heads + h) * p.tokens + n) * p.head_dim;
            for (int64_t axis = 0; axis < 2; ++axis)  // row, then column
                for (int64_t m = 0; m < quarter; ++m) {
                    const float c = p.cos[position[axis] * quarter + m], s = p.sin[position[axis] * quarter + m];
                    const int64_t i = axis * half + m, j = i + quarter;  // a pair of channels, rotated
                    write(to, row + i, p.dtype, x[i] * c - x[j] * s);
                    write(to, row + j, p.dtype, x[j] * c + x[i] * s);
                }
        }
}

}  // namespace

const Kernels kernels_scalar = {plan_attention, attention, packed_w2, plan_prepare, prepare, plan_head, head, plan_rope, rope, nullptr, nullptr};

}  // namespace page4d
