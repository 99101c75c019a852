#define PAGE4D_ISA avx512_bf16
#define PAGE4D_BF16_ENGINE EngineBf16
#include "level.h"
