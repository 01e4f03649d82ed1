// TokenMerge in two launches, `match` and `reduce`; a third, `unit`, goes before them where there are many tokens.
// mod.rs says what the operator means, cuda.rs what is launched and what the scratch memory holds.
#include "common.cuh"

// As `MergeArguments` in cuda.rs.
struct Merge {
    const void* x;
    const void* metric;
    const float* size;
    void* y;
    float* size_out;
    i64* anchor;
    i64* leaving;
    i64* into;
    float* unit;  // [B, candidates, head_dim], or null: `match` makes unit rows itself
    u32* best;    // [B, count_a]: the similarity of each A token to its most similar B token, sortable
    u32* partner; // [B, count_a]: which one that is
    u32* order;   // a region of `region` words for each block of `reduce`, or null: shared memory
    int tokens, channels, protect, suffix, r;
    int heads, head_dim, width, at;
    int parts;  // blocks for each image
    int region; // words
    int wide;   // rows of x and y can be moved in pieces of 16 bytes

    METHOD int candidates() const { return tokens - protect - suffix; }
    METHOD int first_a() const { return protect + protect % 2; }
    METHOD int first_b() const { return protect + 1 - protect % 2; }
    METHOD int count_a() const { return (candidates() + 1 - protect % 2) / 2; }
    METHOD int count_b() const { return (candidates() + protect % 2) / 2; }
};

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;

// ---------------------------------------------------------------------------------------------------------- unit rows

// Channel `d` of the mean over heads of the metric row at `row`.
template <class S> DEVICE float mean_of_heads(const Merge& m, const S* row, int d) {
    float sum = 0;
#pragma unroll 4
    for (int h = 0; h < m.heads; h++) {
        sum += to_float(row[i64(h) * m.head_dim + d]);
    }
    return sum / m.heads;
}

DEVICE float guarded_norm(float squares) { return fmaxf(sqrtf(squares), 1e-12f); }

// Unit rows of all candidates, a warp for each. Sums run in the same order as in `fill_from_metric`: the same numbers.
template <class S> DEVICE void unit(const Merge& m) {
    int rows = m.candidates();
    int image = blockIdx.x / m.parts;
    int row = blockIdx.x % m.parts * WARPS + warp_id();
    if (row >= rows) {
        return;
    }
    const S* from = static_cast<const S*>(m.metric) + (i64(image) * m.tokens + m.protect + row) * m.width + m.at;
    float* to = m.unit + (i64(image) * rows + row) * m.head_dim;
    float squares = 0;
    for (int d = lane_id(); d < m.head_dim; d += WARP) {
        float mean = mean_of_heads(m, from, d);
        squares = fmaf(mean, mean, squares);
        to[d] = mean;
    }
    float norm = guarded_norm(warp_sum(squares));
    for (int d = lane_id(); d < m.head_dim; d += WARP) {
        to[d] /= norm;
    }
}

KERNEL(merge_unit_f32, Merge, THREADS) { unit<float>(arguments); }
KERNEL(merge_unit_f16, Merge, THREADS) { unit<f16>(arguments); }
KERNEL(merge_unit_bf16, Merge, THREADS) { unit<bf16>(arguments); }

// -------------------------------------------------------------------------------------------------------------- match

constexpr int TILE_A = 32;
constexpr int TILE_B = 64;
constexpr int MAX_DIM = 120; // of heads whose unit rows `match` makes itself: 96 rows fill 48 KiB
constexpr int CHUNK = 64;    // channels of prepared unit rows that are in shared memory at once
constexpr int LANES = 16;    // threads along B: each has 2 rows of A and 4 of B

// Tiles are rows of float32, `stride` quads apart: an odd number, so that the rows of a column lie in different banks.
DEVICE int tile_stride(int dim) { return (dim + 3) / 4 | 1; }

// Unit rows of the tokens `first`, `first + 2`, …; rows from `count` on are zero. A warp makes four rows at a time to
// have many loads under way.
template <class S>
DEVICE void fill_from_metric(const Merge& m, float* tile, int rows, int image, int first, int count, int stride) {
    constexpr int ROWS = 4, PARTS = (MAX_DIM + WARP - 1) / WARP;
    const S* metric = static_cast<const S*>(m.metric) + i64(image) * m.tokens * m.width + m.at;
    for (int row = warp_id() * ROWS; row < rows; row += WARPS * ROWS) {
        float mean[ROWS][PARTS] = {};
        const S* from[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            from[i] = metric + i64(first + 2 * min(row + i, count - 1)) * m.width;
        }
#pragma unroll 2
        for (int h = 0; h < m.heads; h++) {
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                int d = part * WARP + lane_id();
                if (d < m.head_dim) {
#pragma unroll
                    for (int i = 0; i < ROWS; i++) {
                        mean[i][part] += to_float(from[i][h * m.head_dim + d]);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            float squares = 0;
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                mean[i][part] /= m.heads;
                squares = fmaf(mean[i][part], mean[i][part], squares);
            }
            float norm = guarded_norm(warp_sum(squares));
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                int d = part * WARP + lane_id();
                if (d < 4 * stride) {
                    tile[(row + i) * 4 * stride + d] = row + i < count ? mean[i][part] / norm : 0;
                }
            }
        }
    }
}

// The channels from `chunk` on of prepared unit rows.
DEVICE void fill_from_unit(const Merge& m, float* tile, int rows, int image, int first, int count, int stride,
                           int chunk) {
    const float* unit = m.unit + i64(image) * m.candidates() * m.head_dim + chunk;
    for (int row = warp_id(); row < rows; row += WARPS) {
        const float* from = unit + i64(first - m.protect + 2 * row) * m.head_dim;
        for (int d = lane_id(); d < 4 * stride; d += WARP) {
            tile[row * 4 * stride + d] = row < count && d < CHUNK && chunk + d < m.head_dim ? from[d] : 0;
        }
    }
}

// The most similar B token of a tile of A tokens.
template <class S, bool PREPARED> DEVICE void match(const Merge& m) {
    int count_a = m.count_a(), count_b = m.count_b();
    int first_a = m.first_a(), first_b = m.first_b();
    int image = blockIdx.x / m.parts;
    int tile_a = blockIdx.x % m.parts * TILE_A;
    int stride = tile_stride(PREPARED ? min(m.head_dim, CHUNK) : m.head_dim);
    float* a = reinterpret_cast<float*>(shared_memory());
    float* b = a + TILE_A * 4 * stride;
    int in_a = threadIdx.x / LANES, in_b = threadIdx.x % LANES;

    u32 best[2] = {0, 0}; // below any similarity
    int partner[2] = {0, 0};
    for (int tile_b = 0; tile_b < count_b; tile_b += TILE_B) {
        float score[2][4] = {};
        for (int chunk = 0; chunk < m.head_dim; chunk += PREPARED ? CHUNK : MAX_DIM) {
            __syncthreads();
            int rows_a = count_a - tile_a, rows_b = count_b - tile_b;
            bool keeps_a = tile_b && m.head_dim <= (PREPARED ? CHUNK : MAX_DIM);
            if constexpr (PREPARED) {
                if (!keeps_a) {
                    fill_from_unit(m, a, TILE_A, image, first_a + 2 * tile_a, rows_a, stride, chunk);
                }
                fill_from_unit(m, b, TILE_B, image, first_b + 2 * tile_b, rows_b, stride, chunk);
            } else {
                if (!keeps_a) {
                    fill_from_metric<S>(m, a, TILE_A, image, first_a + 2 * tile_a, rows_a, stride);
                }
                fill_from_metric<S>(m, b, TILE_B, image, first_b + 2 * tile_b, rows_b, stride);
            }
            __syncthreads();
            const Float4* of_a = reinterpret_cast<const Float4*>(a) + in_a * stride;
            const Float4* of_b = reinterpret_cast<const Float4*>(b) + in_b * stride;
#pragma unroll 4
            for (int quad = 0; quad < stride; quad++) {
                Float4 left[2], right[4];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    left[i] = of_a[i * TILE_A / 2 * stride + quad];
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    right[j] = of_b[j * LANES * stride + quad];
                }
#pragma unroll
                for (int k = 0; k < 4; k++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            score[i][j] = fmaf(left[i].at[k], right[j].at[k], score[i][j]);
                        }
                    }
                }
            }
        }
        // A thread sees B tokens in rising order: only a larger similarity takes over.
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int candidate = tile_b + in_b + LANES * j;
                u32 key = sortable(score[i][j]);
                if (candidate < count_b && key > best[i]) {
                    best[i] = key;
                    partner[i] = candidate;
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int distance = LANES / 2; distance; distance /= 2) {
            u32 other_best = __shfl_xor_sync(ALL, best[i], distance);
            int other = __shfl_xor_sync(ALL, partner[i], distance);
            if (other_best > best[i] || (other_best == best[i] && other < partner[i])) {
                best[i] = other_best;
                partner[i] = other;
            }
        }
        int row = tile_a + in_a + i * TILE_A / 2;
        if (in_b == 0 && row < count_a) {
            m.best[i64(image) * count_a + row] = best[i];
            m.partner[i64(image) * count_a + row] = partner[i];
        }
    }
}

KERNEL(merge_match_f32, Merge, THREADS) { match<float, false>(arguments); }
KERNEL(merge_match_f16, Merge, THREADS) { match<f16, false>(arguments); }
KERNEL(merge_match_bf16, Merge, THREADS) { match<bf16, false>(arguments); }
KERNEL(merge_match_unit, Merge, THREADS) { match<float, true>(arguments); }

// ------------------------------------------------------------------------------------------------------------- reduce

// A block's view of how its image is grouped.
struct Grouping {
    // Behind `select`, for l < r: the position among A (low half) and the partner (high half) of the l-th leaving
    // token.
    u64* edges;
    // Bits of the A tokens that stay, 32 to a word, and how many stay before each word.
    u32* stays;
    u32* before;
    int words;

    METHOD static int position(u64 edge) { return int(u32(edge)); }
    METHOD static int partner(u64 edge) { return int(edge >> 32); }
};

// Every block of an image selects anew: cheaper than waiting for one that does. Same input, same order, same result.
DEVICE Grouping select(const Merge& m, int image) {
    int count = m.count_a();
    int padded = 1;
    while (padded < count) {
        padded *= 2;
    }
    u32* region = m.order ? m.order + i64(blockIdx.x) * m.region : reinterpret_cast<u32*>(shared_memory());
    Grouping g;
    g.edges = reinterpret_cast<u64*>(region);
    g.words = (count + WARP - 1) / WARP;
    g.stays = region + 2 * padded;
    g.before = g.stays + g.words;
    const u32* best = m.best + i64(image) * count;
    const u32* partner = m.partner + i64(image) * count;

    for (int i = threadIdx.x; i < padded; i += THREADS) {
        g.edges[i] = i < count ? ranked(best[i], i) : 0;
    }
    __syncthreads();
    sort_falling<THREADS>(g.edges, padded);

    u64 weakest = m.r ? g.edges[m.r - 1] : 0;
    for (int word = warp_id(); word < g.words; word += WARPS) {
        int i = word * WARP + lane_id();
        u32 bits = __ballot_sync(ALL, i < count && (!m.r || ranked(best[i], i) < weakest));
        if (lane_id() == 0) {
            g.stays[word] = bits;
        }
    }
    __syncthreads();

    if (warp_id() == 0) {
        int total = 0;
        for (int first = 0; first < g.words; first += WARP) {
            int word = first + lane_id();
            int own = word < g.words ? __popc(g.stays[word]) : 0, up_to = own;
#pragma unroll
            for (int distance = 1; distance < WARP; distance *= 2) {
                int other = __shfl_up_sync(ALL, up_to, distance);
                up_to += lane_id() >= distance ? other : 0;
            }
            if (word < g.words) {
                g.before[word] = total + up_to - own;
            }
            total += __shfl_sync(ALL, up_to, WARP - 1);
        }
    }
    for (int i = threadIdx.x; i < padded; i += THREADS) {
        int position = ranked_position(g.edges[i]);
        g.edges[i] = i < count ? u64(partner[position]) << 32 | u32(position) : 0;
    }
    __syncthreads();
    return g;
}

// The `k`-th A token that stays, in order of position. All lanes of a warp ask for the same.
DEVICE int staying(const Grouping& g, int k) {
    int low = 0, high = g.words - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (int(g.before[middle]) <= k) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    u32 bits = g.stays[low], lower = bits & ((1u << lane_id()) - 1);
    bool mine = (bits >> lane_id() & 1) && int(g.before[low]) + __popc(lower) == k;
    return low * WARP + __ffs(__ballot_sync(ALL, mine)) - 1;
}

// y of one slot that tokens join: the mean of its tokens by size. Joined tokens are summed in the order they leave.
template <class T, int WIDTH, class Joins>
DEVICE void merge_rows(const Merge& m, T* to, const T* x, const float* size, int token, float total, const Grouping& g,
                       Joins joins) {
    constexpr int PIECES = 2; // of WIDTH channels for each lane, in registers at once
    int first_a = m.first_a();
#pragma unroll 1
    for (int start = 0; start < m.channels; start += WARP * WIDTH * PIECES) {
        float sum[PIECES][WIDTH] = {};
        auto add = [&](int from, float share) {
            const T* row = x + i64(from) * m.channels;
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) {
                int channel = start + (piece * WARP + lane_id()) * WIDTH;
                if (channel < m.channels) {
                    float value[WIDTH];
                    load<WIDTH>(value, row + channel);
#pragma unroll
                    for (int i = 0; i < WIDTH; i++) {
                        sum[piece][i] = fmaf(share, value[i], sum[piece][i]);
                    }
                }
            }
        };
        each_entry(m.r, joins, [&](int l) {
            int from = first_a + 2 * Grouping::position(g.edges[l]);
            add(from, size[from] / total);
        });
        add(token, size[token] / total);
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
            int channel = start + (piece * WARP + lane_id()) * WIDTH;
            if (channel < m.channels) {
                store<WIDTH>(to + channel, sum[piece]);
            }
        }
    }
}

// A warp for each slot: where it comes from, how large it is, and its row.
template <class T, int WIDTH> DEVICE void write_slots(const Merge& m, const Grouping& g, int image, int part) {
    int slots = m.tokens - m.r, stay = m.count_a() - m.r, count_b = m.count_b();
    const T* x = static_cast<const T*>(m.x) + i64(image) * m.tokens * m.channels;
    const float* size = m.size + i64(image) * m.tokens;
#pragma unroll 1
    for (int slot = part * WARPS + warp_id(); slot < slots; slot += m.parts * WARPS) {
        int receiver = -1, token;
        if (slot < m.protect) {
            token = slot;
        } else if (slot < m.protect + stay) {
            int k = slot - m.protect;
            token = m.first_a() + 2 * (m.protect ? staying(g, k) : Grouping::position(g.edges[m.r + k]));
        } else if (slot < m.protect + stay + count_b) {
            receiver = slot - m.protect - stay;
            token = m.first_b() + 2 * receiver;
        } else {
            token = slot + m.r;
        }

        auto joins = [&](int l) { return Grouping::partner(g.edges[l]) == receiver; };
        bool joined = false;
        float added = 0;
        if (receiver >= 0) {
            each_entry(m.r, joins, [&](int l) {
                joined = true;
                added += size[m.first_a() + 2 * Grouping::position(g.edges[l])];
            });
        }
        float total = size[token] + added;
        i64 at = i64(image) * slots + slot;
        if (lane_id() == 0) {
            m.anchor[at] = token;
            m.size_out[at] = total;
        }
        T* to = static_cast<T*>(m.y) + at * m.channels;
        if (joined) {
            merge_rows<T, WIDTH>(m, to, x, size, token, total, g, joins);
        } else {
            using Piece = Moved<T, WIDTH>;
            const T* from = x + i64(token) * m.channels;
            for (int channel = lane_id() * WIDTH; channel < m.channels; channel += WARP * WIDTH) {
                *reinterpret_cast<Piece*>(to + channel) = *reinterpret_cast<const Piece*>(from + channel);
            }
        }
    }
}

template <class T> DEVICE void reduce(const Merge& m) {
    int image = blockIdx.x / m.parts, part = blockIdx.x % m.parts;
    Grouping g = select(m, image);
    int before_b = m.protect + m.count_a() - m.r;
    for (int l = part * THREADS + threadIdx.x; l < m.r; l += m.parts * THREADS) {
        m.leaving[i64(image) * m.r + l] = m.first_a() + 2 * Grouping::position(g.edges[l]);
        m.into[i64(image) * m.r + l] = before_b + Grouping::partner(g.edges[l]);
    }
    if (m.wide) {
        write_slots<T, WIDE<T>>(m, g, image, part);
    } else {
        write_slots<T, 1>(m, g, image, part);
    }
}

KERNEL(merge_reduce_f32, Merge, THREADS) { reduce<float>(arguments); }
KERNEL(merge_reduce_f16, Merge, THREADS) { reduce<f16>(arguments); }
KERNEL(merge_reduce_bf16, Merge, THREADS) { reduce<bf16>(arguments); }
