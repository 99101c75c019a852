// Launches mask_attention_sm90.cuh. Builds the schedule and the tensor maps of q, k and v.
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <iterator>

#include "hopper.cuh"
#include "launch.cuh"
#include "mask_attention_sm90.cuh"

namespace page4d::cuda {
namespace {

// Looked up in the driver at run time. The library does not link the driver, so it also loads on machines without one.
using Encode = decltype(&cuTensorMapEncodeTiled);
Status find_encoder(Encode& encode) {
    static std::atomic<Encode> found{nullptr};  // a look-up that failed is tried again: its reason may have gone
    if (encode = found; encode) return Status::ok;
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) return to_status(error);
    if (result != cudaDriverEntryPointSuccess) return failure("the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12");
    found = encode = reinterpret_cast<Encode>(function);
    return Status::ok;
}

// Sizes and strides are in 2-byte elements. The contiguous dimension comes first, and its stride is omitted. Boxes are 64 columns wide. The
// device must have been set: the driver encodes for the context of the thread.
template <int RANK>
Status make_map(TensorMap& map, DType dtype, const void* base, const int64_t (&size)[RANK], const int64_t (&stride)[RANK - 1],
                const int (&box)[RANK]) {
    Encode encode;
    if (const Status status = find_encoder(encode); status != Status::ok) return status;
    cuuint64_t sizes[RANK], bytes[RANK - 1];
    cuuint32_t boxes[RANK], ones[RANK];
    for (int i = 0; i < RANK; ++i) sizes[i] = static_cast<cuuint64_t>(size[i]), boxes[i] = static_cast<cuuint32_t>(box[i]), ones[i] = 1;
    for (int i = 0; i < RANK - 1; ++i) bytes[i] = size[i + 1] == 1 ? 16 : static_cast<cuuint64_t>(stride[i]) * 2;  // any stride is valid for size 1
    const auto type = dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const CUresult result = encode(&map, type, RANK, const_cast<void*>(base), sizes, bytes, boxes, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result == CUDA_ERROR_INVALID_VALUE) return failure("no tensor map can be made of these sizes and strides");
    return to_status(static_cast<cudaError_t>(result));  // the runtime numbers the driver's errors alike; this may be one of an earlier kernel
}

template <int D>
TileScheduler schedule_of(const MaskAttention& p, int splits) {
    using Tile = AttentionTile<__half, D>;
    const bool layout = p.gate && p.special > 0;
    const auto number = [](int64_t x) { return static_cast<int>(x); };
    return {number(p.queries),
            number(p.keys),
            number(p.heads),
            number(p.batch),
            layout ? number(p.per_frame) : 1,
            layout ? number(p.special) : 0,
            layout ? number(p.frames) : 0,
            Tile::rows,
            Tile::keys,
            splits};
}

TileScheduler schedule_of(const MaskAttention& p, int splits) { return p.head_dim == 64 ? schedule_of<64>(p, splits) : schedule_of<128>(p, splits); }

bool aligned(const void* base, const int64_t (&stride)[3], int64_t batch, int64_t heads, int64_t tokens) {
    const auto fits = [](int64_t stride, int64_t count) {
        return count == 1 || (stride > 0 && stride * 2 % 16 == 0);
    };  // no tensor map is documented for stride 0
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && fits(stride[0], batch) && fits(stride[1], heads) && fits(stride[2], tokens);
}

Status check(const MaskAttention& p) {
    if (p.dtype != DType::f16 && p.dtype != DType::bf16) return Status::bad_dtype;
    if (!p.q || !p.k || !p.v || !p.out || !p.lse || (p.gate == nullptr) != (p.bias == nullptr)) return Status::null_pointer;
    const auto fits = [](int64_t x) { return x >= 1 && x <= INT32_MAX / 2; };
    if (!fits(p.batch) || !fits(p.heads) || !fits(p.queries) || !fits(p.keys) || (p.head_dim != 64 && p.head_dim != 128)) return Status::bad_sizes;
    if (p.variant < 0 || p.variant >= static_cast<int>(std::size(attention_variants))) return Status::bad_variant;
    const int rows = schedule_of(p, 1).tile_rows;
    if (p.special < 0 || p.special > rows || (p.special > 0 && p.frames * p.per_frame != p.queries)) return Status::bad_sizes;
    const double work =
        (static_cast<double>(p.queries) / rows + static_cast<double>(p.frames) + 2) * static_cast<double>(p.heads) * static_cast<double>(p.batch);
    if (work > INT32_MAX / 64) return Status::bad_sizes;
    const bool all = aligned(p.q, p.q_stride, p.batch, p.heads, p.queries) && aligned(p.k, p.k_stride, p.batch, p.heads, p.keys) &&
                     aligned(p.v, p.v_stride, p.batch, p.heads, p.keys) && aligned(p.out, p.out_stride, p.batch, p.heads, p.queries);
    return all ? Status::ok : Status::misaligned;
}

Status multiprocessors(int device, int& count) { return to_status(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)); }

template <class T, int D, int POLYNOMIAL>
Status launch(const MaskAttention& p, int splits, float* out_partial, float* lse_partial, int device, cudaStream_t stream) {
    using Tile = AttentionTile<T, D>;
    constexpr int bytes = sizeof(AttentionShared<T, D>);
    static_assert(bytes <= 227 * 1024);
    const OnDevice guard(device);
    Status status = to_status(guard.status());
    AttentionArguments a{};
    a.schedule = schedule_of<D>(p, splits);
    const TileScheduler& s = a.schedule;
    const auto map = [&](TensorMap& to, const void* base, const int64_t (&stride)[3], int64_t tokens, int box) {
        if (status == Status::ok)
            status = make_map<4>(to, p.dtype, base, {D, tokens, p.heads, p.batch}, {stride[2], stride[1], stride[0]}, {64, box, 1, 1});
    };
    map(a.q, p.q, p.q_stride, p.queries, Tile::rows);
    map(a.k, p.k, p.k_stride, p.keys, Tile::keys);
    map(a.v, p.v, p.v_stride, p.keys, Tile::keys);
    if (status == Status::ok && s.special > 0)
        status = make_map<5>(a.q_packed, p.dtype, p.q, {D, p.special, p.frames, p.heads, p.batch},
                             {p.q_stride[2], p.per_frame * p.q_stride[2], p.q_stride[1], p.q_stride[0]}, {64, s.special, s.packed_frames, 1, 1});
    a.gate = p.gate, a.bias = p.bias, a.out = p.out, a.lse = p.lse, a.out_partial = out_partial, a.lse_partial = lse_partial;
    for (int i = 0; i < 3; ++i) a.out_stride[i] = p.out_stride[i];
    a.gate_stride = p.gate_stride, a.bias_stride = p.bias_stride, a.scale = p.scale;
    // The kernel compares logits before the scale is applied, or natural ones. A margin must be finite, as the first maximum grows from -inf.
    const float margin = attention_variants[p.variant].rescale_past * 0.6931471805599453f;
    a.rescale_margin[0] = std::min(margin / p.scale, FLT_MAX), a.rescale_margin[1] = margin;

    int count = 0;
    if (status == Status::ok) status = multiprocessors(device, count);
    const auto kernel = mask_attention_fwd_kernel<T, D, POLYNOMIAL>;
    if (status == Status::ok) status = allow_shared_memory(kernel, bytes, device);
    if (status == Status::ok) status = launch_kernel(kernel, static_cast<unsigned>(min(count, s.work)), Tile::threads, bytes, stream, a);
    if (status != Status::ok || splits == 1) return status;
    const int64_t pieces = p.batch * p.heads * p.queries * (D / 4);
    return launch_kernel(mask_attention_fwd_kernel_merge<T, D>, static_cast<unsigned>((pieces + merge_threads - 1) / merge_threads), merge_threads, 0,
                         stream, a);
}

template <class T>
Status launch_variant(const MaskAttention& p, int splits, float* out_partial, float* lse_partial, int device, cudaStream_t stream) {
    if (p.head_dim == 128) return launch<T, 128, 0>(p, splits, out_partial, lse_partial, device, stream);
    switch (attention_variants[p.variant].polynomial_every) {
        case 8: return launch<T, 64, 8>(p, splits, out_partial, lse_partial, device, stream);
        case 16: return launch<T, 64, 16>(p, splits, out_partial, lse_partial, device, stream);
        case 0: return launch<T, 64, 0>(p, splits, out_partial, lse_partial, device, stream);
    }
    return Status::bad_variant;
}

}  // namespace
}  // namespace page4d::cuda

namespace page4d {

Status mask_attention_cuda_splits(const MaskAttention& p, int device, int& splits) {
    if (const Status status = cuda::check(p); status != Status::ok) return status;
    int count = 0;
    const Status status = cuda::multiprocessors(device, count);
    splits = cuda::splits_for(cuda::schedule_of(p, 1), count);
    return status;
}

Status mask_attention_cuda(const MaskAttention& p, int splits, float* out_partial, float* lse_partial, int device, void* stream) {
    if (const Status status = cuda::check(p); status != Status::ok) return status;
    if (splits < 1 || splits != cuda::whole_splits(cuda::schedule_of(p, 1).key_tiles, splits)) return Status::bad_sizes;
    if (splits > 1 && (!out_partial || !lse_partial)) return Status::null_pointer;
    const auto to = static_cast<cudaStream_t>(stream);
    return p.dtype == DType::f16 ? cuda::launch_variant<__half>(p, splits, out_partial, lse_partial, device, to)
                                 : cuda::launch_variant<__nv_bfloat16>(p, splits, out_partial, lse_partial, device, to);
}

}  // namespace page4d
