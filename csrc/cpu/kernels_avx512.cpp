#define PAGE4D_ISA avx512
#define PAGE4D_BF16_ENGINE EngineF32
#include "level.h"
