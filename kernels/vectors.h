// Vectors as wide as this processor's registers, in the extension that GCC and Clang share: AVX-512, AVX2, NEON or SSE,
// whichever -march=native stands for. Rows of float or bfloat16; all arithmetic is float32.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t IntVec __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(WIDTH * 2)));

struct bfloat16 {
    uint16_t bits;
};

inline Vec broadcast(float value) { return Vec{} + value; }

inline Vec load(const float* from) {
    Vec value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

inline Vec load(const bfloat16* from) {
    HalfVec bits;
    std::memcpy(&bits, from, sizeof(bits));
    return (Vec)(__builtin_convertvector(bits, IntVec) << 16);
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }

inline float one(float value) { return value; }

inline float one(bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float found;
    std::memcpy(&found, &bits, sizeof(found));
    return found;
}

inline float sum(Vec value) {
    typedef float Four __attribute__((vector_size(16)));
    Four parts[WIDTH / 4];
    std::memcpy(parts, &value, sizeof(value));
    Four found = parts[0];
    for (int i = 1; i < WIDTH / 4; i++) found += parts[i];
    return (found[0] + found[1]) + (found[2] + found[3]);
}

constexpr int ROWS = 8;      // read side by side, so that more of memory is on its way at a time
constexpr int AHEAD = 512;  // bytes that are asked for before they are needed

template <class T>
inline void ask(const T* from) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + AHEAD, 0, 3);
}

// found[r] = rows[r] · x; FRESH: the rows come from memory.
template <bool FRESH, class T>
inline void dots(const T* const rows[ROWS], const float* x, int64_t size, float found[ROWS]) {
    Vec sums[ROWS] = {};
    int64_t i = 0;
    for (; i + WIDTH <= size; i += WIDTH) {
        const Vec part = load(x + i);
        for (int r = 0; r < ROWS; r++) {
            if (FRESH) ask(rows[r] + i);
            sums[r] += load(rows[r] + i) * part;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        found[r] = sum(sums[r]);
        for (int64_t j = i; j < size; j++) found[r] += one(rows[r][j]) * x[j];
    }
}

// y += Σ scales[r] rows[r]
template <bool FRESH, class T>
inline void add_rows(float* y, const float scales[ROWS], const T* const rows[ROWS], int64_t size) {
    Vec factors[ROWS];
    for (int r = 0; r < ROWS; r++) factors[r] = broadcast(scales[r]);
    int64_t i = 0;
    for (; i + WIDTH <= size; i += WIDTH) {
        Vec found = load(y + i);
        for (int r = 0; r < ROWS; r++) {
            if (FRESH) ask(rows[r] + i);
            found += factors[r] * load(rows[r] + i);
        }
        store(y + i, found);
    }
    for (; i < size; i++)
        for (int r = 0; r < ROWS; r++) y[i] += scales[r] * one(rows[r][i]);
}

// e^x to float32's rounding for x <= 88: 2^n times a polynomial (Cephes' expf) of what is left within ln 2 / 2.
inline Vec exponential(Vec x) {
    const Vec low = broadcast(-87.0f);
    x = x < low ? low : x;
    const Vec scaled = x * 1.44269504088896341f + 0.5f;
    IntVec n = __builtin_convertvector(scaled, IntVec);
    n += (__builtin_convertvector(n, Vec) > scaled);  // towards minus infinity; a true comparison is -1
    const Vec whole = __builtin_convertvector(n, Vec);
    x = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vec p = broadcast(1.9875691500e-4f);
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * x * x + x + 1.0f;
    return p * (Vec)((n + 127) << 23);
}
