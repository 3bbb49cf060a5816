// Calibration's algebra on the device: cuBLAS and cuSOLVER, float64 throughout.
#pragma once

#include <memory>

#include "backend/algebra.h"
#include "backend/cuda/kernels.h"

namespace larosa::cuda {

class OneRow;

/// On `stream`, behind whatever waits in `row`; both must outlive it.
std::unique_ptr<Algebra> make_algebra(const Stream& stream, OneRow& row);

}  // namespace larosa::cuda
