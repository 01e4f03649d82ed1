// TokenSize: ones. mod.rs says what the operator means, cuda.rs what is launched.
#include "common.cuh"

// As `SizeArguments` in cuda.rs.
struct Size {
    float* size;
    i64 count;
};

constexpr int THREADS = 256;

KERNEL(token_size, Size, THREADS) {
    i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (i < arguments.count) {
        arguments.size[i] = 1;
    }
}
