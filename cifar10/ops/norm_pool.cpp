// BatchNorm in training, 2x2 max pooling and ReLU in one operation, on images that lie channels-last in memory.
//
// Forward reads the convolution's output twice, for its statistics and for the result, and writes the pooled result; backward
// reads it twice again, computes the normalized values and their maxima anew, and writes the gradient. PyTorch's three operations
// write and read four more tensors of that size, and 8-byte indices. Sums are taken over blocks of a fixed number of pixels
// and added in order, in double precision: they do not depend on the number of threads.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int W = 16;  // channels at a time
#else
constexpr int W = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));
typedef uint16_t bf16;

constexpr int64_t BLOCK = 8192;  // values that are summed in single precision: they stay in the first cache

struct Shape {  // of the input
    int64_t images, height, width, C;
    int64_t rows() const { return images * height / 2; }  // of the result, over all images
    int64_t columns() const { return width / 2; }
    int64_t down() const { return width * C; }  // from a pixel to the one below
};

inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Floats load(const bf16* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return (Floats)(__builtin_convertvector(h, Words) << 16);
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16* p, Floats v) {  // to nearest, ties to even; NaN stays NaN
    const Words bits = (Words)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Halves h = __builtin_convertvector(v != v ? (bits >> 16 | 0x40u) : rounded, Halves);
    std::memcpy(p, &h, sizeof h);
}

// The largest normalized value of 2x2 pixels, the pixel it comes from, and where it is: the first of equals, as in PyTorch.
template <typename T> struct Window {
    Floats x[4], x_max, z_max;
    Ints right, below;

    Window(const T* in, const Shape& s, Floats scale, Floats shift)
        : x{load(in), load(in + s.C), load(in + s.down()), load(in + s.down() + s.C)} {
        const Floats z0 = x[0] * scale + shift, z1 = x[1] * scale + shift, z2 = x[2] * scale + shift, z3 = x[3] * scale + shift;
        const Ints top_right = z1 > z0, bottom_right = z3 > z2;
        const Floats top = top_right ? z1 : z0, bottom = bottom_right ? z3 : z2;
        below = bottom > top;
        right = below ? bottom_right : top_right;
        x_max = below ? (bottom_right ? x[3] : x[2]) : (top_right ? x[1] : x[0]);
        z_max = below ? bottom : top;
    }
};

template <typename T> void statistics(const T* x, const Shape& s, float* mean, float* variance) {
    const int64_t C = s.C, pixels = s.images * s.height * s.width;
    const int64_t block = BLOCK / C > 16 ? BLOCK / C : 16, blocks = (pixels + block - 1) / block;
    std::vector<float> sums(2 * blocks * C);
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t first = b * block, n = first + block < pixels ? block : pixels - first;
        for (int64_t c = 0; c < C; c += W) {
            Floats sum{}, square{};
            const T* in = x + first * C + c;
            for (int64_t p = 0; p < n; p++) sum += load(in + p * C);
            sum /= float(n);
            for (int64_t p = 0; p < n; p++) {
                const Floats d = load(in + p * C) - sum;
                square += d * d;
            }
            store(&sums[2 * b * C + c], sum);
            store(&sums[(2 * b + 1) * C + c], square);
        }
    }
    for (int64_t c = 0; c < C; c++) {  // merged as in Chan, Golub and LeVeque (1979)
        double total = 0.0, m = 0.0, m2 = 0.0;
        for (int64_t b = 0; b < blocks; b++) {
            const double n = double((b + 1) * block < pixels ? block : pixels - b * block);
            const double d = sums[2 * b * C + c] - m;
            m2 += sums[(2 * b + 1) * C + c] + d * d * total * n / (total + n);
            m += d * n / (total + n);
            total += n;
        }
        mean[c] = float(m);
        variance[c] = float(m2 / total);
    }
}

template <typename T> void forward(const T* x, T* y, const Shape& s, const float* scales, const float* shifts) {
    const int64_t C = s.C;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < s.rows(); row++)
        for (int64_t c = 0; c < C; c += W) {
            const Floats scale = load(scales + c), shift = load(shifts + c);
            const T* in = x + row * 2 * s.down() + c;
            T* out = y + row * s.columns() * C + c;
            for (int64_t column = 0; column < s.columns(); column++, in += 2 * C, out += C) {
                const Floats z = Window<T>(in, s, scale, shift).z_max;
                store(out, z < 0.0f ? Floats{} : z);  // NaN stays NaN
            }
        }
}

// dz: memory for the gradient before ReLU, of the result's shape
template <typename T>
void backward(const T* x, const T* dy, T* dz, T* dx, const Shape& s, const float* scales, const float* shifts,
              const float* means, const float* invstds, float* dweight, float* dbias) {
    const int64_t C = s.C, rows = s.rows(), columns = s.columns(), down = s.down(), pixels = s.images * s.height * s.width;
    const int64_t wanted = BLOCK / (C * columns), block = wanted > 1 ? wanted : 1, blocks = (rows + block - 1) / block;
    std::vector<float> sums(2 * blocks * C), factors(C), constants(C);
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < blocks; n++) {
        const int64_t end = (n + 1) * block < rows ? (n + 1) * block : rows;
        for (int64_t c = 0; c < C; c += W) {
            const Floats scale = load(scales + c), shift = load(shifts + c), mean = load(means + c);
            Floats of_g{}, of_gx{};
            for (int64_t row = n * block; row < end; row++)
                for (int64_t column = 0; column < columns; column++) {
                    const int64_t at = (row * columns + column) * C + c;
                    const Window<T> window(x + row * 2 * down + column * 2 * C + c, s, scale, shift);
                    const Floats g = window.z_max > 0.0f ? load(dy + at) : Floats{};
                    store(dz + at, g);
                    of_g += g;
                    of_gx += g * (window.x_max - mean);
                }
            store(&sums[2 * n * C + c], of_g);
            store(&sums[(2 * n + 1) * C + c], of_gx);
        }
    }
    for (int64_t c = 0; c < C; c++) {
        double g = 0.0, gx = 0.0;
        for (int64_t n = 0; n < blocks; n++) {
            g += sums[2 * n * C + c];
            gx += sums[(2 * n + 1) * C + c];
        }
        gx *= invstds[c];
        dbias[c] = float(g);
        dweight[c] = float(gx);
        // dx = scale * (g - mean of g - normalized x * mean of g * normalized x) = scale * g + factor * x + constant
        factors[c] = float(-scales[c] * invstds[c] * gx / double(pixels));
        constants[c] = float(-scales[c] * g / double(pixels) - double(factors[c]) * means[c]);
    }
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t c = 0; c < C; c += W) {
            const Floats scale = load(scales + c), shift = load(shifts + c), factor = load(&factors[c]);
            const Floats constant = load(&constants[c]);
            const T* in = x + row * 2 * down + c;
            T* to = dx + row * 2 * down + c;
            const T* out = dz + row * columns * C + c;
            for (int64_t column = 0; column < columns; column++, in += 2 * C, to += 2 * C, out += C) {
                const Window<T> window(in, s, scale, shift);
                const Floats g = load(out) * scale, none{};
                const Floats left = window.right ? none : g, right = window.right ? g : none;
                store(to, (window.below ? none : left) + (factor * window.x[0] + constant));
                store(to + C, (window.below ? none : right) + (factor * window.x[1] + constant));
                store(to + down, (window.below ? left : none) + (factor * window.x[2] + constant));
                store(to + down + C, (window.below ? right : none) + (factor * window.x[3] + constant));
            }
        }
}

}  // namespace

#define FOR_BOTH_TYPES(call)  \
    if (is_bf16) {            \
        typedef bf16 T;       \
        call;                 \
    } else {                  \
        typedef float T;      \
        call;                 \
    }

extern "C" {

int channels_at_a_time() { return W; }

void norm_pool_statistics(int is_bf16, const Shape* s, const void* x, float* mean, float* variance) {
    FOR_BOTH_TYPES(statistics((const T*)x, *s, mean, variance))
}

void norm_pool_forward(int is_bf16, const Shape* s, const void* x, void* y, const float* scale, const float* shift) {
    FOR_BOTH_TYPES(forward((const T*)x, (T*)y, *s, scale, shift))
}

void norm_pool_backward(int is_bf16, const Shape* s, const void* x, const void* dy, void* dz, void* dx, const float* scale,
                        const float* shift, const float* mean, const float* invstd, float* dweight, float* dbias) {
    FOR_BOTH_TYPES(backward((const T*)x, (const T*)dy, (T*)dz, (T*)dx, *s, scale, shift, mean, invstd, dweight, dbias))
}
}
