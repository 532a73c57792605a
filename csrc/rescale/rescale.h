// What the glue (rescale.cpp) and the CPU kernels (rescale_cpu.cpp) agree on. Shapes: x, y, g, dx [rows, n]; l, dl [n].
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/switch.h"

PK_DECLARE_ISA(void rescale_fwd(Dtype x_type, const void* x, Dtype l_type, const void* l, void* y, int64_t rows,
                                int64_t n);
               // dx may be null.
               void rescale_bwd(Dtype x_type, const void* g, const void* x, Dtype l_type, const void* l, void* dx,
                                void* dl, int64_t rows, int64_t n);)
