// Some outputs of a linear layer, or the share of some of its inputs: only the rows that are listed are read.
#include <omp.h>

#include "../vectors.h"

static int64_t last_row(int64_t k, int r, int64_t kept) { return k + r < kept ? k + r : kept - 1; }

template <class T>
static void outputs_of(const float* x, int64_t batch, int64_t inputs, const int32_t* index, int64_t kept, const T* weight,
                       int64_t stride, float* y, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t k = 0; k < kept; k += ROWS) {
        const T* rows[ROWS];
        for (int r = 0; r < ROWS; r++) rows[r] = weight + index[last_row(k, r, kept)] * stride;
        for (int64_t b = 0; b < batch; b++) {
            float found[ROWS];
            dots<true>(rows, x + b * inputs, inputs, found);
            for (int r = 0; r < ROWS && k + r < kept; r++) y[b * kept + k + r] = found[r];
        }
    }
}

template <class T>
static void inputs_of(const float* values, int64_t batch, const int32_t* index, int64_t kept, const T* weight,
                      int64_t stride, int64_t outputs, float* partial, float* y, int64_t threads) {
    int team = 1;
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num();
#pragma omp single
        team = omp_get_num_threads();
        float* own = partial + int64_t(thread) * batch * outputs;
        std::memset(own, 0, sizeof(float) * batch * outputs);
#pragma omp for schedule(static)
        for (int64_t k = 0; k < kept; k += ROWS) {
            const T* rows[ROWS];
            for (int r = 0; r < ROWS; r++) rows[r] = weight + index[last_row(k, r, kept)] * stride;
            for (int64_t b = 0; b < batch; b++) {
                float scales[ROWS];
                for (int r = 0; r < ROWS; r++) scales[r] = k + r < kept ? values[b * kept + k + r] : 0.0f;
                add_rows<true>(own + b * outputs, scales, rows, outputs);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * outputs; i++)
            for (int t = 0; t < team; t++) y[i] += partial[int64_t(t) * batch * outputs + i];
    }
}

// y (batch, kept), y[b, k] = weight[index[k]] · x[b]
extern "C" void some_outputs(int64_t half, const float* x, int64_t batch, int64_t inputs, const int32_t* index,
                             int64_t kept, const void* weight, int64_t stride, float* y, int64_t threads) {
    if (half)
        outputs_of(x, batch, inputs, index, kept, (const bfloat16*)weight, stride, y, threads);
    else
        outputs_of(x, batch, inputs, index, kept, (const float*)weight, stride, y, threads);
}

// y (batch, outputs) += Σ values[b, k] weight[index[k]]; partial (threads, batch, outputs)
extern "C" void some_inputs(int64_t half, const float* values, int64_t batch, const int32_t* index, int64_t kept,
                            const void* weight, int64_t stride, int64_t outputs, float* partial, float* y,
                            int64_t threads) {
    if (half)
        inputs_of(values, batch, index, kept, (const bfloat16*)weight, stride, outputs, partial, y, threads);
    else
        inputs_of(values, batch, index, kept, (const float*)weight, stride, outputs, partial, y, threads);
}
