// bf16 matmuls on AMX tiles. A tile has 16 rows of 64 bytes. One instruction adds to a 16 x 16 fp32 result over 32 values of the inner
// dimension.
//
// With PAGE4D_EMULATE_AMX, loops that follow the documentation replace the tile instructions. This tests packing, strides and blocking on
// processors without AMX. The emulation is for tests only and is not part of the library.
#pragma once

#include "ceiling.h"
#include "gemm.h"

namespace page4d::PAGE4D_ISA {

#if defined(PAGE4D_EMULATE_AMX)

struct Tile {
    uint32_t row[16][16];
};
inline Tile& tile_register(int index) {
    static thread_local Tile tiles[8];
    return tiles[index];
}
inline void configure_tiles() {}
inline void release_tiles() {}
inline void tile_zero(int t) { tile_register(t) = {}; }
inline void tile_load(int t, const void* base, int64_t bytes) {
    for (int i = 0; i < 16; ++i) __builtin_memcpy(tile_register(t).row[i], static_cast<const char*>(base) + i * bytes, 64);
}
inline void tile_store(int t, void* base, int64_t bytes) {
    for (int i = 0; i < 16; ++i) __builtin_memcpy(static_cast<char*>(base) + i * bytes, tile_register(t).row[i], 64);
}
inline void tile_multiply(int c, int a_tile, int b_tile) {
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) {
            float total;
            __builtin_memcpy(&total, &tile_register(c).row[i][j], 4);
            for (int u = 0; u < 16; ++u) {
                const uint32_t a = tile_register(a_tile).row[i][u], b = tile_register(b_tile).row[u][j];
                total += from_bf16(static_cast<uint16_t>(a)) * from_bf16(static_cast<uint16_t>(b));
                total += from_bf16(static_cast<uint16_t>(a >> 16)) * from_bf16(static_cast<uint16_t>(b >> 16));
            }
            __builtin_memcpy(&tile_register(c).row[i][j], &total, 4);
        }
}
#define PAGE4D_TILE_ZERO(t) tile_zero(t)
#define PAGE4D_TILE_LOAD(t, base, bytes) tile_load(t, base, bytes)
#define PAGE4D_TILE_STORE(t, base, bytes) tile_store(t, base, bytes)
#define PAGE4D_TILE_MULTIPLY(c, a, b) tile_multiply(c, a, b)

#else

inline void configure_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
}
inline void release_tiles() { _tile_release(); }
// The intrinsics need literal tile numbers, because GCC pastes them into the assembly.
#define PAGE4D_TILE_ZERO(t) _tile_zero(t)
#define PAGE4D_TILE_LOAD(t, base, bytes) _tile_loadd(t, base, bytes)
#define PAGE4D_TILE_STORE(t, base, bytes) _tile_stored(t, base, bytes)
#define PAGE4D_TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)

#endif

struct EngineAmx {
    using Element = uint16_t;
    using Unit = uint32_t;
    static constexpr int pair = 2, rows = 32, block = 64, step = 16, vectors = 2;
    static void begin() { configure_tiles(); }
    static void end() { release_tiles(); }
};

// 32 rows by one or two vectors of columns, with four accumulator tiles and two tiles of each operand.
template <int VECTORS>
void amx_tile(int64_t inner, const uint32_t* a, int64_t lda, const uint32_t* b, float* c, int64_t ldc, bool add) {
    const int64_t a_bytes = 4 * lda, b_bytes = 4 * 16 * VECTORS, c_bytes = 4 * ldc;
    if (add) {
        PAGE4D_TILE_LOAD(0, c, c_bytes);
        PAGE4D_TILE_LOAD(1, c + 16 * ldc, c_bytes);
        if (VECTORS == 2) {
            PAGE4D_TILE_LOAD(2, c + 16, c_bytes);
            PAGE4D_TILE_LOAD(3, c + 16 * ldc + 16, c_bytes);
        }
    } else {
        PAGE4D_TILE_ZERO(0);
        PAGE4D_TILE_ZERO(1);
        PAGE4D_TILE_ZERO(2);
        PAGE4D_TILE_ZERO(3);
    }
    for (int64_t u = 0; u < inner; u += 16) {
        PAGE4D_TILE_LOAD(4, a + u, a_bytes);
        PAGE4D_TILE_LOAD(5, a + 16 * lda + u, a_bytes);
        PAGE4D_TILE_LOAD(6, b + u * 16 * VECTORS, b_bytes);
        PAGE4D_TILE_MULTIPLY(0, 4, 6);
        PAGE4D_TILE_MULTIPLY(1, 5, 6);
        if (VECTORS == 2) {
            PAGE4D_TILE_LOAD(7, b + u * 16 * VECTORS + 16, b_bytes);
            PAGE4D_TILE_MULTIPLY(2, 4, 7);
            PAGE4D_TILE_MULTIPLY(3, 5, 7);
        }
    }
    PAGE4D_TILE_STORE(0, c, c_bytes);
    PAGE4D_TILE_STORE(1, c + 16 * ldc, c_bytes);
    if (VECTORS == 2) {
        PAGE4D_TILE_STORE(2, c + 16, c_bytes);
        PAGE4D_TILE_STORE(3, c + 16 * ldc + 16, c_bytes);
    }
}

template <>
double matmuls<EngineAmx>() {
    alignas(64) static const uint32_t zeros[16 * 16] = {};
    configure_tiles();
    PAGE4D_TILE_ZERO(0);
    PAGE4D_TILE_ZERO(1);
    PAGE4D_TILE_ZERO(2);
    PAGE4D_TILE_ZERO(3);
    PAGE4D_TILE_LOAD(4, zeros, 64);
    PAGE4D_TILE_LOAD(5, zeros, 64);
    PAGE4D_TILE_LOAD(6, zeros, 64);
    PAGE4D_TILE_LOAD(7, zeros, 64);
    for (int64_t round = 0; round < ceiling_rounds / 16; ++round) {
        PAGE4D_TILE_MULTIPLY(0, 4, 6);
        PAGE4D_TILE_MULTIPLY(1, 5, 6);
        PAGE4D_TILE_MULTIPLY(2, 4, 7);
        PAGE4D_TILE_MULTIPLY(3, 5, 7);
    }
    alignas(64) float sums[16 * 16];
    PAGE4D_TILE_STORE(0, sums, 64);
    keep(load(sums));
    release_tiles();
    return 2.0 * 4 * 16 * 16 * 32 * (ceiling_rounds / 16);
}

template <>
void multiply<EngineAmx>(int64_t rows, Panels panels, int64_t inner, const uint32_t* a, int64_t lda, const uint32_t* b, float* c, int64_t ldc,
                         bool add) {
    for (int64_t p = 0; p < panels.count; ++p, b += inner * panels.width(), c += panels.width())
        for (int64_t i = 0; i < rows; i += EngineAmx::rows) {
            if (panels.vectors == 1)
                amx_tile<1>(inner, a + i * lda, lda, b, c + i * ldc, ldc, add);
            else
                amx_tile<2>(inner, a + i * lda, lda, b, c + i * ldc, ldc, add);
        }
}

}  // namespace page4d::PAGE4D_ISA
