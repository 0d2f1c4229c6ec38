// Attention of one query a head to ragged keys and values. Segments are cut into pieces of equal cost, so that one long
// head keeps all threads busy; each piece leaves its largest score, its sum and its weighted values, and those of a
// segment are put together at the end (Flash-Decoding).
#include <algorithm>
#include <vector>

#include "../vectors.h"

constexpr int64_t PIECE = 256;  // tokens: the scores of a group stay in the first cache

struct Piece {
    int64_t segment, begin, count;
};

template <class T>
static void attend(const Piece& piece, const float* q, int64_t group, int64_t size, const T* k, int64_t k_stride,
                   const T* v, int64_t v_stride, float scale, float* scores, float* partial, float* received) {
    const int64_t padded = (piece.count + ROWS - 1) / ROWS * ROWS;
    for (int64_t t = 0; t < padded; t += ROWS) {
        const T* rows[ROWS];
        for (int r = 0; r < ROWS; r++)
            rows[r] = k + (piece.begin + std::min(t + r, piece.count - 1)) * k_stride;
        for (int64_t g = 0; g < group; g++) {
            float* found = scores + g * PIECE + t;
            g ? dots<false>(rows, q + g * size, size, found) : dots<true>(rows, q, size, found);
            for (int r = 0; r < ROWS; r++)
                found[r] = t + r < piece.count ? found[r] * scale : -INFINITY;
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float* own = scores + g * PIECE;
        float* out = partial + g * (size + 2);
        const float largest = *std::max_element(own, own + piece.count);
        float total = 0;
        int64_t t = 0;
        for (; t + WIDTH <= piece.count; t += WIDTH) {
            const Vec weight = exponential(load(own + t) - largest);
            store(own + t, weight);
            total += sum(weight);
        }
        for (; t < piece.count; t++) total += own[t] = std::exp(own[t] - largest);
        for (; t < padded; t++) own[t] = 0.0f;
        std::memset(out, 0, sizeof(float) * size);
        out[size] = largest;
        out[size + 1] = total;
        if (received) std::memcpy(received + g * piece.count, own, sizeof(float) * piece.count);
    }
    for (int64_t t = 0; t < padded; t += ROWS) {
        const T* rows[ROWS];
        for (int r = 0; r < ROWS; r++)
            rows[r] = v + (piece.begin + std::min(t + r, piece.count - 1)) * v_stride;
        for (int64_t g = 0; g < group; g++) {
            float* out = partial + g * (size + 2);
            const float* weights = scores + g * PIECE + t;
            g ? add_rows<false>(out, weights, rows, size) : add_rows<true>(out, weights, rows, size);
        }
    }
}

template <class T>
static void run(const float* q, int64_t segments, int64_t group, int64_t size, const T* k, int64_t k_stride, const T* v,
                int64_t v_stride, const int32_t* offsets, const int32_t* lengths, float scale, float* y,
                float* received, int64_t threads) {
    std::vector<Piece> pieces;
    std::vector<int64_t> first(segments + 1, 0), before(segments + 1, 0);
    for (int64_t s = 0; s < segments; s++) {
        for (int64_t t = 0; t < lengths[s]; t += PIECE)
            pieces.push_back({s, offsets[s] + t, std::min<int64_t>(PIECE, lengths[s] - t)});
        first[s + 1] = pieces.size();
        before[s + 1] = before[s] + lengths[s] * group;
    }
    std::vector<float> weights(received ? before[segments] : 0);
    const int64_t wide = group * (size + 2);
    std::vector<float> partial(pieces.size() * wide);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(group * PIECE);
#pragma omp for schedule(static)
        for (int64_t p = 0; p < (int64_t)pieces.size(); p++)
            attend(pieces[p], q + pieces[p].segment * group * size, group, size, k, k_stride, v, v_stride, scale,
                   scores.data(), partial.data() + p * wide,
                   received ? weights.data() + before[pieces[p].segment] + (p - first[pieces[p].segment]) * PIECE * group
                            : nullptr);
#pragma omp for schedule(static)
        for (int64_t s = 0; s < segments; s++)
            for (int64_t g = 0; g < group; g++) {
                float* out = y + (s * group + g) * size;
                std::memset(out, 0, sizeof(float) * size);
                float largest = -INFINITY, total = 0;
                for (int64_t p = first[s]; p < first[s + 1]; p++)
                    largest = std::max(largest, partial[p * wide + g * (size + 2) + size]);
                for (int64_t p = first[s]; p < first[s + 1]; p++) {
                    const float* part = partial.data() + p * wide + g * (size + 2);
                    const float weight = std::exp(part[size] - largest);
                    total += weight * part[size + 1];
                    for (int64_t i = 0; i < size; i++) out[i] += weight * part[i];
                }
                if (first[s] < first[s + 1])
                    for (int64_t i = 0; i < size; i++) out[i] /= total;
                if (!received) continue;
                const float* own = weights.data() + before[s];
                for (int64_t p = first[s]; p < first[s + 1]; own += group * pieces[p++].count) {
                    const float share = std::exp(partial[p * wide + g * (size + 2) + size] - largest) / (total * group);
                    for (int64_t t = 0; t < pieces[p].count; t++)
                        received[pieces[p].begin + t] += share * own[g * pieces[p].count + t];
                }
            }
    }
}

// y (segments, group, size); a segment's keys and values are its first `length` rows from `offset` on. `received`, where
// it is not null, has a number for each row of k, to which the mean of its weights over the group is added.
extern "C" void decode_attention(int64_t half, const float* q, int64_t segments, int64_t group, int64_t size,
                                 const void* k, int64_t k_stride, const void* v, int64_t v_stride,
                                 const int32_t* offsets, const int32_t* lengths, float scale, float* y,
                                 float* received, int64_t threads) {
    if (half)
        run(q, segments, group, size, (const bfloat16*)k, k_stride, (const bfloat16*)v, v_stride, offsets, lengths,
            scale, y, received, threads);
    else
        run(q, segments, group, size, (const float*)k, k_stride, (const float*)v, v_stride, offsets, lengths, scale, y,
            received, threads);
}
