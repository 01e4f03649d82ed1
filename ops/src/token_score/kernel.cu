// TokenScore in two launches: `receive` adds up what each key receives from some queries of a head, `mean` averages.
// mod.rs says what the operator means, cuda.rs what is launched.
//
// Scores are computed twice, once for the softmax's maximum and sum, once for its weights, so that no row of them need
// be stored. They are kept times log2(e), so that weights are powers of two.
#include "common.cuh"

// As `ScoreArguments` in cuda.rs.
struct Score {
    const void* q;
    const void* k;
    const float* size;
    float* score;
    float* received; // [B, heads, parts, M]
    i64 count;       // keys of all images
    int queries, keys, chosen, heads, head_dim;
    int q_width, q_at, k_width, k_at;
    int parts; // blocks for each head
    float scale;
    int wide; // the rows of each head can be read in pieces of 16 bytes
};

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int GROUP = 4; // queries that share the reading of keys
constexpr float LOG2_E = 1.44269504088896341f;

struct Softmax {
    float top, sum; // the sum of weights relative to the largest score
};

// Below all scores that are finite, and finite itself: the difference to minus infinity is a number.
DEVICE float lowest() { return bits_to_float(0xff7fffffu); }

// Scores of a key for a group of queries.
template <class T, int WIDTH>
DEVICE void score_key(const Score& p, float (&scores)[GROUP], const T* const (&queries)[GROUP], const T* key) {
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        scores[g] = 0;
    }
#pragma unroll 2
    for (int d = 0; d < p.head_dim; d += WIDTH) {
        float of_key[WIDTH];
        load<WIDTH>(of_key, key + d);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float of_query[WIDTH];
            load<WIDTH>(of_query, queries[g] + d);
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                scores[g] = fmaf(of_query[i], of_key[i], scores[g]);
            }
        }
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        scores[g] *= p.scale * LOG2_E;
    }
}

// A block has every `parts`-th group of the queries of a head, and its threads the same keys in each.
template <class T, int WIDTH> DEVICE void receive(const Score& p) {
    int unit = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
    int image = unit / p.heads, head = unit % p.heads;
    const T* q = static_cast<const T*>(p.q) + i64(image) * p.queries * p.q_width + p.q_at + i64(head) * p.head_dim;
    const T* k = static_cast<const T*>(p.k) + i64(image) * p.keys * p.k_width + p.k_at + i64(head) * p.head_dim;
    const float* size = p.size + i64(image) * p.keys;
    float* received = p.received + i64(blockIdx.x) * p.keys;
    Softmax* of_warps = reinterpret_cast<Softmax*>(shared_memory());

#pragma unroll 1
    for (int first = part * GROUP; first < p.chosen; first += p.parts * GROUP) {
        // Behind the last query there is the last once more, which then does not count.
        const T* queries[GROUP];
        int count = min(GROUP, p.chosen - first);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            queries[g] = q + i64(first + min(g, count - 1)) * p.q_width;
        }
        float scores[GROUP];
        Softmax own[GROUP];
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            own[g] = {lowest(), 0};
        }
#pragma unroll 1
        for (int key = threadIdx.x; key < p.keys; key += THREADS) {
            score_key<T, WIDTH>(p, scores, queries, k + i64(key) * p.k_width);
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float top = fmaxf(own[g].top, scores[g]);
                own[g].sum = own[g].sum * exp2_fast(own[g].top - top) + size[key] * exp2_fast(scores[g] - top);
                own[g].top = top;
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float top = warp_max(own[g].top);
            float sum = warp_sum(own[g].sum * exp2_fast(own[g].top - top));
            if (lane_id() == 0) {
                of_warps[warp_id() * GROUP + g] = {top, sum};
            }
        }
        __syncthreads();
        float factor[GROUP];
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            own[g] = of_warps[g];
            for (int warp = 1; warp < WARPS; warp++) {
                own[g].top = fmaxf(own[g].top, of_warps[warp * GROUP + g].top);
            }
            own[g].sum = 0;
            for (int warp = 0; warp < WARPS; warp++) {
                Softmax other = of_warps[warp * GROUP + g];
                own[g].sum += other.sum * exp2_fast(other.top - own[g].top);
            }
            factor[g] = 1 / own[g].sum;
        }
        __syncthreads();
#pragma unroll 1
        for (int key = threadIdx.x; key < p.keys; key += THREADS) {
            score_key<T, WIDTH>(p, scores, queries, k + i64(key) * p.k_width);
            float sum = 0;
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                sum += g < count ? exp2_fast(scores[g] - own[g].top) * factor[g] : 0;
            }
            received[key] = size[key] * sum + (first == part * GROUP ? 0 : received[key]);
        }
    }
}

template <class T> DEVICE void receive_of(const Score& p) {
    if (p.wide) {
        receive<T, WIDE<T>>(p);
    } else {
        receive<T, 1>(p);
    }
}

KERNEL(score_receive_f32, Score, THREADS) { receive_of<float>(arguments); }
KERNEL(score_receive_f16, Score, THREADS) { receive_of<f16>(arguments); }
KERNEL(score_receive_bf16, Score, THREADS) { receive_of<bf16>(arguments); }

KERNEL(score_mean, Score, THREADS) {
    const Score& p = arguments;
    i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= p.count) {
        return;
    }
    int rows = p.heads * p.parts;
    const float* received = p.received + i / p.keys * rows * p.keys + i % p.keys;
    float sum = 0;
#pragma unroll 4
    for (int row = 0; row < rows; row++) {
        sum += received[i64(row) * p.keys];
    }
    p.score[i] = sum / (float(p.heads) * float(p.chosen));
}
