#define PAGE4D_ISA amx
#include "amx.h"
#define PAGE4D_BF16_ENGINE EngineAmx
#include "level.h"
