// Solves one block of a flow token by token, noise to data: every layer of every token inside one call.
//
// Contract: the arithmetic of a row (a picture's branch) is the same whatever the other rows, their number and the
// number of threads, so a picture is bit for bit what it would be alone. Sums, norms and attention are float32; the
// cache may be stored in bfloat16. Nothing is allocated, locked or printed: the caller provides the memory.
//
// A product reads its weights once, in the order in which they lie: panels of PANEL outputs, the inputs as the outer
// index. All rows use a panel before the next is read, so that at 4 to 8 rows a product takes as long as reading its
// weights. The panels are divided among the threads, which wait for each other at a barrier after every stage.
//
// The layers' matrices come in one of five formats (`Format`), each a struct with the same functions. Integer weights
// have a scale for each group of inputs of an output. Their products are of integers, exact whatever the processor: a
// row's inputs are rounded to 16 bits with a scale a group (2^-16 of the group's largest), multiplied and summed as
// integers within the group, and scaled into a float32 sum.
//
// The structs are mirrored in pack.py.

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() asm volatile("yield")
#else
#define RELAX() ((void)0)
#endif

extern "C" {
struct Layer {
    const void *qkv, *proj, *up, *down;  // panels; `up` alternates gate and up where the MLP is gated
    const float *qkv_bias, *proj_bias, *up_bias, *down_bias;
    const float *norm1, *norm1_bias, *norm2, *norm2_bias;  // an RMSNorm's weight comes as 1 + w
    const float *query_norm, *key_norm, *post1, *post2;    // or null
    void *keys, *values;                                   // (rows, kv_heads, length, head_dim)
};

struct Block {
    int32_t pictures, rows, width, heads, kv_heads, head_dim, hidden, layers;
    int32_t channels, length, tokens, first, prefix, threads;
    int32_t rms, gated, half_split, softplus, rule, weights, half_cache;  // rule: 0 none, 1 gaussian, 2 linear
    float clip;
    const Layer *layer;
    const float *proj_in, *proj_in_bias, *proj_out, *proj_out_bias;  // always float32
    const float *final_norm;                                         // 1 + w, or null
    const float *rotary;                                             // (positions, head_dim / 2, 2), or null
    const float *table;                                              // (inputs, padded width), or null
    const float *class_vector;                                       // (rows, padded width), or null
    const float *start;                                              // (channels), or null
    const float *query_scale;                                        // (rows), or null
    const float *weight;                                             // guidance weights (pictures, tokens)
    const float *noise;                                              // (pictures, tokens, channels)
    float *x;                                                        // likewise
    float *work;                                                     // as many floats as starflow_workspace() says
};
}

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR = 16, PANEL_VECTORS = 2, TILE = 8;  // floats of a vector, vectors of a panel, rows of a tile
#elif defined(__AVX__)
constexpr int VECTOR = 8, PANEL_VECTORS = 2, TILE = 6;
#elif defined(__aarch64__)
constexpr int VECTOR = 4, PANEL_VECTORS = 4, TILE = 6;
#else
constexpr int VECTOR = 4, PANEL_VECTORS = 2, TILE = 4;
#endif
constexpr int PANEL = VECTOR * PANEL_VECTORS;
constexpr int LINE = 16;           // floats of a cache line
constexpr int ROW_GAP = LINE;  // between rows: at distances of powers of two they would evict each other from a cache
constexpr int NEIGHBOUR_TILES = 8;  // tiles of rows that use the same piece of a panel in turn, while it is in a cache
constexpr int PIECE = 128, LONG_PIECE = 512;  // inputs of a piece where reading limits, and where arithmetic does
constexpr int REPEATED_ROWS = 64;  // up to so many rows, times threads, every thread computes all norms for itself
constexpr int PREFETCH = 8192;  // bytes ahead that are prefetched, so that reading never pauses
constexpr int LINE_BYTES = 64;

enum Format { FLOAT32, BFLOAT16, BFLOAT16_PRODUCTS, INT8, INT4 };  // of a block's matrices, as pack.py numbers them

typedef float vf __attribute__((vector_size(4 * VECTOR)));
typedef int32_t vi __attribute__((vector_size(4 * VECTOR)));
typedef uint32_t vu __attribute__((vector_size(4 * VECTOR)));
typedef uint16_t vh __attribute__((vector_size(2 * VECTOR)));
typedef int16_t vs __attribute__((vector_size(4 * VECTOR)));   // pairs of 16 bits
typedef int16_t vsh __attribute__((vector_size(2 * VECTOR)));  // single ones
typedef int8_t vb __attribute__((vector_size(2 * VECTOR)));    // pairs of 8 bits
typedef uint8_t vub __attribute__((vector_size(2 * VECTOR)));
typedef uint16_t half;  // a bfloat16

inline vf splat(float a) { return a - vf{}; }
inline vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
// Compilers that prefer shorter vectors would split these.
#if defined(__AVX512BW__)
inline vu widen(vh h) { return (vu)_mm512_cvtepu16_epi32((__m256i)h); }
inline vs widen(vb b) { return (vs)_mm512_cvtepi8_epi16((__m256i)b); }
inline vs widen(vub b) { return (vs)_mm512_cvtepu8_epi16((__m256i)b); }
#else
inline vu widen(vh h) { return __builtin_convertvector(h, vu); }
inline vs widen(vb b) { return __builtin_convertvector(b, vs); }
inline vs widen(vub b) { return __builtin_convertvector(b, vs); }
#endif
inline vf load(const half *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(widen(h) << 16);
}
inline float one(const float *p) { return *p; }
inline float one(const half *p) {
    uint32_t bits = uint32_t(*p) << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
inline void store_one(float *p, float v) { *p = v; }
inline void store_one(half *p, float v) {  // round to nearest, ties to even; a NaN stays one
    uint32_t bits;
    memcpy(&bits, &v, 4);
    *p = v != v ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
inline vi splat_word(const float *p) {  // 32 bits of any meaning
    int32_t bits;
    memcpy(&bits, p, 4);
    return bits - vi{};
}
inline float sum(vf v) {  // by halves, always in the same order
    float lane[VECTOR];
    store(lane, v);
    for (int n = VECTOR / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lane[i] += lane[i + n];
    return lane[0];
}

inline vf exponential(vf x) {  // within 1e-7 of the value, and 0 for what underflows
    const vf log2e = splat(1.44269504f), magic = splat(12582912.f);
    const vf low = splat(-87.33f), high = splat(88.37f);
    const vi under = x < low;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const vf shifted = x * log2e + magic, n = shifted - magic;
    const vf r = (x - n * splat(0.693145752f)) - n * splat(1.42860677e-6f);
    vf p = splat(1.f / 5040);
    const float rest[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    for (float c : rest) p = p * r + splat(c);
    const vf scaled = (vf)((vu)p + ((vu)shifted << 23));
    return under ? vf{} : (x == x ? scaled : x);  // a NaN's bits do not give an exponent
}

// x Phi(x). Phi(-a) = exp(-a^2 / 2) P(1 / (1 + 0.34 a)), P fitted to 2e-8 of the value for a from 0 to 14.
inline vf gelu(vf x) {
    const vf a = x < 0 ? -x : x;
    const vf t = splat(1.f) / (splat(1.f) + splat(0.34f) * a);
    const float rest[] = {-0.02711653235f, 0.1441224912f, -0.2822009644f, 0.2119660957f, -0.05104301232f, 0.1178573011f, 0.114611359f, 0.1361866724f, 0.1356165912f};
    vf p = splat(rest[0]);
    for (int i = 1; i < 9; i++) p = p * t + splat(rest[i]);
    const vf tail = x * (p * t * exponential(splat(-0.5f) * a * a));
    return x < 0 ? tail : (x > splat(15.f) ? x : x - tail);
}

inline vf tanh_gelu(vf x) {
    const vf u = splat(-1.59576912f) * (x + splat(0.044715f) * x * x * x);
    return x / (splat(1.f) + exponential(u));
}

// ---- products ----

// A format has
//   stride(K)         floats of a row of inputs, as its products take them
//   convert(y, x, K)  makes such a row of float32 inputs, where `converts`
//   panel(K), at(k)   bytes of a panel of K inputs, and of the inputs before number k
//   tile<R, P>(..)    out[p][r][:] (+)= sum_k x[r][k] w[p][k][:] for R rows and P panels, over `count` inputs from k
//                     on, in order; panels are `next` bytes apart.

template <int R, int P>
inline void take(vf (&acc)[P][R][PANEL_VECTORS], const float *out, bool more) {
    for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++)
            for (int j = 0; j < PANEL_VECTORS; j++)
                acc[p][r][j] = more ? load(out + (p * R + r) * PANEL + j * VECTOR) : vf{};
}
template <int R, int P>
inline void give(const vf (&acc)[P][R][PANEL_VECTORS], float *out) {
    for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++)
            for (int j = 0; j < PANEL_VECTORS; j++) store(out + (p * R + r) * PANEL + j * VECTOR, acc[p][r][j]);
}
inline void prefetch(const char *p, int bytes) {
    for (int i = 0; i < bytes; i += LINE_BYTES) __builtin_prefetch(p + PREFETCH + i);
}

struct Float32 {
    static constexpr bool converts = false;
    static ptrdiff_t panel(int K) { return ptrdiff_t(K) * PANEL * 4; }
    static ptrdiff_t at(int k) { return panel(k); }
    static ptrdiff_t stride(int K) { return K; }
    static void convert(float *, const float *, int) {}

    template <int R, int P>
    static void tile(const float *x, ptrdiff_t stride, const char *w, ptrdiff_t next, int k, int count, float *out,
                     bool more) {
        vf acc[P][R][PANEL_VECTORS];
        take<R, P>(acc, out, more);
        x += k;
        for (int i = 0; i < count; i++) {
            vf b[P][PANEL_VECTORS];
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                const char *from = w + p * next + i * (PANEL * 4);
                prefetch(from, PANEL * 4);
                for (int j = 0; j < PANEL_VECTORS; j++) b[p][j] = load((const float *)from + j * VECTOR);
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const vf a = splat(x[r * stride + i]);
#pragma GCC unroll 4
                for (int p = 0; p < P; p++)
#pragma GCC unroll 4
                    for (int j = 0; j < PANEL_VECTORS; j++) acc[p][r][j] += a * b[p][j];
            }
        }
        give<R, P>(acc, out);
    }
};

// Words of two bfloat16 numbers: of an output the weights of one input and, above it, of the next.
struct BFloat16 {
    static constexpr bool converts = false;
    static ptrdiff_t panel(int K) { return ptrdiff_t(K + K % 2) * PANEL * 2; }
    static ptrdiff_t at(int k) { return panel(k); }
    static ptrdiff_t stride(int K) { return K; }
    static void convert(float *, const float *, int) {}

    template <int R, int P>
    static void tile(const float *x, ptrdiff_t stride, const char *w, ptrdiff_t next, int k, int count, float *out,
                     bool more) {
        vf acc[P][R][PANEL_VECTORS];
        take<R, P>(acc, out, more);
        x += k;
        for (int i = 0; i < count; i += 2) {
            vf b[P][2][PANEL_VECTORS];
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                const char *from = w + p * next + i * (PANEL * 2);
                prefetch(from, PANEL * 4);
                for (int j = 0; j < PANEL_VECTORS; j++) {
                    vu word;
                    memcpy(&word, from + j * VECTOR * 4, sizeof word);
                    b[p][0][j] = (vf)(word << 16);
                    b[p][1][j] = (vf)(word & 0xffff0000u);
                }
            }
            const int last = i + 1 < count ? 2 : 1;
            for (int h = 0; h < last; h++)
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const vf a = splat(x[r * stride + i + h]);
#pragma GCC unroll 4
                    for (int p = 0; p < P; p++)
#pragma GCC unroll 4
                        for (int j = 0; j < PANEL_VECTORS; j++) acc[p][r][j] += a * b[p][h][j];
                }
        }
        give<R, P>(acc, out);
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define BFLOAT16_DOT 1
// The same words, multiplied with inputs in bfloat16, two at a time.
struct BFloat16Products : BFloat16 {
    static constexpr bool converts = true;
    static ptrdiff_t stride(int K) { return (K + 1) / 2; }

    static void convert(float *y, const float *x, int K) {
        half *to = (half *)y;
        if (K % 2) to[K] = 0;
        int i = 0;
        for (; i + VECTOR <= K; i += VECTOR) {
            const __m256bh rounded = _mm512_cvtneps_pbh((__m512)load(x + i));
            memcpy(to + i, &rounded, sizeof rounded);
        }
        for (; i < K; i++) store_one(to + i, x[i]);
    }

    template <int R, int P>
    static void tile(const float *x, ptrdiff_t stride, const char *w, ptrdiff_t next, int k, int count, float *out,
                     bool more) {
        vf acc[P][R][PANEL_VECTORS];
        take<R, P>(acc, out, more);
        x += k / 2;
        for (int i = 0; i < (count + 1) / 2; i++) {
            vi b[P][PANEL_VECTORS];
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                const char *from = w + p * next + i * (PANEL * 4);
                prefetch(from, PANEL * 4);
                for (int j = 0; j < PANEL_VECTORS; j++) memcpy(&b[p][j], from + j * VECTOR * 4, sizeof b[p][j]);
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const vi a = splat_word(x + r * stride + i);
#pragma GCC unroll 4
                for (int p = 0; p < P; p++)
#pragma GCC unroll 4
                    for (int j = 0; j < PANEL_VECTORS; j++)
                        acc[p][r][j] = (vf)_mm512_dpbf16_ps((__m512)acc[p][r][j], (__m512bh)b[p][j], (__m512bh)a);
            }
        }
        give<R, P>(acc, out);
    }
};
#else
#define BFLOAT16_DOT 0
typedef BFloat16 BFloat16Products;
#endif

// sum + a b + A B of words with 16 bits a and, above them, A.
inline vi dot(vi sum, vi a, vi b) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
    return (vi)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

struct EightBits {  // of two inputs in turn, for every output
    static constexpr int GROUP = 64, INPUTS = 2, OFFSET = 0;
    static void unpack(const char *from, vi *word) {
        vb bytes;
        memcpy(&bytes, from, sizeof bytes);
        word[0] = (vi)widen(bytes);
    }
};
struct FourBits {  // weights plus 8; of two inputs in turn and, above them, of the next two
    static constexpr int GROUP = 32, INPUTS = 4, OFFSET = 8;
    static void unpack(const char *from, vi *word) {
        vub bytes;
        memcpy(&bytes, from, sizeof bytes);
        const vs wide = widen(bytes);
        word[0] = (vi)(wide & 15), word[1] = (vi)(wide >> 4);
    }
};

// Groups of weights, each followed by its outputs' scales in bfloat16.
template <class Bits>
struct Integers {
    static constexpr bool converts = true;
    static constexpr int GROUP = Bits::GROUP, STEP = Bits::INPUTS, STEP_BYTES = 2 * PANEL;
    static constexpr int WEIGHT_BYTES = GROUP / STEP * STEP_BYTES, GROUP_BYTES = WEIGHT_BYTES + 2 * PANEL;
    static int groups(int K) { return (K + GROUP - 1) / GROUP; }
    static ptrdiff_t panel(int K) { return ptrdiff_t(groups(K)) * GROUP_BYTES; }
    static ptrdiff_t at(int k) { return panel(k); }
    static constexpr int ROW_GROUP = GROUP / 2 + 2;  // floats: pairs of inputs, their scale, -OFFSET times their sum
    static ptrdiff_t stride(int K) { return ptrdiff_t(groups(K)) * ROW_GROUP; }

    static void convert(float *y, const float *x, int K) {
        float padding[GROUP];
        for (int g = 0; g < groups(K); g++, y += ROW_GROUP) {
            const float *from = x + g * GROUP;
            if (K - g * GROUP < GROUP) {
                memset(padding, 0, sizeof padding);
                memcpy(padding, from, 4 * (K - g * GROUP));
                from = padding;
            }
            group(y, from);
        }
    }
    static void group(float *y, const float *x) {
        vf most{}, broken{};  // what is no number makes the scale none
        for (int i = 0; i < GROUP; i += VECTOR) {
            const vf v = load(x + i), a = v < 0 ? -v : v;
            most = a > most ? a : most;
            broken += v - v;
        }
        float lane[VECTOR], largest = 0;
        store(lane, most);
        for (float one : lane) largest = one > largest ? one : largest;
        const vf factor = splat(largest > 1e-30f ? 32767.f / largest : 0.f), magic = splat(12582912.f);
        int16_t *to = (int16_t *)y;
        vi total{};
        for (int i = 0; i < GROUP; i += VECTOR) {
            const vi n = (vi)(load(x + i) * factor + magic) - (vi)magic;
            const vsh narrow = __builtin_convertvector(n, vsh);
            memcpy(to + i, &narrow, sizeof narrow);
            total += n;
        }
        int32_t parts[VECTOR], sum_all = 0;
        memcpy(parts, &total, sizeof parts);
        for (int32_t one : parts) sum_all += one;
        sum_all *= -Bits::OFFSET;
        y[GROUP / 2] = (largest > 1e-30f ? largest : 0.f) / 32767.f + sum(broken);
        memcpy(y + GROUP / 2 + 1, &sum_all, 4);
    }

    template <int R, int P>
    static void tile(const float *x, ptrdiff_t stride, const char *w, ptrdiff_t next, int k, int count, float *out,
                     bool more) {
        x += k / GROUP * ROW_GROUP;
        for (int g = 0; g < groups(count); g++, x += ROW_GROUP, w += GROUP_BYTES) {
            vi acc[P][R][PANEL_VECTORS];
            for (int p = 0; p < P; p++)
                for (int r = 0; r < R; r++)
                    for (int j = 0; j < PANEL_VECTORS; j++)
                        acc[p][r][j] = Bits::OFFSET ? splat_word(x + r * stride + GROUP / 2 + 1) : vi{};
            for (int i = 0; i < GROUP / STEP; i++) {
                vi b[P][PANEL_VECTORS][STEP / 2];
#pragma GCC unroll 4
                for (int p = 0; p < P; p++) {
                    const char *from = w + p * next + i * STEP_BYTES;
                    prefetch(from, STEP_BYTES);
                    for (int j = 0; j < PANEL_VECTORS; j++) Bits::unpack(from + 2 * j * VECTOR, b[p][j]);
                }
#pragma GCC unroll 2
                for (int h = 0; h < STEP / 2; h++)
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) {
                        const vi a = splat_word(x + r * stride + i * (STEP / 2) + h);
#pragma GCC unroll 4
                        for (int p = 0; p < P; p++)
#pragma GCC unroll 4
                            for (int j = 0; j < PANEL_VECTORS; j++) acc[p][r][j] = dot(acc[p][r][j], b[p][j][h], a);
                    }
            }
            for (int p = 0; p < P; p++)
                for (int j = 0; j < PANEL_VECTORS; j++) {
                    const vf scale = load((const half *)(w + p * next + WEIGHT_BYTES) + j * VECTOR);
                    for (int r = 0; r < R; r++) {
                        float *to = out + (p * R + r) * PANEL + j * VECTOR;
                        const vf before = more || g ? load(to) : vf{};
                        const vf factor = scale * splat(x[r * stride + GROUP / 2]);
                        store(to, before + factor * __builtin_convertvector(acc[p][r][j], vf));
                    }
                }
        }
    }
};
typedef Integers<EightBits> Int8;
typedef Integers<FourBits> Int4;

template <int R, class F>
void tiles(int panels, const float *x, ptrdiff_t stride, const char *w, ptrdiff_t next, int k, int count, float *out,
           bool more) {
    if constexpr (R <= TILE) {
        if constexpr (4 * R <= TILE)
            if (panels == 4) return F::template tile<R, 4>(x, stride, w, next, k, count, out, more);
        if constexpr (2 * R <= TILE)
            if (panels == 2) return F::template tile<R, 2>(x, stride, w, next, k, count, out, more);
        F::template tile<R, 1>(x, stride, w, next, k, count, out, more);
    }
}

template <class F>
void tiles_of(int rows, int panels, const float *x, ptrdiff_t stride, const char *w, ptrdiff_t next, int k, int count,
              float *out, bool more) {
    switch (rows) {
        case 1: return tiles<1, F>(panels, x, stride, w, next, k, count, out, more);
        case 2: return tiles<2, F>(panels, x, stride, w, next, k, count, out, more);
        case 3: return tiles<3, F>(panels, x, stride, w, next, k, count, out, more);
        case 4: return tiles<4, F>(panels, x, stride, w, next, k, count, out, more);
        case 5: return tiles<5, F>(panels, x, stride, w, next, k, count, out, more);
        case 6: return tiles<6, F>(panels, x, stride, w, next, k, count, out, more);
        case 7: return tiles<7, F>(panels, x, stride, w, next, k, count, out, more);
        default: return tiles<8, F>(panels, x, stride, w, next, k, count, out, more);
    }
}

struct Share {
    int from, to;
    Share(int count, int thread, int threads)
        : from(int(int64_t(count) * thread / threads)), to(int(int64_t(count) * (thread + 1) / threads)) {}
};

inline int panels_of(int outputs) { return (outputs + PANEL - 1) / PANEL; }
inline int padded(int outputs) { return panels_of(outputs) * PANEL; }

// x (rows, K) times panels share.from .. share.to-1; done(panel, row, values) takes PANEL outputs of a row.
// If there are more rows than a tile holds, some tiles use a piece of a panel in turn while it is in a cache.
template <class F, class Done>
void product(int rows, const float *x, ptrdiff_t stride, const void *w, int K, Share share, Done done) {
    const int steps = (rows + TILE - 1) / TILE, piece = steps == 1 ? K : steps <= NEIGHBOUR_TILES ? PIECE : LONG_PIECE;
    const int most = rows > TILE / 2 ? 1 : rows > TILE / 4 ? 2 : 4;
    float out[NEIGHBOUR_TILES * TILE * PANEL];
    for (int p = share.from; p < share.to;) {
        int count = most;
        while (count > share.to - p) count /= 2;
        const char *panel = (const char *)w + p * F::panel(K);
        for (int s = 0; s < steps; s += NEIGHBOUR_TILES) {
            const int last = s + NEIGHBOUR_TILES < steps ? s + NEIGHBOUR_TILES : steps;
            for (int k = 0; k < K; k += piece)
                for (int t = s; t < last; t++) {
                    const Share some(rows, t, steps);
                    tiles_of<F>(some.to - some.from, count, x + some.from * stride, stride, panel + F::at(k),
                                F::panel(K), k, k + piece < K ? piece : K - k, out + (t - s) * TILE * PANEL, k > 0);
                }
            for (int t = s; t < last; t++) {
                const Share some(rows, t, steps);
                const int n = some.to - some.from;
                for (int q = 0; q < count; q++)
                    for (int r = 0; r < n; r++)
                        done(p + q, some.from + r, out + (t - s) * TILE * PANEL + (q * n + r) * PANEL);
            }
        }
        p += count;
    }
}

// ---- rows ----

inline float total(const float *x, int n) {
    vf v{};
    int i = 0;
    for (; i + VECTOR <= n; i += VECTOR) v += load(x + i);
    float s = sum(v);
    for (; i < n; i++) s += x[i];
    return s;
}
inline float squares(const float *x, int n, float mean) {
    vf v{};
    int i = 0;
    for (; i + VECTOR <= n; i += VECTOR) {
        const vf d = load(x + i) - splat(mean);
        v += d * d;
    }
    float s = sum(v);
    for (; i < n; i++) s += (x[i] - mean) * (x[i] - mean);
    return s;
}
inline void scaled(float *y, const float *x, int n, float mean, float scale, const float *w, const float *b) {
    int i = 0;
    for (; i + VECTOR <= n; i += VECTOR) {
        const vf v = (load(x + i) - splat(mean)) * splat(scale) * load(w + i);
        store(y + i, b ? v + load(b + i) : v);
    }
    for (; i < n; i++) y[i] = (x[i] - mean) * scale * w[i] + (b ? b[i] : 0.f);
}
inline void rms_norm(float *y, const float *x, int n, const float *w) {
    scaled(y, x, n, 0.f, 1.f / std::sqrt(squares(x, n, 0.f) / n + 1e-6f), w, nullptr);
}
inline void layer_norm(float *y, const float *x, int n, const float *w, const float *b) {
    const float mean = total(x, n) / n;
    scaled(y, x, n, mean, 1.f / std::sqrt(squares(x, n, mean) / n + 1e-5f), w, b);
}

inline void rotate(float *h, const float *angle, int n, bool half_split) {
    const int pairs = n / 2, apart = half_split ? pairs : 1, step = half_split ? 1 : 2;
    for (int i = 0; i < pairs; i++) {
        const float c = angle[2 * i], s = angle[2 * i + 1];
        float &a = h[i * step], &b = h[i * step + apart];
        const float turned = a * c - b * s;
        b = a * s + b * c;
        a = turned;
    }
}

// ---- threads ----

class Barrier {
    std::atomic<int> waiting{0}, phase{0};
    const int count;

   public:
    explicit Barrier(int threads) : count(threads) {}
    void wait() {
        if (count == 1) return;
        const int now = phase.load(std::memory_order_relaxed);
        if (waiting.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
            waiting.store(0, std::memory_order_relaxed);
            phase.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase.load(std::memory_order_acquire) == now; spins++)
            if (spins < 2000)
                RELAX();
            else
                std::this_thread::yield();  // the thread that is missing may have been suspended
    }
};

// Floats between rows of inputs in a format's own numbers; 0 where it takes float32.
inline size_t converted_stride(int format, int K) {
    size_t floats = 0;
    if (format == BFLOAT16_PRODUCTS && BFloat16Products::converts) floats = BFloat16Products::stride(K);
    if (format == INT8) floats = Int8::stride(K);
    if (format == INT4) floats = Int4::stride(K);
    return floats ? (floats + LINE - 1) / LINE * LINE + ROW_GAP : 0;
}

struct Workspace {  // the parts of a call's memory; rows are whole panels and ROW_GAP apart
    int width, qkv, inner, hidden, outputs, scores;
    bool shared_norms;  // whether the norms of rows are divided among the threads, which takes one more barrier
    float *x, *heads, *attended, *expanded, *out, *spare, *common, *own;
    size_t normed_size, converted_size, own_size, floats;

    Workspace(const Block &b, int rows, int asked_threads, float *work) {
        width = padded(b.width) + ROW_GAP, inner = padded(b.heads * b.head_dim) + ROW_GAP;
        hidden = padded(b.hidden) + ROW_GAP;
        qkv = padded((b.heads + 2 * b.kv_heads) * b.head_dim) + ROW_GAP, outputs = padded(2 * b.channels);
        scores = padded(b.length) + 2 * padded(b.head_dim);
        float *p = work;
        auto take = [&](size_t n) { return (p += (n + LINE - 1) / LINE * LINE) - (n + LINE - 1) / LINE * LINE; };
        x = take(size_t(rows) * width), heads = take(size_t(rows) * qkv), attended = take(size_t(rows) * inner);
        expanded = take(size_t(rows) * hidden), out = take(size_t(rows) * outputs), spare = take(size_t(rows) * width);
        const int most = width > padded(b.channels) ? width : padded(b.channels);
        shared_norms = int64_t(rows) * asked_threads > REPEATED_ROWS;
        normed_size = (size_t(rows) * most + LINE - 1) / LINE * LINE;
        const int inputs = b.hidden > b.width ? b.hidden : b.width, inner_inputs = b.heads * b.head_dim;
        converted_size = size_t(rows) * converted_stride(b.weights, inputs > inner_inputs ? inputs : inner_inputs);
        common = take(shared_norms ? normed_size + converted_size : 0);
        own = p;
        own_size = shared_norms ? 0 : normed_size + converted_size;
        own_size += (size_t(scores) + LINE - 1) / LINE * LINE + LINE;  // threads share no cache line
        floats = size_t(p - work) + own_size * b.threads;
    }
};

struct Worker {
    const Block &b;
    const Workspace &space;
    Barrier &barrier;
    const int thread;
    float *normed, *converted, *scratch;

    Worker(const Block &block, const Workspace &r, Barrier &bar, int t)
        : b(block), space(r), barrier(bar), thread(t) {
        float *mine = r.own + t * r.own_size;
        normed = r.shared_norms ? r.common : mine, converted = normed + r.normed_size;
        scratch = r.shared_norms ? mine : converted + r.converted_size;
    }

    Share share(int count) const { return Share(count, thread, b.threads); }

    // Fill rows of `normed`: a few of them every thread for itself, which takes less time than another barrier.
    template <class Fill>
    void fill(int rows, Fill one_row) {
        const Share mine = space.shared_norms ? share(rows) : Share(rows, 0, 1);
        for (int r = mine.from; r < mine.to; r++) one_row(r);
        if (space.shared_norms) barrier.wait();
    }

    struct Inputs {  // rows as the products of a format take them
        const float *rows;
        ptrdiff_t stride;
    };

    template <class F>
    Inputs norm(int rows, const float *w, const float *bias) {
        const ptrdiff_t apart = converted_stride(b.weights, b.width);
        fill(rows, [&](int r) {
            const float *x = space.x + size_t(r) * space.width;
            float *y = normed + size_t(r) * space.width;
            b.rms ? rms_norm(y, x, b.width, w) : layer_norm(y, x, b.width, w, bias);
            if (F::converts) F::convert(converted + r * apart, y, b.width);
        });
        if (F::converts) return {converted, apart};
        return {normed, space.width};
    }

    template <class F>
    Inputs convert(int rows, const float *x, ptrdiff_t stride, int K) {
        if (!F::converts) return {x, stride};
        const ptrdiff_t apart = converted_stride(b.weights, K);
        fill(rows, [&](int r) { F::convert(converted + r * apart, x + r * stride, K); });
        return {converted, apart};
    }

    // Add a product's outputs to the residual stream, through a norm where there is one.
    template <class F>
    void add(int rows, Inputs y, const void *w, int K, const float *bias, const float *post) {
        float *to = post ? space.spare : space.x;
        product<F>(rows, y.rows, y.stride, w, K, share(panels_of(b.width)), [&](int panel, int row, const float *sums) {
            float *out = to + size_t(row) * space.width + panel * PANEL;
            for (int j = 0; j < PANEL; j += VECTOR) {
                const vf v = load(sums + j) + load(bias + panel * PANEL + j);
                store(out + j, post ? v : v + load(out + j));
            }
        });
        barrier.wait();
        if (!post) return;
        const Share mine = share(rows);
        for (int r = mine.from; r < mine.to; r++) {
            float *x = space.x + size_t(r) * space.width, *y = space.spare + size_t(r) * space.width;
            rms_norm(y, y, b.width, post);
            for (int j = 0; j < b.width; j++) x[j] += y[j];
        }
        barrier.wait();
    }

    template <int FIXED, class C>
    void attend(const Layer &layer, int row, int kv, int position, int count) {
        const int H = FIXED ? FIXED : b.head_dim, group = b.heads / b.kv_heads;
        const size_t start = (size_t(row) * b.kv_heads + kv) * b.length * H;
        C *keys = (C *)layer.keys + start, *values = (C *)layer.values + start;
        float *const q = scratch, *const acc = scratch + padded(b.head_dim), *const score = acc + padded(b.head_dim);
        auto head = [&](int t, int h) { return space.heads + (size_t(row) * count + t) * space.qkv + size_t(h) * H; };
        auto turn = [&](float *to, const float *from, const float *w, int at) {
            w ? rms_norm(to, from, H, w) : (void)memcpy(to, from, 4 * H);
            if (b.rotary) rotate(to, b.rotary + size_t(at) * (H / 2) * 2, H, b.half_split);
        };
        for (int t = 0; t < count; t++) {
            turn(q, head(t, b.heads + kv), layer.key_norm, position + t);
            const float *v = head(t, b.heads + b.kv_heads + kv);
            for (int i = 0; i < H; i++) {
                store_one(keys + size_t(position + t) * H + i, q[i]);
                store_one(values + size_t(position + t) * H + i, v[i]);
            }
        }
        const float scale = (b.query_scale ? b.query_scale[row] : 1.f) / std::sqrt(float(H));
        for (int t = 0; t < count; t++)
            for (int g = 0; g < group; g++) {
                turn(q, head(t, kv * group + g), layer.query_norm, position + t);
                for (int i = 0; i < H; i++) q[i] *= scale;
                const int seen = position + t + 1;
                const float inverse = soften<FIXED>(q, keys, score, seen, H);
                mix<FIXED>(score, values, acc, seen, H);
                float *to = space.attended + (size_t(row) * count + t) * space.inner + size_t(kv * group + g) * H;
                for (int i = 0; i < H; i++) to[i] = acc[i] * inverse;
            }
    }

    // score[l] = exp(q . k_l - max), and returns one over their sum.
    template <int FIXED, class C>
    static float soften(const float *q, const C *keys, float *score, int seen, int H) {
        float most = -INFINITY;
        for (int l = 0; l < seen; l++) {
            const C *k = keys + size_t(l) * H;
            vf v{};
            int i = 0;
#pragma GCC unroll 8
            for (; i + VECTOR <= H; i += VECTOR) v += load(q + i) * load(k + i);
            float s = sum(v);
            for (; i < H; i++) s += q[i] * one(k + i);
            score[l] = s;
            most = s > most ? s : most;
        }
        vf all{};
        int l = 0;
        for (; l + VECTOR <= seen; l += VECTOR) {
            const vf e = exponential(load(score + l) - splat(most));
            store(score + l, e);
            all += e;
        }
        float s = sum(all);
        for (; l < seen; l++) s += score[l] = std::exp(score[l] - most);
        return 1.f / s;
    }

    // acc = sum_l score[l] v_l
    template <int FIXED, class C>
    static void mix(const float *score, const C *values, float *acc, int seen, int H) {
        if constexpr (FIXED > 0 && FIXED % VECTOR == 0 && FIXED / VECTOR <= 16) {
            constexpr int N = FIXED / VECTOR;
            vf even[N] = {}, odd[N] = {};
            int l = 0;
            for (; l + 2 <= seen; l += 2) {
                const vf a = splat(score[l]), c = splat(score[l + 1]);
#pragma GCC unroll 16
                for (int i = 0; i < N; i++) {
                    even[i] += a * load(values + size_t(l) * FIXED + i * VECTOR);
                    odd[i] += c * load(values + size_t(l + 1) * FIXED + i * VECTOR);
                }
            }
            if (l < seen)
                for (int i = 0; i < N; i++) even[i] += splat(score[l]) * load(values + size_t(l) * FIXED + i * VECTOR);
            for (int i = 0; i < N; i++) store(acc + i * VECTOR, even[i] + odd[i]);
        } else {
            for (int i = 0; i < H; i++) acc[i] = 0;
            for (int l = 0; l < seen; l++)
                for (int i = 0; i < H; i++) acc[i] += score[l] * one(values + size_t(l) * H + i);
        }
    }

    template <class C>
    void attention(const Layer &layer, int position, int count) {
        const Share tasks = share(b.rows * b.kv_heads);
        for (int task = tasks.from; task < tasks.to; task++) {
            const int row = task / b.kv_heads, kv = task % b.kv_heads;
            if (b.head_dim == 64)
                attend<64, C>(layer, row, kv, position, count);
            else
                attend<0, C>(layer, row, kv, position, count);
        }
    }

    template <class F>
    void expand(const Layer &layer, int rows, Inputs y) {
        if (!b.gated) {
            product<F>(rows, y.rows, y.stride, layer.up, b.width, share(panels_of(b.hidden)),
                       [&](int p, int row, const float *sums) {
                           float *out = space.expanded + size_t(row) * space.hidden + p * PANEL;
                           for (int j = 0; j < PANEL; j += VECTOR)
                               store(out + j, gelu(load(sums + j) + load(layer.up_bias + p * PANEL + j)));
                       });
            return;
        }
        Share pairs = share(panels_of(b.hidden));  // a thread has both panels of a pair
        pairs.from *= 2, pairs.to *= 2;
        product<F>(rows, y.rows, y.stride, layer.up, b.width, pairs, [&](int p, int row, const float *sums) {
            float *out = space.expanded + size_t(row) * space.hidden + p / 2 * PANEL;
            for (int j = 0; j < PANEL; j += VECTOR) {
                const vf v = load(sums + j) + load(layer.up_bias + p * PANEL + j);
                store(out + j, p % 2 ? v * load(out + j) : tanh_gelu(v));
            }
        });
    }

    // All layers for `count` tokens from `position`, in place in space.x, (rows * count, width).
    template <class F>
    void layers(int position, int count) {
        const int rows = b.rows * count, inner = b.heads * b.head_dim;
        for (int i = 0; i < b.layers; i++) {
            const Layer &layer = b.layer[i];
            Inputs y = norm<F>(rows, layer.norm1, layer.norm1_bias);
            const int heads = (b.heads + 2 * b.kv_heads) * b.head_dim;
            product<F>(rows, y.rows, y.stride, layer.qkv, b.width, share(panels_of(heads)),
                       [&](int panel, int row, const float *sums) {
                           float *out = space.heads + size_t(row) * space.qkv + panel * PANEL;
                           for (int j = 0; j < PANEL; j += VECTOR)
                               store(out + j, load(sums + j) + load(layer.qkv_bias + panel * PANEL + j));
                       });
            barrier.wait();
            b.half_cache ? attention<half>(layer, position, count) : attention<float>(layer, position, count);
            barrier.wait();
            y = convert<F>(rows, space.attended, space.inner, inner);
            add<F>(rows, y, layer.proj, inner, layer.proj_bias, layer.post1);
            y = norm<F>(rows, layer.norm2, layer.norm2_bias);
            expand<F>(layer, rows, y);
            barrier.wait();
            y = convert<F>(rows, space.expanded, space.hidden, b.hidden);
            add<F>(rows, y, layer.down, b.hidden, layer.down_bias, layer.post2);
        }
    }

    // Input number `index` of the block: the token before the one that it predicts, or the start token.
    void embed(int index) {
        const int token = index + b.first;
        fill(b.rows, [&](int r) {
            const float *from = token ? b.x + (size_t(r % b.pictures) * b.tokens + token - 1) * b.channels : b.start;
            memcpy(normed + size_t(r) * b.channels, from, 4 * b.channels);
        });
        product<Float32>(b.rows, normed, b.channels, b.proj_in, b.channels, share(panels_of(b.width)),
                [&](int panel, int row, const float *sums) {
                    const int at = panel * PANEL;
                    for (int j = 0; j < PANEL; j += VECTOR) {
                        vf v = load(sums + j) + load(b.proj_in_bias + at + j);
                        if (b.table) v += load(b.table + size_t(index) * padded(b.width) + at + j);
                        if (b.class_vector) v += load(b.class_vector + size_t(row) * padded(b.width) + at + j);
                        store(space.x + size_t(row) * space.width + at + j, v);
                    }
                });
        barrier.wait();
    }

    void project() {
        const float *y = space.x;
        if (b.final_norm) {
            fill(b.rows, [&](int r) {
                rms_norm(normed + size_t(r) * space.width, space.x + size_t(r) * space.width, b.width, b.final_norm);
            });
            y = normed;
        }
        product<Float32>(b.rows, y, space.width, b.proj_out, b.width, share(panels_of(2 * b.channels)),
                [&](int panel, int row, const float *sums) {
                    float *out = space.out + size_t(row) * space.outputs + panel * PANEL;
                    for (int j = 0; j < PANEL; j += VECTOR)
                        store(out + j, load(sums + j) + load(b.proj_out_bias + panel * PANEL + j));
                });
        barrier.wait();
    }

    double output(int row, int i) const {
        const double o = space.out[size_t(row) * space.outputs + i];
        return b.clip ? b.clip * std::tanh(o / b.clip) : o;
    }
    double log_sigma(double a) const {
        if (!b.softplus) return a;
        const double y = a + 0.541324854612918;  // flow/block.py's softplus and its two ends
        return y < -30 ? y : std::log(y > 40 ? y : std::log1p(std::exp(y)));
    }

    // x = mu + sigma z of a token, guided (sampling/guidance.py has the rules).
    void invert(int token) {
        const Share mine = share(b.pictures * b.channels);
        for (int e = mine.from; e < mine.to; e++) {
            const int picture = e / b.channels, c = e % b.channels, null = picture + b.pictures;
            double scale = output(picture, c), mu = output(picture, b.channels + c), spread;
            const double w = b.rule ? b.weight[size_t(picture) * b.tokens + token] : 0.;
            if (b.rule == 2) {
                scale += w * (scale - output(null, c));
                mu += w * (mu - output(null, b.channels + c));
            }
            spread = log_sigma(scale);
            if (b.rule == 1) {
                const double apart = spread - log_sigma(output(null, c));
                const double ratio = std::exp(2 * (apart > 0 ? 0. : apart)), precision = 1 + w - w * ratio;
                mu = ((1 + w) * mu - w * ratio * output(null, b.channels + c)) / precision;
                spread -= 0.5 * std::log(precision);
            }
            const size_t at = (size_t(picture) * b.tokens + token) * b.channels + c;
            b.x[at] = float(mu + std::exp(spread) * b.noise[at]);
        }
        barrier.wait();
    }

    void forward(int position, int count) {
        switch (b.weights) {
            case BFLOAT16: return layers<BFloat16>(position, count);
            case BFLOAT16_PRODUCTS: return layers<BFloat16Products>(position, count);
            case INT8: return layers<Int8>(position, count);
            case INT4: return layers<Int4>(position, count);
            default: return layers<Float32>(position, count);
        }
    }

    void solve(int from, int to) {
        for (int token = from; token < to; token++) {
            embed(token - b.first);
            forward(b.prefix + token - b.first, 1);
            project();
            invert(token);
        }
    }
};

// Run `work` on the block's threads, or on as many as the system grants.
template <class Work>
void on_threads(const Block &given, int rows, Work work) {
    Block b = given;
    std::atomic<int> count{0};  // set once all threads were requested: none may wait for one that did not start
    std::vector<std::thread> others;
    std::unique_ptr<Workspace> space;
    std::unique_ptr<Barrier> barrier;
    auto run = [&](int t) {
        Worker worker(b, *space, *barrier, t);
        work(worker, *space);
    };
    try {
        for (int t = 1; t < given.threads; t++)
            others.emplace_back([&, t] {
                while (!count.load(std::memory_order_acquire)) std::this_thread::yield();
                run(t);
            });
    } catch (const std::exception &) {
    }
    b.threads = int(others.size()) + 1;
    space.reset(new Workspace(b, rows, given.threads, b.work));
    barrier.reset(new Barrier(b.threads));
    count.store(b.threads, std::memory_order_release);
    run(0);
    for (auto &other : others) other.join();
}

}  // namespace

extern "C" {

int32_t starflow_version() { return 3; }
int32_t starflow_panel() { return PANEL; }
int32_t starflow_bfloat16_products() { return BFLOAT16_DOT; }

// Floats of the workspace for `count` tokens at once.
int64_t starflow_workspace(const Block *b, int32_t count) {
    return int64_t(Workspace(*b, b->rows * count, b->threads, (float *)64).floats);  // no address is read
}

// Tokens from .. to-1, given those before them in x and their keys and values in the cache.
void starflow_solve(const Block *b, int32_t from, int32_t to) {
    on_threads(*b, b->rows, [=](Worker &worker, const Workspace &) { worker.solve(from, to); });
}

// All layers for hidden states (rows, count, width) that continue the cache at `position`, in place.
void starflow_extend(const Block *b, float *hidden, int32_t position, int32_t count) {
    const int rows = b->rows * count;
    on_threads(*b, rows, [=](Worker &worker, const Workspace &space) {
        const Share mine = worker.share(rows);
        for (int r = mine.from; r < mine.to; r++)
            memcpy(space.x + size_t(r) * space.width, hidden + size_t(r) * b->width, 4 * b->width);
        worker.barrier.wait();
        worker.forward(position, count);
        for (int r = mine.from; r < mine.to; r++)
            memcpy(hidden + size_t(r) * b->width, space.x + size_t(r) * space.width, 4 * b->width);
    });
}

// y = gelu(x), or its tanh form, of n values in whole vectors; used by tests.
void starflow_gelu(const float *x, float *y, int32_t n, int32_t tanh_form) {
    for (int i = 0; i + VECTOR <= n; i += VECTOR) store(y + i, tanh_form ? tanh_gelu(load(x + i)) : gelu(load(x + i)));
}

// A checksum of bytes that depends on their values and order, at the speed of reading them.
uint64_t starflow_mark(const void *start, int64_t bytes) {
    const unsigned char *p = (const unsigned char *)start;
    vu lanes[4] = {};
    constexpr int64_t STRIDE = sizeof lanes;
    int64_t i = 0;
    for (; i + STRIDE <= bytes; i += STRIDE)
        for (int j = 0; j < 4; j++) {
            vu words;
            memcpy(&words, p + i + j * int64_t(sizeof words), sizeof words);
            lanes[j] = lanes[j] * 0x9e3779b1u + words;
        }
    uint64_t mark = uint64_t(bytes);
    for (int j = 0; j < 4; j++)
        for (int k = 0; k < VECTOR; k++) mark = mark * 0x100000001b3u + lanes[j][k];
    for (; i < bytes; i++) mark = mark * 0x100000001b3u + p[i];
    return mark;
}
}
