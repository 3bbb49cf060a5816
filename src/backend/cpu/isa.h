// Which instruction set the CPU backend uses.
#pragma once

#include <string>

#include "backend/cpu/kernels.h"

namespace larosa {

/// The kernels of the best instruction set here, or of the one that LAROSA_ISA names (portable, avx2,
/// avx512, avx512vnni, zen5, intel; neon on Arm); throws Error where that is unknown or not supported. oneDNN
/// follows, as far as it still can: it settles on an instruction set once per process.
Kernels choose_kernels();

/// The instruction set that oneDNN uses: "avx512_core_bf16".
std::string onednn_isa();

/// oneDNN multiplies bf16 natively here (AVX512_BF16 or AMX).
bool onednn_has_bf16();

}  // namespace larosa
