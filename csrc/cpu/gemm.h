// C (+)= A B for small tiles: the only matmul of the library, with FMA, bf16 dot-product or AMX instructions.
//
// Along the inner dimension, operands consist of 32-bit *units*: one float, or a pair of bf16. A is row-major (rows, inner). B is stored in
// panels of columns, (inner, width) each. C is row-major fp32. An engine defines how many rows and vectors of columns stay in registers.
#pragma once

#include "simd.h"

namespace page4d::PAGE4D_ISA {

// Columns are divided as evenly as possible into `count` panels of `vectors` vectors each.
struct Panels {
    int64_t count, vectors;
    int64_t width() const { return vectors * Vec::width; }
    int64_t columns() const { return count * width(); }
    Panels first(int64_t columns) const { return {(columns + width() - 1) / width(), vectors}; }
};

template <class E>
Panels panels_for(int64_t columns) {
    const int64_t vectors = (columns + Vec::width - 1) / Vec::width;
    const int64_t count = (vectors + E::vectors - 1) / E::vectors;
    return {count, (vectors + count - 1) / count};
}

struct EngineF32 {
    using Element = float;  // of a packed operand
    using Unit = float;
    static constexpr int pair = 1;    // elements in a unit
    static constexpr int rows = 6;    // processed together, in registers
    static constexpr int block = 48;  // rows whose logits are in the cache together
    static constexpr int step = 1;    // the inner dimension, in units, is a multiple of this
#if defined(__AVX512F__)
    static constexpr int vectors = 4;
#else
    static constexpr int vectors = 2;
#endif
    static Vec multiply_add(Vec c, float a, Vec b) { return fma(broadcast(a), b, c); }
    static Vec load_unit(const float* p) { return load(p); }
    static void begin() {}  // before and after a thread's matmuls
    static void end() {}
};

#if defined(__AVX512BF16__)
struct EngineBf16 {
    using Element = uint16_t;
    using Unit = uint32_t;
    static constexpr int pair = 2, rows = 6, block = 48, step = 1, vectors = 4;
    static Vec multiply_add(Vec c, uint32_t a, Vec b) {
        return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)_mm512_castps_si512(b.v))};
    }
    static Vec load_unit(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
    static void begin() {}
    static void end() {}
};
#endif

// Stores values as elements of an operand.
inline void store_elements(float* to, Vec x) { store(to, x); }
#if defined(__AVX512BF16__)
inline void store_elements(uint16_t* to, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x.v)); }
#endif

template <class E, int ROWS, int VECTORS>
inline void tile(int64_t inner, const typename E::Unit* a, int64_t lda, const typename E::Unit* b, float* c, int64_t ldc, bool add) {
    Vec acc[ROWS][VECTORS];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < VECTORS; ++j) acc[i][j] = add ? load(c + i * ldc + j * Vec::width) : broadcast(0.0f);
    for (int64_t u = 0; u < inner; ++u) {
        Vec column[VECTORS];
        for (int j = 0; j < VECTORS; ++j) column[j] = E::load_unit(b + u * VECTORS * Vec::width + j * Vec::width);
        for (int i = 0; i < ROWS; ++i)
            for (int j = 0; j < VECTORS; ++j) acc[i][j] = E::multiply_add(acc[i][j], a[i * lda + u], column[j]);
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < VECTORS; ++j) store(c + i * ldc + j * Vec::width, acc[i][j]);
}

template <class E, int VECTORS>
void panel(int64_t rows, int64_t inner, const typename E::Unit* a, int64_t lda, const typename E::Unit* b, float* c, int64_t ldc, bool add) {
    constexpr int64_t chunk = 64;  // units of a panel that stay in the L1 cache for all rows
    for (int64_t u = 0; u < inner; u += chunk)
        for (int64_t i = 0; i < rows; i += E::rows)
            tile<E, E::rows, VECTORS>(smaller(chunk, inner - u), a + i * lda + u, lda, b + u * VECTORS * Vec::width, c + i * ldc, ldc, add || u > 0);
}

// `rows` must be a multiple of E::rows, and `inner` (in units) a multiple of E::step.
template <class E>
void multiply(int64_t rows, Panels panels, int64_t inner, const typename E::Unit* a, int64_t lda, const typename E::Unit* b, float* c, int64_t ldc,
              bool add) {
    for (int64_t p = 0; p < panels.count; ++p, b += inner * panels.width(), c += panels.width()) {
        switch (panels.vectors) {
            case 1: panel<E, 1>(rows, inner, a, lda, b, c, ldc, add); break;
            case 2: panel<E, 2>(rows, inner, a, lda, b, c, ldc, add); break;
            case 3: panel<E, 3>(rows, inner, a, lda, b, c, ldc, add); break;
            default: panel<E, 4>(rows, inner, a, lda, b, c, ldc, add); break;
        }
    }
}

}  // namespace page4d::PAGE4D_ISA
