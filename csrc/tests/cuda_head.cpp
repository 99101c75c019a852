// csrc/cuda/mask_head.cu, including MMAs and asynchronous copies, against the plain loops of the compiled library.
#include "ampere_on_cpu.h"
#include "checks.h"
//
#include "../cuda/mask_head.cu"

namespace page4d::tests {
namespace {

struct Case {
    int64_t batch, frames, channels, hidden, special, height, width;
    int64_t slack = 0, offset = 0;  // longer rows, and a misaligned first address
    bool channels_first = false;
    float mean = 0.0f;
};

template <class T>
void head_case(DType dtype, const Case& c) {
    const int64_t per_frame = c.special + c.height * c.width, row = (c.channels_first ? per_frame : c.channels) + c.slack;
    const int64_t frame = row * (c.channels_first ? c.channels : per_frame);
    const size_t count = static_cast<size_t>(c.batch * c.frames * frame + c.offset);
    std::vector<float> exact(count);
    std::unique_ptr<cuda::Pack<T>[]> memory(new cuda::Pack<T>[count]);  // aligned to 16 bytes
    T* const given = memory[0].at;
    for (size_t i = 0; i < count; ++i) {
        cuda::assign(given[i], 3 * random_float() + c.mean);
        exact[i] = cuda::value(given[i]);
    }
    const int64_t sizes[] = {c.channels * 9, c.channels, c.hidden * c.channels, c.hidden, c.hidden, 1};
    std::unique_ptr<cuda::Pack<float>[]> parameters[6];
    for (int i = 0; i < 6; ++i) {
        parameters[i].reset(new cuda::Pack<float>[static_cast<size_t>(sizes[i] / 4 + 1)]);
        for (int64_t j = 0; j < sizes[i]; ++j) parameters[i][static_cast<size_t>(j / 4)].at[j % 4] = 0.3f * random_float();
    }
    const size_t outputs = static_cast<size_t>(c.batch * c.frames * per_frame), statistics = static_cast<size_t>(c.batch * c.frames * c.channels);
    std::vector<float> want(outputs), got(outputs, NAN), mean(statistics, NAN), rstd(statistics, NAN);

    MaskHead p{};
    p.tokens = exact.data() + c.offset, p.out = want.data();
    const float** places[] = {&p.w0, &p.b0, &p.w2, &p.b2, &p.w4, &p.b4};
    for (int i = 0; i < 6; ++i) *places[i] = parameters[i][0].at;
    p.batch = c.batch, p.frames = c.frames, p.channels = c.channels, p.hidden = c.hidden, p.special = c.special, p.height = c.height,
    p.width = c.width;
    p.stride[0] = c.frames * frame, p.stride[1] = frame, p.stride[2] = c.channels_first ? 1 : row, p.stride[3] = c.channels_first ? row : 1;
    p.min_std = 1e-6f, p.dtype = DType::f32, p.threads = 1, p.level = Level::scalar;
    bool good = mask_head(p) == Status::ok;

    p.tokens = given + c.offset, p.out = got.data(), p.dtype = dtype;
    gpu() = {};
    good = good && mask_head_cuda(p, mean.data(), rstd.data(), 0, nullptr) == Status::ok;
    float worst = 0;
    for (size_t i = 0; i < outputs; ++i) {
        const float allowed = dtype == DType::f32 ? 2e-6f : 1e-3f, error = std::abs(got[i] - want[i]);
        good = good && error <= allowed;  // false for NaN
        worst = std::max(worst, error);
    }
    check(good, "mask_head: dtype %d, batch %d, frames %d, channels %d, hidden %d, grid %d x %d: %g", static_cast<int>(dtype),
          static_cast<int>(c.batch), static_cast<int>(c.frames), static_cast<int>(c.channels), static_cast<int>(c.hidden), static_cast<int>(c.height),
          static_cast<int>(c.width), worst);
}

template <class T>
void head_cases(DType dtype) {
    head_case<T>(dtype, {1, 1, 24, 16, 5, 3, 4});
    head_case<T>(dtype, {2, 1, 40, 16, 0, 1, 2});                     // the fewest patches; fewer channels than a block
    head_case<T>(dtype, {1, 2, 64, 48, 5, 13, 21});                   // more patches than a tile, ragged
    head_case<T>(dtype, {1, 1, 72, 100, 1, 5, 40});                   // a wide grid, a wide hidden layer
    head_case<T>(dtype, {2, 2, 33, 20, 2, 4, 5});                     // an odd number of channels
    head_case<T>(dtype, {1, 2, 24, 16, 5, 6, 5, 3, 1});               // an odd address
    head_case<T>(dtype, {1, 1, 24, 16, 5, 6, 5, 0, 0, true});         // (B, S, C, P)
    head_case<T>(dtype, {1, 1, 24, 16, 5, 17, 19, 8, 0, false, 30});  // longer rows, a large mean
}

}  // namespace

void mask_head_cases() {
    head_cases<float>(DType::f32);
    head_cases<__half>(DType::f16);
    head_cases<__nv_bfloat16>(DType::bf16);
}

}  // namespace page4d::tests
