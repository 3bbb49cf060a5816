#include "decoding.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "backend/cuda/kernels.h"
#include "base/error.h"
#include "model/random.h"

namespace larosa {
namespace {

using cuda::check;

constexpr int64_t kFloat = sizeof(float);
constexpr int64_t kAlign = 256;  // bytes, as cudaMalloc aligns: what each weight would be by itself

}  // namespace

std::vector<Projection> projections_of(Step step) {
  std::vector<Projection> all;
  for (Projection p : kProjections)
    if (static_cast<int>(site_of(p)) == static_cast<int>(step)) all.push_back(p);
  return all;
}

Weights::Weights(Backend& backend, const ModelConfig& config, DType dtype, ThreadPool& pool) {
  ModelConfig one = config;
  one.layers = 1;
  one.vocab = 256;  // the head is not timed
  Plan plan;
  plan.layers = {dense_layer()};
  const Model model = make_random_model(one, plan, {dtype}, pool);
  for (Projection p : kProjections) {
    Weight& w = projection_[static_cast<size_t>(p)] = model.layers[0].weights[p];
    CHECK(w.layout == Layout::channels);
    offset_[static_cast<size_t>(p)] = layer_bytes_;
    layer_bytes_ += (w.bytes() + kAlign - 1) / kAlign * kAlign;
    if (!w.bias) continue;
    biases_.push_back(backend.upload(w.bias, w.out * kFloat));
    w.bias = static_cast<const float*>(biases_.back().get());
  }
  const int64_t smallest = projection_[static_cast<size_t>(Projection::wo)].bytes();
  layers_ = std::max(config.layers, std::min(kMostLayers, (kPool + smallest - 1) / smallest));
  memory_ = backend.allocate(layers_ * layer_bytes_);
  char* const first = static_cast<char*>(memory_.get());
  for (size_t p = 0; p < kProjections.size(); ++p) {
    check(cudaMemcpy(first + offset_[p], projection_[p].data, static_cast<size_t>(projection_[p].bytes()),
                     cudaMemcpyHostToDevice),
          "cudaMemcpy of weights");
  }
  for (int64_t l = 1; l < layers_; ++l) {
    check(cudaMemcpy(first + l * layer_bytes_, first, static_cast<size_t>(layer_bytes_),
                     cudaMemcpyDeviceToDevice),
          "cudaMemcpy of a layer");
  }
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize after weights");
}

Weight Weights::at(int64_t layer, Projection p) const {
  Weight w = projection_[static_cast<size_t>(p)];
  w.data = static_cast<const char*>(memory_.get()) + layer * layer_bytes_ + offset_[static_cast<size_t>(p)];
  return w;
}

int64_t Weights::kept(Step step, double keep) const {
  return static_cast<int64_t>(std::lround(keep * static_cast<double>(in(step))));
}

double Weights::bytes(Step step, double keep) const {
  int64_t line = 0;
  for (Projection p : projections_of(step)) line += at(0, p).line_bytes();
  return static_cast<double>(line * kept(step, keep));
}

Inputs::Inputs(Backend& backend, int64_t widest) : widest_(widest) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform(1, 2);
  std::vector<float> values(static_cast<size_t>(kRows * widest));
  for (float& v : values) v = normal(random);
  rows_ = backend.upload(values.data(), static_cast<int64_t>(values.size()) * kFloat);
  values.resize(static_cast<size_t>(widest));
  for (float& v : values) v = uniform(random);
  scale_ = backend.upload(values.data(), widest * kFloat);
  std::fill(values.begin(), values.end(), 1.0f);
  gain_ = backend.upload(values.data(), widest * kFloat);
}

Mat Inputs::row(int64_t i, int64_t cols) const {
  return Mat(const_cast<float*>(static_cast<const float*>(rows_.get())) + i % kRows * widest_, 1, cols);
}

Weight Inputs::table(int64_t dim) const {
  return {rows_.get(), nullptr, DType::f32, Layout::rows, dim, kRows * widest_ / dim};
}

Decoding::Decoding(Backend& backend, const ModelConfig& config, const Weights& weights, const Inputs& inputs)
    : backend_(backend), config_(config), weights_(weights), inputs_(inputs) {
  const int64_t cols[] = {config.dim,      config.dim, config.q_dim(), config.kv_dim(),
                          config.kv_dim(), config.ffn, config.ffn,     config.ffn};
  Mat* const mats[] = {&stream_, &h_, &q_, &k_, &v_, &gate_, &up_, &mid_};
  for (size_t i = 0; i < std::size(cols); ++i) {
    memory_.push_back(backend.allocate(cols[i] * kFloat));
    *mats[i] = Mat(static_cast<float*>(memory_.back().get()), 1, cols[i]);
    const std::vector<float> zeros(static_cast<size_t>(cols[i]));
    backend.write(zeros.data(), *mats[i]);
  }
  kept_ = backend.make_selection(1, std::max({config.ffn, config.dim, config.q_dim()}));
}

void Decoding::issue_token(double keep) {
  const auto id = static_cast<int32_t>(next_++ % Inputs::kRows);
  backend_.embed(inputs_.table(config_.dim), std::span(&id, 1), stream_);
  for (int64_t l = 0; l < config_.layers; ++l) {
    run(Step::qkv, l, keep, stream_);
    run(Step::o, l, keep, next_row(Step::o));
    run(Step::gate_up, l, keep, stream_);
    run(Step::down, l, keep, mid_);
  }
}

void Decoding::prepare(Step step, double keep) {
  constexpr int64_t kReady = 13;
  ready_.clear();
  if (keep == 1) return;
  const int64_t cols = weights_.in(step);
  for (int64_t i = 0; i < kReady; ++i) {
    ready_.push_back(backend_.make_selection(1, cols));
    backend_.topk(inputs_.row(i, cols), inputs_.scale(), weights_.kept(step, keep), *ready_.back());
    backend_.synchronize();
  }
}

void Decoding::issue_ready(Step step, int64_t l) {
  const std::vector<Product> all = products(step, l);
  if (ready_.empty()) {
    backend_.matmul(next_row(step), all);
  } else {
    backend_.sparse_matmul(*ready_[static_cast<size_t>(next_++) % ready_.size()], all);
  }
  finish(step);
}

std::vector<Product> Decoding::products(Step step, int64_t l) const {
  const std::array<Mat, 7> to = {q_, k_, v_, stream_, gate_, up_, stream_};
  const bool residual = step == Step::o || step == Step::down;
  std::vector<Product> all;
  for (Projection p : projections_of(step))
    all.push_back({weights_.at(l, p), to[static_cast<size_t>(p)], residual});
  return all;
}

void Decoding::run(Step step, int64_t l, double keep, Mat x) {
  if (step == Step::qkv || step == Step::gate_up) {
    backend_.rms_norm(x, inputs_.gain(), config_.norm_eps, h_);
    x = h_;
  }
  const std::vector<Product> all = products(step, l);
  if (keep == 1) {
    backend_.matmul(x, all);
  } else {
    backend_.topk(x, inputs_.scale(), weights_.kept(step, keep), *kept_);
    backend_.sparse_matmul(*kept_, all);
  }
  finish(step);
}

void Decoding::finish(Step step) {
  if (step == Step::gate_up) backend_.glu(gate_, up_, config_.activation, mid_);
}

}  // namespace larosa
