// Vectors of fp32 for the instruction set of the including file, and approximations of exp2 and erf.
//
// Every kernel file must define PAGE4D_ISA before including this. All code is in that namespace, so the linker cannot put a function compiled
// for a newer processor into a path for an older one. For the same reason, nothing here uses templates of the standard library.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace page4d::PAGE4D_ISA {

#if defined(__AVX512F__)

struct Vec {
    __m512 v;
    static constexpr int width = 16;
};

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Returns the second operand if either is NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float max(Vec a) { return _mm512_reduce_max_ps(a.v); }
// The low 9 bits as the sign and exponent of a float: 2^(bits - 127), and 0 for bits = 0.
inline Vec power_of_bits(Vec a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))}; }
// Any 64 bytes, as 16 units of 32 bits.
inline Vec load_units(const void* p) { return {_mm512_castsi512_ps(_mm512_loadu_si512(p))}; }
// 16 bf16 values of each of two rows, interleaved: each unit holds one value of each row.
inline Vec load_pairs(const uint16_t* low, const uint16_t* high) {
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
    const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
    return {_mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)))};
}
// r[i][j] becomes r[j][i].
inline void transpose(Vec (&r)[16]) {
    __m512 t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
        t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + j]), _mm512_castps_pd(t[i + j + 2])));
            u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + j]), _mm512_castps_pd(t[i + j + 2])));
        }
    for (int i = 0; i < 4; ++i) {  // u[4 a + i] holds column 4 b + i of rows 4 a ... 4 a + 3 in its lane b
        const __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88), b = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
        const __m512 c = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd), d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
        r[i].v = _mm512_shuffle_f32x4(a, b, 0x88);
        r[i + 8].v = _mm512_shuffle_f32x4(a, b, 0xdd);
        r[i + 4].v = _mm512_shuffle_f32x4(c, d, 0x88);
        r[i + 12].v = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
}
// 16 bf16 values.
inline Vec load_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}

#else

struct Vec {
    __m256 v;
    static constexpr int width = 8;
};

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline float sum(Vec a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
inline float max(Vec a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}
inline Vec power_of_bits(Vec a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))}; }
inline void transpose(Vec (&r)[8]) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
        t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            u[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(t[i + j]), _mm256_castps_pd(t[i + j + 2])));
            u[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(t[i + j]), _mm256_castps_pd(t[i + j + 2])));
        }
    for (int i = 0; i < 4; ++i) {
        r[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}
inline Vec load_bf16(const uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))};
}

#endif

// 2^x for x < 127, by a minimax polynomial on [-1/2, 1/2]. The relative error is below 2e-7. Returns 0 below -126.5, including -inf.
// NaN stays NaN.
//
// x = n + f with n the nearest integer. Floats from 2^23 to 2^24 are the integers, so adding 1.5 * 2^23 rounds x, and adding 127 more leaves
// the biased exponent of 2^n in the low bits. This takes fewer instructions than rounding and converting.
inline Vec exp2(Vec x) {
    x = max(broadcast(-127.0f), x);
    const Vec integer = broadcast(0x1.8p23f + 127.0f), biased = x + integer, f = x - (biased - integer);
    Vec p = broadcast(0.001326472731307149f);
    p = fma(p, f, broadcast(0.009671512991189957f));
    p = fma(p, f, broadcast(0.05550733581185341f));
    p = fma(p, f, broadcast(0.24022242426872253f));
    p = fma(p, f, broadcast(0.6931470036506653f));
    p = fma(p, f, broadcast(1.0f));
    return p * power_of_bits(biased);  // a product, so that NaN stays NaN
}

// erf(x) as x P(x^2) / Q(x^2), minimax on [-3.95, 3.95] and clamped beyond. The absolute error is below 4e-7 everywhere.
inline Vec erf(Vec x) {
    x = min(broadcast(3.95f), max(broadcast(-3.95f), x));
    const Vec t = x * x;
    Vec p = broadcast(2.025862158916425e-06f), q = broadcast(3.783119609579444e-05f);
    p = fma(p, t, broadcast(0.00028468522941693664f));
    q = fma(q, t, broadcast(0.001170725212432444f));
    p = fma(p, t, broadcast(0.003808181267231703f));
    q = fma(q, t, broadcast(0.015055129304528236f));
    p = fma(p, t, broadcast(0.05287548899650574f));
    q = fma(q, t, broadcast(0.11455991864204407f));
    p = fma(p, t, broadcast(0.19155117869377136f));
    q = fma(q, t, broadcast(0.503090500831604f));
    p = fma(p, t, broadcast(1.1283791065216064f));
    q = fma(q, t, broadcast(1.0f));
    return x * p / q;
}

inline Vec gelu(Vec x) { return broadcast(0.5f) * x * (broadcast(1.0f) + erf(x * broadcast(0.7071067811865476f))); }

inline float from_bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    __builtin_memcpy(&x, &wide, 4);
    return x;
}

// Rounds to nearest, ties to even. NaN stays NaN.
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float value(float x) { return x; }
inline float value(uint16_t x) { return from_bf16(x); }
inline Vec load(const uint16_t* p) { return load_bf16(p); }
inline void assign(float* p, float x) { *p = x; }
inline void assign(uint16_t* p, float x) { *p = to_bf16(x); }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace page4d::PAGE4D_ISA
