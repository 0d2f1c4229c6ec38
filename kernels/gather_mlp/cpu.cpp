// Some neurons of an MLP: a neuron's rows of gate, up and down are read once, one after the other, and every thread adds
// into an output of its own, so that a step costs what it reads.
#include <omp.h>

#include "../vectors.h"

enum Activation { SILU, GELU, GELU_TANH, RELU, IDENTITY };

static float activate(float x, int64_t activation) {
    switch (activation) {
        case SILU: return x / (1.0f + std::exp(-x));
        case GELU: return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
        case GELU_TANH: return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case RELU: return x < 0.0f ? 0.0f : x;
        default: return x;
    }
}

template <class T>
static void run(const float* x, int64_t batch, int64_t inputs, const int32_t* neurons, int64_t kept, const T* gate,
                int64_t gate_stride, const float* gate_bias, const float* gated, const T* up, int64_t up_stride,
                const float* up_bias, const T* down, int64_t down_stride, int64_t outputs, int64_t activation,
                float* partial, float* y, int64_t threads) {
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
            const int64_t count = kept - k < ROWS ? kept - k : ROWS;
            const T *up_rows[ROWS], *down_rows[ROWS], *gate_rows[ROWS];
            for (int r = 0; r < ROWS; r++) {  // the last rows stand in for those there are not, times zero
                const int64_t neuron = neurons[k + (r < count ? r : count - 1)];
                up_rows[r] = up + neuron * up_stride;
                down_rows[r] = down + neuron * down_stride;
                gate_rows[r] = gate ? gate + neuron * gate_stride : up_rows[r];
            }
            for (int64_t b = 0; b < batch; b++) {
                const float* input = x + b * inputs;
                float values[ROWS], gates[ROWS];
                dots<true>(up_rows, input, inputs, values);
                if (gate) dots<true>(gate_rows, input, inputs, gates);
                for (int r = 0; r < ROWS; r++) {
                    const int64_t place = k + (r < count ? r : count - 1);
                    if (up_bias) values[r] += up_bias[place];
                    if (gate)
                        values[r] *= activate(gates[r] + (gate_bias ? gate_bias[place] : 0.0f), activation);
                    else if (gated)
                        values[r] *= gated[b * kept + place];
                    else
                        values[r] = activate(values[r], activation);
                    if (r >= count) values[r] = 0.0f;
                }
                add_rows<true>(own + b * outputs, values, down_rows, outputs);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * outputs; i++)
            for (int t = 0; t < team; t++) y[i] += partial[int64_t(t) * batch * outputs + i];
    }
}

// y (batch, outputs) holds what is added to; biases hold the listed neurons' only; partial (threads, batch, outputs).
extern "C" void gather_mlp(int64_t half, const float* x, int64_t batch, int64_t inputs, const int32_t* neurons, int64_t kept,
                           const void* gate, int64_t gate_stride, const float* gate_bias, const float* gated,
                           const void* up, int64_t up_stride, const float* up_bias, const void* down,
                           int64_t down_stride, int64_t outputs, int64_t activation, float* partial, float* y, int64_t threads) {
    if (half)
        run(x, batch, inputs, neurons, kept, (const bfloat16*)gate, gate_stride, gate_bias, gated, (const bfloat16*)up,
            up_stride, up_bias, (const bfloat16*)down, down_stride, outputs, activation, partial, y, threads);
    else
        run(x, batch, inputs, neurons, kept, (const float*)gate, gate_stride, gate_bias, gated, (const float*)up,
            up_stride, up_bias, (const float*)down, down_stride, outputs, activation, partial, y, threads);
}
