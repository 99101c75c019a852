// Shared by the tests of CUDA kernels: random numbers, the count of checks, and the cases of each kernel.
#pragma once

#include <cstdio>
#include <random>

namespace page4d::tests {

inline int checks = 0, failed = 0;
inline std::mt19937 random(0);
inline float random_float() { return std::normal_distribution<float>()(random); }

template <class... Arguments>
void check(bool good, const char* what, Arguments... arguments) {
    ++checks;
    if (good) return;
    ++failed;
    std::printf(what, arguments...);
    std::printf("\n");
}

void qk_norm_rope_cases();
void mask_attention_cases();
void mask_head_cases();
void launch_cases();

}  // namespace page4d::tests
