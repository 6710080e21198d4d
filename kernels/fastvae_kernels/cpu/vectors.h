/* Vectors of LANES floats by the compiler's own vector types. On x86 the build asks for AVX2, FMA and F16C; avx512.c
compiles the same code again for AVX512. */
#ifndef FASTVAE_VECTORS_H
#define FASTVAE_VECTORS_H

#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef FASTVAE_AVX512
#define LANES 16
#define FUNCTION(name) name##_avx512
#else
#define LANES 8
#define FUNCTION(name) name
#endif
#define HALF (LANES / 2)
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float hvec __attribute__((vector_size(4 * HALF)));
typedef double dvec __attribute__((vector_size(8 * HALF)));
typedef uint16_t bits __attribute__((vector_size(2 * LANES)));
/* The same at any address. */
typedef float vec_anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef double dvec_anywhere __attribute__((vector_size(8 * HALF), aligned(8), may_alias));
typedef uint16_t bits_anywhere __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* Numbers of the dtypes; cpu/library.py has the same. */
enum { FLOAT32, BFLOAT16, FLOAT16 };

INLINE vec load(const float *from) { return (vec)*(const vec_anywhere *)from; }
INLINE void store(float *to, vec values) { *(vec_anywhere *)to = (vec_anywhere)values; }
INLINE dvec load_double(const double *from) { return (dvec)*(const dvec_anywhere *)from; }
INLINE void store_double(double *to, dvec values) { *(dvec_anywhere *)to = (dvec_anywhere)values; }
INLINE vec all(float value) { return value - (vec){0}; }

/* Without these instructions GCC 12 converts value by value. */
#if defined(FASTVAE_AVX512)
INLINE dvec wide(hvec values) { return (dvec)_mm512_cvtps_pd((__m256)values); }
INLINE vec from_half(bits values) { return (vec)_mm512_cvtph_ps((__m256i)values); }
INLINE bits to_half(vec values) { return (bits)_mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT); }
INLINE ivec widen(bits values) { return (ivec)_mm512_cvtepu16_epi32((__m256i)values); }
INLINE bits narrow(ivec values) { return (bits)_mm512_cvtepi32_epi16((__m512i)values); }
#elif defined(__AVX2__)
INLINE dvec wide(hvec values) { return (dvec)_mm256_cvtps_pd((__m128)values); }
INLINE vec from_half(bits values) { return (vec)_mm256_cvtph_ps((__m128i)values); }
INLINE bits to_half(vec values) { return (bits)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT); }
INLINE ivec widen(bits values) { return (ivec)_mm256_cvtepu16_epi32((__m128i)values); }
INLINE bits narrow(ivec values) {
    const __m128i low = _mm256_castsi256_si128((__m256i)values), high = _mm256_extracti128_si256((__m256i)values, 1);
    return (bits)_mm_packus_epi32(low, high);
}
#else
typedef _Float16 half __attribute__((vector_size(2 * LANES)));
INLINE dvec wide(hvec values) { return __builtin_convertvector(values, dvec); }
INLINE vec from_half(bits values) { return __builtin_convertvector((half)values, vec); }
INLINE bits to_half(vec values) { return (bits)__builtin_convertvector(values, half); }
INLINE ivec widen(bits values) { return __builtin_convertvector(values, ivec); }
INLINE bits narrow(ivec values) { return __builtin_convertvector(values, bits); }
#endif

/* Return the values from ``index`` on as fp32. */
INLINE vec load_as(int dtype, const void *from, int64_t index) {
    if (dtype == FLOAT32)
        return load((const float *)from + index);
    const bits values = (bits)((const bits_anywhere *)((const uint16_t *)from + index))[0];
    return dtype == FLOAT16 ? from_half(values) : (vec)(widen(values) << 16);
}

/* Return one value as fp32. */
INLINE float value_of(int dtype, const void *from, int64_t index) {
    float value;
    uint16_t bits_;
    uint32_t whole;
    if (dtype == FLOAT32)
        return ((const float *)from)[index];
    memcpy(&bits_, (const uint16_t *)from + index, 2);
    if (dtype == FLOAT16) {
        bits lanes = {bits_};
        return from_half(lanes)[0];
    }
    whole = (uint32_t)bits_ << 16;
    memcpy(&value, &whole, 4);
    return value;
}

/* Round to nearest even and write; NaN stays NaN. */
INLINE void store_as(int dtype, void *to, int64_t index, vec values) {
    if (dtype == FLOAT32) {
        store((float *)to + index, values);
        return;
    }
    bits rounded;
    if (dtype == FLOAT16) {
        rounded = to_half(values);
    } else {
        /* NaN is 0 until the end: its bits could overflow. */
        const ivec is_number = values == values, whole = (ivec)values & is_number;
        const ivec nearest = whole + 0x7fff + ((whole >> 16) & 1);
        rounded = narrow(((nearest | (0x7fc00000 & ~is_number)) >> 16) & 0xffff);
    }
    ((bits_anywhere *)((uint16_t *)to + index))[0] = (bits_anywhere)rounded;
}

/* e^x to 1.2 units in the last place: 2^n e^r with |r| <= ln 2 / 2. 0 below -87.3, infinity above 88.7, NaN of NaN. */
INLINE vec exponential(vec x) {
    const ivec above = x > 88.72283f, below = x < -87.33654f;
    const ivec outside = above | below;
    const vec inside = (vec)((ivec)x & ~outside);
    const vec shifter = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    const vec n = (inside * 1.44269504f + shifter) - shifter;
    const vec r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    /* 2^n in two factors: n is up to 128. */
    const ivec exponent = __builtin_convertvector(n, ivec), lower = exponent >> 1;
    p = p * (vec)((lower + 127) << 23) * (vec)((exponent - lower + 127) << 23);
    const vec limit = (vec)(above & (ivec)all(__builtin_inff()));
    return (vec)(((ivec)p & ~outside) | (ivec)limit);
}

INLINE vec silu(vec x) { return x / (1.0f + exponential(-x)); }

#endif
