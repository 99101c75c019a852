// Runs the CUDA kernels on the CPU and prints a summary. The exit code is 0 if all checks passed, else 1.
#include "checks.h"

using namespace page4d::tests;

int main() {
    launch_cases();  // first, see there
    qk_norm_rope_cases();
    mask_attention_cases();
    mask_head_cases();
    std::printf("%d checks, %d failed\n", checks, failed);
    return failed > 0;
}
