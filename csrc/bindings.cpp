// The only file that depends on Python. It takes addresses and numbers and raises exceptions. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "page4d/mask_attention.h"
#include "page4d/mask_head.h"
#include "page4d/qk_norm_rope.h"

namespace py = pybind11;
using namespace page4d;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

template <size_t N>
void copy(const std::array<int64_t, N>& from, int64_t (&to)[N]) {
    for (size_t i = 0; i < N; ++i) to[i] = from[i];
}

void raise_if(Status status, const char* op) {
    if (status == Status::no_memory) throw std::bad_alloc();
#if defined(PAGE4D_WITH_CUDA)
    if (status == Status::cuda_error) throw std::runtime_error(std::string(op) + ": CUDA: " + cuda_message());
#endif
    if (status != Status::ok) throw std::invalid_argument(std::string(op) + ": " + describe(status));
}

using Three = std::array<int64_t, 3>;
using Four = std::array<int64_t, 4>;

using Attention = std::tuple<Address, Address, Address, Address, Address, Address, Address>;  // q, k, v, gate, bias, out, lse

MaskAttention attention_problem(const Attention& tensors, const std::array<int64_t, 5>& sizes, const std::array<Three, 4>& strides,
                                int64_t gate_stride, int64_t bias_stride, float scale, int dtype) {
    MaskAttention p{};
    const auto [q, k, v, gate, bias, out, lse] = tensors;
    p.q = pointer<void>(q), p.k = pointer<void>(k), p.v = pointer<void>(v), p.out = pointer<void>(out), p.lse = pointer<float>(lse);
    p.gate = pointer<float>(gate), p.bias = pointer<float>(bias);
    p.batch = sizes[0], p.heads = sizes[1], p.queries = sizes[2], p.keys = sizes[3], p.head_dim = sizes[4];
    copy(strides[0], p.q_stride), copy(strides[1], p.k_stride), copy(strides[2], p.v_stride), copy(strides[3], p.out_stride);
    p.gate_stride = gate_stride, p.bias_stride = bias_stride, p.scale = scale;
    p.dtype = static_cast<DType>(dtype);
    return p;
}

void run_attention(const Attention& tensors, const std::array<int64_t, 5>& sizes, const std::array<Three, 4>& strides, int64_t gate_stride,
                   int64_t bias_stride, float scale, int dtype, int threads, int level) {
    MaskAttention p = attention_problem(tensors, sizes, strides, gate_stride, bias_stride, scale, dtype);
    p.threads = threads, p.level = static_cast<Level>(level);
    raise_if(mask_attention(p), "mask_attention");
}

MaskHead head_problem(Address tokens, const std::array<Address, 6>& parameters, Address out, const std::array<int64_t, 7>& sizes, const Four& stride,
                      float min_std, int dtype) {
    MaskHead p{};
    p.tokens = pointer<void>(tokens), p.out = pointer<float>(out);
    const float** places[] = {&p.w0, &p.b0, &p.w2, &p.b2, &p.w4, &p.b4};
    for (size_t i = 0; i < parameters.size(); ++i) *places[i] = pointer<float>(parameters[i]);
    p.batch = sizes[0], p.frames = sizes[1], p.channels = sizes[2], p.hidden = sizes[3], p.special = sizes[4];
    p.height = sizes[5], p.width = sizes[6];
    copy(stride, p.stride);
    p.min_std = min_std, p.dtype = static_cast<DType>(dtype);
    return p;
}

void run_head(Address tokens, const std::array<Address, 6>& parameters, Address out, const std::array<int64_t, 7>& sizes, const Four& stride,
              float min_std, int dtype, int threads, int level) {
    MaskHead p = head_problem(tokens, parameters, out, sizes, stride, min_std, dtype);
    p.threads = threads, p.level = static_cast<Level>(level);
    raise_if(mask_head(p), "mask_head");
}

QkNormRope rope_problem(Address qkv, const std::array<Address, 6>& vectors, Address q, Address k, const std::array<int64_t, 7>& sizes,
                        const Four& stride, float eps, int dtype) {
    QkNormRope p{};
    p.qkv = pointer<void>(qkv), p.q = pointer<void>(q), p.k = pointer<void>(k);
    const float** places[] = {&p.q_weight, &p.q_bias, &p.k_weight, &p.k_bias, &p.cos, &p.sin};
    for (size_t i = 0; i < vectors.size(); ++i) *places[i] = pointer<float>(vectors[i]);
    p.batch = sizes[0], p.tokens = sizes[1], p.heads = sizes[2], p.head_dim = sizes[3];
    p.per_frame = sizes[4], p.special = sizes[5], p.width = sizes[6];
    copy(stride, p.stride);
    p.eps = eps, p.dtype = static_cast<DType>(dtype);
    return p;
}

void run_rope(Address qkv, const std::array<Address, 6>& vectors, Address q, Address k, const std::array<int64_t, 7>& sizes, const Four& stride,
              float eps, int dtype, int threads, int level) {
    QkNormRope p = rope_problem(qkv, vectors, q, k, sizes, stride, eps, dtype);
    p.threads = threads, p.level = static_cast<Level>(level);
    raise_if(qk_norm_rope(p), "qk_norm_rope");
}

#if defined(PAGE4D_WITH_CUDA)
void run_head_cuda(Address tokens, const std::array<Address, 6>& parameters, Address out, const std::array<Address, 2>& statistics,
                   const std::array<int64_t, 7>& sizes, const Four& stride, float min_std, int dtype, int device, Address stream) {
    const MaskHead p = head_problem(tokens, parameters, out, sizes, stride, min_std, dtype);
    raise_if(mask_head_cuda(p, pointer<float>(statistics[0]), pointer<float>(statistics[1]), device, pointer<void>(stream)), "mask_head");
}

void run_rope_cuda(Address qkv, const std::array<Address, 6>& vectors, Address q, Address k, const std::array<int64_t, 7>& sizes, const Four& stride,
                   float eps, int dtype, int device, Address stream) {
    raise_if(qk_norm_rope_cuda(rope_problem(qkv, vectors, q, k, sizes, stride, eps, dtype), device, pointer<void>(stream)), "qk_norm_rope");
}
#endif

#if defined(PAGE4D_WITH_CUDA_SM90)
using Layout = std::array<int64_t, 3>;  // frames, tokens per frame, special tokens

MaskAttention with_layout(MaskAttention p, const Layout& layout) {
    p.frames = layout[0], p.per_frame = layout[1], p.special = layout[2];
    return p;
}

int attention_cuda_splits(const Attention& tensors, const std::array<int64_t, 5>& sizes, const std::array<Three, 4>& strides, int64_t gate_stride,
                          int64_t bias_stride, float scale, const Layout& layout, int dtype, int device) {
    const MaskAttention p = with_layout(attention_problem(tensors, sizes, strides, gate_stride, bias_stride, scale, dtype), layout);
    int splits = 1;
    raise_if(mask_attention_cuda_splits(p, device, splits), "mask_attention");
    return splits;
}

void run_attention_cuda(const Attention& tensors, const std::array<int64_t, 5>& sizes, const std::array<Three, 4>& strides, int64_t gate_stride,
                        int64_t bias_stride, float scale, const Layout& layout, int variant, int splits, const std::array<Address, 2>& partials,
                        int dtype, int device, Address stream) {
    MaskAttention p = with_layout(attention_problem(tensors, sizes, strides, gate_stride, bias_stride, scale, dtype), layout);
    p.variant = variant;
    raise_if(mask_attention_cuda(p, splits, pointer<float>(partials[0]), pointer<float>(partials[1]), device, pointer<void>(stream)),
             "mask_attention");
}
#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Compiled kernels of page4d. Call them through page4d_kernels.native.";
    module.attr("interface") = PAGE4D_INTERFACE;
    module.def("best_level", [] { return static_cast<int>(best_level()); });
    module.def(
        "peak_rate",
        [](int dtype, bool exponentials, int threads, int level) {
            return peak_rate(static_cast<DType>(dtype), exponentials, threads, static_cast<Level>(level));
        },
        py::call_guard<py::gil_scoped_release>());
    module.def("mask_attention", run_attention, py::call_guard<py::gil_scoped_release>());
    module.def("mask_head", run_head, py::call_guard<py::gil_scoped_release>());
    module.def("qk_norm_rope", run_rope, py::call_guard<py::gil_scoped_release>());
#if defined(PAGE4D_WITH_CUDA)
    module.def("cuda_shared_memory", [](int device) {
        int bytes = 0;
        raise_if(cuda_shared_memory(device, bytes), "cuda_shared_memory");
        return bytes;
    });
    module.def("mask_head_cuda_shared_bytes", mask_head_cuda_shared_bytes);
    module.def("mask_head_cuda", run_head_cuda, py::call_guard<py::gil_scoped_release>());
    module.def("qk_norm_rope_cuda", run_rope_cuda, py::call_guard<py::gil_scoped_release>());
#endif
#if defined(PAGE4D_WITH_CUDA_SM90)
    std::vector<std::pair<int, float>> variants;
    for (const AttentionVariant& variant : attention_variants) variants.emplace_back(variant.polynomial_every, variant.rescale_past);
    module.attr("mask_attention_cuda_variants") = variants;
    module.def("mask_attention_cuda_splits", attention_cuda_splits);
    module.def("mask_attention_cuda", run_attention_cuda, py::call_guard<py::gil_scoped_release>());
#endif
}
