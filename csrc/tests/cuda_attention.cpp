// csrc/cuda/mask_attention_sm90.cu and schedule.h. The whole call, including tensor maps, TMA loads and wgmmas, is tested against plain loops in
// double precision. The schedule is tested to cover every row and key tile once.
#include <array>
#include <set>

#include "checks.h"
#include "hopper_on_cpu.h"
//
#include "../cuda/mask_attention_sm90.cu"

namespace page4d::tests {
namespace {

using cuda::TileScheduler;

enum class Gate { none, layout, anywhere };

struct Case {
    int batch, heads, frames, per_frame, special, keys;  // keys = 0: as many as queries
    Gate gate;
    int splits = 1;
    int blocks = 2;
    float spread = 1.0f, strength = 32.0f;
    bool extremes = false;  // row 7: all logits -inf; row 20: NaN
    int nan_key = -1;       // NaN in this key, so in all rows
    int variant = 0;
    float scale = 0.0f;  // 0: 1 / sqrt(D)
};

template <class T>
T rounded(float x) {
    if constexpr (std::is_same_v<T, __half>)
        return __float2half_rn(x);
    else
        return __float2bfloat16_rn(x);
}
float value(__half x) { return __half2float(x); }
float value(__nv_bfloat16 x) { return __bfloat162float(x); }

// If queries and keys are equally many, q, k and v are views of one (B, N, 3, H, D) projection, as in the model.
template <class T, int D>
void attention_case(const Case& c) {
    const int queries = c.frames * c.per_frame, keys = c.keys ? c.keys : queries, longest = std::max(queries, keys);
    const int64_t row = 3 * c.heads * D + 8, batch_stride = longest * row;
    std::vector<T> qkv(static_cast<size_t>(c.batch * batch_stride));
    for (T& x : qkv) x = rounded<T>(c.spread * random_float());
    const auto at = [&](int which, int b, int h, int n, int d) {
        return value(qkv[static_cast<size_t>(b * batch_stride + n * row + (which * c.heads + h) * D + d)]);
    };
    const auto set = [&](int which, int n, int d, float x) {
        for (int b = 0; b < c.batch; ++b)
            for (int h = 0; h < c.heads; ++h) qkv[static_cast<size_t>(b * batch_stride + n * row + (which * c.heads + h) * D + d)] = rounded<T>(x);
    };
    if (c.extremes) {
        for (int n = 0; n < longest; ++n) set(0, n, 0, 0.0f), set(1, n, 0, -1e30f);
        for (int d = 0; d < D; ++d) set(0, 7, d, d == 0 ? 1e30f : 0.0f);
        set(0, 20, 3, NAN);
    }
    if (c.nan_key >= 0) set(1, c.nan_key, 3, NAN);
    std::vector<float> gate(static_cast<size_t>(c.batch * queries), 0.0f), bias(static_cast<size_t>(c.batch * keys));
    for (size_t i = 0; i < gate.size(); ++i) {
        const bool special = static_cast<int>(i) % queries % c.per_frame < c.special;
        if (c.gate == Gate::layout ? special : c.gate == Gate::anywhere && random() % 64 == 0) gate[i] = c.strength * (0.5f + 0.5f * random_float());
    }
    for (float& x : bias) x = 0.5f * random_float();

    const size_t rows = static_cast<size_t>(c.batch * c.heads) * static_cast<size_t>(queries);
    std::vector<T> out(rows * D, rounded<T>(NAN));
    std::vector<float> lse(rows, NAN), out_partial(c.splits > 1 ? static_cast<size_t>(c.splits) * rows * D : 0, NAN),
        lse_partial(static_cast<size_t>(c.splits) * rows, NAN);
    MaskAttention p{};
    p.q = qkv.data(), p.k = qkv.data() + c.heads * D, p.v = qkv.data() + 2 * c.heads * D;
    if (c.gate != Gate::none) p.gate = gate.data(), p.bias = bias.data();
    p.out = out.data(), p.lse = lse.data();
    p.batch = c.batch, p.heads = c.heads, p.queries = queries, p.keys = keys, p.head_dim = D;
    for (int64_t* stride : {p.q_stride, p.k_stride, p.v_stride}) stride[0] = batch_stride, stride[1] = D, stride[2] = row;
    p.out_stride[0] = static_cast<int64_t>(queries) * c.heads * D, p.out_stride[1] = D, p.out_stride[2] = c.heads * D;  // token-major
    p.gate_stride = queries, p.bias_stride = keys, p.scale = c.scale == 0.0f ? 1.0f / std::sqrt(static_cast<float>(D)) : c.scale;
    p.dtype = std::is_same_v<T, __half> ? DType::f16 : DType::bf16;
    if (c.gate == Gate::layout) p.frames = c.frames, p.per_frame = c.per_frame, p.special = c.special;
    p.variant = c.variant;
    gpu() = {};
    gpu().multiprocessors = c.blocks;

    bool good = mask_attention_cuda(p, c.splits, out_partial.data(), lse_partial.data(), 0, nullptr) == Status::ok;
    double worst = 0;
    std::vector<double> probs(static_cast<size_t>(keys));
    for (int b = 0; b < c.batch; ++b)
        for (int h = 0; h < c.heads; ++h)
            for (int n = 0; n < queries; ++n) {
                double row_max = -INFINITY, row_sum = 0;
                for (int m = 0; m < keys; ++m) {
                    double logit = 0;
                    for (int d = 0; d < D; ++d) logit += static_cast<double>(at(0, b, h, n, d)) * at(1, b, h, m, d);
                    logit *= p.scale;
                    if (p.gate) logit += static_cast<double>(gate[static_cast<size_t>(b * queries + n)]) * bias[static_cast<size_t>(b * keys + m)];
                    probs[static_cast<size_t>(m)] = logit, row_max = std::max(row_max, logit);
                }
                const bool fully_masked = c.extremes && n == 7;
                for (double& prob : probs) row_sum += prob = fully_masked ? 0.0 : std::exp(prob - row_max);
                const size_t index = (static_cast<size_t>(b) * static_cast<size_t>(c.heads) + static_cast<size_t>(h)) * static_cast<size_t>(queries) +
                                     static_cast<size_t>(n);
                if (fully_masked)
                    good = good && lse[index] == -INFINITY, row_sum = 1.0;
                else if (row_sum == row_sum)
                    good = good && std::abs(lse[index] - (row_max + std::log(row_sum))) < 1e-4 * (1 + std::abs(row_max));
                else
                    good = good && lse[index] != lse[index];
                for (int d = 0; d < D; ++d) {
                    double want = 0, size = 0;
                    for (int m = 0; m < keys; ++m) {
                        const double term = probs[static_cast<size_t>(m)] / row_sum * at(2, b, h, m, d);
                        want += term, size += std::abs(term);
                    }
                    const float got = value(out[static_cast<size_t>((static_cast<int64_t>(b) * queries + n) * c.heads * D + h * D + d)]);
                    const double epsilon = std::is_same_v<T, __half> ? 6e-4 : 4e-3;  // rounding of P and of the result
                    const double error = want != want && got != got ? 0.0 : std::abs(got - want) / (epsilon * (size + std::abs(want)) + 1e-6);
                    good = good && error < 1;  // false for NaN
                    worst = std::max(worst, error);
                }
            }
    check(good,
          "mask_attention: %s, head dim %d, batch %d, heads %d, %d frames of %d tokens (%d special), %d keys, gate %d, %d splits, variant %d: %.2f "
          "of the "
          "tolerance",
          std::is_same_v<T, __half> ? "fp16" : "bf16", D, c.batch, c.heads, c.frames, c.per_frame, c.special, keys, static_cast<int>(c.gate),
          c.splits, c.variant, worst);
}

template <class T, int D>
void kernel_cases() {
    attention_case<T, D>({1, 1, 1, 1, 0, 0, Gate::none});                         // one row, one key
    attention_case<T, D>({1, 2, 3, 59, 5, 0, Gate::layout});                      // ragged; gated rows fill a part of one tile
    attention_case<T, D>({2, 1, 2, 128, 1, 0, Gate::layout, 1, 1});               // whole tiles, a batch, one block for all work tiles
    attention_case<T, D>({1, 1, 45, 9, 5, 0, Gate::layout, 1, 3, 2.0f});          // gated rows in two tiles
    attention_case<T, D>({1, 1, 1, 70, 5, 700, Gate::anywhere, 1, 1});            // more keys than the stages hold; gates in some warpgroups only
    attention_case<T, D>({1, 2, 1, 200, 0, 300, Gate::anywhere, 3, 2, 3.0f});     // keys split, the last split ragged
    attention_case<T, D>({2, 1, 2, 40, 5, 0, Gate::layout, 1, 2, 6.0f, 256.0f});  // large logits
    for (const int key : {20, 25})                                                // in a column of ex2_approx, of exp2_polynomial
        attention_case<T, D>({1, 1, 3, 59, 5, 0, Gate::layout, 1, 2, 1.0f, 32.0f, false, key});
    attention_case<T, D>({1, 1, 2, 20, 5, 300, Gate::layout, 1, 1, 1.0f, 32.0f, false, -1, 0, 1e-39f});  // the margin of maxima would be infinite
    for (int variant = 1; variant < static_cast<int>(std::size(attention_variants)); ++variant)  // maxima that grow within and past the margin
        for (const float spread : {1.0f, 16.0f})
            if (D == 64 || spread > 1.0f) attention_case<T, D>({1, 1, 1, 20, 5, 260, Gate::layout, 1, 1, spread, 32.0f, false, -1, variant});
    if (std::is_same_v<T, __nv_bfloat16>)  // fp16 logits do not reach -inf
        for (const int splits : {1, 2}) attention_case<T, D>({1, 1, 3, 59, 5, 0, Gate::layout, splits, 2, 1.0f, 32.0f, true});
}

// Every row must be written once, and special rows by packed tiles.
void schedule_case(int frames, int per_frame, int special, int keys, int splits) {
    const TileScheduler s{frames * per_frame, keys, 2, 3, per_frame, special, special ? frames : 0, 192, 128, splits};
    std::map<std::array<int, 4>, int> written;
    std::set<std::array<int, 4>> key_tiles;
    bool good = true;
    for (int index = 0; index < s.work; ++index) {
        const cuda::WorkTile work = s.at(index);
        good = good && work.first_key_tile < work.last_key_tile && work.last_key_tile <= s.key_tiles;
        for (int i = 0; i < s.tile_rows; ++i)
            if (const int n = s.row(work.tile, i); n >= 0) {
                ++written[{work.batch, work.head, work.split, n}];
                good = good && n < s.queries && (special == 0 || s.packed(work.tile) == (n % per_frame < special));
            }
        for (int tile = work.first_key_tile; tile < work.last_key_tile; ++tile)
            good = good && key_tiles.insert({work.batch, work.head, work.tile, tile}).second;
    }
    for (const auto& [row, times] : written) good = good && times == 1;
    good =
        good && written.size() == static_cast<size_t>(6 * splits * s.queries) && key_tiles.size() == static_cast<size_t>(6 * s.tiles * s.key_tiles);
    check(good, "schedule: %d frames of %d tokens (%d special), %d keys, %d splits", frames, per_frame, special, keys, splits);
}

void splits_cases() {
    const auto splits = [](int queries, int keys) { return cuda::splits_for({queries, keys, 16, 1, 1, 0, 0, 192, 128, 1}, 132); };
    check(splits(893, 893) == 1, "a short sequence is not split: %d", splits(893, 893));
    check(splits(35720, 35720) == 1, "enough tiles are not split: %d", splits(35720, 35720));
    check(splits(5, 35720) == 8, "five queries are split until the device is full: %d", splits(5, 35720));
    for (int tiles = 1; tiles < 40; ++tiles)
        for (int wanted = 1; wanted <= tiles; ++wanted) {
            const int whole = cuda::whole_splits(tiles, wanted), span = TileScheduler::ceil_div(tiles, whole);
            check(whole >= 1 && whole <= wanted && (whole - 1) * span < tiles && whole * span >= tiles, "%d key tiles in %d splits: %d", tiles,
                  wanted, whole);
        }
}

void merge_cases() {
    cuda::Merge merge;
    const float lse[] = {1.0f, -INFINITY, 3.0f};
    for (const float x : lse) merge.see(x);
    const float weights[] = {merge.weight(lse[0]), merge.weight(lse[1]), merge.weight(lse[2])};
    check(std::abs(merge.lse() - std::log(std::exp(1.0f) + std::exp(3.0f))) < 1e-6f, "merge: log-sum-exp %f", merge.lse());
    check(weights[1] == 0.0f && std::abs(weights[0] * merge.factor() - 1 / (1 + std::exp(2.0f))) < 1e-6f, "merge: weights");
    cuda::Merge fully_masked;
    fully_masked.see(-INFINITY);
    check(fully_masked.weight(-INFINITY) == 0.0f && fully_masked.factor() == 0.0f && fully_masked.lse() == -INFINITY, "merge: no logit is finite");
    cuda::Merge nan;
    for (const float x : {1.0f, NAN, 2.0f}) nan.see(x);
    nan.weight(1.0f);
    check(nan.lse() != nan.lse(), "merge: NaN stays NaN");
}

void polynomial_cases() {
    double worst = 0;
    for (float x = -124.0f; x <= 9.0f; x += 0.0137f)
        worst = std::max(worst, std::abs(cuda::exp2_polynomial(x) / std::exp2(static_cast<double>(x)) - 1));
    check(worst < 8e-5, "exp2_polynomial: relative error %g", worst);
    check(cuda::exp2_polynomial(-INFINITY) < 1e-37f && cuda::exp2_polynomial(-1e30f) >= 0.0f, "exp2_polynomial: far below 0");
    check(cuda::exp2_polynomial(NAN) != cuda::exp2_polynomial(NAN), "exp2_polynomial: NaN");
}

}  // namespace

void mask_attention_cases() {
    for (const int special : {0, 1, 5, 59, 192})
        for (const int splits : {1, 3}) schedule_case(7, std::max(special, 59), special, 700, splits);
    splits_cases();
    merge_cases();
    polynomial_cases();
    kernel_cases<__nv_bfloat16, 64>();
    kernel_cases<__nv_bfloat16, 128>();
    kernel_cases<__half, 64>();
    kernel_cases<__half, 128>();
}

}  // namespace page4d::tests
