// Memory on huge pages: all of it is there, aligned, and the kernel has been asked.
#include "base/huge_pages.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <new>
#include <string>
#include <utility>

namespace larosa {
namespace {

/// The VmFlags line of the mapping that holds `data`.
std::string flags_of(const std::byte* data) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  std::ifstream smaps("/proc/self/smaps");
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    unsigned long begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2)
      inside = begin <= address && address < end;
    else if (inside && line.rfind("VmFlags:", 0) == 0)
      return line + " ";
  }
  return "";
}

TEST(HugePages, EveryByteIsThereAndZero) {
  for (const int64_t bytes : {int64_t{0}, int64_t{1}, int64_t{5000}, HugePages::kPage - 1, HugePages::kPage,
                              HugePages::kPage + 1, 5 * HugePages::kPage / 2}) {
    HugePages first(bytes);
    const HugePages pages = std::move(first);
    EXPECT_EQ(
        reinterpret_cast<uintptr_t>(pages.data()) % (bytes < HugePages::kPage ? 4096 : HugePages::kPage), 0u);
    EXPECT_TRUE(
        std::all_of(pages.data(), pages.data() + bytes, [](std::byte b) { return b == std::byte{0}; }));
    std::fill_n(pages.data(), bytes, std::byte{1});
  }
}

TEST(HugePages, TheKernelIsAsked) {
  if (!std::filesystem::exists("/sys/kernel/mm/transparent_hugepage/enabled"))
    GTEST_SKIP() << "this kernel has none";
  const HugePages pages(3 * HugePages::kPage), small(5000);
  EXPECT_NE(flags_of(pages.data()).find(" hg "), std::string::npos) << flags_of(pages.data());
  EXPECT_NE(flags_of(pages.data() + 3 * HugePages::kPage - 1).find(" hg "), std::string::npos);
  EXPECT_EQ(flags_of(small.data()).find(" hg "), std::string::npos);
}

TEST(HugePages, TooMuchThrows) {
  EXPECT_THROW(HugePages(int64_t{1} << 60), std::bad_alloc);
}

}  // namespace
}  // namespace larosa
