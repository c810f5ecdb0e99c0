// The least that a test needs: a count of failures, each with its place and values.
#pragma once

#include <iostream>

inline int failures = 0;

template <typename A, typename B>
void check(bool holds, const char* what, const char* file, int line, const A& a, const B& b) {
  if (holds) return;
  ++failures;
  std::cerr << file << ":" << line << ": " << what << " does not hold: " << a << " and " << b
            << "\n";
}

#define CHECK_EQUAL(a, b) check((a) == (b), #a " == " #b, __FILE__, __LINE__, (a), (b))
#define CHECK_BELOW(a, b) check((a) < (b), #a " < " #b, __FILE__, __LINE__, (a), (b))
