// The stored types as a table: body(tag) with the kernel type that reads lines of `dtype`.
#pragma once

#include "backend/cuda/device.cuh"
#include "base/error.h"

namespace larosa::cuda {

template <class Body>
void with_lines(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(Elements<float>());
    case DType::f16:
      return body(Elements<__half>());
    case DType::bf16:
      return body(Elements<__nv_bfloat16>());
    case DType::int8:
      return body(Int8Line());
    case DType::int4:
      return body(Int4Line());
    default:
      CHECK(false);
  }
}

}  // namespace larosa::cuda
