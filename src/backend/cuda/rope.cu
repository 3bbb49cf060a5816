// Rotary embedding. The angles of a token are made once and serve all layers.
#include "backend/cuda/device.cuh"
#include "backend/cuda/launch.h"

namespace larosa::cuda {
namespace {

constexpr int kThreads = 128;

/// The float32 product, as the models were trained with; cosine and sine of that, rounded once.
__global__ void __launch_bounds__(kThreads)
    angles_kernel(int64_t pos, int half, const float* inv_freq, Angles to) {
  wait_for_inputs();
  for (int i = static_cast<int>(threadIdx.x); i < half; i += kThreads) {
    const double angle = __fmul_rn(static_cast<float>(pos + blockIdx.x), inv_freq[i]);
    double sine, cosine;
    sincos(angle, &sine, &cosine);
    to.cosine[static_cast<int64_t>(blockIdx.x) * half + i] = static_cast<float>(cosine);
    to.sine[static_cast<int64_t>(blockIdx.x) * half + i] = static_cast<float>(sine);
  }
}

__global__ void __launch_bounds__(kThreads) rope_kernel(Mat q, Mat k, int half, Angles at) {
  wait_for_inputs();
  const int64_t t = blockIdx.x;
  const Mat m = blockIdx.y == 0 ? q : k;
  for (int i = static_cast<int>(threadIdx.x); i < m.cols / 2; i += kThreads) {
    const int head = i / half, e = i % half;
    float* a = m.data + t * m.stride + static_cast<int64_t>(head) * 2 * half + e;
    float* b = a + half;
    const float2 turned = rotate_pair(*a, *b, at.cosine[t * half + e], at.sine[t * half + e]);
    *a = turned.x;
    *b = turned.y;
  }
}

}  // namespace

void angles(const Stream& s, int64_t pos, int64_t rows, int64_t half, const float* inv_freq,
            const Angles& to) {
  launch_kernel(s, angles_kernel, static_cast<unsigned>(rows), kThreads, 0, pos, static_cast<int>(half),
                inv_freq, to);
}

void rope(const Stream& s, Mat q, Mat k, int64_t head_dim, const Angles& at) {
  launch_kernel(s, rope_kernel, dim3(static_cast<unsigned>(q.rows), 2), kThreads, 0, q, k,
                static_cast<int>(head_dim / 2), at);
}

}  // namespace larosa::cuda
