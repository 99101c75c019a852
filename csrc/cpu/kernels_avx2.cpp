#define PAGE4D_ISA avx2
#define PAGE4D_BF16_ENGINE EngineF32
#include "level.h"
