// A test runner without dependencies: TEST(name) { EXPECT(condition, ...details); } registers a function; main runs them.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace test {

struct Case {
  const char* name;
  void (*run)();
};

std::vector<Case>& cases();
void fail(const char* file, int line, const char* condition, const std::string& details);

struct Registered {
  Registered(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

#define TEST(name)                                              \
  static void name();                                           \
  static const test::Registered registered_##name{#name, name}; \
  static void name()

#define EXPECT(condition, details)                                           \
  do {                                                                       \
    if (!(condition)) test::fail(__FILE__, __LINE__, #condition, (details)); \
  } while (0)

// An array that ends (or begins) exactly at a page nobody may touch: a vector load one element too long dies, masked
// loads included, which AddressSanitizer does not instrument. Fresh memory is poisoned with 0xff: NaN, -1.
template <class T>
class Guarded {
 public:
  explicit Guarded(std::int64_t count, bool at_begin = false) : count_(count) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE)),
                      bytes = static_cast<std::size_t>(count) * sizeof(T);
    inner_ = (bytes + page - 1) / page * page;
    total_ = inner_ + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, total_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) std::abort();
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + inner_, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(at_begin ? base_ + page : base_ + page + inner_ - bytes);
    poison();
  }
  ~Guarded() { munmap(base_, total_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  void poison() { std::memset(static_cast<void*>(data_), 0xff, static_cast<std::size_t>(count_) * sizeof(T)); }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](std::int64_t i) { return data_[i]; }
  const T& operator[](std::int64_t i) const { return data_[i]; }
  std::int64_t size() const { return count_; }
  std::int64_t address() const { return reinterpret_cast<std::int64_t>(data_); }

 private:
  std::int64_t count_;
  std::size_t inner_ = 0, total_ = 0;
  char* base_ = nullptr;
  T* data_ = nullptr;
};

inline std::mt19937& random() {
  static std::mt19937 engine(20240707);
  return engine;
}

inline std::int64_t uniform(std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random());
}

// Equal bits, every NaN alike.
template <class T>
bool same(const T* a, const T* b, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (std::memcmp(a + i, b + i, sizeof(T)) != 0 && (a[i] == a[i] || b[i] == b[i])) return false;
  }
  return true;
}

}  // namespace test
