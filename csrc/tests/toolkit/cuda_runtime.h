// Takes the place of the CUDA toolkit's header in tests.
#pragma once
#include "../runtime_on_cpu.h"
