// Loads a model, generates, meets an error: consumer MODEL
#include <larosa/engine.h>

#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  try {
    const larosa::Engine engine(argv[1]);
    larosa::SessionOptions options;
    options.sampling.temperature = 0;
    larosa::Session session(engine, options);
    const auto prompt = engine.encode("It was a dark night, and");
    std::string streamed;
    const larosa::Generated made = session.generate(prompt, 16, [&](std::string_view text) {
      streamed += text;
      return true;
    });
    if (made.tokens.size() != 16 || streamed != made.text || engine.decode(made.tokens) != made.text)
      return 3;
    std::printf("larosa %s: %s\n", larosa::version(), made.text.c_str());
  } catch (const larosa::Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 4;
  }
  try {
    const larosa::Engine none("/nonexistent");
    return 5;
  } catch (const larosa::Error&) {
    return 0;
  }
}
