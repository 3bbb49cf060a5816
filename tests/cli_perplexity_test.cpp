// larosa perplexity: what is printed of a sparse model, and models that cannot be compared.
#include "cli_fixture.h"

namespace larosa {
namespace {

TEST_F(Cli, ThresholdsSayWhatTheyReached) {
  const std::string made = dir_ / "teal";
  const Outcome o = run({"sparsify", model(), "-o", made, "--method", "teal", "--calib", text()});
  ASSERT_EQ(o.code, 0) << o.err;
  const Outcome ppl = run({"perplexity", made, "-f", text(), "-c", "32"});
  EXPECT_NE(ppl.out.find("% of the weights dropped"), std::string::npos) << ppl.out;
  const auto j = nlohmann::json::parse(run({"perplexity", made, "-f", text(), "-c", "32", "--json"}).out);
  EXPECT_NEAR(j["reached_weight_sparsity"].get<double>(), 0.5, 0.02);  // its own text, 4 small windows of it
  EXPECT_EQ(j["reached_sites"].size(), 4u);
  EXPECT_NE(run({"inspect", made}).out.find("expected"), std::string::npos);
  EXPECT_EQ(run({"run", made, "-p", "hello", "-n", "4"}).code, 0);
}

TEST_F(Cli, AgainstAModelThatCannotBeCompared) {
  edit_json(copy("other") + "/tokenizer.json",
            [](nlohmann::json& j) { std::swap(j["model"]["vocab"]["e"], j["model"]["vocab"]["t"]); });
  expect_refused({"perplexity", model(), "-f", text(), "-c", "32", "--against", dir_ / "other"},
                 {"other", "tokenizer"});
  edit_json(copy("brief") + "/config.json", [](nlohmann::json& j) { j["max_position_embeddings"] = 16; });
  expect_refused({"perplexity", model(), "-f", text(), "-c", "32", "--against", dir_ / "brief"},
                 {"-c 32", "16"});
}

}  // namespace
}  // namespace larosa
