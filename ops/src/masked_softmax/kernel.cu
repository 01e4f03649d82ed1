// MaskedSoftmax: a warp for each row. mod.rs says what the operator means, cuda.rs what is launched.
//
// A row is read three times, for its peak, its sum and its weights; the first cache has it from the second time on.
#include "common.cuh"

// As `SoftmaxArguments` in cuda.rs.
struct Softmax {
    const void* scores;
    const float* mask;
    const float* size;
    void* weights;
    i64 rows; // of all heads of all images
    int heads, queries, keys;
    float eps;
};

constexpr int THREADS = 256;
constexpr float LOG2_E = 1.44269504088896341f;

template <class T> DEVICE void softmax_of(const Softmax& p) {
    i64 row = i64(blockIdx.x) * (THREADS / WARP) + warp_id();
    if (row >= p.rows) {
        return;
    }
    i64 image = row / p.queries / p.heads;
    const T* scores = static_cast<const T*>(p.scores) + row * p.keys;
    const float* mask = p.mask + (image * p.queries + row % p.queries) * p.keys;
    const float* size = p.size + image * p.keys;
    T* weights = static_cast<T*>(p.weights) + row * p.keys;

    auto sized = [&](int key) { return to_float(scores[key]) + logf(size[key]); };
    float peak = -3.402823466e38f; // finite, so that a row of nothing but −∞ has a difference
    for (int key = lane_id(); key < p.keys; key += WARP) {
        peak = fmaxf(peak, sized(key));
    }
    peak = warp_max(peak);

    auto open = [&](int key) { return exp2_fast((sized(key) - peak) * LOG2_E) * mask[key]; };
    float total = 0;
    for (int key = lane_id(); key < p.keys; key += WARP) {
        total += open(key);
    }
    total = warp_sum(total) + p.eps;

    float share = p.eps / p.keys;
    for (int key = lane_id(); key < p.keys; key += WARP) {
        weights[key] = from_float<T>((open(key) + share) / total);
    }
}

KERNEL(masked_softmax_f32, Softmax, THREADS) { softmax_of<float>(arguments); }
KERNEL(masked_softmax_f16, Softmax, THREADS) { softmax_of<f16>(arguments); }
KERNEL(masked_softmax_bf16, Softmax, THREADS) { softmax_of<bf16>(arguments); }
