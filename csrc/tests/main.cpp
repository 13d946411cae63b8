// Runs every registered test, or those whose name contains the first argument.
#include "tests/test.h"

namespace test {
namespace {

int failures = 0, printed = 0;
const char* current = "";

}  // namespace

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

void fail(const char* file, int line, const char* condition, const std::string& details) {
  ++failures;
  if (++printed <= 5) std::printf("FAILED %s: %s:%d: %s  %s\n", current, file, line, condition, details.c_str());
}

}  // namespace test

int main(int argc, char** argv) {
  int run = 0;
  for (const test::Case& c : test::cases()) {
    if (argc > 1 && std::strstr(c.name, argv[1]) == nullptr) continue;
    test::current = c.name;
    const int before = test::failures;
    test::printed = 0;
    c.run();
    std::printf("%s %s\n", test::failures == before ? "ok" : "FAILED", c.name);
    std::fflush(stdout);
    ++run;
  }
  std::printf("%d tests, %d failures\n", run, test::failures);
  return test::failures == 0 && run > 0 ? 0 : 1;
}
