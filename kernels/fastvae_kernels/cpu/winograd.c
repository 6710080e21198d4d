/* 3x3 convolutions by Winograd's F(2x2) and F(4x4), stride 1 and padding 1, images in NHWC. Images and weights have one
dtype; everything between is fp32.

A chunk of tiles goes through three steps while it is in the cache: windows to V [window^2, tiles, C], the products
M = V U of each plane, and M to pixels with bias and residual. The products of one tile do not depend on the others, so
neither chunks, threads nor the batch change a bit. Matrices: shared/winograd_matrices.py; their
pairs of rows (1, 2) and (3, 4) differ in signs alone, which halves the arithmetic. */

#include <omp.h>

#include "vectors.h"

/* The sums of a product: 6 x 16 in 12 of AVX2's 16 registers, 12 x 32 in 24 of AVX512's 32. */
#define ROWS (3 * LANES / 4)
#define COLUMNS (2 * LANES)
/* Channels of a panel of U, for every LANES. */
#define PANEL 16
#define DEPTH 256
#define LARGEST_WINDOW 6
/* Planes of V and M start in different sets of the caches: a power of two would put all of them in one. */
#define PAD 16

struct convolution {
    const void *x;
    const float *weight, *bias;
    const void *residual;
    void *y;
    int64_t dtype, batch, height, width, in, out;
    int64_t tile, upsample;
    /* 1 if x is a band of one image with one more row above and below it, 0 if zeros are there. */
    int64_t halo;
    const float *input, *output;
};

struct chunk {
    int64_t image, first, tiles, rows;
    float *v, *m, *zeros;
    int64_t v_plane, m_plane;
};

static int64_t cut(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Return B^T d for one row or column d of a window; ``step`` is the distance between its values. */
INLINE void window_of(int tile, const float *matrix, const vec *d, int step, vec *t, int t_step) {
    const int n = tile + 2;
    const float *last = matrix + (n - 1) * n;
    vec first_sum = matrix[0] * d[0], last_sum = last[1] * d[step];
#pragma GCC unroll 8
    for (int k = 2; k < n; k += 2) {
        first_sum += matrix[k] * d[k * step];
        last_sum += last[k + 1] * d[(k + 1) * step];
    }
    t[0] = first_sum;
    t[(n - 1) * t_step] = last_sum;
#pragma GCC unroll 8
    for (int i = 1; i < n - 1; i += 2) {
        const float *row = matrix + i * n;
        vec even = row[2] * d[2 * step], odd = row[1] * d[step];
        if (tile == 4) {
            even += row[4] * d[4 * step];
            odd += row[3] * d[3 * step];
        }
        t[i * t_step] = even + odd;
        t[(i + 1) * t_step] = even - odd;
    }
}

/* Return A^T m for one row or column m of products. */
INLINE void results_of(int tile, const float *matrix, const vec *m, int step, vec *t, int t_step) {
    const int n = tile + 2;
    vec even[2], odd[2];
#pragma GCC unroll 8
    for (int i = 1; i < n - 1; i += 2) {
        even[i / 2] = m[i * step] + m[(i + 1) * step];
        odd[i / 2] = m[i * step] - m[(i + 1) * step];
    }
#pragma GCC unroll 8
    for (int k = 0; k < tile; k++) {
        const float *row = matrix + k * n;
        const vec *pair = k % 2 ? odd : even;
        vec sum = row[1] * pair[0];
        if (tile == 4)
            sum += row[3] * pair[1];
        if (k == 0)
            sum += m[0];
        if (k == tile - 1)
            sum += m[(n - 1) * step];
        t[k * t_step] = sum;
    }
}

INLINE void read_windows(int tile, int dtype, const struct convolution *c, struct chunk *k) {
    const int n = tile + 2;
    const int64_t across = cut(c->width, tile), width = c->width >> c->upsample, height = c->height >> c->upsample;
    const int64_t bytes = (dtype == FLOAT32 ? 4 : 2) * c->in;
    const char *image = (const char *)c->x + (k->image * height + c->halo) * width * bytes;
    for (int64_t t = 0; t < k->tiles; t++) {
        const int64_t top = (k->first + t) / across * tile - 1, left = (k->first + t) % across * tile - 1;
        const void *pixel[LARGEST_WINDOW * LARGEST_WINDOW];
        for (int i = 0; i < n; i++)
            for (int j = 0; j < n; j++) {
                const int64_t row = top + i, column = left + j;
                const int inside = row >= -c->halo && row < c->height + c->halo && column >= 0 && column < c->width;
                const int64_t place = (row >> c->upsample) * width + (column >> c->upsample);
                pixel[i * n + j] = inside ? (const void *)(image + place * bytes) : k->zeros;
            }
        for (int64_t channel = 0; channel < c->in; channel += LANES) {
            vec d[LARGEST_WINDOW], half[LARGEST_WINDOW * LARGEST_WINDOW];
#pragma GCC unroll 8
            for (int j = 0; j < n; j++) {
#pragma GCC unroll 8
                for (int i = 0; i < n; i++)
                    d[i] = load_as(dtype, pixel[i * n + j], channel);
                window_of(tile, c->input, d, 1, half + j, n);
            }
            float *v = k->v + t * c->in + channel;
#pragma GCC unroll 8
            for (int i = 0; i < n; i++) {
                window_of(tile, c->input, half + i * n, 1, d, 1);
#pragma GCC unroll 8
                for (int j = 0; j < n; j++)
                    store(v + (i * n + j) * k->v_plane, d[j]);
            }
        }
    }
}

/* m [rows, vectors * LANES] = v [rows, depth] u [depth, ...], added to m if ``add``. The second vector of u is ``right``
behind the first. ``lines`` lines of each vector from ``next`` on are fetched meanwhile. */
INLINE void product(
    int rows, int vectors, const float *v, int64_t v_step, const float *u, int64_t right, int64_t depth, float *m,
    int64_t m_step, int add, const float *next, int64_t lines) {
    vec sum[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
        sum[r][0] = sum[r][1] = (vec){0};
    for (int64_t k = 0; k < depth; k++) {
        vec columns[2];
#pragma GCC unroll 2
        for (int c = 0; c < vectors; c++)
            columns[c] = load(u + c * right + k * PANEL);
        if (k < lines) {
            __builtin_prefetch(next + k * PANEL);
            if (right > LANES)
                __builtin_prefetch(next + right + k * PANEL);
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const vec value = all(v[r * v_step + k]);
#pragma GCC unroll 2
            for (int c = 0; c < vectors; c++)
                sum[r][c] += value * columns[c];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int c = 0; c < vectors; c++) {
            float *to = m + r * m_step + c * LANES;
            if (add)
                sum[r][c] += load(to);
            store(to, sum[r][c]);
        }
}

/* One panel of columns of M: ROWS tiles at a time, and of the last tiles a third or two thirds of that. */
INLINE void multiply_panel(
    int vectors, const struct convolution *c, const struct chunk *k, const float *v, const float *u, int64_t depth,
    float *m, int add, const float *next) {
    const int64_t lines = cut(depth, cut(k->tiles, ROWS)), right = LANES < PANEL ? LANES : c->in * PANEL;
    for (int64_t tile = 0; tile < k->tiles; tile += ROWS) {
        const int64_t left = k->tiles - tile;
        const float *from = v + tile * c->in;
        float *to = m + tile * c->out;
        if (left > ROWS * 2 / 3)
            product(ROWS, vectors, from, c->in, u, right, depth, to, c->out, add, next, lines);
        else if (left > ROWS / 3)
            product(ROWS * 2 / 3, vectors, from, c->in, u, right, depth, to, c->out, add, next, lines);
        else
            product(ROWS / 3, vectors, from, c->in, u, right, depth, to, c->out, add, next, lines);
        next += lines * PANEL;
    }
}

/* M [window^2, tiles, out]. The next panel of U is fetched while V is multiplied by this one. */
static void multiply(const struct convolution *c, struct chunk *k) {
    const int64_t planes = (c->tile + 2) * (c->tile + 2);
    for (int64_t plane = 0; plane < planes; plane++)
        for (int64_t from = 0; from < c->in; from += DEPTH) {
            const int64_t depth = c->in - from < DEPTH ? c->in - from : DEPTH;
            const float *v = k->v + plane * k->v_plane + from;
            for (int64_t column = 0; column < c->out; column += COLUMNS) {
                const float *u = c->weight + (plane * c->out + column) * c->in + from * PANEL;
                const float *next = column + 2 * COLUMNS <= c->out ? u + c->in * COLUMNS : u;
                float *m = k->m + plane * k->m_plane + column;
                if (column + COLUMNS <= c->out)
                    multiply_panel(2, c, k, v, u, depth, m, from > 0, next);
                else
                    multiply_panel(1, c, k, v, u, depth, m, from > 0, u);
            }
        }
}

INLINE void write_pixels(int tile, int dtype, const struct convolution *c, struct chunk *k) {
    const int n = tile + 2;
    const int64_t across = cut(c->width, tile);
    for (int64_t t = 0; t < k->tiles; t++) {
        const int64_t top = (k->first + t) / across * tile, left = (k->first + t) % across * tile;
        const int64_t rows = c->height - top < tile ? c->height - top : tile;
        const int64_t pixels = c->width - left < tile ? c->width - left : tile;
        const int64_t place = ((k->image * c->height + top) * c->width + left) * c->out;
        for (int64_t column = 0; column < c->out; column += LANES) {
            vec d[LARGEST_WINDOW], half[LARGEST_WINDOW * LARGEST_WINDOW];
            const float *m = k->m + t * c->out + column;
#pragma GCC unroll 8
            for (int j = 0; j < n; j++) {
#pragma GCC unroll 8
                for (int i = 0; i < n; i++)
                    d[i] = load(m + (i * n + j) * k->m_plane);
                results_of(tile, c->output, d, 1, half + j, n);
            }
            const vec bias = c->bias ? load(c->bias + column) : (vec){0};
#pragma GCC unroll 8
            for (int i = 0; i < tile; i++) {
                if (i >= rows)
                    break;
                results_of(tile, c->output, half + i * n, 1, d, 1);
                const int64_t at = place + i * c->width * c->out + column;
#pragma GCC unroll 8
                for (int j = 0; j < tile; j++) {
                    if (j >= pixels)
                        break;
                    vec y = d[j] + bias;
                    if (c->residual)
                        y += load_as(dtype, c->residual, at + j * c->out);
                    store_as(dtype, c->y, at + j * c->out, y);
                }
            }
        }
    }
}

INLINE void convolve(int tile, int dtype, const struct convolution *c, struct chunk *k) {
    read_windows(tile, dtype, c, k);
    multiply(c, k);
    write_pixels(tile, dtype, c, k);
}

INLINE void convolve_tiles(int dtype, const struct convolution *c, struct chunk *k) {
    if (c->tile == 4)
        convolve(4, dtype, c, k);
    else
        convolve(2, dtype, c, k);
}

static int64_t planes_of(int64_t tile) { return (tile + 2) * (tile + 2); }

/* Return the floats of workspace that one thread needs for chunks of ``tiles``. */
int64_t FUNCTION(fastvae_winograd_workspace)(int64_t tile, int64_t in, int64_t out, int64_t tiles) {
    return in + planes_of(tile) * (cut(tiles, ROWS) * ROWS * (in + out) + 2 * PAD);
}

/* Write y. ``in`` is a multiple of LANES, ``out`` of PANEL; the workspace is that of ``threads`` threads. */
void FUNCTION(fastvae_winograd)(const struct convolution *c, int64_t most_tiles, float *workspace, int64_t threads) {
    const int64_t tiles = cut(c->height, c->tile) * cut(c->width, c->tile), chunks = cut(tiles, most_tiles);
    const int64_t size = FUNCTION(fastvae_winograd_workspace)(c->tile, c->in, c->out, most_tiles);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < c->batch * chunks; item++) {
        float *own = workspace + omp_get_thread_num() * size;
        struct chunk k = {.image = item / chunks, .first = item % chunks * most_tiles, .zeros = own};
        k.tiles = tiles - k.first < most_tiles ? tiles - k.first : most_tiles;
        memset(own, 0, c->in * sizeof(float));
        k.v_plane = cut(most_tiles, ROWS) * ROWS * c->in + PAD;
        k.m_plane = cut(most_tiles, ROWS) * ROWS * c->out + PAD;
        k.v = own + c->in;
        k.m = k.v + planes_of(c->tile) * k.v_plane;
        if (c->dtype == FLOAT32)
            convolve_tiles(FLOAT32, c, &k);
        else if (c->dtype == BFLOAT16)
            convolve_tiles(BFLOAT16, c, &k);
        else
            convolve_tiles(FLOAT16, c, &k);
    }
}

/* Write U [window^2, out / PANEL, in, PANEL] = G g G^T of a weight [out, in, 3, 3] with these strides: computed in
fp64 and rounded once. ``matrix`` is G [window, 3]. */
void FUNCTION(fastvae_winograd_weight)(
    int64_t dtype, const void *weight, const int64_t *strides, int64_t in, int64_t out, int64_t window, const double *matrix,
    float *to, int64_t threads) {
    const int64_t panels = out / PANEL;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < panels * in; item++) {
        const int64_t panel = item / in, channel = item % in;
        double g[3][3][PANEL], half[LARGEST_WINDOW][3][PANEL], u[PANEL];
        for (int64_t o = 0; o < PANEL; o++) {
            const int64_t from = (panel * PANEL + o) * strides[0] + channel * strides[1];
            for (int64_t i = 0; i < 3; i++)
                for (int64_t j = 0; j < 3; j++)
                    g[i][j][o] = value_of(dtype, weight, from + i * strides[2] + j * strides[3]);
        }
        for (int64_t i = 0; i < window; i++)
            for (int64_t j = 0; j < 3; j++)
                for (int64_t o = 0; o < PANEL; o++)
                    half[i][j][o] =
                        matrix[i * 3] * g[0][j][o] + matrix[i * 3 + 1] * g[1][j][o] + matrix[i * 3 + 2] * g[2][j][o];
        for (int64_t i = 0; i < window; i++)
            for (int64_t j = 0; j < window; j++) {
                const double *row = matrix + j * 3;
                float *into = to + (((i * window + j) * panels + panel) * in + channel) * PANEL;
                for (int64_t o = 0; o < PANEL; o++)
                    u[o] = row[0] * half[i][0][o] + row[1] * half[i][1][o] + row[2] * half[i][2][o];
                for (int64_t o = 0; o < PANEL; o++)
                    into[o] = (float)u[o];
            }
    }
}
