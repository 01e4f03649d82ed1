// ConnectionMask: a warp for each row of the mask. mod.rs says what the operator means, cuda.rs what is launched.
#include "common.cuh"

// As `MaskArguments` in cuda.rs.
struct Mask {
    const void* weights;
    const i64* anchor;
    float* mask;
    i64 rows; // of the masks of all images
    int heads, tokens, slots;
    int protect, free; // slots at the front that keep all connections, and those behind them that do not
    int kept;          // connections in a row of the latter; not zero unless `free` is
};

constexpr int THREADS = 256;

template <class T> DEVICE void mask_of(const Mask& p) {
    i64 row = i64(blockIdx.x) * (THREADS / WARP) + warp_id();
    if (row >= p.rows) {
        return;
    }
    i64 image = row / p.slots;
    int slot = int(row % p.slots) - p.protect;
    bool is_free = slot >= 0 && slot < p.free && p.kept < p.free;
    float* mask = p.mask + row * p.slots;
    for (int column = lane_id(); column < p.slots; column += WARP) {
        if (!is_free || column < p.protect || column >= p.protect + p.free) {
            mask[column] = 1;
        }
    }
    if (!is_free) {
        return;
    }

    // Strengths stand where the mask will: each lane comes back to its own columns alone.
    const i64* anchor = p.anchor + image * p.slots + p.protect;
    float* strength = mask + p.protect;
    auto is_token = [&](i64 token) { return token >= 0 && token < p.tokens; };
    bool is_row = is_token(anchor[slot]);
    i64 from = is_row ? anchor[slot] : 0;
    i64 head_entries = i64(p.tokens) * p.tokens;
    const T* weights = static_cast<const T*>(p.weights) + image * p.heads * head_entries + from * p.tokens;
#pragma unroll 1
    for (int column = lane_id(); column < p.free; column += WARP) {
        i64 to = anchor[column];
        float sum = 0;
        if (is_row && is_token(to)) {
#pragma unroll 4
            for (int head = 0; head < p.heads; head++) {
                sum += to_float(weights[head * head_entries + to]);
            }
        }
        float mean = sum / p.heads;
        strength[column] = mean != mean ? infinite() : mean;
    }

    // The strength of the weakest that stays, bit by bit from the highest: the largest number that enough reach.
    u32 weakest = 0;
#pragma unroll 1
    for (u32 bit = 1u << 31; bit; bit >>= 1) {
        int reached = 0;
#pragma unroll 1
        for (int first = 0; first < p.free; first += WARP) {
            int column = first + lane_id();
            bool reaches = column < p.free && sortable(strength[column]) >= (weakest | bit);
            reached += __popc(__ballot_sync(ALL, reaches));
        }
        weakest |= reached >= p.kept ? bit : 0;
    }
    for (int column = lane_id(); column < p.free; column += WARP) {
        strength[column] = sortable(strength[column]) >= weakest;
    }
}

KERNEL(connection_mask_f32, Mask, THREADS) { mask_of<float>(arguments); }
KERNEL(connection_mask_f16, Mask, THREADS) { mask_of<f16>(arguments); }
KERNEL(connection_mask_bf16, Mask, THREADS) { mask_of<bf16>(arguments); }
