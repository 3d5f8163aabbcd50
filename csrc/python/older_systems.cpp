// Keeps the extension loadable wherever torch's wheels are (manylinux_2_28: glibc 2.28, libstdc++ of gcc 8),
// though it is built with newer ones: what these have added since and our code refers to is defined here, or
// replaced by what was there before. Nothing of it leaves the extension (exports.map).
#include <cmath>
#include <new>
#include <sstream>

#if defined(__GLIBC__) && defined(__GLIBCXX__)

// Their default constructors are in libstdc++ since gcc 9.
template class std::basic_stringstream<char>;
template class std::basic_ostringstream<char>;

namespace std {
void __throw_bad_array_new_length();
void __throw_bad_array_new_length() { throw bad_array_new_length(); }  // in libstdc++ since gcc 11
}  // namespace std

// In glibc since 2.32. With 0, std::shared_ptr counts atomically, as it did before.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;

// glibc 2.29 gave these a second version, which leaves errno alone and computes the same.
#if defined(__x86_64__)
#define FASTQUANT_FIRST_VERSION "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define FASTQUANT_FIRST_VERSION "GLIBC_2.17"
#endif
#ifdef FASTQUANT_FIRST_VERSION
__asm__(".symver first_exp, exp@" FASTQUANT_FIRST_VERSION);
__asm__(".symver first_log, log@" FASTQUANT_FIRST_VERSION);
extern "C" {
double first_exp(double);
double first_log(double);
// CMakeLists.txt has the linker send calls of exp and log here.
double __wrap_exp(double x);
double __wrap_log(double x);
double __wrap_exp(double x) { return first_exp(x); }
double __wrap_log(double x) { return first_log(x); }
}
#endif

#endif
