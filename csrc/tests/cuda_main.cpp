// CUDA kernels on the CPU. Exit code 0 and a summary, or 1.
#include "checks.h"

using namespace page4d::tests;

int main() {
    qk_norm_rope_cases();
    mask_attention_cases();
    mask_head_cases();
    std::printf("%d checks, %d failed\n", checks, failed);
    return failed > 0;
}
