// Handles of the CUDA libraries.
#pragma once

namespace larosa::cuda {

/// A handle that `destroy` is called with at the end, if one was made. Example:
/// Handle<cublasHandle_t, cublasDestroy> blas; check(cublasCreate(blas.out()), …).
template <class T, auto destroy>
class Handle {
 public:
  Handle() = default;
  ~Handle() {
    if (handle_) destroy(handle_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  /// Where to write it, once.
  T* out() { return &handle_; }
  operator T() const { return handle_; }

 private:
  T handle_ = nullptr;
};

}  // namespace larosa::cuda
