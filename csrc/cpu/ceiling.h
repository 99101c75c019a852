// The peak rate of the arithmetic units of a level, with all operands in registers. Benchmarks divide by it. Each function does a fixed
// amount of work and returns that amount. The caller measures the time.
#pragma once

#include "gemm.h"
#include "simd.h"

namespace page4d::PAGE4D_ISA {

constexpr int64_t ceiling_rounds = 1 << 16;

inline void keep(Vec x) {
    volatile float sink = sum(x);
    (void)sink;
}

template <class E>
double matmuls() {
    Vec acc[E::rows][E::vectors], column[E::vectors];
    float seed[Vec::width];
    for (int i = 0; i < Vec::width; ++i) seed[i] = 1e-3f;
    for (Vec& b : column) b = load(seed);
    for (auto& row : acc)
        for (Vec& c : row) c = broadcast(0.0f);
    typename E::Unit a = static_cast<typename E::Unit>(1);
    for (int64_t round = 0; round < ceiling_rounds; ++round)
        for (int i = 0; i < E::rows; ++i)
            for (int j = 0; j < E::vectors; ++j) acc[i][j] = E::multiply_add(acc[i][j], a, column[j]);
    for (auto& row : acc)
        for (const Vec& c : row) keep(c);
    return 2.0 * E::pair * Vec::width * E::rows * E::vectors * ceiling_rounds;
}

// Eight independent chains hide the latency of each one.
inline double exponentials() {
    Vec x[8];
    for (Vec& chain : x) chain = broadcast(-0.5f);
    for (int64_t round = 0; round < ceiling_rounds; ++round)
        for (Vec& chain : x) chain = exp2(chain - broadcast(1.0f));
    for (const Vec& chain : x) keep(chain);
    return 8.0 * Vec::width * ceiling_rounds;
}

}  // namespace page4d::PAGE4D_ISA
