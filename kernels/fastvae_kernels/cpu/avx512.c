/* group_norm.c and winograd.c again, with vectors of AVX512: their functions with the suffix _avx512, and the same bits.

library.py takes them where the CPU has AVX512. Clang has no such pragma: its library has the functions for AVX2 alone. */

#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#define FASTVAE_AVX512

#include "group_norm.c"
#include "winograd.c"
#endif
