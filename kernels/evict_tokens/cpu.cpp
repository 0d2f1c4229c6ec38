// What the rules of each segment keep, and the slots of evicted tokens filled with the last ones': a segment at a time,
// while its codes and scores are in the cache.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

constexpr int32_t PINNED = 1 << 30;
constexpr int64_t RULE = 6;  // numbers a rule has: evicts, seen, window, heavy, apart, normalize

struct Workspace {
    std::vector<uint32_t> order, left;
    std::vector<uint8_t> keep;
};

// A number that is greater where the score is; 0 for what is never chosen.
static uint32_t ordered(float score) {
    if (!std::isfinite(score)) return 0;
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof(bits));
    return bits >> 31 ? ~bits : bits | 1u << 31;
}

// The `rank` greatest of `numbers` (1 for the greatest), digit by digit; changes `numbers`, and `rank` to how many of
// those that are equal to it belong to them.
static uint32_t select(std::vector<uint32_t>& numbers, int64_t& rank) {
    uint32_t found = 0;
    for (int shift : {21, 10, 0}) {
        const uint32_t digits = shift ? 2048 : 1024;
        int64_t counts[2048] = {};
        for (uint32_t number : numbers) counts[number >> shift & (digits - 1)]++;
        uint32_t digit = digits - 1;
        while (counts[digit] < rank) rank -= counts[digit--];
        size_t size = 0;
        for (uint32_t number : numbers) {
            numbers[size] = number;
            size += (number >> shift & (digits - 1)) == digit;
        }
        numbers.resize(size);
        found |= digit << shift;
    }
    return found;
}

static void choose(const int64_t* rule, int64_t count, const int32_t* codes, const float* scores, Workspace& space) {
    const int64_t seen = rule[1], start = seen - rule[2];
    space.keep.resize(count);
    for (int64_t i = 0; i < count; i++)
        space.keep[i] = (codes[i] & PINNED) != 0 || (codes[i] & (PINNED - 1)) >= start;
    if (!scores || rule[3] <= 0) return;
    space.order.resize(count);
    space.left.clear();
    for (int64_t i = 0; i < count; i++) {
        const int64_t place = codes[i] & (PINNED - 1);
        const float score = rule[5] ? scores[i] / (float)std::max<int64_t>(seen - place, 1) : scores[i];
        space.order[i] = rule[4] && place >= start ? 0 : ordered(score);
        if (space.order[i]) space.left.push_back(space.order[i]);
    }
    int64_t equal = rule[3];
    const uint32_t least = equal < (int64_t)space.left.size() ? select(space.left, equal) : 0;
    for (int64_t i = 0; i < count; i++) {
        if (space.order[i] > least) space.keep[i] = 1;
        else if (least && space.order[i] == least && equal > 0) space.keep[i] = 1, equal--;
    }
}

// Segments lie `capacity` slots apart. `scores` may be null. `lengths` is read and written.
extern "C" void evict_tokens(int64_t segments, int64_t capacity, const int64_t* rules, char* keys, int64_t key_bytes,
                             char* values, int64_t value_bytes, int32_t* codes, float* scores, int64_t* lengths,
                             int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Workspace space;
#pragma omp for schedule(static)
        for (int64_t s = 0; s < segments; s++) {
            if (!rules[s * RULE]) continue;
            const int64_t base = s * capacity, count = lengths[s];
            choose(rules + s * RULE, count, codes + base, scores ? scores + base : nullptr, space);
            int64_t left = 0;
            for (int64_t i = 0; i < count; i++) left += space.keep[i];
            for (int64_t to = 0, from = left; to < left; to++) {
                if (space.keep[to]) continue;
                while (!space.keep[from]) from++;
                std::memcpy(keys + (base + to) * key_bytes, keys + (base + from) * key_bytes, key_bytes);
                std::memcpy(values + (base + to) * value_bytes, values + (base + from) * value_bytes, value_bytes);
                codes[base + to] = codes[base + from];
                if (scores) scores[base + to] = scores[base + from];
                from++;
            }
            if (scores) std::fill(scores + base + left, scores + base + count, 0.0f);
            lengths[s] = left;
        }
    }
}
