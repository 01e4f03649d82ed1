// TokenPrune in one launch. mod.rs says what the operator means, cuda.rs what is launched.
#include "common.cuh"

// As `PruneArguments` in cuda.rs.
struct Prune {
    const void* x;
    const float* score;
    const float* size;
    void* y;
    float* size_out;
    i64* anchor;
    i64* assign;
    u64* order; // a region of `padded` entries for each block, or null: shared memory
    int tokens, channels, keep, protect, suffix;
    int fuses;  // 1 if there is a slot of what is dropped, else 0
    int padded; // candidates, up to a power of two
    int parts;  // blocks for each image
    int wide;   // rows of x and y can be moved in pieces of 16 bytes

    METHOD int candidates() const { return tokens - protect - suffix; }
    METHOD int kept_end() const { return protect + keep; }
    METHOD int slots() const { return kept_end() + fuses + suffix; }
};

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int BATCH = 4; // tokens of a sum that are under way at once

DEVICE u64 rank_of(const Prune& p, const float* score, int candidate) {
    float own = score[p.protect + candidate];
    return ranked(sortable(own != own ? infinite() : own), candidate);
}

// WIDTH channels for each lane of the slot of what is dropped: summed in order of position.
template <class T, int WIDTH, class Dropped>
DEVICE void fuse(const Prune& p, T* to, const T* x, const float* score, int channel, Dropped dropped) {
    bool mine = channel < p.channels;
    float sum[WIDTH] = {};
#pragma unroll 1
    for (int first = 0; first < p.candidates(); first += WARP) {
        int own = first + lane_id();
        u32 found = __ballot_sync(ALL, own < p.candidates() && dropped(own));
#pragma unroll 1
        while (found) {
            float value[BATCH][WIDTH], weight[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                int token = found ? p.protect + first + __ffs(found) - 1 : -1;
                found &= found - 1;
                weight[i] = token < 0 ? 0 : score[token];
                if (token >= 0 && mine) {
                    load<WIDTH>(value[i], x + i64(token) * p.channels + channel);
                } else {
#pragma unroll
                    for (int j = 0; j < WIDTH; j++) {
                        value[i][j] = 0;
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
#pragma unroll
                for (int j = 0; j < WIDTH; j++) {
                    sum[j] = fmaf(weight[i], value[i][j], sum[j]);
                }
            }
        }
    }
    if (mine) {
        store<WIDTH>(to + channel, sum);
    }
}

// Every block of an image selects anew: cheaper than waiting for one that does. Same input, same order, same result.
// Then a warp for each slot; for that of what is dropped, one for each piece of channels, and these first.
template <class T, int WIDTH> DEVICE void prune(const Prune& p) {
    int image = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
    const T* x = static_cast<const T*>(p.x) + i64(image) * p.tokens * p.channels;
    const float* score = p.score + i64(image) * p.tokens;
    const float* size = p.size + i64(image) * p.tokens;
    T* y = static_cast<T*>(p.y) + i64(image) * p.slots() * p.channels;
    float* size_out = p.size_out + i64(image) * p.slots();
    i64* anchor = p.anchor + i64(image) * p.slots();
    i64* assign = p.assign + i64(image) * p.tokens;

    u64* order = p.order ? p.order + i64(blockIdx.x) * p.padded : reinterpret_cast<u64*>(shared_memory());
    for (int i = threadIdx.x; i < p.padded; i += THREADS) {
        order[i] = i < p.candidates() ? rank_of(p, score, i) : 0;
    }
    __syncthreads();
    sort_falling<THREADS>(order, p.padded);
    u64 weakest = p.keep ? order[p.keep - 1] : ~u64(0);
    auto dropped = [&](int candidate) { return !p.keep || rank_of(p, score, candidate) < weakest; };

    for (int i = part * THREADS + threadIdx.x; i < p.candidates(); i += p.parts * THREADS) {
        if (dropped(i)) {
            assign[p.protect + i] = p.fuses ? p.kept_end() : -1;
        }
    }
    int pieces = p.fuses ? max(1, (p.channels + WARP * WIDTH - 1) / (WARP * WIDTH)) : 0;
    int units = pieces + p.slots() - p.fuses;
#pragma unroll 1
    for (int unit = part * WARPS + warp_id(); unit < units; unit += p.parts * WARPS) {
        if (unit < pieces) {
            int slot = p.kept_end();
            if (unit == 0 && lane_id() == 0) {
                anchor[slot] = -1;
                size_out[slot] = 1;
            }
            int channel = (unit * WARP + lane_id()) * WIDTH;
            fuse<T, WIDTH>(p, y + i64(slot) * p.channels, x, score, channel, dropped);
            continue;
        }
        int kept = unit - pieces, slot, token;
        if (kept < p.protect) {
            slot = token = kept;
        } else if (kept < p.kept_end()) {
            slot = kept;
            token = p.protect + ranked_position(order[kept - p.protect]);
        } else {
            slot = kept + p.fuses;
            token = kept + p.candidates() - p.keep;
        }
        if (lane_id() == 0) {
            anchor[slot] = token;
            size_out[slot] = size[token];
            assign[token] = slot;
        }
        using Piece = Moved<T, WIDTH>;
        const T* from = x + i64(token) * p.channels;
        T* to = y + i64(slot) * p.channels;
        for (int channel = lane_id() * WIDTH; channel < p.channels; channel += WARP * WIDTH) {
            *reinterpret_cast<Piece*>(to + channel) = *reinterpret_cast<const Piece*>(from + channel);
        }
    }
}

template <class T> DEVICE void prune_of(const Prune& p) {
    if (p.wide) {
        prune<T, WIDE<T>>(p);
    } else {
        prune<T, 1>(p);
    }
}

KERNEL(token_prune_f32, Prune, THREADS) { prune_of<float>(arguments); }
KERNEL(token_prune_f16, Prune, THREADS) { prune_of<f16>(arguments); }
KERNEL(token_prune_bf16, Prune, THREADS) { prune_of<bf16>(arguments); }
