// csrc/cuda/qk_norm_rope.cu against the plain loops of the compiled library: odd lengths, strides, misaligned inputs.
#include <algorithm>

#include "checks.h"
#include "runtime_on_cpu.h"
//
#include "../cuda/qk_norm_rope.cu"

namespace page4d::tests {
namespace {

template <class T>
void rope_case(DType dtype, int64_t batch, int64_t frames, int64_t heads, int64_t special, int64_t height, int64_t width, int64_t slack,
               int64_t offset, bool heads_first = false, float scale = 3) {
    constexpr int64_t head_dims[] = {32, 64, 128};
    const int64_t head_dim = head_dims[random() % 3], per_frame = special + height * width, tokens = frames * per_frame;
    const int64_t row = (heads_first ? head_dim : 3 * heads * head_dim) + slack;
    const int64_t rows = heads_first ? tokens * 3 * heads : tokens, count = batch * rows * row + offset, positions = std::max(height, width) + 1;
    std::vector<float> exact(static_cast<size_t>(count)), parameters(static_cast<size_t>(4 * head_dim + 2 * positions * head_dim / 4));
    std::vector<T> given(exact.size());
    for (size_t i = 0; i < exact.size(); ++i) {
        cuda::assign(given[i], scale * random_float() + scale / 3);
        exact[i] = cuda::value(given[i]);
    }
    for (float& x : parameters) x = random_float();
    const size_t outputs = static_cast<size_t>(batch * heads * tokens * head_dim);
    std::vector<float> want_q(outputs), want_k(outputs);
    const std::unique_ptr<cuda::Pack<T>[]> q(new cuda::Pack<T>[outputs]), k(new cuda::Pack<T>[outputs]);  // aligned to 16 bytes

    QkNormRope p{};
    p.qkv = exact.data() + offset;
    p.q_weight = parameters.data(), p.q_bias = p.q_weight + head_dim, p.k_weight = p.q_bias + head_dim, p.k_bias = p.k_weight + head_dim;
    p.cos = p.k_bias + head_dim, p.sin = p.cos + positions * head_dim / 4;
    p.q = want_q.data(), p.k = want_k.data();
    p.batch = batch, p.tokens = tokens, p.heads = heads, p.head_dim = head_dim, p.per_frame = per_frame, p.special = special, p.width = width;
    p.stride[0] = rows * row, p.stride[1] = row;
    p.stride[2] = heads_first ? heads * tokens * row : heads * head_dim, p.stride[3] = heads_first ? tokens * row : head_dim;
    p.eps = 1e-5f, p.dtype = DType::f32, p.threads = 1, p.level = Level::scalar;
    bool good = qk_norm_rope(p) == Status::ok;

    p.qkv = given.data() + offset, p.q = q.get(), p.k = k.get(), p.dtype = dtype;
    const bool aligned = cuda::aligned<T>(p);
    good = good && aligned == (slack % cuda::Pack<T>::size == 0 && offset % cuda::Pack<T>::size == 0);
    gpu() = {};
    good = good && qk_norm_rope_cuda(p, 0, nullptr) == Status::ok;
    const double rounding = dtype == DType::f32 ? 1e-5 : dtype == DType::f16 ? 1e-3 : 8e-3;
    for (size_t i = 0; i < outputs; ++i)
        for (const auto& [got, want] : {std::pair{cuda::value(q[i / cuda::Pack<T>::size].at[i % cuda::Pack<T>::size]), want_q[i]},
                                        std::pair{cuda::value(k[i / cuda::Pack<T>::size].at[i % cuda::Pack<T>::size]), want_k[i]}})
            good = good && std::abs(got - want) <= rounding * (1 + std::abs(want));  // false for NaN
    check(good, "qk_norm_rope: dtype %d, batch %d, frames %d, heads %d, head_dim %d, slack %d, offset %d", static_cast<int>(dtype),
          static_cast<int>(batch), static_cast<int>(frames), static_cast<int>(heads), static_cast<int>(head_dim), static_cast<int>(slack),
          static_cast<int>(offset));
}

template <class T>
void rope_cases(DType dtype) {
    for (int repeat = 0; repeat < 4; ++repeat) {
        rope_case<T>(dtype, 1, 1, 1, 0, 1, 1, 0, 0);                // one token
        rope_case<T>(dtype, 2, 2, 2, 5, 3, 4, 0, 0);                // 34 tokens
        rope_case<T>(dtype, 1, 1, 2, 1, 5, 7, 10, 0);               // rows longer than 3 H D
        rope_case<T>(dtype, 1, 2, 1, 5, 4, 3, 0, 1);                // an odd address
        rope_case<T>(dtype, 1, 1, 3, 2, 2, 9, 16, 0);               // longer rows that stay aligned
        rope_case<T>(dtype, 2, 1, 2, 1, 2, 3, 10, 0);               // longer rows and a batch
        rope_case<T>(dtype, 2, 2, 3, 1, 3, 2, 0, 0, true);          // (B, 3, H, N, D)
        rope_case<T>(dtype, 2, 2, 3, 1, 3, 2, 4, 0, true);          // with longer rows: aligned in fp32 only
        rope_case<T>(dtype, 1, 1, 2, 1, 3, 2, 0, 0, false, 3e-3f);  // a variance as small as eps
    }
}

}  // namespace

void qk_norm_rope_cases() {
    rope_cases<float>(DType::f32);
    rope_cases<__half>(DType::f16);
    rope_cases<__nv_bfloat16>(DType::bf16);
}

}  // namespace page4d::tests
