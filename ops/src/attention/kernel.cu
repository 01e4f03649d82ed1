// Attention and ProportionalAttention in one launch, without the scores ever being in global memory.
// mod.rs says what the operators mean, cuda.rs what is launched.
//
// A block takes some queries of one head and walks over the keys, tile by tile, with the softmax of what it has seen
// so far: `top` is the largest score, `sum` the sum of weights relative to it, and what is mixed is scaled anew when a
// larger one comes. Scores are kept times log2(e), so that weights are powers of two. The size of a key is added as its
// logarithm: as the mean of a slot counts, and no weight is above one, whatever the sizes, which float16 needs. Keys
// behind the last have size zero.
#include "common.cuh"

// As `AttentionArguments` in cuda.rs.
struct Attention {
    const void* q;
    const void* k;
    const void* v;
    const float* size; // null: all one
    void* y;
    int queries, keys, heads, head_dim;
    int q_width, q_at, k_width, k_at, v_width, v_at;
    float scale;
    int wide;  // the rows of each head can be moved in pieces of 16 bytes
    int tiles; // of queries
};

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
constexpr float LOG2_E = 1.44269504088896341f;

// The heads of one image and head: row i begins at `data + i * width`.
template <class T> struct Rows {
    const T* data;
    int width, count, dim;
};

template <class T>
DEVICE Rows<T> rows_of(const void* data, int image, int head, int count, int width, int at, int dim) {
    return {static_cast<const T*>(data) + i64(image) * count * width + at + i64(head) * dim, width, count, dim};
}

// How often a key counts; its logarithm is added to scores.
DEVICE float size_of(const Attention& p, int image, int key) {
    return key >= p.keys ? 0 : p.size ? p.size[i64(image) * p.keys + key] : 1;
}

// ------------------------------------------------------------------------------------------------------- tensor cores

// What differs between types: how matrices come from shared memory into the registers of a warp, and are multiplied.
// A warp has 16 queries. Lane l has rows l / 4 and l / 4 + 8 of scores, weights and results, and of each eight columns
// the two from 2 (l % 4) on: `[column / 8][2 * (row >= 8) + column % 2]`.
template <class T> struct Matrices;

// What float16 and bfloat16 have in common: steps of 16 channels, or of 16 keys.
template <class T> struct Matrices16 {
    static constexpr int STEP = 16; // channels of queries in one fragment
    static constexpr int KEYS = 64; // of a tile

    // One of two elements that `pack` made of floats.
    METHOD static T part(u32 pair, int i) { return {u16(pair >> 16 * i)}; }

    template <int STRIDE> METHOD static void load_queries(u32 (&to)[4], const T* tile, int step) {
        load_matrices(to, shared_address(tile + lane_id() % 16 * STRIDE + lane_id() / 16 * 8) + step * STEP * 2);
    }

    template <int STRIDE, int STEPS>
    METHOD static void score(float (&scores)[KEYS / 8][4], const u32 (&queries)[STEPS][4], const T* tile) {
        int key = lane_id() / 16 * 8 + lane_id() % 8;
        SharedAddress row = shared_address(tile + key * STRIDE + lane_id() / 8 % 2 * 8);
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                u32 keys[4];
                load_matrices(keys, row + (n * 16 * STRIDE + step * STEP) * 2);
                Matrices<T>::multiply(scores[2 * n], queries[step], keys[0], keys[1]);
                Matrices<T>::multiply(scores[2 * n + 1], queries[step], keys[2], keys[3]);
            }
        }
    }

    template <int STRIDE, int D>
    METHOD static void mix(float (&mixed)[D / 8][4], const float (&weights)[KEYS / 8][4], const T* tile) {
        SharedAddress row = shared_address(tile + lane_id() % 16 * STRIDE + lane_id() / 16 * 8);
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            const float(&low)[4] = weights[2 * step];
            const float(&high)[4] = weights[2 * step + 1];
            u32 a[4] = {Matrices<T>::pack(low[0], low[1]), Matrices<T>::pack(low[2], low[3]),
                        Matrices<T>::pack(high[0], high[1]), Matrices<T>::pack(high[2], high[3])};
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                u32 values[4];
                load_matrices_transposed(values, row + (step * 16 * STRIDE + n * 16) * 2);
                Matrices<T>::multiply(mixed[2 * n], a, values[0], values[1]);
                Matrices<T>::multiply(mixed[2 * n + 1], a, values[2], values[3]);
            }
        }
    }

};

template <> struct Matrices<f16> : Matrices16<f16> {
    METHOD static u32 pack(float low, float high) { return float_to_half(low) | u32(float_to_half(high)) << 16; }
    METHOD static void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if ARCH >= 800
        multiply_f16_k16(sum, a, b0, b1);
#else
        multiply_f16_k8(sum, a[0], a[1], b0);
        multiply_f16_k8(sum, a[2], a[3], b1);
#endif
    }
};

#if ARCH >= 800

template <> struct Matrices<bf16> : Matrices16<bf16> {
    METHOD static u32 pack(float low, float high) { return floats_to_bfloats(low, high); }
    METHOD static void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        multiply_bf16_k16(sum, a, b0, b1);
    }
};

// float32 as the sum of two TF32 numbers of 11 bits each, and a product as that of the parts but for the smallest: as
// good as float32 to about 2^-21.
template <> struct Matrices<float> {
    static constexpr int STEP = 8;
    static constexpr int KEYS = 32;

    struct alignas(8) Pair {
        float at[2];
    };

    METHOD static Pair pack(float low, float high) { return {{low, high}}; }
    METHOD static float part(Pair pair, int i) { return pair.at[i]; }

    struct Split {
        u32 high, low;
    };

    METHOD static Split split(float value) {
        u32 high = (float_to_bits(value) + 0x1000u) & ~0x1fffu;
        return {high, float_to_bits(value - bits_to_float(high))};
    }

    METHOD static void multiply(float (&sum)[4], const Split (&a)[4], Split b0, Split b1) {
        u32 high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
        u32 low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
        multiply_tf32_k8(sum, low, b0.high, b1.high);
        multiply_tf32_k8(sum, high, b0.low, b1.low);
        multiply_tf32_k8(sum, high, b0.high, b1.high);
    }

    template <int STRIDE> METHOD static void load_queries(u32 (&to)[4], const float* tile, int step) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = lane_id() / 4 + 8 * (i % 2), channel = step * STEP + lane_id() % 4 + 4 * (i / 2);
            to[i] = float_to_bits(tile[row * STRIDE + channel]);
        }
    }

    template <int STRIDE, int STEPS>
    METHOD static void score(float (&scores)[KEYS / 8][4], const u32 (&queries)[STEPS][4], const float* tile) {
        const float* row = tile + lane_id() / 4 * STRIDE + lane_id() % 4;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            Split a[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[i] = split(bits_to_float(queries[step][i]));
            }
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                const float* from = row + n * 8 * STRIDE + step * STEP;
                multiply(scores[n], a, split(from[0]), split(from[4]));
            }
        }
    }

    // A product does not depend on the order of keys: the multiplication's columns c and c + 4 stand for keys 2 c and
    // 2 c + 1, so that weights are where it wants them.
    template <int STRIDE, int D>
    METHOD static void mix(float (&mixed)[D / 8][4], const float (&weights)[KEYS / 8][4], const float* tile) {
        const float* row = tile + lane_id() % 4 * 2 * STRIDE + lane_id() / 4;
#pragma unroll
        for (int step = 0; step < KEYS / 8; step++) {
            const float(&w)[4] = weights[step];
            Split a[4] = {split(w[0]), split(w[2]), split(w[1]), split(w[3])};
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const float* from = row + step * 8 * STRIDE + n * 8;
                multiply(mixed[n], a, split(from[0]), split(from[STRIDE]));
            }
        }
    }
};

#endif

#if ARCH < 800
// Copies at once; waiting is for the block's barrier.
DEVICE void copy_async(void* to, const void* from, bool zeros) {
    *static_cast<Quad*>(to) = zeros ? Quad{} : *static_cast<const Quad*>(from);
}
DEVICE void copy_async_commit() {}
template <int LATEST> DEVICE void copy_async_wait() {}
#endif

// Begins to copy the rows from `first` on to shared memory, as one group. What there is none of becomes zeros.
template <class T, int D, int STRIDE, int ROWS>
DEVICE void begin_copy(T* tile, const Rows<T>& rows, int first, bool in_pieces) {
    if (in_pieces) {
        constexpr int PIECES = D / WIDE<T>;
        // Where copies wait for what they read, several should.
        [[maybe_unused]] constexpr int AT_ONCE = ARCH >= 800 ? 1 : 4;
#pragma unroll AT_ONCE
        for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
            int row = i / PIECES, channel = i % PIECES * WIDE<T>;
            bool zeros = first + row >= rows.count || channel >= rows.dim;
            const T* from = zeros ? rows.data : rows.data + i64(first + row) * rows.width + channel;
            copy_async(tile + row * STRIDE + channel, from, zeros);
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
            int row = i / D, channel = i % D;
            bool zeros = first + row >= rows.count || channel >= rows.dim;
            tile[row * STRIDE + channel] = zeros ? T{} : rows.data[i64(first + row) * rows.width + channel];
        }
    }
    copy_async_commit();
}

// Attention with heads of up to D channels, each warp 16 queries.
template <class T, int D> DEVICE void attention(const Attention& p) {
    using M = Matrices<T>;
    constexpr int QUERIES = 16 * WARPS, KEYS = M::KEYS, STEPS = D / M::STEP;
    // Rows are one access of 16 bytes longer than they need to be: then those of a matrix lie in different banks.
    constexpr int STRIDE = D + WIDE<T>;
    static_assert(QUERIES <= 2 * KEYS);
    T* k_tile = reinterpret_cast<T*>(shared_memory());
    T* v_tile = k_tile + KEYS * STRIDE;
    float* bias = reinterpret_cast<float*>(v_tile + KEYS * STRIDE);

    int tile = blockIdx.x % p.tiles, head = blockIdx.x / p.tiles % p.heads, image = blockIdx.x / p.tiles / p.heads;
    Rows<T> q = rows_of<T>(p.q, image, head, p.queries, p.q_width, p.q_at, p.head_dim);
    Rows<T> k = rows_of<T>(p.k, image, head, p.keys, p.k_width, p.k_at, p.head_dim);
    Rows<T> v = rows_of<T>(p.v, image, head, p.keys, p.v_width, p.v_at, p.head_dim);
    int first = tile * QUERIES, row = lane_id() / 4, column = lane_id() % 4 * 2;

    // Queries pass through the memory of both tiles into registers.
    u32 queries[STEPS][4];
    begin_copy<T, D, STRIDE, QUERIES>(k_tile, q, first, p.wide);
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        M::template load_queries<STRIDE>(queries[step], k_tile + warp_id() * 16 * STRIDE, step);
    }
    __syncthreads();

    float mixed[D / 8][4] = {};
    float top[2] = {-infinite(), -infinite()}, sum[2] = {0, 0};
    float scale = p.scale * LOG2_E;
    begin_copy<T, D, STRIDE, KEYS>(k_tile, k, 0, p.wide);
    float size = size_of(p, image, threadIdx.x); // for the next tile, by the first threads
    for (int start = 0; start < p.keys; start += KEYS) {
        if (threadIdx.x < KEYS) {
            bias[threadIdx.x] = log2f(size);
        }
        copy_async_wait<0>();
        __syncthreads(); // the keys are there, and nobody needs the values before
        begin_copy<T, D, STRIDE, KEYS>(v_tile, v, start, p.wide);

        float scores[KEYS / 8][4] = {};
        M::template score<STRIDE, STEPS>(scores, queries, k_tile);
        __syncthreads(); // nobody needs the keys
        begin_copy<T, D, STRIDE, KEYS>(k_tile, k, start + KEYS, p.wide);
        size = size_of(p, image, start + KEYS + threadIdx.x);

        float highest[2] = {top[0], top[1]}, base[2], shrink[2];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[n][i] = fmaf(scores[n][i], scale, bias[n * 8 + column + i % 2]);
                highest[i / 2] = fmaxf(highest[i / 2], scores[n][i]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            highest[half] = fmaxf(highest[half], __shfl_xor_sync(ALL, highest[half], 1));
            highest[half] = fmaxf(highest[half], __shfl_xor_sync(ALL, highest[half], 2));
            // Without any size above zero so far there is nothing to be relative to.
            base[half] = highest[half] == -infinite() ? 0 : highest[half];
            shrink[half] = exp2_fast(top[half] - base[half]);
            top[half] = highest[half];
            sum[half] *= shrink[half];
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[n][i] = exp2_fast(scores[n][i] - base[i / 2]);
                sum[i / 2] += scores[n][i];
            }
        }
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                mixed[n][i] *= shrink[i / 2];
            }
        }

        copy_async_wait<1>();
        __syncthreads(); // the values are there
        M::template mix<STRIDE, D>(mixed, scores, v_tile);
    }
    copy_async_wait<0>();

#pragma unroll
    for (int half = 0; half < 2; half++) {
        sum[half] += __shfl_xor_sync(ALL, sum[half], 1);
        sum[half] += __shfl_xor_sync(ALL, sum[half], 2);
        float share = 1 / sum[half];
        int query = first + warp_id() * 16 + row + half * 8;
        if (query < p.queries) {
            T* y = static_cast<T*>(p.y) + ((i64(image) * p.queries + query) * p.heads + head) * p.head_dim;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                int channel = n * 8 + column;
                auto pair = M::pack(mixed[n][half * 2] * share, mixed[n][half * 2 + 1] * share);
                if (p.wide) {
                    if (channel < p.head_dim) {
                        *reinterpret_cast<decltype(pair)*>(y + channel) = pair;
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        if (channel + i < p.head_dim) {
                            y[channel + i] = M::part(pair, i);
                        }
                    }
                }
            }
        }
    }
}

#define ATTENTION(type, dim)                                                                                           \
    KERNEL(attention_##type##_##dim, Attention, THREADS) { attention<type, dim>(arguments); }

using f32 = float;
ATTENTION(f16, 64)
ATTENTION(f16, 80)
ATTENTION(f16, 96)
ATTENTION(f16, 128)
#if ARCH >= 800
ATTENTION(bf16, 64)
ATTENTION(bf16, 80)
ATTENTION(bf16, 96)
ATTENTION(bf16, 128)
ATTENTION(f32, 64)
ATTENTION(f32, 80)
ATTENTION(f32, 128)
#endif

// -------------------------------------------------------------------------------------------------------------- plain

// For what has no kernel above: types that tensor cores do not take, and wide heads. A block has 16 queries of one head
// and 128 channels of their results; a warp has four of the queries, a lane one key of a tile for the scores, and four
// channels for the results.
constexpr int PLAIN_QUERIES = 4; // of a warp
constexpr int PLAIN_PARTS = 4;   // channels of results of a lane
constexpr int PLAIN_CHANNELS = 64; // of keys that are in shared memory at once

struct PlainMemory {
    Float4 queries[WARPS][PLAIN_CHANNELS]; // four queries, channel by channel
    Float4 weights[WARPS][WARP];           // four queries, key by key
    float keys[WARP][PLAIN_CHANNELS + 1];  // a column lies in different banks
};

template <class T> DEVICE void plain(const Attention& p) {
    constexpr int CHANNELS = WARP * PLAIN_PARTS;
    PlainMemory& memory = *reinterpret_cast<PlainMemory*>(shared_memory());
    int groups = (p.head_dim + CHANNELS - 1) / CHANNELS;
    int group = blockIdx.x % groups, rest = blockIdx.x / groups;
    int tile = rest % p.tiles, head = rest / p.tiles % p.heads, image = rest / p.tiles / p.heads;
    Rows<T> q = rows_of<T>(p.q, image, head, p.queries, p.q_width, p.q_at, p.head_dim);
    Rows<T> k = rows_of<T>(p.k, image, head, p.keys, p.k_width, p.k_at, p.head_dim);
    Rows<T> v = rows_of<T>(p.v, image, head, p.keys, p.v_width, p.v_at, p.head_dim);
    int first = (tile * WARPS + warp_id()) * PLAIN_QUERIES, lane = lane_id();
    Float4* queries = memory.queries[warp_id()];
    Float4* weights = memory.weights[warp_id()];

    float mixed[PLAIN_QUERIES][PLAIN_PARTS] = {};
    float top[PLAIN_QUERIES], sum[PLAIN_QUERIES] = {};
#pragma unroll
    for (int i = 0; i < PLAIN_QUERIES; i++) {
        top[i] = -infinite();
    }
    float scale = p.scale * LOG2_E;
    for (int start = 0; start < p.keys; start += WARP) {
        float score[PLAIN_QUERIES] = {};
        for (int chunk = 0; chunk < p.head_dim; chunk += PLAIN_CHANNELS) {
            __syncthreads();
            for (int i = threadIdx.x; i < WARP * PLAIN_CHANNELS; i += THREADS) {
                int key = i / PLAIN_CHANNELS, channel = i % PLAIN_CHANNELS;
                bool there = start + key < k.count && chunk + channel < k.dim;
                memory.keys[key][channel] = there ? to_float(k.data[i64(start + key) * k.width + chunk + channel]) : 0;
            }
            for (int i = lane; i < PLAIN_QUERIES * PLAIN_CHANNELS; i += WARP) {
                int query = i / PLAIN_CHANNELS, channel = i % PLAIN_CHANNELS;
                bool there = first + query < q.count && chunk + channel < q.dim;
                float value = there ? to_float(q.data[i64(first + query) * q.width + chunk + channel]) : 0;
                queries[channel].at[query] = value;
            }
            __syncthreads();
            int channels = min(PLAIN_CHANNELS, p.head_dim - chunk);
#pragma unroll 4
            for (int channel = 0; channel < channels; channel++) {
                Float4 query = queries[channel];
                float key = memory.keys[lane][channel];
#pragma unroll
                for (int i = 0; i < PLAIN_QUERIES; i++) {
                    score[i] = fmaf(query.at[i], key, score[i]);
                }
            }
        }

        float bias = log2f(size_of(p, image, start + lane));
        Float4 weight;
#pragma unroll
        for (int i = 0; i < PLAIN_QUERIES; i++) {
            float scaled = fmaf(score[i], scale, bias);
            float highest = fmaxf(top[i], warp_max(scaled));
            float base = highest == -infinite() ? 0 : highest;
            float shrink = exp2_fast(top[i] - base);
            top[i] = highest;
            weight.at[i] = exp2_fast(scaled - base);
            sum[i] = fmaf(sum[i], shrink, weight.at[i]);
#pragma unroll
            for (int part = 0; part < PLAIN_PARTS; part++) {
                mixed[i][part] *= shrink;
            }
        }
        weights[lane] = weight; // nobody needs the last ones: there has been a barrier
        __syncwarp();
        int keys = min(WARP, p.keys - start);
#pragma unroll 2
        for (int key = 0; key < keys; key++) {
            const T* value = v.data + i64(start + key) * v.width;
            Float4 weight = weights[key];
#pragma unroll
            for (int part = 0; part < PLAIN_PARTS; part++) {
                int channel = group * CHANNELS + part * WARP + lane;
                if (channel < v.dim) {
                    float of = to_float(value[channel]);
#pragma unroll
                    for (int i = 0; i < PLAIN_QUERIES; i++) {
                        mixed[i][part] = fmaf(weight.at[i], of, mixed[i][part]);
                    }
                }
            }
        }
    }

#pragma unroll
    for (int i = 0; i < PLAIN_QUERIES; i++) {
        float total = warp_sum(sum[i]);
        T* y = static_cast<T*>(p.y) + ((i64(image) * p.queries + first + i) * p.heads + head) * p.head_dim;
#pragma unroll
        for (int part = 0; part < PLAIN_PARTS; part++) {
            int channel = group * CHANNELS + part * WARP + lane;
            if (first + i < p.queries && channel < p.head_dim) {
                y[channel] = from_float<T>(mixed[i][part] / total);
            }
        }
    }
}

KERNEL(attention_f32_plain, Attention, THREADS) { plain<float>(arguments); }
KERNEL(attention_f16_plain, Attention, THREADS) { plain<f16>(arguments); }
KERNEL(attention_bf16_plain, Attention, THREADS) { plain<bf16>(arguments); }
