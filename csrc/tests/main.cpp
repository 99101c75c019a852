// The CPU kernels without Python: every level against the scalar one, with shapes and strides that no block size divides, in buffers without
// slack. tests/packaging/test_sanitizers.py builds it with AddressSanitizer and UndefinedBehaviorSanitizer. Prints a summary. The exit code is
// 0 if all checks passed, else 1.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "page4d/mask_attention.h"
#include "page4d/mask_head.h"
#include "page4d/qk_norm_rope.h"

using namespace page4d;

namespace {

const char* level_name(Level level) {
    const char* names[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};
    return names[static_cast<int>(level)];
}

std::mt19937 generator(0);

float random_float() { return std::normal_distribution<float>()(generator); }

uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_bf16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

// `count` values of a dtype on the heap, `offset` elements after an aligned address. The sanitizer checks accesses past both ends.
struct Buffer {
    std::vector<char> bytes;
    int64_t size, offset;
    Buffer(int64_t count, DType dtype, int64_t off = 0) : size(dtype == DType::f32 ? 4 : 2), offset(off * size) {
        bytes.resize(static_cast<size_t>(count * size + offset));
    }
    char* data() { return bytes.data() + offset; }
    void fill(int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const float x = random_float();
            const uint16_t half = to_bf16(x);
            std::memcpy(data() + i * size, size == 4 ? static_cast<const void*>(&x) : &half, static_cast<size_t>(size));
        }
    }
    float at(int64_t i) {
        float x;
        uint16_t half;
        if (size == 4) return std::memcpy(&x, data() + 4 * i, 4), x;
        return std::memcpy(&half, data() + 2 * i, 2), from_bf16(half);
    }
};

int failures = 0, checks = 0;

void expect(bool good, const char* what, Level level, double error) {
    ++checks;
    if (good) return;
    ++failures;
    std::printf("FAILED %s at level %s: error %g\n", what, level_name(level), error);
}

void compare(Buffer& found, Buffer& expected, int64_t count, double tolerance, const char* what, Level level) {
    double worst = 0;
    for (int64_t i = 0; i < count; ++i) {
        const double error = std::fabs(found.at(i) - expected.at(i));
        if (!(error <= worst)) worst = error;  // NaN stays
    }
    expect(worst <= tolerance, what, level, worst);
}

void attention(Level level, DType dtype, int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t head_dim, bool biased) {
    const int64_t rows = batch * heads * queries, columns = batch * heads * keys;
    Buffer q(rows * head_dim, dtype, 1), k(columns * head_dim, dtype, 1), v(columns * head_dim, dtype), gate(batch * queries, DType::f32),
        bias(batch * keys, DType::f32);
    q.fill(rows * head_dim), k.fill(columns * head_dim), v.fill(columns * head_dim), gate.fill(batch * queries), bias.fill(batch * keys);
    for (int64_t i = 0; i < batch * keys; ++i)  // later tiles have much higher logits, so that earlier sums are rescaled
        reinterpret_cast<float*>(bias.data())[i] += 0.04f * static_cast<float>(i % keys);
    const auto run = [&](Level at, Buffer& out, Buffer& lse) {
        MaskAttention p{};
        p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data(), p.lse = reinterpret_cast<float*>(lse.data());
        if (biased) p.gate = reinterpret_cast<float*>(gate.data()), p.bias = reinterpret_cast<float*>(bias.data());
        p.batch = batch, p.heads = heads, p.queries = queries, p.keys = keys, p.head_dim = head_dim;
        const int64_t q_stride[3] = {heads * queries * head_dim, head_dim, heads * head_dim};  // token-major, as a projection is
        const int64_t k_stride[3] = {heads * keys * head_dim, head_dim, heads * head_dim};
        std::memcpy(p.q_stride, q_stride, sizeof q_stride), std::memcpy(p.out_stride, q_stride, sizeof q_stride);
        std::memcpy(p.k_stride, k_stride, sizeof k_stride), std::memcpy(p.v_stride, k_stride, sizeof k_stride);
        p.gate_stride = queries, p.bias_stride = keys;
        p.scale = 1.0f / std::sqrt(static_cast<float>(head_dim)), p.dtype = dtype, p.threads = 2, p.level = at;
        const Status status = mask_attention(p);
        expect(status == Status::ok, describe(status), at, 0);
    };
    Buffer out(rows * head_dim, dtype, 1), expected(rows * head_dim, dtype, 1), lse(rows, DType::f32), expected_lse(rows, DType::f32);
    run(level, out, lse);
    run(Level::scalar, expected, expected_lse);
    compare(out, expected, rows * head_dim, dtype == DType::f32 ? 2e-5 : 4e-2, "mask_attention", level);
    compare(lse, expected_lse, rows, dtype == DType::f32 ? 2e-5 : 1e-4, "mask_attention, log-sum-exp", level);
}

void attention_without_keys(Level level) {
    constexpr int64_t rows = 3, head_dim = 5;
    std::vector<float> q(rows * head_dim, 1.0f), out(rows * head_dim, NAN), lse(rows, NAN);
    MaskAttention p{};
    p.q = q.data(), p.out = out.data(), p.lse = lse.data(), p.batch = p.heads = 1, p.queries = rows, p.head_dim = head_dim;
    p.q_stride[2] = p.out_stride[2] = head_dim, p.scale = 1.0f, p.threads = 1, p.level = level;
    const Status status = mask_attention(p);
    expect(status == Status::ok, describe(status), level, 0);
    for (const float x : out) expect(x == 0.0f, "mask_attention without keys", level, x);
    for (const float x : lse) expect(x == -INFINITY, "mask_attention without keys, log-sum-exp", level, x);
}

void head(Level level, DType dtype, int64_t frames, int64_t channels, int64_t hidden, int64_t special, int64_t height, int64_t width) {
    const int64_t per_frame = special + height * width, count = 2 * frames * per_frame;
    Buffer tokens(count * channels, dtype, 1);
    tokens.fill(count * channels);
    const int64_t sizes[6] = {channels * 9, channels, hidden * channels, hidden, hidden, 1};
    std::vector<std::unique_ptr<Buffer>> parameters;
    for (const int64_t size : sizes) {
        parameters.push_back(std::make_unique<Buffer>(size, DType::f32));
        parameters.back()->fill(size);
    }
    const auto run = [&](Level at, Buffer& out) {
        MaskHead p{};
        p.tokens = tokens.data(), p.out = reinterpret_cast<float*>(out.data());
        const float** places[] = {&p.w0, &p.b0, &p.w2, &p.b2, &p.w4, &p.b4};
        for (size_t i = 0; i < 6; ++i) *places[i] = reinterpret_cast<float*>(parameters[i]->data());
        p.batch = 2, p.frames = frames, p.channels = channels, p.hidden = hidden, p.special = special, p.height = height, p.width = width;
        const int64_t stride[4] = {frames * per_frame * channels, per_frame * channels, channels, 1};
        std::memcpy(p.stride, stride, sizeof stride);
        p.min_std = 1e-6f, p.dtype = dtype, p.threads = 3, p.level = at;
        const Status status = mask_head(p);
        expect(status == Status::ok, describe(status), at, 0);
    };
    Buffer out(count, DType::f32), expected(count, DType::f32);
    run(level, out), run(Level::scalar, expected);
    compare(out, expected, count, dtype == DType::f32 ? 2e-5 : 5e-2, "mask_head", level);
}

void rope(Level level, DType dtype, int64_t tokens, int64_t heads, int64_t head_dim) {
    const int64_t count = 2 * tokens * heads * head_dim, positions = 5;
    Buffer qkv(3 * count, dtype, 1);
    qkv.fill(3 * count);
    std::vector<std::unique_ptr<Buffer>> vectors;
    for (int i = 0; i < 6; ++i) {
        const int64_t size = i < 4 ? head_dim : positions * (head_dim / 4);
        vectors.push_back(std::make_unique<Buffer>(size, DType::f32));
        vectors.back()->fill(size);
    }
    const auto run = [&](Level at, Buffer& q, Buffer& k) {
        QkNormRope p{};
        p.qkv = qkv.data(), p.q = q.data(), p.k = k.data();
        const float** places[] = {&p.q_weight, &p.q_bias, &p.k_weight, &p.k_bias, &p.cos, &p.sin};
        for (size_t i = 0; i < 6; ++i) *places[i] = reinterpret_cast<float*>(vectors[i]->data());
        p.batch = 2, p.tokens = tokens, p.heads = heads, p.head_dim = head_dim, p.per_frame = 17, p.special = 5, p.width = 4;  // 3 x 4 patches
        const int64_t stride[4] = {3 * tokens * heads * head_dim, 3 * heads * head_dim, heads * head_dim, head_dim};
        std::memcpy(p.stride, stride, sizeof stride);
        p.eps = 1e-5f, p.dtype = dtype, p.threads = 2, p.level = at;
        const Status status = qk_norm_rope(p);
        expect(status == Status::ok, describe(status), at, 0);
    };
    Buffer q(count, dtype), k(count, dtype), expected_q(count, dtype), expected_k(count, dtype);
    run(level, q, k), run(Level::scalar, expected_q, expected_k);
    compare(q, expected_q, count, dtype == DType::f32 ? 1e-4 : 0.13, "qk_norm_rope, q", level);
    compare(k, expected_k, count, dtype == DType::f32 ? 1e-4 : 0.13, "qk_norm_rope, k", level);
}

void refusals() {
    MaskAttention p{};
    p.head_dim = 0, p.threads = 1;
    expect(mask_attention(p) == Status::bad_sizes, "no head dim", Level::scalar, 0);
    p.head_dim = 16, p.batch = p.heads = p.queries = p.keys = 1;
    expect(mask_attention(p) == Status::null_pointer, "null pointers", Level::scalar, 0);
    p.dtype = static_cast<DType>(7);
    expect(mask_attention(p) == Status::bad_dtype, "unknown dtype", Level::scalar, 0);
    p.dtype = DType::f32, p.level = static_cast<Level>(9);
    expect(mask_attention(p) == Status::bad_level, "unknown level", Level::scalar, 0);
}

}  // namespace

int main() {
    const int highest = static_cast<int>(best_level());
    for (int i = 0; i <= highest; ++i) {
        const Level level = static_cast<Level>(i);
        for (const DType dtype : {DType::f32, DType::bf16})
            for (const bool biased : {false, true}) {
                attention(level, dtype, 1, 1, 1, 1, 16, biased);
                attention(level, dtype, 1, 2, 50, 300, 64, biased);
                attention(level, dtype, 2, 1, 390, 17, 40, biased);
                attention(level, dtype, 1, 1, 7, 257, 128, biased);
                attention(level, dtype, 1, 3, 65, 31, 1, biased);
                attention(level, dtype, 3, 2, 1, 513, 33, biased);
                attention(level, dtype, 2, 4, 1930, 5, 16, biased);  // more rows than the largest chunk has
            }
        attention_without_keys(level);
        for (const DType dtype : {DType::f32, DType::bf16}) {
            head(level, dtype, 1, 70, 20, 5, 7, 9);
            head(level, dtype, 3, 64, 16, 0, 1, 2);
            head(level, dtype, 1, 1, 1, 1, 60, 1);
            rope(level, dtype, 34, 2, 64);
            rope(level, dtype, 17, 1, 4);
            rope(level, dtype, 51, 3, 40);
        }
    }
    refusals();
    std::printf("%d checks, %d failed, levels up to %s\n", checks, failures, level_name(static_cast<Level>(highest)));
    return failures != 0;
}
