// The profiled backend: the results of the plain one bit for bit, names and bytes of every operation.
#include "backend/profile.h"

#include <gtest/gtest.h>

#include <map>

#include "calib/methods.h"
#include "model/random.h"
#include "model_fixture.h"
#include "products.h"

namespace larosa {
namespace {

std::map<std::string, Timing> by_name(Profile& profile) {
  std::map<std::string, Timing> found;
  for (const Timing& t : profile.take()) found[t.name] = t;
  return found;
}

TEST(Profile, BytesOfSparseProducts) {
  ThreadPool pool(2);
  const auto plain = make_cpu_backend({}, pool);
  for (const DType dtype : cases::kTypes) {
    for (const int64_t rows : {1, 3}) {
      Profile profile;
      const auto profiled = make_profiled_backend(*plain, profile);
      const cases::ProductCase c(rows, {257, 129}, dtype, Layout::channels, true, true);
      const auto kept = profiled->make_selection(rows, 257);
      profile.name(c.weights[0].weight.data, "wide");
      profiled->topk(c.x.mat, nullptr, 100, *kept);
      const std::vector<cases::Rows> got = c.run_sparse(*profiled, *kept);
      const std::vector<cases::Rows> want = c.run_sparse(*plain, *kept);
      for (size_t p = 0; p < got.size(); ++p) {
        EXPECT_EQ(cases::bits_differ(got[p].mat, want[p].mat), 0);
      }
      // Two products of 129 and 65 outputs; one row reads its 100 kept channels, several read them all.
      const int64_t channels = rows == 1 ? 100 : 257;
      auto found = by_name(profile);
      EXPECT_EQ(found["sparse_matmul wide"].bytes,
                channels * (line_bytes(dtype, 129) + line_bytes(dtype, 65)) + 4 * (129 + 65));
      EXPECT_EQ(found["sparse_matmul wide"].calls, 1);
      EXPECT_EQ(found["topk"].calls, 1);
      EXPECT_EQ(found["topk"].bytes, 0);
      EXPECT_TRUE(profile.take().empty());
    }
  }
}

TEST(Profile, CacheBytesAreThoseOfThePositionsAttendedTo) {
  const auto plain = make_ref_backend();
  Profile profile;
  const auto profiled = make_profiled_backend(*plain, profile);
  for (const DType dtype : {DType::f32, DType::f16}) {
    const auto cache = profiled->make_kv_cache({3, 2, 4, 20, dtype});
    const int64_t position = 2 * 2 * 4 * dtype_size(dtype);
    cases::Random random(1);
    cases::Rows q(5, 16), kv(5, 8), out(5, 16);
    q.fill(random), kv.fill(random);
    profiled->attend(q.mat, kv.mat, kv.mat, *cache, 1, 0, 0, out.mat);
    EXPECT_EQ(by_name(profile)["attend"].bytes, 5 * position);
    const auto one = [&](int64_t pos, int64_t window) {
      profiled->attend(q.mat.slice(0, 1), kv.mat.slice(0, 1), kv.mat.slice(0, 1), *cache, 1, pos, window,
                       out.mat.slice(0, 1));
      return by_name(profile)["attend"].bytes;
    };
    EXPECT_EQ(one(5, 0), 6 * position);
    EXPECT_EQ(one(6, 3), 3 * position);
    EXPECT_EQ(one(7, 100), 8 * position);
  }
}

TEST(Profile, LargestEntriesAreThePlainOnes) {
  const auto plain = make_ref_backend();
  Profile profile;
  const auto profiled = make_profiled_backend(*plain, profile);
  cases::Random random(1);
  const cases::Rows x = cases::Rows(1, 100).fill(random);
  std::vector<Candidate> found(7), truth(7);
  profiled->largest(x.mat, found);
  plain->largest(x.mat, truth);
  for (size_t i = 0; i < truth.size(); ++i) EXPECT_EQ(found[i].id, truth[i].id);
  EXPECT_EQ(by_name(profile)["largest"].calls, 1);
}

/// Whole models, dense and sparse, prompt and tokens: the same logits, and the bytes that a token is said to
/// cost.
TEST(Profile, WholeModel) {
  ThreadPool pool(2);
  const auto plain = make_cpu_backend({}, pool);
  for (size_t m = 0; m < tiny_models().size(); m += 3) {
    const ModelConfig config = load_config(tiny_models()[m]);
    Choice choice;
    choice.sparsity = 0.5;
    const Plan plan = plan_model(find_method("larosa"), config, choice);
    const Model model = make_random_model(config, plan, {DType::bf16, 3}, pool);
    Profile profile;
    const auto profiled = make_profiled_backend(*plain, profile);
    for (const size_t step : {1, 4}) {
      const auto tokens = some_tokens(config.vocab, 8);
      EXPECT_EQ(all_logits(model, *profiled, tokens, step), all_logits(model, *plain, tokens, step));
      int64_t bytes = 0, calls = 0;
      for (const Timing& t : profile.take()) {
        EXPECT_GE(t.seconds, 0);
        bytes += t.name == "attend" || t.name == "rope" ? 0 : t.bytes;
        calls += t.name == "glu" ? t.calls : 0;
      }
      EXPECT_EQ(calls, config.layers * static_cast<int64_t>(8 / step));
      if (step == 1) {
        EXPECT_EQ(bytes, 8 * token_bytes(model).sparse()) << tiny_models()[m];
      }
    }
  }
}

}  // namespace
}  // namespace larosa
