/* GroupNorm and SiLU for images in NHWC: silu((x - mean_g) / deviation_g * weight_c + bias_c).

x is read twice and y written once. Sums are fp64, of x minus the first value of its group in the image: one pass over
x gives mean and variance to 1e-8, whatever the mean. Chunks have a fixed size and are added in their order, so threads
do not change a bit. */

#include <math.h>
#include <omp.h>

#include "vectors.h"

/* Values of one chunk: 128 KB in fp32, a quarter of an L2 cache. */
#define CHUNK 32768
/* Pixels whose values are added in registers, before the sums in memory. */
#define PIXELS 4

struct norm {
    const void *x;
    void *y;
    int64_t dtype, batch, pixels, channels, groups;
    /* 1: the norm alone, without SiLU. */
    int64_t plain;
    const float *weight, *bias;
    double eps;
    /* [batch, chunks, 2, channels], [batch, channels], [batch, channels], [batch, channels] */
    double *sums;
    float *centre, *scale, *shift;
};

static int64_t pixels_of(const struct norm *a) { return a->channels < CHUNK ? CHUNK / a->channels : 1; }

int64_t FUNCTION(fastvae_norm_chunks)(int64_t pixels, int64_t channels) {
    const struct norm a = {.channels = channels};
    return (pixels + pixels_of(&a) - 1) / pixels_of(&a);
}

/* Add the values, minus ``centre`` of their channel, and the squares of one chunk to sums [2, channels]. Pixels are added
one by one in their order, so a chunk may come in pieces. */
INLINE void sums_of(
    int dtype, const struct norm *a, const float *centre, int64_t start, int64_t count, double *sums) {
    const int64_t channels = a->channels;
    for (int64_t pixel = 0; pixel < count; pixel += PIXELS) {
        const int64_t together = count - pixel < PIXELS ? count - pixel : PIXELS;
        const int64_t place = (start + pixel) * channels;
        for (int64_t channel = 0; channel < channels; channel += LANES) {
            const vec middle = load(centre + channel);
            dvec sum[2], square[2];
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                sum[h] = load_double(sums + channel + h * HALF);
                square[h] = load_double(sums + channels + channel + h * HALF);
            }
            for (int64_t p = 0; p < together; p++) {
                union {
                    vec whole;
                    hvec halves[2];
                } x = {load_as(dtype, a->x, place + p * channels + channel)}, c = {middle};
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const dvec d = wide(x.halves[h]) - wide(c.halves[h]);
                    sum[h] += d;
                    square[h] += d * d;
                }
            }
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                store_double(sums + channel + h * HALF, sum[h]);
                store_double(sums + channels + channel + h * HALF, square[h]);
            }
        }
    }
}

INLINE void normalize(int dtype, const struct norm *a, int64_t image, int64_t first, int64_t count) {
    const int64_t channels = a->channels, place = (image * a->pixels + first) * channels;
    const float *centre = a->centre + image * channels, *scale = a->scale + image * channels;
    const float *shift = a->shift + image * channels;
    for (int64_t pixel = 0; pixel < count; pixel++)
        for (int64_t channel = 0; channel < channels; channel += LANES) {
            const int64_t at = place + pixel * channels + channel;
            const vec d = load_as(dtype, a->x, at) - load(centre + channel);
            const vec z = d * load(scale + channel) + load(shift + channel);
            store_as(dtype, a->y, at, a->plain ? z : silu(z));
        }
}

/* Write centre, scale and shift of one image: (x - centre) * scale + shift. */
static void affine_of(const struct norm *a, int64_t image, int64_t chunks) {
    const int64_t channels = a->channels, width = channels / a->groups;
    float *centre = a->centre + image * channels, *scale = a->scale + image * channels;
    float *shift = a->shift + image * channels;
    for (int64_t group = 0; group < a->groups; group++) {
        const double count = (double)a->pixels * (double)width, middle = centre[group * width];
        double sum = 0, square = 0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const double *part = a->sums + (image * chunks + chunk) * 2 * channels + group * width;
            for (int64_t channel = 0; channel < width; channel++) {
                sum += part[channel];
                square += part[channels + channel];
            }
        }
        const double variance = (square - sum * sum / count) / count, mean = middle + sum / count;
        const double inverse = 1 / sqrt((variance > 0 || variance != variance ? variance : 0) + a->eps);
        for (int64_t channel = group * width; channel < (group + 1) * width; channel++) {
            /* The mean rounded to fp32 is subtracted from x; the shift takes the rest of the mean. */
            centre[channel] = (float)mean;
            scale[channel] = (float)(a->weight[channel] * inverse);
            shift[channel] = (float)(a->bias[channel] - (mean - centre[channel]) * (a->weight[channel] * inverse));
        }
    }
}

INLINE void run(int dtype, const struct norm *a, int64_t chunks, int64_t threads) {
    const int64_t each = pixels_of(a), width = a->channels / a->groups;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
        for (int64_t item = 0; item < a->batch * a->channels; item++) {
            const int64_t image = item / a->channels, group = item % a->channels / width;
            a->centre[item] = value_of(dtype, a->x, image * a->pixels * a->channels + group * width);
        }
#pragma omp for
        for (int64_t item = 0; item < a->batch * chunks; item++) {
            const int64_t first = item % chunks * each, count = a->pixels - first < each ? a->pixels - first : each;
            double *sums = a->sums + item * 2 * a->channels;
            memset(sums, 0, 2 * a->channels * sizeof(double));
            sums_of(dtype, a, a->centre + item / chunks * a->channels, item / chunks * a->pixels + first, count, sums);
        }
#pragma omp for
        for (int64_t image = 0; image < a->batch; image++)
            affine_of(a, image, chunks);
        /* Last pixels first: the cache still holds the end of x. */
#pragma omp for
        for (int64_t item = a->batch * chunks - 1; item >= 0; item--) {
            const int64_t first = item % chunks * each, count = a->pixels - first < each ? a->pixels - first : each;
            normalize(dtype, a, item / chunks, first, count);
        }
    }
}

/* Write the affine of every image, and y, which may be x. ``channels`` is a multiple of LANES. */
void FUNCTION(fastvae_norm)(const struct norm *a, int64_t threads) {
    const int64_t chunks = FUNCTION(fastvae_norm_chunks)(a->pixels, a->channels);
    if (a->dtype == FLOAT32)
        run(FLOAT32, a, chunks, threads);
    else if (a->dtype == BFLOAT16)
        run(BFLOAT16, a, chunks, threads);
    else
        run(FLOAT16, a, chunks, threads);
}

INLINE void add(int dtype, const struct norm *a, int64_t first, int64_t count, int64_t threads) {
    const int64_t each = pixels_of(a), width = a->channels / a->groups, from = first / each;
    if (first == 0)
        for (int64_t channel = 0; channel < a->channels; channel++)
            a->centre[channel] = value_of(dtype, a->x, channel / width * width);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t chunk = from; chunk <= (first + count - 1) / each; chunk++) {
        const int64_t begin = chunk * each > first ? chunk * each : first;
        const int64_t end = (chunk + 1) * each < first + count ? (chunk + 1) * each : first + count;
        sums_of(dtype, a, a->centre, begin - first, end - begin, a->sums + chunk * 2 * a->channels);
    }
}

/* Add a band of one image to its sums, which begin as zeros: x has the pixels from ``first`` on, bands come in order.
The sums have the bits that they have of the whole image. */
void FUNCTION(fastvae_norm_add)(const struct norm *a, int64_t first, int64_t count, int64_t threads) {
    if (a->dtype == FLOAT32)
        add(FLOAT32, a, first, count, threads);
    else if (a->dtype == BFLOAT16)
        add(BFLOAT16, a, first, count, threads);
    else
        add(FLOAT16, a, first, count, threads);
}

/* Write the affine of one image from its sums; it overwrites ``centre``. */
void FUNCTION(fastvae_norm_affine)(const struct norm *a) {
    affine_of(a, 0, FUNCTION(fastvae_norm_chunks)(a->pixels, a->channels));
}

INLINE void apply(int dtype, const struct norm *a, int64_t count, int64_t threads) {
    const int64_t each = pixels_of(a);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < count; first += each)
        normalize(dtype, a, 0, first, count - first < each ? count - first : each);
}

/* Write y of ``count`` pixels of one image by its affine. */
void FUNCTION(fastvae_norm_apply)(const struct norm *a, int64_t count, int64_t threads) {
    if (a->dtype == FLOAT32)
        apply(FLOAT32, a, count, threads);
    else if (a->dtype == BFLOAT16)
        apply(BFLOAT16, a, count, threads);
    else
        apply(FLOAT16, a, count, threads);
}

#ifndef FASTVAE_AVX512
/* Return the hash of the C files that this library was built from. */
const char *fastvae_sources(void) { return FASTVAE_SOURCES; }
#endif
