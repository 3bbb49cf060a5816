#include "base/huge_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <new>

namespace larosa {
namespace {

constexpr size_t round_up(size_t n, size_t to) {
  return (n + to - 1) / to * to;
}

}  // namespace

void HugePages::Unmap::operator()(std::byte* data) const {
  munmap(data, bytes);
}

HugePages::HugePages(int64_t bytes) : data_(nullptr, Unmap{0}) {
  constexpr size_t kHuge = kPage;
  const bool huge = bytes >= kPage;
  const size_t wanted = static_cast<size_t>(std::max<int64_t>(bytes, 1));
  const size_t size = huge ? round_up(wanted, kHuge) : wanted;
  const size_t taken = huge ? size + kHuge : size;  // room to align; what is never touched costs nothing
  void* memory = mmap(nullptr, taken, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  auto* data = static_cast<std::byte*>(memory);
  if (huge) {
    const size_t before = round_up(std::bit_cast<uintptr_t>(data), kHuge) - std::bit_cast<uintptr_t>(data);
    if (before > 0) munmap(data, before);
    data += before;
    if (before < kHuge) munmap(data + size, kHuge - before);
    madvise(data, size, MADV_HUGEPAGE);  // advice: a kernel without it leaves the usual pages
  }
  data_ = std::unique_ptr<std::byte[], Unmap>(data, Unmap{size});
}

}  // namespace larosa
