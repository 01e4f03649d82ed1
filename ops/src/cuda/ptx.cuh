// What needs an instruction of its own, each behind a function, for NVRTC without any header of the CUDA toolkit.
//
// Host tests put functions of the same names in place of this file (ops/tests/cuda_on_host/shim.hpp), so that all other
// source is the same in both. Which lane holds which element of a matrix is said in the PTX ISA, "Warp-level matrix
// instructions"; shim.hpp spells it out.
#pragma once

#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__
#define ARCH __CUDA_ARCH__

// A kernel with one argument, the structure `arguments`, in blocks of `threads`.
#define KERNEL(name, Arguments, threads)                                                                               \
    extern "C" __global__ void __launch_bounds__(threads) name(const Arguments arguments)

// The block's dynamic shared memory.
DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

DEVICE float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
DEVICE unsigned float_to_bits(float value) { return __float_as_uint(value); }

DEVICE float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// The nearest, ties to even.
DEVICE unsigned short float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// 2 to the power of `value`, within 2 units of the last place; denormal results are zero.
DEVICE float exp2_fast(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// Where something in shared memory lies, as instructions of that memory have it; sums count bytes.
using SharedAddress = unsigned;

DEVICE SharedAddress shared_address(const void* pointer) {
    SharedAddress address;
    asm("{ .reg .u64 at; cvta.to.shared.u64 at, %1; cvt.u32.u64 %0, at; }" : "=r"(address) : "l"(pointer));
    return address;
}

// Four 8 × 8 matrices of 16-bit elements from shared memory: lanes 8 i to 8 i + 7 say where the rows of matrix i are.
DEVICE void load_matrices(unsigned (&to)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

// The same, each matrix transposed.
DEVICE void load_matrices_transposed(unsigned (&to)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

// sum += a b, with a 16 × 8 and b 8 × 8 of float16.
DEVICE void multiply_f16_k8(float (&sum)[4], unsigned a0, unsigned a1, unsigned b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a0), "r"(a1), "r"(b));
}

#if ARCH >= 800

// Two bfloat16, each the nearest, ties to even; `low` in the low half.
DEVICE unsigned floats_to_bfloats(float low, float high) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// sum += a b, with a 16 × 16 and b 16 × 8 of float16.
DEVICE void multiply_f16_k16(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum += a b, with a 16 × 16 and b 16 × 8 of bfloat16.
DEVICE void multiply_bf16_k16(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum += a b, with a 16 × 8 and b 8 × 8 of float32 whose lowest 13 bits are not read.
DEVICE void multiply_tf32_k8(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Starts to copy 16 bytes from global to shared memory, or to put zeros there.
DEVICE void copy_async(void* to, const void* from, bool zeros) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(zeros ? 0 : 16)
                 : "memory");
}

// Ends a group of copies.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the `LATEST` last groups of this thread are under way.
template <int LATEST> DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LATEST) : "memory");
}

#endif
